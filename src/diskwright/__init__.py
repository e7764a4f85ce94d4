"""diskwright: a complete, live, safe block layer for virtual-machine disks.

The names below come from :mod:`diskwright.api` when they are first used, so that importing the
package costs nothing.  The asyncio API is :mod:`diskwright.aio`, the errors are
:mod:`diskwright.errors`.
"""

from __future__ import annotations

from .hints import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import aio, errors
    from .api import (
        Budget,
        Disk,
        Inspector,
        Policy,
        Progress,
        amend,
        check,
        commit,
        compare,
        convert,
        create,
        digest,
        info,
        info_chain,
        inspect,
        limited,
        map,
        measure,
        open,
        overlay,
        picture,
        plan_repair,
        rebase,
        salvage,
        undo,
    )

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Disk",
    "Inspector",
    "Policy",
    "Progress",
    "open",
    "create",
    "info",
    "info_chain",
    "check",
    "plan_repair",
    "undo",
    "salvage",
    "convert",
    "compare",
    "commit",
    "rebase",
    "amend",
    "digest",
    "inspect",
    "overlay",
    "measure",
    "map",
    "picture",
    "limited",
    "aio",
    "errors",
]


def __getattr__(name: str) -> Any:
    if name in ("aio", "errors"):
        from importlib import import_module

        return import_module(f"{__name__}.{name}")
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
