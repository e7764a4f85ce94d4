"""Long work on disks that somebody watches, stops for a while, and ends: its states and verbs."""
