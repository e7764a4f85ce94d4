"""What a guest does to a disk: the `io` commands, and the bytes that must be there afterwards."""

from __future__ import annotations

from pathlib import Path


class Guest:
    """A disk's bytes as they must be.  Changes are made here and kept as commands for `io`."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = bytearray(data)
        self._commands: list[str] = []

    def write(self, pattern: int, at: int, length: int, flags: str = "") -> None:
        """``length`` times the byte ``pattern``; ``flags`` as of the command `write`."""
        self.data[at : at + length] = bytes([pattern]) * length
        self._commands.append(f"write {flags}{' ' if flags else ''}-P {pattern} {at} {length}")

    def zero(self, at: int, length: int, unmap: bool = False) -> None:
        self.data[at : at + length] = bytes(length)
        self._commands.append(f"write -z {'-u ' if unmap else ''}{at} {length}")

    def discard(self, at: int, length: int) -> None:
        """Of whole clusters, which then read as zeroes."""
        self.data[at : at + length] = bytes(length)
        self._commands.append(f"discard {at} {length}")

    def resize(self, size: int) -> None:
        self.data = self.data[:size].ljust(size, b"\0")

    def commands(self) -> str:
        """All that was not carried out yet, as arguments of `io`."""
        found, self._commands = [*self._commands, "flush"], []
        return " ".join(f'-c "{command}"' for command in found)


def store(path: Path, data: bytes | bytearray) -> None:
    """The bytes as a raw file, with holes where they are zero."""
    with path.open("wb") as file:
        file.truncate(len(data))
        for at in range(0, len(data), 65536):
            part = data[at : at + 65536]
            if part.count(0) != len(part):
                file.seek(at)
                file.write(part)


class Kept:
    """A disk's bytes kept in a file, so that many of them take no memory."""

    def __init__(self, path: Path, data: bytes | bytearray) -> None:
        self.path, self.size = path, len(data)
        store(path, data)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.size)
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)
