"""What the disks of the benches hold; as a program, ``disks.py KIND SIZE PATH`` writes one."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20
_BLOCK = 4096
_TEXT = (".c", ".h", ".html", ".js", ".json", ".md", ".pl", ".pm", ".py", ".rst", ".txt", ".xml")
_BINARY = (".so", ".a", ".o", ".pyc")
_MOST = 48 * MIB
"""Of one file: the sixteen largest libraries of a machine are no disk."""


def pieces(kind: str, size: int) -> Iterator[bytes | int]:
    """The disk, in order: bytes, or how many bytes of hole."""
    if kind == "files":
        yield from _files(size)
        return
    rng = random.Random(kind)
    done = 0
    while done < size:
        if kind == "random":
            yield rng.randbytes(MIB)
        elif kind == "mixed":  # a file system in use: files, holes and blocks of zeroes
            choice = rng.randrange(4)
            if choice == 0:
                yield MIB
            elif choice == 1:
                yield b"".join(
                    rng.randbytes(4096) if rng.random() < 0.5 else bytes(4096) for _ in range(256)
                )
            else:
                yield rng.randbytes(MIB)
        elif kind == "zero":  # written, but nothing but zeroes
            yield bytes(MIB)
        elif kind == "text":  # what deflate halves
            words = [rng.randbytes(6).hex().encode() + b" " for _ in range(512)]
            yield b"".join(rng.choices(words, k=MIB // 13 + 1))[:MIB]
        else:
            raise SystemExit(f"unknown data: {kind}")
        done += MIB


def _files(size: int) -> Iterator[bytes | int]:
    """A quarter of the disk in use: this machine's own text (a third of it) and binaries (another),
    noise and zeroes (a sixth each), each file from a block of 4 KiB on; the rest are holes."""
    rng = random.Random(size)
    text, binary = _stream(_TEXT, rng), _stream(_BINARY, rng)
    order = [1, 0, 0, 0] * (size // (4 * MIB))
    rng.shuffle(order)
    for used in order:
        choice = rng.randrange(6)
        if not used:
            yield MIB
        elif choice < 4:
            yield next(text if choice < 2 else binary)
        else:
            yield rng.randbytes(MIB) if choice == 4 else bytes(MIB)


def _stream(endings: tuple[str, ...], rng: random.Random) -> Iterator[bytes]:
    """Files of this machine with such names, again and again, in pieces of 1 MiB."""
    paths = []
    for folder in ("/usr/share", "/usr/lib", "/usr/include", "/usr/local/lib"):
        for at, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                stem = name.partition(".so.")[0] + ".so" if ".so." in name else name
                path = Path(at, name)
                if stem.endswith(endings) and path.is_file() and not path.is_symlink():
                    paths.append(path)
    if not paths:
        raise SystemExit(f"no files that end in {', '.join(endings)} were found")
    rng.shuffle(paths)
    held = bytearray()
    while True:
        for path in paths:
            try:
                with path.open("rb") as file:
                    held += file.read(_MOST)
            except OSError:
                continue
            held += bytes(-len(held) % _BLOCK)
            while len(held) >= MIB:
                yield bytes(held[:MIB])
                del held[:MIB]


def write(kind: str, size: int, path: Path) -> None:
    """A raw disk with its holes."""
    with path.open("wb", buffering=0) as out:
        for piece in pieces(kind, size):
            if isinstance(piece, int):
                out.seek(piece, os.SEEK_CUR)
            else:
                out.write(piece)
        out.truncate(size)
        os.fsync(out.fileno())


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
