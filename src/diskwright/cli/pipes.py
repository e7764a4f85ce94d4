"""``-`` in the place of an image: standard input, standard output."""

from __future__ import annotations

import os
import stat
import sys
from typing import TYPE_CHECKING

from ..errors import UsageError
from .sizes import bounded

if TYPE_CHECKING:
    from ..ops.images import ImageSpec
    from ..ops.pipes import Pipe
    from .options import Args

STDIN, STDOUT = 0, 1


def source(args: Args, image: ImageSpec) -> ImageSpec | Pipe:
    """What ``-`` as a source is; ``image`` is what the options say of it.

    A file that is read from its beginning is as good as one that was named.
    """
    from ..ops.pipes import Pipe

    image = image._replace(name="standard input")
    size = None
    if (text := args.get("size")) is not None:
        if image.format != "raw":
            raise UsageError("--size needs -f raw")
        size = bounded("size", text)
    elif (path := _file()) is not None:
        return image._replace(reference=path)
    if os.isatty(STDIN):
        raise UsageError("Standard input is a terminal, and no disk")
    if image.format is None:
        raise UsageError(
            "The format of what comes through standard input must be said (-f raw, -f qcow2, ...)"
        )
    return Pipe(STDIN, image, size)


def target(image: ImageSpec) -> Pipe:
    """What ``-`` as a target is."""
    from ..ops.pipes import Pipe

    if os.isatty(STDOUT):
        raise UsageError("Standard output is a terminal: a disk is not written to it")
    sys.stdout.flush()
    return Pipe(STDOUT, image._replace(name="standard output"))


def _file() -> str | None:
    """The name of the file or device that standard input reads from its beginning."""
    found = os.fstat(STDIN)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        return None
    if os.lseek(STDIN, 0, os.SEEK_CUR):
        return None
    path = os.path.realpath("/dev/stdin")
    try:
        return path if os.path.samestat(os.stat(path), found) else None
    except OSError:
        return None
