"""What the base model says of the training rows: features that clusterers other than text use."""
