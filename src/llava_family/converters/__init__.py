"""Converts the originals' checkpoints: the three families' own knowledge on top of `llava_family.conversion`."""
