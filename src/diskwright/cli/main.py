"""The command line: which tool was called, which verb, and how it ends.

A verb is a module that is imported when it is called for, and offers
``main(call: Call, argv: list[str]) -> int``; what it raises is worded and turned into an exit
status here.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..errors import DiskError, OverBudget
from .options import OptionError
from .output import (
    Call,
    Reported,
    UsageProblem,
    finish,
    hush,
    prepare_streams,
    reason,
    to_stderr,
)

# The version of the tools whose command line and output are followed; scripts parse it.
COMPATIBLE = "10.0.2"

IMG_VERBS = {
    "amend": "Change options of an image in place",
    "bench": "Measure how fast an image is",
    "bitmap": "Change the dirty bitmaps of an image",
    "check": "Check an image for damage",
    "commit": "Write an overlay's data into its backing file",
    "compare": "Tell whether two disks have the same content",
    "convert": "Copy disks into a new image",
    "create": "Make a new image",
    "dd": "Copy a part of a disk into a new image",
    "info": "Show what an image is",
    "map": "Show what is where in an image",
    "measure": "Tell how large a new image will be",
    "rebase": "Change an image's backing file",
    "resize": "Change the size of a disk",
    "snapshot": "List, take, apply or delete an image's own snapshots",
}
OWN_VERBS = {
    "completion": "Print what completes command lines in a shell",
    "daemon": "Hold disks and serve them, under the control of QMP monitors",
    "digest": "Print digests of a disk's content",
    "inspect": "Tell what a file is, opening nothing that it names",
    "io": "Read and write by commands",
    "mount": "Show a disk as a raw file, without being root",
    "qmp": "Talk to a QMP monitor, by hand or by a script",
    "salvage": "Copy what can be read out of a damaged image",
    "serve": "Serve a disk over NBD",
    "top": "Show what the disks of a daemon do, live",
}
# Tools without verbs: the whole command line belongs to one module.
TOOLS = {"qemu-io": "io", "qemu-nbd": "serve", "qemu-storage-daemon": "daemon"}
OWN_NAMES = ("diskwright", "dw")


def console() -> None:
    """The entry point of the installed commands."""
    # What modules hold lives to the end: looking for garbage among it costs a tenth of a short run.
    gc.set_threshold(20_000, 20, 20)
    status = main(sys.argv[0], sys.argv[1:])
    # Everything is closed and flushed.  To take the interpreter apart would cost a tenth, too.
    try:
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # nobody is left to be told
    os._exit(status)


def main(argv0: str, argv: Sequence[str]) -> int:
    """Run the tool that ``argv0`` names with the arguments ``argv``; returns the exit status."""
    name = os.path.basename(argv0)
    if name in ("__main__.py", "-m", "-c", ""):
        name = "diskwright"
    prepare_streams()
    call = Call(name)
    try:
        status = _guarded(call, list(argv))
    except KeyboardInterrupt:
        status = 130
    late = finish(call)
    return status or late


def _guarded(call: Call, argv: list[str]) -> int:
    try:
        return dispatch(call, argv)
    except Reported as reported:
        return reported.status
    except OptionError as error:
        return _usage(call, str(error), getopt=True)
    except UsageProblem as problem:
        return _usage(call, str(problem), problem.getopt)
    except BrokenPipeError:
        hush()
        return 141
    except KeyboardInterrupt:
        call.error(call.on_interrupt)
        return 130
    except (DiskError, OSError) as error:
        call.error(reason(error))
        late = isinstance(error, OverBudget) and error.what == "time"
        if late and call.on_interrupt != Call.on_interrupt:
            call.error(call.on_interrupt)
        return call.failure
    except MemoryError:
        call.error("out of memory")
        return call.failure
    except RecursionError:
        call.error("the description of the image is nested too deeply")
        return call.failure


def _usage(call: Call, text: str, getopt: bool) -> int:
    prefix = call.title if getopt else call.name
    hint = f"Try '{call.title} --help' for more info"
    if tool_of(call.name) == "qemu-nbd":
        hint = f"{f'{prefix}: ' if getopt else ''}Try `{call.name} --help' for more information."
    to_stderr(f"{prefix}: {text}\n{hint}\n")
    return call.failure


def tool_of(name: str) -> str:
    """Which tool a called name selects: ``qemu-img``, ``qemu-io``, ``qemu-nbd``,
    ``qemu-storage-daemon`` or ``diskwright``.  An ending (``.py``, ``.exe``) is not part of it."""
    stem = name.split(".")[0]
    return stem if stem == "qemu-img" or stem in TOOLS else "diskwright"


def dispatch(call: Call, argv: list[str]) -> int:
    """Run the verb that ``argv`` starts with."""
    tool = tool_of(call.name)
    if tool in TOOLS:
        return _run(call, TOOLS[tool], argv)
    verbs = IMG_VERBS if tool == "qemu-img" else {**IMG_VERBS, **OWN_VERBS}
    while argv and argv[0].startswith("-"):
        word = argv.pop(0)
        if word in ("-V", "--version"):
            sys.stdout.write(version(call.name) + "\n")
            return 0
        if word in ("-h", "--help"):
            sys.stdout.write(_overview(call, verbs))
            return 0
        if word in ("-T", "--trace") or word.startswith("--trace="):
            if not word.startswith("--trace=") and argv:
                argv.pop(0)
            continue
        if word.startswith("--"):
            raise OptionError(f"unrecognized option '{word}'")
        raise OptionError(f"invalid option -- '{word[1:2]}'")
    if not argv:
        raise UsageProblem("Not enough arguments")
    verb = argv.pop(0)
    if verb not in verbs:
        raise UsageProblem(f"Command not found: {verb}")
    call.verb = verb
    return _run(call, verb, argv)


def _run(call: Call, module: str, argv: list[str]) -> int:
    found = import_module(f"{__package__}.{module}")
    status: int = found.main(call, argv)
    return status


def version(name: str) -> str:
    """What ``--version`` prints: under the name of a qemu tool it starts as that one's does."""
    tool = tool_of(name)
    if tool == "diskwright":
        return f"diskwright {__version__}"
    word = "" if tool == "qemu-nbd" else "version "
    return f"{tool} {word}{COMPATIBLE} (diskwright {__version__})"


def _overview(call: Call, verbs: dict[str, str]) -> str:
    lines = [
        version(call.name),
        f"Usage: {call.name} VERB [OPTIONS] ...",
        f"'{call.name} VERB --help' tells the options of each.",
        "",
        "Verbs:",
    ]
    lines += [f"  {verb:<10} {summary}" for verb, summary in sorted(verbs.items())]
    # Scripts look for this line to learn which formats there are.
    lines += ["", "Supported image formats:", "  " + " ".join(_formats())]
    return "\n".join(lines) + "\n"


def _formats() -> list[str]:
    from ..graph.registry import BUILTIN

    return sorted(BUILTIN)
