"""Persistent dirty bitmaps: their directory, loading, storing, checking and mending them."""
