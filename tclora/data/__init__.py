"""Examples: read from files, datasets or a generator, checked, split and described."""
