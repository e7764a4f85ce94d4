"""A qcow2 image with all of its parts: what is open for writing."""

from __future__ import annotations

from .image import Image
from .machine.encryptedplanning import EncryptedPlanner


class Qcow2(Image, EncryptedPlanner):
    """One open qcow2 image that can be written to."""

    def written(self) -> Qcow2:
        """The image itself, which can be changed."""
        return self
