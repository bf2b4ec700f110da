"""The commands and their options, by group; each imports what it uses when it is called."""
