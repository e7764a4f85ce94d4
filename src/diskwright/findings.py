"""What a check, or a salvage, of an image found."""

from __future__ import annotations

from .hints import Any
from .records import NamedTuple

_MOST_FINDINGS = 10_000
_KEYS = (
    "image-end-offset", "compressed-clusters", "total-clusters", "corruptions",
    "corruptions-fixed", "check-errors", "leaks", "leaks-fixed", "allocated-clusters", "filename",
    "format", "fragmented-clusters",
)  # fmt: skip
LOST, GUESSED = "lost", "guessed"


class Note(NamedTuple):
    """``length`` bytes of the disk from ``start`` are ``state``: ``lost`` (nothing tells them) or
    ``guessed`` (they are what they most likely were)."""

    start: int
    length: int
    state: str
    why: str


class CheckResult:
    """What a check has found so far.  Counts are in the format's units; ``image_end_offset`` is in
    bytes.

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

    def say(self, text: str) -> None:
        """Add a finding."""
        if len(self.findings) < _MOST_FINDINGS:
            self.findings.append(text)

    def corruption(self, text: str) -> None:
        """Add a finding that counts as a corruption."""
        self.corruptions += 1
        self.say(f"ERROR {text}")

    def report(self, filename: str, format: str) -> CheckReport:
        """What is told of the check of this file, which is over."""
        known = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        return CheckReport(
            filename, format, **known,
            findings=tuple(self.findings), uncovered=tuple(self.uncovered),
        )  # fmt: skip


class CheckReport(NamedTuple):
    """What a check of ``filename`` found.  Counts are in the format's units (clusters, blocks,
    grains); ``image_end_offset`` and ``bytes_read`` are bytes.

    ``findings`` are sentences, at most 10,000 of them; ``uncovered`` names what was not looked
    at, in which case space that only this refers to is not reported as leaked.
    ``leaks_fixed`` and ``corruptions_fixed`` are those of a check that repairs.
    """

    filename: str
    format: str
    check_errors: int
    corruptions: int
    leaks: int
    corruptions_fixed: int
    leaks_fixed: int
    total_clusters: int
    allocated_clusters: int
    fragmented_clusters: int
    compressed_clusters: int
    image_end_offset: int
    passes: int
    bytes_read: int
    findings: tuple[str, ...]
    uncovered: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Nothing is wrong, and all could be looked at."""
        return not (self.corruptions or self.leaks or self.check_errors)

    def to_dict(self, *, stats: bool = False) -> dict[str, Any]:
        """The keys of ``qemu-img check --output=json``, in its order (measured with 10.0); counts
        of zero are left out as there.  ``stats``: how often the tables were gone through, and the
        bytes read, too."""
        counts = self._asdict()
        out: dict[str, Any] = {}
        for key in _KEYS:
            value = counts[key.replace("-", "_")]
            if value or key in ("filename", "format", "check-errors"):
                out[key] = value
        if self.uncovered:
            out["uncovered"] = list(self.uncovered)
        if stats and self.passes:
            out |= {"passes": self.passes, "bytes-read": self.bytes_read}
        return out
