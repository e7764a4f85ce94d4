"""seSparse extents, which ESXi makes for snapshots."""
