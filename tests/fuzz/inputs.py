"""What the fuzzer's bytes mean: a sample, what is done to it, and changes.

An image of 5 MiB of which 200 bytes matter, with checksums over them, is nothing that a fuzzer
finds its way into.  So its input is not the image but how it differs from a sound one: the first
bytes choose the sample, the mode and one or two of the mode's parts, and each record of twelve
changes one place.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping
from functools import cache

from fuzz.attack import MODES, PARTS, attack
from fuzz.fields import Field
from fuzz.machine import Sample
from fuzz.mutants import Change, borders, changed, copies
from fuzz.pages import Pages
from fuzz.samples import samples

HEAD = 3
RECORD = struct.Struct("<BHBQ")  # what, which field, which value of it, or this one
MOST_RECORDS = 12
BORDER, ALONE, VALUE, NEAR, BIT, AROUND, CUT, COPY = range(8)


class Places:
    """The fields of a sample with their values, looked up once."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.groups = copies(sample) or [[Field("start", sample.image, 0, 8, "little")]]
        self._borders: dict[int, list[bytes]] = {}

    def borders(self, number: int) -> list[bytes]:
        """All values at which this group of fields is tried."""
        found = self._borders.get(number)
        if found is None:
            found = borders(self.groups[number][0], self.sample.files, True)
            self._borders[number] = found
        return found


@cache
def _places(format: str, number: int) -> Places:
    return Places(samples(format)[number])


def decode(format: str, data: bytes) -> tuple[Sample, str, list[int], list[Change]]:
    """Any bytes mean something."""
    head = data[:HEAD].ljust(HEAD, b"\0")
    places = _places(format, head[0] % len(samples(format)))
    modes = MODES[format]
    changes = []
    for at in range(
        HEAD, min(len(data), HEAD + MOST_RECORDS * RECORD.size) - RECORD.size + 1, RECORD.size
    ):
        changes += _changes(places, *RECORD.unpack_from(data, at))
    mode = modes[head[1] % len(modes)]
    second, first = divmod(head[2], 16)
    parts = [first] if second < 8 else [first, second]
    return places.sample, mode, parts, changes


def _changes(places: Places, what: int, which: int, pick: int, value: int) -> list[Change]:
    what %= 8
    number = which % len(places.groups)
    group = places.groups[number]
    field = group[pick % len(group)]
    files = places.sample.files
    width = field.width
    if what in (BORDER, ALONE):
        values = places.borders(number)
        data = values[value % len(values)]
        return [Change(one.file, one.at, data) for one in (group if what == BORDER else [field])]
    if what == AROUND:
        at = max(field.at + pick - 128, 0)
        return [Change(field.file, at, value.to_bytes(8, "little"))]
    if what == CUT:
        return [Change(field.file, value % (len(files[field.file]) + 4096), None)]
    if what == COPY:
        at = value % max(len(files[field.file]) - width, 1)
        return [Change(field.file, field.at, files[field.file][at : at + width])]
    if what == VALUE or width > 8:
        return [
            Change(field.file, field.at, (value.to_bytes(8, "little") * (width // 8 + 1))[:width])
        ]
    now = field.value(files)
    new = now ^ 1 << pick % (8 * width) if what == BIT else now + value % 257 - 128
    return [Change(field.file, field.at, (new % (1 << 8 * width)).to_bytes(width, field.order))]  # type: ignore[arg-type]


def run(format: str, data: bytes) -> int:
    """What `attack` says of it."""
    sample, mode, parts, changes = decode(format, data)
    files: Mapping[str, bytes | Pages] = changed(sample, changes) if changes else sample.files
    return attack(sample, files, mode, only=parts)


def seeds(format: str) -> list[bytes]:
    """Each sample with each part of each mode, untouched."""
    return [
        bytes([sample, number, part])
        for sample in range(len(samples(format)))
        for number, mode in enumerate(MODES[format])
        for part in range(len(PARTS[mode]))
    ]


def mutate(data: bytes, rng: random.Random, other: Callable[[bytes], bytes]) -> bytes:
    """Change the records as records, now and then ``other``-wise."""
    head, body = bytearray(data[:HEAD].ljust(HEAD, b"\0")), data[HEAD:]
    records = [
        body[at : at + RECORD.size] for at in range(0, len(body) - RECORD.size + 1, RECORD.size)
    ]
    dice = rng.random()
    if dice < 0.5 or not records:
        new = RECORD.pack(
            rng.randrange(8), rng.randrange(1 << 16), rng.randrange(256), rng.getrandbits(64)
        )
        if dice < 0.25 and records:
            records[rng.randrange(len(records))] = new
        else:
            records.insert(rng.randrange(len(records) + 1), new)
    elif dice < 0.6:
        del records[rng.randrange(len(records))]
    elif dice < 0.75:  # what many of them make of an image is refused at once
        records = [rng.choice(records)]
    elif dice < 0.9:
        head[rng.randrange(HEAD)] = rng.randrange(256)
    else:
        return other(data)
    return bytes(head) + b"".join(records[-MOST_RECORDS:])
