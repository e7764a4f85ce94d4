"""What a call of the Python API is given beside its options: a disk's name, its gate (policy, and
what paths of other machines mean here), and its secrets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..graph.gate import Gate

if TYPE_CHECKING:
    from ..secrets import Secrets

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Source = Path | Mapping[str, Any]
"""A path, a ``json:`` or ``proto:`` name, or a dict of options."""

VARIABLE = "DISKWRIGHT_MAP_PATH"


def reference_of(source: Source) -> str | Mapping[str, Any]:
    """A caller's path, name or dict of options as the graph takes it."""
    return source if isinstance(source, Mapping) else os.fsdecode(source)


def gate_of(
    policy: str | None = None,
    typed: Iterable[str] = (),
    map_paths: Mapping[str, str] | None = None,
) -> Gate:
    """The gate with ``policy`` (None: the environment's), which admits ``typed`` references.

    ``map_paths``: prefixes of paths that images may name, and the directories that stand for them;
    they win over those of the variable DISKWRIGHT_MAP_PATH.  Raises UsageError.
    """
    return Gate.from_environment(policy, typed, {**from_environment(), **(map_paths or {})})


def from_environment() -> dict[str, str]:
    """The mappings in DISKWRIGHT_MAP_PATH: ``FROM=TO;FROM=TO``, a semicolon in a path doubled."""
    text = os.environ.get(VARIABLE, "")
    return pairs(
        (part.replace("\0", ";") for part in text.replace(";;", "\0").split(";")), VARIABLE
    )


def pairs(words: Iterable[str], by: str) -> dict[str, str]:
    """``FROM=TO`` words as a dict; ``by`` is what a message calls them.  Raises UsageError."""
    out: dict[str, str] = {}
    for word in filter(None, words):
        prefix, equals, directory = word.partition("=")
        if not (prefix and equals and directory):
            raise UsageError(f"{by} expects FROM=TO, not '{word}'")
        out[prefix] = directory
    return out


def kept(given: Mapping[str, bytes | str] | None) -> Secrets | None:
    """What a program gave as ``secrets``; text is taken as UTF-8.  Raises UsageError."""
    if given is None:
        return None
    from ..secrets import Secrets

    return given if isinstance(given, Secrets) else Secrets(given)
