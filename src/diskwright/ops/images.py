"""How whole-image operations open their disks, and what they say when that fails."""

from __future__ import annotations

from collections.abc import Mapping

from ..engine.kernel import BaseDriver
from ..errors import DiskError, ImageError
from ..graph.closing import explain
from ..graph.gate import Gate
from ..graph.names import Reference
from ..graph.node import Node
from ..graph.opener import close_disk, open_disk
from ..graph.perms import ALL
from ..hints import Any
from ..records import NamedTuple


class OpenFailed(DiskError):
    """A disk could not be opened; ``name`` is how the caller called it, ``cause`` why."""

    def __init__(self, name: str, cause: BaseException) -> None:
        self.name = name
        self.cause = cause
        text = explain(cause)
        if isinstance(cause, ImageError) and cause.file == name:
            text = text.replace(f"{name}: ", "", 1)  # said already
        super().__init__(f"Could not open '{name}': {text}")


class ImageSpec(NamedTuple):
    """A disk as a caller describes it.

    ``name`` is what messages call it; ``reference`` the file name, ``json:`` name or options;
    ``cache`` one of the cache modes; ``gate`` decides about what the image names; ``secrets`` are
    what options such as ``key-secret`` name.
    """

    name: str
    reference: Reference
    format: str | None = None
    cache: str = "writeback"
    force_share: bool = False
    gate: Gate = Gate()
    secrets: Mapping[str, bytes] | None = None

    async def open(
        self,
        driver: BaseDriver,
        *,
        writable: bool = False,
        backing: bool = True,
        check: bool = False,
        metadata_only: bool = False,
        resize: bool = False,
        shared: frozenset[str] = ALL,
        options: Mapping[str, Any] | None = None,
        graph: Any = None,
        stage: Any = None,
    ) -> Node:
        """Open it; see :func:`diskwright.graph.opener.open_disk`.  Raises :class:`OpenFailed`."""
        try:
            return await open_disk(
                driver,
                self.reference,
                format=self.format,
                writable=writable,
                cache=self.cache,
                force_share=self.force_share,
                gate=self.gate,
                backing=backing,
                check=check,
                metadata_only=metadata_only,
                resize=resize,
                shared=shared,
                options=options,
                graph=graph,
                secrets=self.secrets,
                stage=stage,
            )
        except (OSError, DiskError) as error:
            raise OpenFailed(self.name, error) from error


async def close_all(nodes: list[Node]) -> None:
    """Close disks, the last opened first; all of them, then the first error is raised."""
    first: Exception | None = None
    for node in reversed(nodes):
        try:
            await close_disk(node)
        except Exception as error:
            first = first or error
    if first is not None:
        raise first
