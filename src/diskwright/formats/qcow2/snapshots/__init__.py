"""Internal snapshots: their table, taking and applying and deleting them, VM state."""
