"""The synchronous Python API.

>>> import diskwright
>>> diskwright.create("disk.qcow2", format="qcow2", size=1 << 30)
>>> with diskwright.open("disk.qcow2", writable=True) as disk:
...     disk.write_at(0, b"hello")
...     disk.flush()

Offsets, lengths and sizes are bytes.  A disk runs only inside the calls made to it; between two
calls nothing happens.  Calls from several threads take turns.  A forked process does not inherit
a disk: there it is closed, as :class:`~diskwright.errors.NodeClosed` says.
"""

from __future__ import annotations

import atexit
import functools
import os
import threading
import warnings
from collections.abc import Callable, Coroutine, Mapping
from importlib import import_module
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakSet

from .contract import FUA, MAY_UNMAP
from .engine.kernel import BaseDriver, Driver
from .errors import NodeClosed, UsageError
from .graph.closing import abandon_disk
from .graph.display import display_name
from .graph.graph import chain as layers
from .graph.node import Buffer, Node
from .graph.opener import close_disk, open_disk
from .ops.calls import OPERATIONS, operation
from .ops.gates import Policy, Source, gate_of, kept, reference_of
from .records import NamedTuple

__all__ = ["Disk", "Policy", "Progress", "open"]

P = ParamSpec("P")
T = TypeVar("T")

_ELSEWHERE = {"Budget": "engine.budget", "limited": "engine.budget",
              "Inspector": "ops.inspect", "Progress": "ops.progress"}  # fmt: skip

def open(
    source: Source,
    *,
    writable: bool = False,
    format: str | None = None,
    policy: str | Policy | None = None,
    options: Mapping[str, Any] | None = None,
    cache: str = "writeback",
    force_share: bool = False,
    backing: bool = True,
    discard: str = "unmap",
    detect_zeroes: str = "off",
    secrets: Mapping[str, bytes | str] | None = None,
) -> Disk:
    """Open a disk: a path, a ``json:`` or ``proto:`` name, or a dict of options.

    Without ``format`` the image is probed.  What the image itself names (a backing file) is opened
    as far as ``policy`` allows (``untrusted``, ``local``, ``trusted`` or a :class:`Policy`; see
    docs/security.md); ``backing=False`` leaves it out.  ``secrets`` are the passphrases that
    options such as ``key-secret`` name (``{"sec0": b"..."}``), ``options`` those of the format.
    ``force_share`` reads what others write to; for the modes see docs/reference/python.md.

    Raises OSError, and the kinds of DiskError: Refused when the policy forbids a reference,
    ImageInUse, ImageError when it is the image's fault, UsageError when it is the caller's.
    """
    driver = Driver()
    try:
        opening = open_disk(
            driver, reference_of(source), format=format, writable=writable, options=options,
            cache=cache, force_share=force_share, gate=gate_of(policy), backing=backing,
            discard=discard, detect_zeroes=detect_zeroes, secrets=kept(secrets),
        )  # fmt: skip
        node = driver.run(opening)
    except BaseException:
        driver.close()
        raise
    return Disk(node, driver)


def blocking(
    call: Callable[Concatenate[BaseDriver, P], Coroutine[Any, Any, T]],
) -> Callable[P, T]:
    """An operation of the engine as a plain function, run on a driver of its own."""

    @functools.wraps(call)
    def blocked(*arguments: P.args, **named: P.kwargs) -> T:
        return run(lambda driver: call(driver, *arguments, **named))

    # What tells signatures leaves out the first parameter of a method.
    blocked.__wrapped__ = MethodType(call, blocked)
    return blocked


