"""The judgement on a file, and the same for one that goes by in pieces."""

from __future__ import annotations

from collections.abc import Iterable

from ...engine.budget import Budget
from ...graph import registry
from ...graph.probe import PROBE_BYTES, matches
from . import contents, driven, others
from .result import IMAGE, Facts, Inspection, Match
from .window import HEAD, StreamWindow, View

_MOST_ROUNDS = 16
"""How often it is looked anew for what a stream has yet to bring."""


class Inspector:
    """Inspects what is fed to it: an upload, while it goes by.

    >>> inspector = Inspector()
    >>> for chunk in chunks:
    ...     inspector.feed(chunk)
    >>> inspector.finish().verdict

    It keeps at most 4 MiB of the beginning, 2 MiB of the end, and 64 MiB of tables that an image's
    header says will come.  A table that went by before anything told of it is "not seen".
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self._window = StreamWindow()
        self._budget = budget or Budget()
        self._next = HEAD
        self._rounds = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes, in pieces of any length.  Raises OverBudget."""
        view = memoryview(data).cast("B")
        while len(view):
            part = view[: max(self._next - self._window.position, 1)] if self._next else view
            self._window.feed(part)
            view = view[len(part) :]
            if self._next and self._window.position >= self._next:
                self._look_ahead()

    def finish(self, filename: str = "-") -> Inspection:
        """There is no more: what it was."""
        self._window.end()
        return judge(self._window, filename, self._budget)

    def _look_ahead(self) -> None:
        """Ask what else an image will want, and keep that when it comes."""
        self._next = 0
        self._rounds += 1
        if self._rounds > _MOST_ROUNDS:
            return
        for facts in _examined(self._window, _names(self._window), self._budget):
            for offset, length in facts.unseen:
                if self._window.keep(offset, length):
                    self._next = max(self._next, offset + length)


def judge(view: View, filename: str, budget: Budget) -> Inspection:
    """What the bytes of ``view`` are.  Raises OverBudget."""
    head, tail = _end(view, 0), _end(view, view.length - contents.LOOKED_AT)
    names = matches(head[:PROBE_BYTES], tail[-PROBE_BYTES:])
    inside = list(contents.contents(head, tail, view.length))
    found = _examined(view, names, budget)
    facts = found[0] if len(found) == 1 else Facts("raw")
    if not found:
        facts.size = view.length
    details = {one.format: str(one.features.get("subformat", "")) for one in found}
    images = [
        Match(name, IMAGE, 0 if in_head else -PROBE_BYTES, details[name])
        for name, in_head in names.items()
    ]
    # What a fixed VHD or a DMG has at its beginning is the disk itself.
    twofold = any(names.values()) and any(match.offset >= 0 for match in inside)
    references = tuple(reference for one in found for reference in one.references)
    violations = tuple(violation for one in found for violation in one.violations)
    unknown = tuple(text for one in found for text in one.unknown)
    unseen = tuple(part for one in found for part in one.unseen)
    if len(found) > 1 or twofold:
        verdict = "ambiguous"
    elif violations:
        verdict = "damaged"
    elif references:
        verdict = "refers"
    elif unknown or unseen:
        verdict = "unknown"
    else:
        verdict = "self-contained" if found else "raw"
    return Inspection(
        filename=filename,
        length=view.length,
        format=None if len(found) > 1 else facts.format,
        virtual_size=facts.size,
        verdict=verdict,
        matches=(*images, *inside),
        references=references,
        features=facts.features,
        violations=violations,
        not_known=unknown,
        not_seen=unseen,
    )


def _names(view: StreamWindow) -> list[str]:
    return [name for name, in_head in matches(bytes(view.head[:PROBE_BYTES])).items() if in_head]


def _examined(view: View, names: Iterable[str], budget: Budget) -> list[Facts]:
    """What each of the formats ``names`` says."""
    counted = _Counted(view, budget)
    return [_examine(name, counted) for name in names]


def _examine(name: str, view: View) -> Facts:
    second = name == "luks" and view.read(6, 2) == b"\0\2"
    if name in registry.BUILTIN and not second:
        return driven.examine(name, view)
    return others.examine(name, view)


def _end(view: View, offset: int) -> bytes:
    """The bytes that are looked at for signatures, from ``offset``."""
    return view.read(max(offset, 0), contents.LOOKED_AT)


class _Counted:
    """A view that costs."""

    def __init__(self, view: View, budget: Budget) -> None:
        self.length = view.length
        self._view = view
        self._budget = budget

    def read(self, offset: int, length: int) -> bytes:
        offset = max(offset, 0)  # a file that is shorter than what should be at its end
        self._budget.read(min(length, max(self.length - offset, 0)))
        return self._view.read(offset, length)
