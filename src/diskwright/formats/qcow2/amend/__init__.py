"""Changing creation options of an image in place."""
