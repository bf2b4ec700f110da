"""The version of the package, and nothing that would have to be imported to read it."""

__version__ = "0.2.0"
