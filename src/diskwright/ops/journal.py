"""The journal of a conversion that can be resumed, as docs/resume.md has it: lines in a file.

A line is the CRC-32 of the rest as eight hexadecimal digits, a space, and an object of JSON.
What follows a line that is not whole was not written to its end, and does not count.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from typing import Any

from ..engine.kernel import BaseDriver
from ..errors import ImageError, UnsupportedFeature, UsageError
from ..protocols.filenode import FileNode
from ..records import NamedTuple
from .create import JOURNAL

VERSION = 1
_KIND = "diskwright convert"
_BEGINNING = b' {"journal":"' + _KIND.encode()
_MOST_BYTES = 64 << 20


class Covered(NamedTuple):
    """All of the disk below ``end`` is durable in the target, and more than zeroes in ``data`` of
    these bytes.  ``tree``: the digest of what the source held since the line before."""

    end: int
    data: int
    tree: str | None = None


class State(NamedTuple):
    """What a journal says: the conversion, its sources, the inode of the target once that was
    made, and what is covered, ascending."""

    conversion: Mapping[str, Any]
    sources: list[Any]
    target: int | None
    covered: list[Covered]


class Journal:
    """An open journal, which nobody else opens meanwhile.  What it is given is durable when it
    returns."""

    def __init__(self, file: FileNode) -> None:
        self.path = file.filename
        self._file = file
        self._end = 0

    @classmethod
    async def open(cls, driver: BaseDriver, path: str) -> tuple[Journal, State | None]:
        """Open or make the journal ``path``; also what it says, None when it is empty.

        Raises ImageInUse while another conversion goes on by it, ImageError for a file that is no
        journal, UnsupportedFeature, OSError.
        """
        there = os.path.lexists(path)
        file = await FileNode.open(driver, path, writable=True, create=not there)
        try:
            file.set_permissions({"write"}, set())
            journal = cls(file)
            return journal, await journal._read()
        except BaseException:
            await file.close()
            raise

    async def _read(self) -> State | None:
        if self._file.size > _MOST_BYTES:
            raise self._bad("is too large for a journal")
        (raw,) = await self._file.read([0], [self._file.size])
        text = bytes(raw)
        lines = []
        for line in text.splitlines(keepends=True):
            found = _decoded(line)
            if found is None:
                break
            lines.append(found)
            self._end += len(line)
        if not lines:
            # A first line that was cut off; after a loss of power zeroes may stand for it.
            if text.strip(b"\0") and not _BEGINNING.startswith(text[8 : 8 + len(_BEGINNING)]):
                raise self._bad("is no journal of a conversion")
            return None
        if lines[0].get("journal") != _KIND:
            raise self._bad("is no journal of a conversion")
        begun = max(number for number, line in enumerate(lines) if "journal" in line)
        head, rest = lines[begun], lines[begun + 1 :]
        if head.get("version") != VERSION:
            raise UnsupportedFeature(f"journals of version {head.get('version')}", file=self.path)
        try:
            return _state(head, rest)
        except (KeyError, TypeError, ValueError) as error:
            raise self._bad("contradicts itself") from error

    def _bad(self, text: str) -> ImageError:
        return ImageError(text, file=self.path)

    async def begin(
        self, conversion: Mapping[str, Any], sources: list[Any], there: bool = False
    ) -> None:
        """A new conversion: whatever the journal says counts no more.  While something is
        ``there`` in the place of the target it keeps saying that this may be overwritten."""
        if not there:
            self._end = 0
        head = {"journal": _KIND, "version": VERSION}
        await self._add({**head, "conversion": conversion, "sources": sources})

    async def made(self, inode: int) -> None:
        """The target was made, and is durable."""
        await self._add({"target": inode})

    async def covers(self, covered: Covered) -> None:
        """So much is durable in the target."""
        tree = {} if covered.tree is None else {"tree": covered.tree}
        await self._add({"end": covered.end, "data": covered.data, **tree})

    async def _add(self, what: Mapping[str, Any]) -> None:
        text = json.dumps(what, separators=(",", ":")).encode()
        line = b"%08x %b\n" % (zlib.crc32(text), text)
        if self._file.size > self._end:
            await self._file.truncate(self._end)  # the rest of a line that was never whole
        await self._file.write([self._end], [line])
        await self._file.flush()
        self._end += len(line)

    async def remove(self) -> None:
        """The conversion is complete."""
        os.unlink(self.path)
        await self._file.close()

    async def close(self) -> None:
        """Leave it to whoever goes on."""
        await self._file.close()


def _decoded(line: bytes) -> dict[str, Any] | None:
    text = line[9:-1]
    if line[-1:] != b"\n" or line[:9] != b"%08x " % zlib.crc32(text):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _state(head: dict[str, Any], lines: list[dict[str, Any]]) -> State:
    target: int | None = None
    covered = [Covered(0, 0)]
    for line in lines:
        if "target" in line:
            target = int(line["target"])
            continue
        tree = line.get("tree")
        new = Covered(int(line["end"]), int(line["data"]), None if tree is None else str(tree))
        if target is None or new.end < covered[-1].end or new.data < covered[-1].data:
            raise ValueError("lines in the wrong order")
        covered.append(new)
    return State(dict(head["conversion"]), list(head["sources"]), target, covered[1:])


def forget(target: str) -> None:
    """``target`` is made anew by something else: a journal of how it was made counts no more.

    Raises UsageError where it cannot be taken away: it would be believed later.
    """
    path = target + JOURNAL
    try:
        with open(path, "rb") as file:
            if file.read(8 + len(_BEGINNING))[8:] != _BEGINNING:
                return
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"'{path}' must be removed first: {error.strerror}") from error