if TYPE_CHECKING:
    from .engine.budget import Budget as Budget
    from .engine.budget import limited as limited
    from .ops.bitmap_list import Bitmaps
    from .ops.calls import looking, making, mending
    from .ops.inspect import Inspector as Inspector
    from .ops.map import Extent
    from .ops.progress import Progress
    from .ops.rawfile import RawDisk
    from .ops.snapshot_list import Snapshots

    info = blocking(looking.info)
    info_chain = blocking(looking.info_chain)
    check = blocking(mending.check)
    plan_repair = blocking(mending.plan_repair)
    undo = blocking(mending.undo)
    salvage = blocking(mending.salvage)
    convert = blocking(making.convert)
    compare = blocking(looking.compare)
    commit = blocking(making.commit)
    rebase = blocking(making.rebase)
    amend = blocking(making.amend)
    digest = blocking(looking.digest)
    inspect = blocking(looking.inspect)
    create = blocking(making.create)
    overlay = blocking(making.overlay)
    measure = blocking(looking.measure)
    map = blocking(looking.map)
    picture = blocking(looking.picture)


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return getattr(import_module(f"{__package__}.{_ELSEWHERE[name]}"), name)
    if name not in OPERATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = blocking(operation(name))
    return found


def run(make: Callable[[Driver], Coroutine[Any, Any, T]]) -> T:
    """Run one operation on a driver of its own."""
    driver = Driver()
    try:
        return driver.run(driver.in_time(make(driver)))
    finally:
        driver.close()


class Layer(NamedTuple):
    """One image of a chain; ``size`` is its virtual size in bytes."""

    name: str
    format: str
    size: int

    def to_dict(self) -> dict[str, Any]:
        """With the names that ``info`` has for them."""
        return {"filename": self.name, "format": self.format, "virtual-size": self.size}


class OpenDisk:
    """What an open disk tells of itself: the same in both APIs."""

    def __init__(self, node: Node) -> None:
        self._node: Node | None = node
        self._pid = os.getpid()

    @property
    def node(self) -> Node:
        """The top of the graph; raises NodeClosed after close and in a forked process."""
        if self._pid != os.getpid():
            raise NodeClosed("the disk was opened by another process: open it again after a fork")
        if self._node is None:
            raise NodeClosed("the disk is closed")
        return self._node

    @property
    def closed(self) -> bool:
        """True after :meth:`close`, and in a forked process."""
        return self._node is None or self._pid != os.getpid()

    @property
    def name(self) -> str:
        """The file name, or a ``json:`` name where that does not suffice."""
        return display_name(self.node)

    @property
    def format(self) -> str:
        """The driver's name: ``raw``, ``qcow2``, ..."""
        return self.node.driver_name

    @property
    def probed(self) -> bool:
        """True when the format was guessed to be raw, which restricts writes of sector 0."""
        return self.node.probed

    @property
    def size(self) -> int:
        """Virtual size in bytes."""
        return self.node.size

    @property
    def chain(self) -> tuple[Layer, ...]:
        """The image and what is below it, the topmost first."""
        return tuple(
            Layer(display_name(node), node.driver_name, node.size) for node in layers(self.node)
        )

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return not self.node.read_only

    def __reduce__(self) -> Any:
        raise TypeError("an open disk cannot be pickled: open it again by its name")

    def __del__(self) -> None:
        if getattr(self, "_node", None) is not None and not self.closed:
            # Nothing is written by whichever thread and call happens to collect what was dropped.
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2)

    def __repr__(self) -> str:
        node = self._node
        if node is None or self.closed:
            return "<closed Disk>"
        return f"<Disk {display_name(node)!r} {node.driver_name} {node.size} bytes>"

    def _inside(self, offset: int, length: int) -> Node:
        node = self.node
        if offset < 0 or length < 0 or offset + length > node.size:
            raise UsageError(
                f"{length} bytes at offset {offset} do not lie inside a disk of {node.size} bytes"
            )
        return node


