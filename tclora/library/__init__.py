"""The product of a run: a directory that holds adapters, factors, merges and figures."""
