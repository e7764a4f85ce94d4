"""What people and scripts use to talk to a monitor: the shell of ``qmp``, the table of ``top``."""
