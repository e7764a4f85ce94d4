"""Mutants: fields at their borders, pairs of fields, files cut short, noise, other descriptors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fuzz.fields import Field, fields
from fuzz.machine import Sample
from fuzz.pages import Pages


class Change(NamedTuple):
    """These bytes at ``at`` of ``file``; None: the file ends there."""

    file: str
    at: int
    data: bytes | None


def changed(sample: Sample, changes: Sequence[Change]) -> dict[str, Pages]:
    """The files of a sample with these changes, and with its checksums made good again."""
    files = {name: Pages(data) for name, data in sample.files.items()}
    spots = []
    for name, at, data in changes:
        if data is None:
            files[name].resize(at)
        else:
            files[name].write(at, data)
            spots.append((name, at, len(data)))
    if sample.seal is not None:
        sample.seal(files, spots)
    return files


class Mutant(NamedTuple):
    """A sample with some changes."""

    sample: Sample
    said: str
    changes: Sequence[Change]

    def files(self) -> Mapping[str, Pages | bytes]:
        """Made anew each time."""
        return changed(self.sample, self.changes)


def borders(field: Field, files: dict[str, bytes], every: bool) -> list[bytes]:
    """What the field is set to: its ends and its sign, what is near to what it is, what is aligned
    and what is not, and the end of its file, in bytes and in sectors; with ``every`` each single
    bit, and all powers of two with their neighbours."""
    width = field.width
    if not field.number and width > 8:
        now = files[field.file][field.at : field.at + width]
        ends = bytes([now[0] ^ 1]) + now[1:], now[:-1] + bytes([now[-1] ^ 0x80])
        return [bytes(width), b"\xff" * width, b"A" * width, *ends]
    now_ = field.value(files)
    top = (1 << 8 * width) - 1
    end = len(files[field.file])
    wanted = {0, 1, 2, top, top - 1, top >> 1, (top >> 1) + 1}
    wanted |= {now_ - 1, now_ + 1, now_ * 2, now_ ^ 512, end, end // 512 + 1}
    if every:
        wanted |= {now_ // 2, end - 1, end + 1, end // 512 - 1, end // 512, -(-end // 4096) * 4096}
        bits = range(8 * width)
        wanted |= {now_ ^ 1 << bit for bit in bits} | {1 << bit for bit in bits}
        wanted |= {(1 << bit) - 1 for bit in bits} | {(1 << bit) + 1 for bit in bits}
        wanted |= {*range(70), *range(1023, 1026), *range(4095, 4098)}
        for near in (now_, end, 1 << 16, 1 << 20):
            wanted |= {near + step for step in (-4096, -512, -1, 1, 512, 4096)}
            wanted |= {near * factor for factor in (2, 3, 16)}
    values = sorted(value for value in wanted if 0 <= value <= top and value != now_)
    return [value.to_bytes(width, field.order) for value in values]  # type: ignore[arg-type]


def mutants(sample: Sample, known: set[str], every: bool = False) -> Iterator[Mutant]:
    """All of a sample.  Fields whose names are in ``known`` (those of other samples) are only
    sampled, unless ``every``; the names of this one are added."""
    rng = random.Random(str(sample))
    singles: list[tuple[list[Field], bytes]] = []
    for alike in copies(sample):
        values = borders(alike[0], sample.files, every)
        if alike[0].name in known and not every:
            values = rng.sample(values, 1)
        singles += [(alike, value) for value in values]
        if len(alike) > 1:  # each of them alone, while the others say what they said
            singles += [
                ([one], value) for one in alike for value in (values if every else values[:1])
            ]
    known.update(field.name for field in fields(sample))
    yield Mutant(sample, "untouched", ())
    for single in singles:
        yield _of(sample, [single])
    for _ in range(len(singles) if every else len(singles) // 20):
        yield _of(sample, rng.sample(singles, rng.choice((2, 3))))
    for name, data in sample.files.items():
        cuts = {0, 1, 4, 71, 104, 511, 512, 513, 4096, len(data) // 2, len(data) - 1}
        for length in sorted(cut for cut in cuts if 0 <= cut < len(data)):
            yield Mutant(sample, f"{name} cut to {length}", [Change(name, length, None)])
        for _ in range(200 if every else 4):
            noise = [
                Change(name, rng.randrange(min(len(data), 8192)), rng.randbytes(1))
                for _ in range(rng.randrange(1, 20))
            ]
            yield Mutant(sample, "noise", noise)
    for name, at, room, text in descriptors(sample):
        for new in texts(text, rng, 100 if every else 8):
            made = [Change(name, at, new[:room].ljust(room if at else 0, b"\0"))]
            if not at:
                made.append(Change(name, len(new), None))
            yield Mutant(sample, f"descriptor {new[:60]!r}", made)


def copies(sample: Sample) -> list[list[Field]]:
    """The fields of a sample, those together that are copies of each other."""
    found: dict[tuple[str, int, int], list[Field]] = {}
    for field in fields(sample):
        found.setdefault((field.name, field.width, field.value(sample.files)), []).append(field)
    return list(found.values())


def _of(sample: Sample, chosen: Sequence[tuple[list[Field], bytes]]) -> Mutant:
    said = ", ".join(
        f"{alike[0].name} at {'and'.join(f'{field.at:#x}' for field in alike)} = {value.hex()}"
        for alike, value in chosen
    )
    made = [Change(field.file, field.at, value) for alike, value in chosen for field in alike]
    return Mutant(sample, said, made)


def descriptors(sample: Sample) -> Iterator[tuple[str, int, int, bytes]]:
    """(file, offset, room, text) of the descriptor of a VMDK image."""
    title = b"# Disk DescriptorFile"
    for name, data in sample.files.items():
        if sample.format == "vmdk" and title in data[:4096]:
            at = data.index(title)
            end = data.index(b"\0", at) if at else len(data)
            yield name, at, 20 * 512 if at else 1 << 20, data[at:end]


def texts(text: bytes, rng: random.Random, noisy: int) -> Iterator[bytes]:
    """Other descriptors."""
    lines = text.split(b"\n")
    numbers = (b"0", b"-1", b"1", b"4294967296", b"18446744073709551616", b"9" * 40, b"x", b"")
    for number in numbers:
        for line in (b'RW %s SPARSE "disk.vmdk"', b"CID=%s", b"parentCID=%s", b"version=%s"):
            name = line.split(b"=")[0].split(b" ")[0]
            yield b"\n".join([*(old for old in lines if not old.startswith(name)), line % number])
    for kind in (b"FLAT", b"ZERO", b"SESPARSE", b"VMFSSPARSE", b"VMFSRDM", b"NONE"):
        yield text.replace(b"SPARSE", kind)
        yield text.replace(b"FLAT", kind)
    yield from (b"", b"#", b"\n" * 5000, b"#" * 10240, text * 9)
    yield from (text.replace(b"\n", end) for end in (b"\r\n", b"\r"))
    yield text.replace(b'"', b"")
    yield text + b'\nparentFileNameHint="' + b"a" * 6000 + b'"'
    yield text + b'\nencoding="no-such-code"\n'
    yield text + b"\xff\xfe\0\0"
    yield text + b'\nRW 8 SPARSE "/etc/passwd"\n'
    for _ in range(noisy):
        new = bytearray(text)
        for _ in range(rng.randrange(1, 6)):
            new[rng.randrange(len(new))] = rng.randrange(256)
        yield bytes(new)
