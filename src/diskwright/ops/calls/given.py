"""The disk, as callers give it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..gates import Policy, Source, gate_of, kept, name_of, reference_of
from ..images import ImageSpec, OpenFailed

Keys = Mapping[str, bytes | str] | None


def spec_of(
    source: Source,
    format: str | None = None,
    policy: str | Policy | None = None,
    secrets: Keys = None,
    *,
    force_share: bool = False,
    cache: str = "writeback",
) -> ImageSpec:
    """The description of a disk that the operations take."""
    reference, gate = reference_of(source), gate_of(policy)
    return ImageSpec(name_of(source), reference, format, cache, force_share, gate, kept(secrets))


@contextmanager
def plain_errors() -> Iterator[None]:
    """The own error of what could not be opened."""
    try:
        yield
    except OpenFailed as error:
        raise error.cause from None
