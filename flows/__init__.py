"""Prefect flows, readable top to bottom, and the command line; no numerics, no file formats."""
