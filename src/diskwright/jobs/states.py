"""The states of a job, and what may be asked of it in each: the tables of QEMU's documentation.

    created -> running <-> paused, running -> ready <-> standby,
    running | ready -> waiting -> pending -> concluded -> null,
    and from each that is not at its end: aborting -> concluded.
"""

from __future__ import annotations

from typing import Final, Literal

Status = Literal[
    "undefined", "created", "running", "paused", "ready", "standby", "waiting", "pending",
    "aborting", "concluded", "null",
]  # fmt: skip

NEXT: Final[dict[Status, tuple[Status, ...]]] = {
    "undefined": ("created",),
    "created": ("running", "aborting", "null"),
    "running": ("paused", "ready", "waiting", "aborting"),
    "paused": ("running",),
    "ready": ("standby", "waiting", "aborting"),
    "standby": ("ready",),
    "waiting": ("pending", "aborting"),
    "pending": ("aborting", "concluded"),
    "aborting": ("concluded",),
    "concluded": ("null",),
    "null": (),
}
"""What may follow each state."""

_MOVING: tuple[Status, ...] = ("created", "running", "paused", "ready", "standby")
VERBS: Final[dict[str, tuple[Status, ...]]] = {
    "cancel": (*_MOVING, "waiting", "pending"),
    "pause": _MOVING,
    "resume": _MOVING,
    "set-speed": _MOVING,
    "complete": ("ready", "standby"),
    "finalize": ("pending",),
    "dismiss": ("concluded",),
}
"""The states in which each verb is accepted."""
