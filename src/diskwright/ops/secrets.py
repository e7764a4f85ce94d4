"""The secrets of a call: objects as they are typed, with the files that they name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..secrets import Secrets


def secrets_of(definitions: Iterable[str | Mapping[str, Any]]) -> Secrets:
    """The secrets that object definitions (``secret,id=...``) make, in their order.

    Raises UsageError.  See :meth:`diskwright.secrets.Secrets.define`.
    """
    from ..secrets import Secrets

    found = Secrets()
    for definition in definitions:
        found.define(definition, read_file)
    return found


def read_file(path: str) -> bytes:
    """A file that an object names, whole.  Raises OSError."""
    with open(path, "rb") as file:
        return file.read()
