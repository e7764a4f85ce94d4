"""The control plane: QMP commands and events, each declared once."""

from __future__ import annotations


def all_commands() -> None:
    """Import every module that declares commands."""
    from . import (  # noqa: F401
        amend,
        basics,
        bitmaps,
        blockstats,
        create,
        exports,
        jobs,
        nbdserver,
        nodes,
        objects,
        overlays,
        query,
        reopening,
        snapshots,
        thresholds,
        transactions,
        waiting,
    )
