"""What tests of programs that use disks need (docs/testing.md): :func:`make_image`,
:class:`RecordingFile`, :func:`crash_states`; and for drivers of others the conformance suite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .files import Crash, RecordingFile, crash_states
    from .images import make_image

__all__ = ["Crash", "RecordingFile", "crash_states", "make_image"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import files, images

    return getattr(images if name == "make_image" else files, name)
