"""Extents with compressed grains (streamOptimized): reading, checking and writing them."""
