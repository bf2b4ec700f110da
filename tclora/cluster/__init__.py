"""Prompts to vectors, and training rows to clusters."""
