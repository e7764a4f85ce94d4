"""Sparse extents: the hosted kind, ``KDMV``, and that of ESX 2 to 5, ``COWD``."""
