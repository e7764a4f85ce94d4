"""Mounting a :class:`~diskwright.export.fuse.DiskFile` with mfusepy, which calls libfuse.

The binding's loop has threads of its own.  What they are asked for is done by the driver, on its
thread, while they wait.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import errno
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from typing import Any, Literal, TypeVar

from ..engine.kernel import BaseDriver, Future, Task
from ..errors import NotSupported, UsageError
from .fuse import DiskFile

T = TypeVar("T")
AllowOther = Literal["off", "on", "auto"]

EXTRA = "diskwright[fuse]"
_ENDING_SECONDS = 1.0
"""How long to wait for those who still use the file, once it has no name any more."""
_TOOL_SECONDS = 10.0
_THREADS = 4
_CLONE_FS = 0x200
_NOW, _OMIT = (1 << 30) - 1, (1 << 30) - 2
"""Nanoseconds that are no time: set it to now, leave it as it is (utimensat(2))."""


class Mount:
    """``file`` over the regular file ``mountpoint``.

    ``allow_other``: users other than this process's, as the file's mode and owner say (``auto``:
    where the system allows it).  ``direct``: the kernel keeps neither data nor size in memory,
    because others change the disk, too; then it cannot be mapped into memory to be shared.
    """

    def __init__(
        self,
        driver: BaseDriver,
        file: DiskFile,
        mountpoint: str,
        allow_other: AllowOther = "off",
        direct: bool = False,
    ) -> None:
        self.driver = driver
        self.file = file
        self.mountpoint = mountpoint
        self.direct = direct
        self.allow_other = allow_other
        self.on_error: Callable[[BaseException], None] = lambda error: None
        """Told of failures that an errno has no words for, in some thread."""
        self.ended: Future[None] = Future()
        """Nobody can reach the file any more: it was unmounted."""
        self._mounted: Future[None] = Future()

    async def start(self) -> None:
        """Mount; the file can be used when it returns.  Raises UsageError, NotSupported."""
        # Not on the driver's own thread: a path may lead through what the driver itself serves.
        self.mountpoint = await self.driver.call(place, self.mountpoint)
        fuse = await self.driver.call(_binding)
        others = self.allow_other == "on" or (
            self.allow_other == "auto" and await self.driver.call(_others_allowed)
        )
        options: dict[str, Any] = {"fsname": "diskwright", "subtype": "diskwright"}
        if others:
            options.update(allow_other=True, default_permissions=True)
        if not self.file.writable:
            options["ro"] = True
        if self.direct:
            options["attr_timeout"] = 0  # others change the size, too
        thread = threading.Thread(target=self._loop, args=(fuse, options), name="fuse", daemon=True)
        self.driver.visitors += 1
        thread.start()
        await self._mounted

    def _loop(self, fuse: Callable[..., object], options: dict[str, Any]) -> None:
        """The binding's thread: until it is unmounted."""
        _own_folder()
        try:
            fuse(_Operations(self), self.mountpoint, **options)
        except RuntimeError:
            pass  # not mounted; libfuse has written why
        finally:
            self.driver.from_thread(self._has_ended)

    def _has_ended(self) -> None:
        self.driver.visitors -= 1
        self._mounted.set(error=UsageError(f"Failed to mount FUSE export on '{self.mountpoint}'"))
        self.ended.set()

    async def stop(self) -> None:
        """Unmount, also while somebody uses it: what was begun is answered, and from then on
        their requests fail.  What was written is durable.  Raises what flushing raises."""
        if not self.ended.done:
            await self.driver.call(unmount, self.mountpoint)
        await self.file.close()
        timer = self.driver.later(_ENDING_SECONDS, self.ended.set)
        await self.ended
        timer.cancel()
        if self.file.writable:
            await self.file.node.flush()

    def ask(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Have the driver do ``work``; called by the binding's threads.  Raises OSError."""
        answer: concurrent.futures.Future[T] = concurrent.futures.Future()

        def begin() -> None:
            task = self.driver.spawn(work(), name="fuse", io=True)
            task.callbacks.append(lambda _: _tell(task, answer))

        if self.file.closed:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        self.driver.from_thread(begin)
        try:
            return answer.result()
        except OSError as error:
            number = error.errno or errno.EIO
        except Exception as error:
            self.on_error(error)
            number = errno.EIO
        raise OSError(number, os.strerror(number))


def _tell(task: Task[T], answer: concurrent.futures.Future[T]) -> None:
    if task.error is not None:
        answer.set_exception(
            task.error if isinstance(task.error, Exception) else OSError(errno.EINTR, "")
        )
    else:
        answer.set_result(task.value)  # type: ignore[arg-type]


class _Operations:
    """What the binding looks for: a method for each request that there is."""

    use_ns = True

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._file = mount.file

    def init(self, path: str) -> None:
        self._mount.driver.from_thread(self._mount._mounted.set)

    def getattr(self, path: str, handle: object = None) -> dict[str, Any]:
        if path != "/":
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return self._mount.ask(self._file.attributes)

    def chmod(self, path: str, mode: int) -> None:
        self._mount.ask(lambda: self._file.permit(mode))

    def chown(self, path: str, user: int, group: int) -> None:
        self._mount.ask(lambda: self._file.give(user, group))

    def statfs(self, path: str) -> dict[str, int]:
        return self._file.space()

    def utimens(self, path: str, times: tuple[int, int] | None) -> None:
        now = time.time_ns()
        meanings = {_NOW: now, _OMIT: None}
        accessed, written = (meanings.get(one, one) for one in times or (now, now))
        self._mount.ask(lambda: self._file.stamp(accessed, written))

    def open(self, path: str, info: Any) -> None:
        if info.flags & os.O_TRUNC:  # libfuse asks the kernel to leave this to us
            self._mount.ask(self._file.empty)
        info.direct_io = self._mount.direct

    def read(self, offset: int, into: memoryview) -> int:
        return self._mount.ask(lambda: self._file.read(offset, into))

    def write(self, offset: int, data: memoryview) -> int:
        return self._mount.ask(lambda: self._file.write(offset, data))

    def flush(self, path: str, handle: object) -> None:
        self._mount.ask(self._file.flush)

    def fsync(self, path: str, data_only: int, handle: object) -> None:
        self._mount.ask(self._file.flush)

    def truncate(self, path: str, size: int) -> None:
        self._mount.ask(lambda: self._file.truncate(size))

    def fallocate(self, path: str, mode: int, offset: int, size: int, handle: object) -> None:
        self._mount.ask(lambda: self._file.allocate(mode, offset, size))

    def lseek(self, offset: int, whence: int) -> int:
        return self._mount.ask(lambda: self._file.seek(offset, whence))


@cache
def _binding() -> Callable[..., object]:
    """The binding's class, whose constructor mounts and runs the loop.  Raises NotSupported."""
    try:
        with _library():
            mfusepy = import_module("mfusepy")
    except ImportError as error:
        raise NotSupported(f"FUSE needs the library mfusepy (pip install '{EXTRA}')") from error
    except OSError as error:
        raise NotSupported("FUSE needs the system's libfuse (Debian: libfuse3-3, fuse3)") from error

    with suppress(AttributeError):  # libfuse 3.7 has it, and that binding its name
        mfusepy._libfuse.fuse_set_log_func(_LOG)

    class Loop(mfusepy.FUSE):  # type: ignore[misc, name-defined]
        """With libfuse's own buffers, so that nothing is copied, and with lseek."""

        def __init__(self, operations: object, mountpoint: str, **options: Any) -> None:
            version = mfusepy.fuse_version_major, mfusepy.fuse_version_minor
            if version >= (3, 0):  # libfuse 3.14 complains of its own default
                options["max_idle_threads"] = _THREADS
            if version >= (3, 12):
                options["max_threads"] = _THREADS
            super().__init__(operations, mountpoint, foreground=True, raw_fi=True, **options)

        def read(self, path: bytes, buf: Any, size: int, offset: int, info: Any) -> int:
            found: int = self.operations.read(offset, _view(buf, size))
            return found

        def write(self, path: bytes, buf: Any, size: int, offset: int, info: Any) -> int:
            found: int = self.operations.write(offset, _view(buf, size))
            return found

        def lseek(self, path: bytes, offset: int, whence: int, info: Any) -> int:
            found: int = self.operations.lseek(offset, whence)
            return found

    return Loop


_PATH = "FUSE_LIBRARY_PATH"
_SONAMES = ("libfuse3.so.4", "libfuse3.so.3")


@contextmanager
def _library() -> Iterator[None]:
    """Tell the binding, while it is imported, which library it shall load: to find one it runs a
    compiler and a linker, where these are installed, which takes longer than all the rest."""
    if sys.platform == "linux" and not os.environ.get(_PATH):
        for name in _SONAMES:
            with suppress(OSError):
                ctypes.CDLL(name)
                os.environ[_PATH] = name
                try:
                    yield
                finally:
                    del os.environ[_PATH]
                return
    yield


_ORDINARY = (b"fuse: reading device", b"fuse: fuse_remove_signal_handlers")
"""What libfuse says when a file is unmounted, and when one of several mounts ends."""
_LINE = 1024


def _log(level: int, form: bytes, arguments: int) -> None:
    """What libfuse has to say; it is called with a ``va_list``."""
    if not form.startswith(_ORDINARY):
        line = ctypes.create_string_buffer(_LINE)
        ctypes.CDLL(None).vsnprintf(line, _LINE, form, ctypes.c_void_p(arguments))
        os.write(2, line.value)


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_log)


def _own_folder() -> None:
    """Give this thread a working directory of its own: libfuse changes it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).unshare(_CLONE_FS)


def _view(pointer: Any, size: int) -> memoryview:
    """``size`` bytes of libfuse's."""
    array = (ctypes.c_ubyte * size).from_address(ctypes.addressof(pointer.contents))
    return memoryview(array).cast("B")


def place(path: str) -> str:
    """The whole name of a regular file to mount over.  Raises UsageError."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise UsageError(f"Failed to stat '{path}': {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise UsageError(f"'{path}' is not a regular file")
    return os.path.realpath(path)


def _others_allowed() -> bool:
    if sys.platform != "linux" or os.getuid() == 0:
        return True
    try:
        with open("/etc/fuse.conf") as file:
            return any(line.strip() == "user_allow_other" for line in file)
    except OSError:
        return False


def unmount(path: str) -> None:
    """Take the mount away from its name; those who have the file open keep it."""
    for words in (["fusermount3", "-u", "-z"], ["fusermount", "-u", "-z"], ["umount"]):
        if shutil.which(words[0]):
            try:
                subprocess.run(
                    [*words, "--", path] if words[0] != "umount" else [*words, path],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=_TOOL_SECONDS,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired):
                continue
            return
