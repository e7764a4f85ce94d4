"""The error tree, drawn by what a caller can do about it.

Every error carries its facts as attributes; the message is built from them.
``exit_code`` is what a command-line tool returns, ``qmp_class`` what a monitor
answers.  Failures of I/O itself stay plain :class:`OSError`, because callers
decide on ``errno``; the classes here that are I/O failures inherit from both.
"""

from __future__ import annotations

import errno as _errno


def words(error: BaseException) -> str:
    """An error in the system's words, without Python's "[Errno 28]" before them."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


class DiskError(Exception):
    """Base of all errors that diskwright raises on purpose."""

    exit_code = 1
    qmp_class = "GenericError"


class UsageError(DiskError):
    """The caller asked for something that no image could answer (bad option, bad size)."""


class ImageError(DiskError):
    """The image is at fault.  Names the file, the field and the offset where known."""

    def __init__(
        self, detail: str, *, file: str = "", field: str = "", offset: int | None = None
    ) -> None:
        self.detail = detail
        self.file = file
        self.field = field
        self.offset = offset
        super().__init__(detail)

    def __str__(self) -> str:
        where = []
        if self.field:
            where.append(f"field '{self.field}'")
        if self.offset is not None:
            where.append(f"offset {self.offset:#x}")
        text = f"{self.detail} ({', '.join(where)})" if where else self.detail
        return f"{self.file}: {text}" if self.file else text


class MalformedImage(ImageError):
    """A structure of the image breaks its specification; nothing can be read through it."""


class CorruptImage(ImageError):
    """The image is marked corrupt, or its metadata contradict each other."""

    met_by: object = None
    """Whose metadata they are (an engine or a format), where a request or a change met them."""
    marked = False
    """The image was marked as corrupt for it, which the message tells."""


class DamagedData(CorruptImage):
    """Stored data cannot be decoded.  The metadata are sound, so all else can be used as before."""


class UnsupportedFeature(ImageError):
    """The image uses something that this version does not implement; ``feature`` names it."""

    exit_code = 1

    def __init__(self, feature: str, *, file: str = "", offset: int | None = None) -> None:
        self.feature = feature
        super().__init__(f"unsupported feature: {feature}", file=file, offset=offset)


class NotSupported(DiskError):
    """The operation does not exist for this format or protocol (exit 63 where a tool says so)."""

    def __init__(self, detail: str, exit_code: int = 1) -> None:
        self.exit_code = exit_code
        super().__init__(detail)


class NoSuchSnapshot(DiskError):
    """No internal snapshot of the image has the id and name that were asked for."""

    def __init__(self) -> None:
        super().__init__("Can't find snapshot")


class Refused(DiskError):
    """The open gate refused a reference that an image names.

    ``reference`` is the name, ``rule`` the rule that refused it, ``switch`` what allows it.
    """

    def __init__(self, reference: str, rule: str, switch: str, *, file: str = "") -> None:
        self.reference, self.rule, self.switch, self.file = reference, rule, switch, file
        by = f"'{file}' names '{reference}'" if file else f"reference '{reference}'"
        super().__init__(f"{by}, which is not opened: {rule}; {switch} allows it")


class Outside(DiskError):
    """A file was to be opened below certain folders only, and lies elsewhere or is no regular
    file.  ``why`` says which."""

    def __init__(self, path: str, why: str) -> None:
        self.path, self.why = path, why
        super().__init__(f"'{path}' is not opened: {why}")


class OverBudget(DiskError):
    """A limit that the caller set was reached: ``what`` is ``time``, ``memory`` or ``metadata``,
    ``limit`` its value (seconds, or bytes)."""

    def __init__(self, what: str, limit: float) -> None:
        self.what, self.limit = what, limit
        size = f"{limit:g} seconds" if what == "time" else f"{limit} bytes"
        super().__init__(f"the limit of {size} of {what} was reached (--max-{what})")


class ImageInUse(DiskError):
    """Another program holds a lock that conflicts; ``permission`` names which one."""

    def __init__(self, file: str, permission: str, shared: bool = False) -> None:
        self.file, self.permission, self.shared = file, permission, shared
        share = "shared " if shared else ""
        super().__init__(
            f'Failed to get {share}"{permission}" lock\n'
            f"Is another process using the image [{file}]?"
        )


class NoSpace(OSError, DiskError):
    """No host space is left for an allocation (``ENOSPC``)."""

    exit_code = 1
    qmp_class = "GenericError"

    def __init__(self, detail: str = "No space left on device") -> None:
        OSError.__init__(self, _errno.ENOSPC, detail)


class FlushFailed(OSError, DiskError):
    """An earlier flush failed; what it covered may be lost, so every later flush fails too."""

    exit_code = 1
    qmp_class = "GenericError"

    def __init__(self, cause: OSError) -> None:
        self.cause = cause
        OSError.__init__(
            self, cause.errno or _errno.EIO, f"an earlier flush failed: {words(cause)}"
        )


class PeerError(OSError, DiskError):
    """A server could not be reached, refused what it was asked, or broke its protocol: ``detail``.
    ``peer`` is its address, ``export`` what was asked of it, where known."""

    exit_code = 1
    qmp_class = "GenericError"

    def __init__(
        self, detail: str, number: int = _errno.EPROTO, *, peer: str = "", export: str = ""
    ) -> None:
        self.detail, self.peer, self.export = detail, peer, export
        where = f"NBD server at '{peer}'" + (f", export '{export}'" if export else "")
        OSError.__init__(self, number, f"{detail} ({where})" if peer else detail)

    def __str__(self) -> str:
        return str(self.strerror)


class NodeClosed(DiskError):
    """The node was closed (or its process forked) and takes no more requests."""


class OperationCancelled(DiskError):
    """The caller's ``progress`` answered ``False``."""

    def __init__(self) -> None:
        super().__init__("The operation was cancelled")
