"""What an inspection found."""

from __future__ import annotations

from ...abilities import Reference
from ...hints import Any
from ...records import NamedTuple

VERDICTS = ("self-contained", "refers", "ambiguous", "damaged", "unknown", "raw")
"""In the words of docs/inspect.md, which also says which one wins where several fit."""
IMAGE, CONTENT = "image", "content"


class Match(NamedTuple):
    """A signature that was found: ``name`` is that of an image format, or (``kind`` ``content``) of
    what a disk has at its beginning.  ``offset`` in bytes, counted from the end if negative."""

    name: str
    kind: str
    offset: int
    detail: str = ""


class Violation(NamedTuple):
    """Something that breaks the specification of ``format``, where known with the field's name and
    its offset in the file."""

    format: str
    detail: str
    field: str = ""
    offset: int | None = None


class Inspection(NamedTuple):
    """What is known of a file.  ``length`` and ``virtual_size`` are bytes; ``virtual_size`` is None
    where no format tells it, or several do.

    ``format`` is None where several match.  ``not_seen``: ranges (offset, length) of a stream that
    had gone by before it was known that they matter.  ``not_known``: what kept the image from being
    judged as a whole.
    """

    filename: str
    length: int
    format: str | None
    virtual_size: int | None
    verdict: str
    matches: tuple[Match, ...]
    references: tuple[Reference, ...]
    features: dict[str, Any]
    violations: tuple[Violation, ...]
    not_known: tuple[str, ...]
    not_seen: tuple[tuple[int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """The same with the keys of ``diskwright inspect --json``, all of them always there."""
        return {
            "filename": self.filename,
            "length": self.length,
            "format": self.format,
            "virtual-size": self.virtual_size,
            "verdict": self.verdict,
            "matches": [match._asdict() for match in self.matches],
            "references": [reference._asdict() for reference in self.references],
            "features": self.features,
            "violations": [violation._asdict() for violation in self.violations],
            "not-known": list(self.not_known),
            "not-seen": [{"offset": offset, "length": n} for offset, n in self.not_seen],
        }


class Facts:
    """What one format says of a file."""

    def __init__(self, format: str) -> None:
        self.format = format
        self.size: int | None = None
        self.references: list[Reference] = []
        self.features: dict[str, Any] = {}
        self.violations: list[Violation] = []
        self.unknown: list[str] = []
        self.unseen: list[tuple[int, int]] = []

    def refer(self, role: str, name: str, format: str | None = None) -> None:
        """Add a reference, unless it is known."""
        found = Reference(role, name, format)
        if found not in self.references:
            self.references.append(found)

    def violate(self, detail: str, field: str = "", offset: int | None = None) -> None:
        """Add a violation, unless it is known."""
        found = Violation(self.format, detail, field, offset)
        if found not in self.violations:
            self.violations.append(found)