class Disk(OpenDisk):
    """An open disk.  Close it, or use it in a ``with`` statement: until then its metadata may be
    in memory only.

    Offsets and lengths are bytes, of any alignment, and lie inside the disk (UsageError).  Requests
    raise OSError (EPERM where it was opened for reading), NoSpace where the host is full,
    CorruptImage where metadata that they meet contradict each other.
    """

    def __init__(self, node: Node, driver: Driver) -> None:
        super().__init__(node)
        self._driver = driver
        self._lock = threading.RLock()
        self._running = False
        _open_disks.add(self)

    # -- requests
    def read_at(self, offset: int, length: int) -> bytes:
        """The bytes of a range."""
        node = self._inside(offset, length)
        if not length:
            return b""
        return bytes(self._call(lambda: node.read([offset], [length]))[0])

    def readinto_at(self, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill all of ``buffer`` with the bytes from ``offset``; returns how many that are."""
        view = memoryview(buffer).cast("B")
        node = self._inside(offset, len(view))
        if len(view):
            self._call(lambda: node.read([offset], [len(view)], [view]))
        return len(view)

    def write_at(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write all of ``data``; ``fua``: durable when it returns, otherwise by :meth:`flush`."""
        view = memoryview(data).cast("B")
        node = self._inside(offset, len(view))
        if len(view):
            self._call(lambda: node.write([offset], [view], FUA if fua else 0))

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        """Make a range read as zeroes; ``unmap``: its space may be given back."""
        node = self._inside(offset, length)
        flags = (MAY_UNMAP if unmap else 0) | (FUA if fua else 0)
        if length:
            self._call(lambda: node.zero([offset], [length], flags))

    def discard(self, offset: int, length: int) -> None:
        """The bytes are not needed any more: they read as before or as zeroes."""
        node = self._inside(offset, length)
        if length:
            self._call(lambda: node.discard([offset], [length]))

    def flush(self) -> None:
        """All writes that have returned are durable when it returns.  Raises FlushFailed after an
        earlier flush failed, until the disk is opened again."""
        node = self.node
        self._call(node.flush)

    def resize(self, size: int, *, preallocation: str = "off", shrink: bool = False) -> None:
        """Change the virtual size (a multiple of 512 bytes); new space reads as zeroes, and is
        preallocated as by ``create``.  ``shrink`` must be said to lose what lies beyond a smaller
        size.  Raises UsageError, and NotSupported for a format that cannot."""
        node = self.node
        if size < node.size and not shrink:
            raise UsageError("The new size is smaller: shrink=True allows it")
        self._call(lambda: node.truncate(size, preallocation))

    def extents(self, offset: int = 0, length: int | None = None) -> list[Extent]:
        """What the ranges of the disk are (None: to its end), in order, through its whole chain."""
        from .ops.map import extents

        node = self.node
        return self._call(lambda: extents(node, offset, length))

    def raw(self) -> RawDisk:
        """The disk's bytes as an unbuffered file, with a position of its own."""
        from .ops.rawfile import RawDisk

        self.node  # noqa: B018 - raises when it is closed
        return RawDisk(self)

    @property
    def snapshots(self) -> Snapshots:
        """The internal snapshots of the image (qcow2)."""
        from .ops.snapshot_list import Snapshots

        return Snapshots(lambda: self.node, self._call)

    @property
    def bitmaps(self) -> Bitmaps:
        """The dirty bitmaps of the disk."""
        from .ops.bitmap_list import Bitmaps

        return Bitmaps(lambda: self.node, self._call)

    # -- end
    def close(self) -> None:
        """Write everything back, flush and close.  Raises what the last flush raised; it is
        closed all the same.  A second call does nothing.  Ctrl-C waits for the end; a second one
        does not, and what was not flushed is lost."""
        if self.closed:
            return
        with self._lock:
            if self.closed:  # by another thread, while we waited
                return
            node, self._node = self.node, None
            _open_disks.discard(self)
            try:
                self._driver.run(close_disk(node), patient=True)
            finally:
                self._driver.close()

    def __enter__(self) -> Disk:
        self.node  # noqa: B018 - raises when it is closed
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        node = getattr(self, "_node", None)
        if node is not None and not self.closed and self._driver.idle:
            abandon_disk(node)
        super().__del__()

    # -- inside
    def _call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        with self._lock:
            self.node  # noqa: B018 - raises when it was closed while we waited
            if self._running:
                raise UsageError("a disk cannot be called from within a call to it")
            self._running = True
            try:
                return self._driver.run(make())
            finally:
                self._running = False


_open_disks: WeakSet[Disk] = WeakSet()


@atexit.register
def _close_all() -> None:
    """Disks that a program left open lose nothing at its end."""
    for disk in list(_open_disks):
        try:
            disk.close()
        except Exception as error:
            warnings.warn(f"closing {disk!r} failed: {error}", ResourceWarning, stacklevel=1)
