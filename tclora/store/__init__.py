"""Files by their digests on any fsspec URL, and a verified cache of them on this machine."""
