"""The base model: where it is, its tokens, its loss, adapters attached to it."""
