"""What a command writes: results on standard output, one line per error on standard error."""

from __future__ import annotations

import errno
import os
import sys

from ..errors import DiskError


class UsageProblem(Exception):
    """The command line is wrong; reported with a pointer to ``--help``.  ``text``: the message;
    ``getopt``: it is about an option, which getopt reports with the verb's name before it."""

    def __init__(self, text: str, getopt: bool = False) -> None:
        super().__init__(text)
        self.getopt = getopt


class Reported(Exception):
    """The command failed and has said why; ``status`` is the exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Call:
    """How the program was called.

    ``name`` starts its messages (``qemu-img``, ``diskwright``, ...); ``verb`` is the subcommand,
    empty for tools that have none.  ``failure`` is the exit status of an error.
    """

    failure = 1
    on_interrupt = "interrupted"
    """What is said after Ctrl-C: what state the images are in, and how to go on."""

    def __init__(self, name: str, verb: str = "") -> None:
        self.name = name
        self.verb = verb
        self.quiet = False

    @property
    def title(self) -> str:
        """The name with the verb behind it, as ``--help`` shows it."""
        return f"{self.name} {self.verb}" if self.verb else self.name

    def out(self, text: str, end: str = "\n") -> None:
        """Write to standard output, unless quiet."""
        if not self.quiet:
            try:
                sys.stdout.write(text + end)
            except OSError as error:
                raise output_failed(error) from error

    def error(self, text: str) -> None:
        """One error, its line starting with the called name; survives a closed standard error."""
        to_stderr(f"{self.name}: {text}\n")

    warning = error

    def fail(self, text: str, status: int | None = None) -> Reported:
        """Report ``text``; the result is to be raised."""
        self.error(text)
        return Reported(self.failure if status is None else status)

    def could_not_open(
        self, name: str, error: BaseException, status: int | None = None
    ) -> Reported:
        """Report that ``name`` could not be opened; the result is to be raised."""
        return self.fail(f"Could not open '{name}': {reason(error)}", status)


def to_stderr(text: str) -> None:
    """Write to standard error, which may be closed."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # nobody is left to be told


def printable(text: str) -> str:
    """``text`` of anybody's making, for a terminal: without control characters."""
    return "".join(char if char.isprintable() else f"\\x{_byte(char):02x}" for char in text)


def _byte(char: str) -> int:
    """The number of a character; of half a pair, as names have them, the byte it stands for."""
    return ord(char) - 0xDC00 if "\udc80" <= char <= "\udcff" else ord(char)


def reason(error: BaseException) -> str:
    """Why something failed, as one text."""
    if isinstance(error, (OSError, DiskError)):
        from ..graph.closing import explain

        return explain(error)
    return str(error)


def strerror(error: OSError) -> str:
    """The system's words alone."""
    return error.strerror or (os.strerror(error.errno) if error.errno else str(error))


def output_failed(error: OSError) -> OSError:
    """The same failure, said to be that of standard output and not of an image."""
    if isinstance(error, BrokenPipeError):
        return error
    return OSError(error.errno, f"standard output: {strerror(error)}")


def prepare_streams() -> None:
    """Make standard input, output and error ready for file names and for being closed.

    File names are bytes: what the locale cannot decode is written back as it came.  Descriptors
    0, 1 and 2 that the caller closed are taken, or an image would get one of them, and then the
    messages as well.
    """
    _fill_standard_descriptors()
    encoding = sys.getfilesystemencoding()
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding=encoding, errors="surrogateescape")


def _fill_standard_descriptors() -> None:
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")


def finish(call: Call) -> int:
    """Flush standard output at the end; returns 0, or the status of a failed write."""
    stream = sys.stdout
    try:
        stream.flush()
    except BrokenPipeError:
        hush()
        return 141
    except OSError as error:
        hush()
        if error.errno == errno.EBADF:
            return 0
        call.error(reason(output_failed(error)))
        return 1
    except ValueError:
        return 0
    return 0


def hush() -> None:
    """Standard output is gone: let the interpreter's last flush go nowhere."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
    except OSError:
        pass  # then there is no descriptor that a flush could fail on
