"""diskwright: a complete, live, safe block layer for virtual-machine disks."""

__version__ = "0.1.0"
