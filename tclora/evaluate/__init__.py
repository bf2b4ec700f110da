"""Measuring a model on examples, and what a merge keeps of what the adapters gained."""
