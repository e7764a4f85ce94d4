"""What a check, or a salvage, of an image found."""

from __future__ import annotations

from typing import Any

from .records import NamedTuple

_MOST_FINDINGS = 10_000
LOST, GUESSED = "lost", "guessed"


class Note(NamedTuple):
    """``length`` bytes of the disk from ``start`` are ``state``: ``lost`` (nothing tells them) or
    ``guessed`` (they are what they most likely were)."""

    start: int
    length: int
    state: str
    why: str


class CheckResult:
    """What a check found.  Counts are in the format's units; ``image_end_offset`` in bytes.

    ``findings`` are sentences, at most 10,000 of them; ``uncovered`` names what was not looked
    at, in which case space that only this refers to is not reported as leaked.
    ``leaks_fixed`` and ``corruptions_fixed`` are those of a check that repairs.
    """

    def __init__(self) -> None:
        self.check_errors = 0
        self.corruptions = 0
        self.leaks = 0
        self.corruptions_fixed = 0
        self.leaks_fixed = 0
        self.total_clusters = 0
        self.allocated_clusters = 0
        self.fragmented_clusters = 0
        self.compressed_clusters = 0
        self.image_end_offset = 0
        self.passes = 0
        """How often the tables were gone through, where a check counts that."""
        self.bytes_read = 0
        """Bytes of tables that were read, in all passes."""
        self.findings: list[str] = []
        self.uncovered: list[str] = []

    @property
    def ok(self) -> bool:
        """Nothing is wrong, and all could be looked at."""
        return not (self.corruptions or self.leaks or self.check_errors)

    def say(self, text: str) -> None:
        """Add a finding."""
        if len(self.findings) < _MOST_FINDINGS:
            self.findings.append(text)

    def corruption(self, text: str) -> None:
        """Add a finding that counts as a corruption."""
        self.corruptions += 1
        self.say(f"ERROR {text}")

    def to_dict(self) -> dict[str, Any]:
        """The keys of ``qemu-img check --output=json``; counts of zero are left out as there."""
        out: dict[str, Any] = {
            "image-end-offset": self.image_end_offset,
            "total-clusters": self.total_clusters,
            "check-errors": self.check_errors,
        }
        for key in (
            "corruptions",
            "leaks",
            "corruptions-fixed",
            "leaks-fixed",
            "allocated-clusters",
            "fragmented-clusters",
            "compressed-clusters",
        ):
            value = getattr(self, key.replace("-", "_"))
            if value:
                out[key] = value
        if self.uncovered:
            out["uncovered"] = list(self.uncovered)
        return out
