"""Images for tests, made in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from .. import api


def make_image(
    folder: Path,
    name: str | None = None,
    *,
    format: str = "qcow2",
    size: int | None = None,
    content: bytes | Mapping[int, bytes] = b"",
    options: Mapping[str, Any] | None = None,
    backing: os.PathLike[str] | None = None,
    secrets: Mapping[str, bytes | str] | None = None,
) -> Path:
    """Make an image in ``folder`` and return its path.

    ``size`` is in bytes (None: that of ``backing``, or 1 MiB); ``content`` are the bytes from the
    disk's start, or by their offsets; ``options`` are creation options, whose ``secrets`` it is
    opened with.  Without a ``name`` it gets one that is free.
    """
    names = (f"disk{number}.{format}" for number in count())
    path = folder / (name or next(free for free in names if not (folder / free).exists()))
    if backing is None:
        size = 1 << 20 if size is None else size
        api.create(path, format=format, size=size, options=options, secrets=secrets)
    else:
        api.overlay(
            backing, path, target_format=format, size=size, options=options, policy="trusted",
            secrets=secrets,
        )  # fmt: skip
    parts = content if isinstance(content, Mapping) else {0: content}
    keys = {key: value for key, value in (options or {}).items() if key.endswith("key-secret")}
    with api.open(
        path, format=format, writable=True, policy="trusted", options=keys, secrets=secrets
    ) as disk:
        for offset, data in parts.items():
            disk.write_at(offset, data)
    return path
