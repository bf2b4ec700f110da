"""Choices made by the base model's loss on a few rows: scale, component weights, CP rank."""
