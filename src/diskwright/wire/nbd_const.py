"""Numbers of the NBD protocol (NetworkBlockDevice/nbd, doc/proto.md), shared by both sides."""

from __future__ import annotations

import errno

# -- handshake
INIT_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x3E889045565A9
OLDSTYLE_MAGIC = 0x420281861253

FLAG_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = 2

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10
OPT_EXTENDED_HEADERS = 11

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERR_UNSUP = 1 << 31 | 1
REP_ERR_POLICY = 1 << 31 | 2
REP_ERR_INVALID = 1 << 31 | 3
REP_ERR_PLATFORM = 1 << 31 | 4
REP_ERR_TLS_REQD = 1 << 31 | 5
REP_ERR_UNKNOWN = 1 << 31 | 6
REP_ERR_SHUTDOWN = 1 << 31 | 7
REP_ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
REP_ERR_TOO_BIG = 1 << 31 | 9
REP_ERR_EXT_HEADER_REQD = 1 << 31 | 10

INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3

MAX_STRING = 4096
"""No string of the protocol is longer (export names, queries, messages)."""

# -- transmission flags of an export
HAS_FLAGS = 1 << 0
READ_ONLY = 1 << 1
SEND_FLUSH = 1 << 2
SEND_FUA = 1 << 3
ROTATIONAL = 1 << 4
SEND_TRIM = 1 << 5
SEND_WRITE_ZEROES = 1 << 6
SEND_DF = 1 << 7
CAN_MULTI_CONN = 1 << 8
SEND_CACHE = 1 << 10
SEND_FAST_ZERO = 1 << 11
BLOCK_STATUS_PAYLOAD = 1 << 12

# -- transmission
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REQUEST_MAGIC = 0x21E41C71
EXTENDED_REPLY_MAGIC = 0x6E8A278C

CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_CACHE = 5
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7

CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_FLAG_DF = 1 << 2
CMD_FLAG_REQ_ONE = 1 << 3
CMD_FLAG_FAST_ZERO = 1 << 4
CMD_FLAG_PAYLOAD_LEN = 1 << 5

REPLY_FLAG_DONE = 1
REPLY_NONE = 0
REPLY_OFFSET_DATA = 1
REPLY_OFFSET_HOLE = 2
REPLY_BLOCK_STATUS = 5
REPLY_BLOCK_STATUS_EXT = 6
REPLY_ERROR = 1 << 15 | 1
REPLY_ERROR_OFFSET = 1 << 15 | 2

STATE_HOLE = 1
STATE_ZERO = 2

STATE_DIRTY = 1

BASE_ALLOCATION = b"base:allocation"
ALLOCATION_DEPTH = b"qemu:allocation-depth"
DIRTY_BITMAP = b"qemu:dirty-bitmap:"
"""Begins the names of contexts that tell what a dirty bitmap calls dirty."""

SIMPLE, STRUCTURED, EXTENDED = range(3)
"""Forms of replies; with the last one requests have lengths of 64 bits."""

MAX_PAYLOAD = 32 << 20
"""Largest read or write in bytes; the size that clients may rely on without asking."""

EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108

_WIRE = {
    errno.EPERM: EPERM,
    errno.EACCES: EPERM,
    errno.EROFS: EPERM,
    errno.EIO: EIO,
    errno.ENOMEM: ENOMEM,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.EOVERFLOW: EOVERFLOW,
    errno.ENOTSUP: ENOTSUP,
    errno.ESHUTDOWN: ESHUTDOWN,
}


_HOST = {
    EPERM: errno.EPERM,
    EIO: errno.EIO,
    ENOMEM: errno.ENOMEM,
    EINVAL: errno.EINVAL,
    ENOSPC: errno.ENOSPC,
    EOVERFLOW: errno.EOVERFLOW,
    ENOTSUP: errno.ENOTSUP,
    ESHUTDOWN: errno.ESHUTDOWN,
}


def host_errno(number: int) -> int:
    """The host's number for an error of the protocol; ``EINVAL`` for one that it does not have."""
    return _HOST.get(number, errno.EINVAL)


def wire_errno(error: BaseException) -> int:
    """The protocol's number for a failure of the host; ``EIO`` where it has none of its own."""
    return _WIRE.get(getattr(error, "errno", None) or errno.EIO, EIO)
