"""Zstandard (RFC 8878), by whichever library is there.

Python 3.14 and later have one of their own (``compression.zstd``); before that the ``zstandard``
wheel is an extra.  Neither is looked for before the first unit.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from ..abilities import Buffer
from ..errors import UnsupportedFeature
from ..hints import Any

# What a frame may make the decoder keep (bytes); RFC 8878 asks for 8 MiB at least.
_WINDOW_BITS = 23
DEFAULT_LEVEL = 3
_spare: dict[int, list[Any]] = {}
"""Machines of the wheel that no thread uses at the moment, by level (0: those that unpack); a new
one sets up its tables anew."""


class Zstd:
    """Units compressed with Zstandard at ``level`` (1 to 19)."""

    __slots__ = ("level",)

    def __init__(self, level: int = DEFAULT_LEVEL) -> None:
        self.level = level

    def pack(self, data: Buffer) -> bytes:
        """``data`` as one frame; it may come out longer.

        Raises UnsupportedFeature without a library.
        """
        own, library = _library()
        if own:
            return bytes(library.compress(data, self.level))
        spare = _spare.setdefault(self.level, [])
        machine = _taken(spare) or library.ZstdCompressor(level=self.level)
        out: bytes = machine.compress(data)
        spare.append(machine)
        return out

    def unpack(self, data: Buffer, unit: int) -> bytes:
        """The first ``unit`` bytes that ``data`` holds; what follows the frame is ignored.

        Raises ValueError when the frame is damaged or holds fewer, UnsupportedFeature without a
        library.
        """
        own, library = _library()
        if own:
            out = _unpack_own(library, data, unit)
        else:
            out = _unpack_wheel(library, data, unit)
        if len(out) < unit:
            raise ValueError(f"the compressed data hold {len(out)} bytes instead of {unit}")
        return bytes(out)


def _unpack_wheel(library: Any, data: Buffer, unit: int) -> bytes:
    spare = _spare.setdefault(0, [])
    machine = _taken(spare) or library.ZstdDecompressor(max_window_size=1 << _WINDOW_BITS)
    try:
        # In one go where the frame says no more than a unit, as those of most writers do: what it
        # says is what the library would allocate.
        if library.frame_content_size(data) == unit:
            out: bytes = machine.decompress(data, allow_extra_data=True)
        else:
            out = machine.stream_reader(data, read_across_frames=False).read(unit)
    except library.ZstdError as error:
        raise _damaged(error) from error
    spare.append(machine)
    return out


def _taken(spare: list[Any]) -> Any:
    try:
        return spare.pop()
    except IndexError:
        return None


def _unpack_own(library: Any, data: Buffer, unit: int) -> bytes:
    limit = {library.DecompressionParameter.window_log_max: _WINDOW_BITS}
    machine = library.ZstdDecompressor(options=limit)
    try:
        out: bytes = machine.decompress(data, unit)
        while len(out) < unit and not (machine.eof or machine.needs_input):
            out += machine.decompress(b"", unit - len(out))
    except library.ZstdError as error:
        raise _damaged(error) from error
    return out


def _damaged(error: Exception) -> ValueError:
    return ValueError(f"the compressed data are damaged: {error}")


@cache
def _library() -> tuple[bool, Any]:
    """The library, and whether it is Python's own.  Raises UnsupportedFeature without one."""
    for own, name in ((True, "compression.zstd"), (False, "zstandard")):
        try:
            return own, import_module(name)
        except ImportError:
            continue
    raise UnsupportedFeature(
        "zstd compression without a library for it (Python 3.14 has one; before that the extra "
        "'zstd' brings it: pip install 'diskwright[zstd]')"
    )
