"""The text of a VMDK image: header, extent lines and disk database.

Grammar: VMware's technical note "Virtual Disk Format" 5.0, chapter "The Descriptor File", and
what libvmdk's documentation adds to it (encodings, device fields, change tracking).  The lines are
kept as the bytes that were read; a change touches the value it is about and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...errors import ImageError, MalformedImage, UnsupportedFeature, UsageError
from ...hints import Any
from ...records import NamedTuple

MAX_EMBEDDED = 64 << 10
MAX_FILE = 4 << 20
MAX_EXTENTS = 4096
_MAX_LINES = 65536
_MAX_SECTORS = 1 << 54  # of the whole disk, so that it has less than 2^63 bytes

NO_CONTENT = 0xFFFFFFFF
"""The CID that means "none" (a parentCID of an image without a parent)."""
LONG_CONTENT = 0xFFFFFFFE
"""The CID of a disk that was never written."""

RW, RDONLY, NOACCESS = "RW", "RDONLY", "NOACCESS"
FLAT_TYPES = ("FLAT", "VMFS")
DEVICE_TYPES = ("VMFSRDM", "VMFSRAW")
SPARSE_TYPES = ("SPARSE", "VMFSSPARSE", "SESPARSE")
TYPES = ("ZERO", *FLAT_TYPES, *DEVICE_TYPES, *SPARSE_TYPES)

# What `encoding` may say, and Python's name for it.  Only encodings in which neither a line feed,
# a quote nor an equals sign can be a part of another character: lines are taken apart as bytes.
ENCODINGS = {
    "utf-8": "utf-8",
    "utf8": "utf-8",
    "us-ascii": "ascii",
    "ascii": "ascii",
    "gbk": "gbk",
    "gb2312": "gbk",
    "gb18030": "gb18030",
    "windows-936": "gbk",
    "big5": "big5",
    "big-5": "big5",
    "windows-950": "cp950",
    "shift_jis": "shift_jis",
    "windows-31j": "cp932",
    "windows-932": "cp932",
    "euc-jp": "euc_jp",
    "euc-kr": "euc_kr",
    "windows-949": "cp949",
    "koi8-r": "koi8_r",
    "ibm-850": "cp850",
    "ibm-437": "cp437",
    **{f"windows-{page}": f"cp{page}" for page in (874, *range(1250, 1259))},
    **{f"iso-8859-{part}": f"iso8859_{part}" for part in (*range(1, 12), 13, 14, 15, 16)},
}

_EXTENT = re.compile(
    rb"[ \t]*(RW|RDONLY|NOACCESS)[ \t]+([0-9]{1,20})[ \t]+([A-Za-z]+)"
    rb'(?:[ \t]+"([^"]*)"(?:[ \t]+([0-9]{1,20}))?(?:[ \t]+(\S.*))?)?',
    re.IGNORECASE,
)
_LIKE_EXTENT = re.compile(rb"[ \t]*[A-Za-z]+[ \t]+[0-9]+[ \t]+[A-Za-z]+")
_SETTING = re.compile(rb"[ \t]*([A-Za-z][\w.:-]*)[ \t]*=[ \t]*(.*)")
_ONCE = ("version", "encoding", "cid", "parentcid", "createtype", "parentfilenamehint")


class ExtentLine(NamedTuple):
    """One extent: ``sectors`` of 512 bytes, from sector ``offset`` of the file ``name``.

    ``name`` is None and ``offset`` too where the line gives none.  ``device``: what follows (the
    identity of a partition or device), as it stands there.
    """

    access: str
    sectors: int
    type: str
    name: str | None = None
    offset: int | None = None
    device: str = ""
    line: int = 0


class Descriptor:
    """A parsed descriptor.

    ``cid`` and ``parent_cid`` are numbers (``NO_CONTENT``: none); ``settings`` has all other
    values by their lower-case keys.
    """

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.codec = "utf-8"
        self.encoding = ""
        self.cid = NO_CONTENT
        self.parent_cid = NO_CONTENT
        self.create_type = ""
        self.parent_hint: str | None = None
        self.extents: list[ExtentLine] = []
        self.settings: dict[str, str] = {}
        self._place: dict[str, int] = {}

    @property
    def cid_digits(self) -> int:
        """How many digits a CID should have to fit where the present one is: 8, or a little less
        (qemu-img writes no leading zeroes), so that it can be changed without moving the rest."""
        here = len(self.settings.get("cid", ""))
        return here if here in (6, 7) else 8

    @property
    def ddb(self) -> dict[str, str]:
        """The disk database, without the prefix ``ddb.`` (keys in lower case)."""
        return {k[4:]: v for k, v in self.settings.items() if k.startswith("ddb.")}

    @property
    def vital(self) -> int:
        """The bytes of the text that hold the extents, the parent and the identity: without what
        comes behind them it describes the same disk."""
        lines = [extent.line for extent in self.extents]
        lines += [self._place[key] + 1 for key in _ONCE if key in self._place]
        return sum(map(len, self.lines[: max(lines, default=0)]))

    def encode(self) -> bytes:
        """The text as it is stored."""
        return b"".join(self.lines)

    # -- changes
    def set_geometry(self, old: int, new: int) -> None:
        """Change the number of cylinders from what a disk of ``old`` sectors has to that of one
        of ``new``.  Where it is something else it stays."""
        ddb = self.ddb
        found = [ddb.get(f"geometry.{what}", "") for what in ("heads", "sectors", "cylinders")]
        if not all(re.fullmatch("[0-9]{1,18}", value) for value in found):
            return
        track = int(found[0]) * int(found[1])
        if track and int(found[2]) == old // track:
            self._set("ddb.geometry.cylinders", str(new // track), True, "")

    def set_cid(self, cid: int) -> None:
        """Change the content identifier, and the long one where it ends with the old one."""
        long_id = self.settings.get("ddb.longcontentid", "")
        ours = re.fullmatch("[0-9A-Fa-f]{9,64}", long_id)
        if ours and long_id[-8:].lower() == f"{self.cid:08x}":
            self._set("ddb.longContentID", long_id[:-8] + f"{cid:08x}", True, "")
        digits = self.cid_digits
        self._set("CID", f"{cid:0{digits}x}", False, "version")
        self.cid = cid

    def set_parent(self, cid: int, hint: str | None) -> None:
        """Change parentCID and parentFileNameHint (None: the line goes)."""
        self._set("parentCID", f"{cid:08x}", False, "cid")
        self.parent_cid = cid
        if hint is None:
            at = self._place.pop("parentfilenamehint", None)
            if at is not None:
                del self.lines[at]
                self._shift(at, -1)
            self.settings.pop("parentfilenamehint", None)
        else:
            self._set("parentFileNameHint", hint, True, "createtype")
        self.parent_hint = hint

    def set_extents(self, extents: Sequence[ExtentLine]) -> None:
        """Replace all extent lines; those that stay as they are keep their bytes."""
        old = {extent.line: extent for extent in self.extents}
        kept = {e._replace(line=0): self.lines[e.line - 1] for e in self.extents}
        ending = self._ending()
        new = [
            (kept.get(e._replace(line=0)) or self._encoded(format_extent(e))).rstrip(b"\r\n")
            + ending
            for e in extents
        ]
        first = min(old) - 1 if old else len(self.lines)
        lines = [line for i, line in enumerate(self.lines) if i + 1 not in old]
        if first and not lines[first - 1].endswith(b"\n"):
            lines[first - 1] += ending
        lines[first:first] = new
        self._reparse(b"".join(lines))

    def _set(self, key: str, value: str, quoted: bool, after: str) -> None:
        """Change the value of ``key`` where it stands, keeping its spaces and quotes; without
        one, add a line behind that of ``after``."""
        at = self._place.get(key.lower())
        raw = self._encoded(between_quotes(value)[1:-1])
        if at is not None:
            line = self.lines[at]
            found = _SETTING.fullmatch(line.rstrip())
            assert found is not None
            start, end = found.span(2)
            if end - start > 1 and line[start] == line[end - 1] == 0x22:
                start, end = start + 1, end - 1
            self.lines[at] = line[:start] + raw + line[end:]
        else:
            if quoted:
                raw = b'"' + raw + b'"'
            at = self._place.get(after, -1) + 1
            ending = self._ending()
            if at and not self.lines[at - 1].endswith(b"\n"):
                self.lines[at - 1] += ending
            self.lines.insert(at, key.encode() + b"=" + raw + ending)
            self._shift(at, 1)
            self._place[key.lower()] = at
        self.settings[key.lower()] = value

    def _shift(self, at: int, by: int) -> None:
        """Lines from ``at`` on have moved by ``by``."""
        self._place = {k: i + by if i >= at else i for k, i in self._place.items()}
        self.extents = [
            e._replace(line=e.line + by) if e.line - 1 >= at else e for e in self.extents
        ]

    def _reparse(self, text: bytes) -> None:
        self.__dict__.update(parse(text).__dict__)

    def _ending(self) -> bytes:
        return b"\r\n" if self.lines and self.lines[0].endswith(b"\r\n") else b"\n"

    def _encoded(self, text: str) -> bytes:
        try:
            return text.encode(self.codec, _errors(self.codec))
        except UnicodeEncodeError:
            raise ImageError(
                f"{text!r} cannot be written in the descriptor's encoding {self.encoding}"
            ) from None


def parse(text: bytes) -> Descriptor:
    """Parse a descriptor; it ends at the first NUL byte.

    Raises MalformedImage with the number of the line, UnsupportedFeature for an encoding, a
    version or a type of extent that is not known.
    """
    out = Descriptor()
    end = text.find(b"\0")
    out.lines = (text if end < 0 else text[:end]).splitlines(keepends=True)
    if len(out.lines) > _MAX_LINES:
        raise MalformedImage(f"the descriptor has more than {_MAX_LINES} lines")
    if out.lines:
        out.lines[0] = out.lines[0].removeprefix(b"\xef\xbb\xbf")
    found: dict[str, tuple[bytes, int]] = {}
    extents = []
    for number, line in enumerate(out.lines, 1):
        stripped = line.strip()
        if not stripped or stripped.startswith(b"#"):
            continue
        if match := _EXTENT.fullmatch(line.rstrip()):
            extents.append((number, match))
        elif match := _SETTING.fullmatch(line.rstrip()):
            key = match[1].decode("ascii", "replace").lower()
            if key not in found:
                found[key] = _unquoted(match[2]), number
            elif key in _ONCE and found[key][0] != _unquoted(match[2]):
                raise _at(number, f"a second {match[1].decode('ascii', 'replace')}")
        elif _LIKE_EXTENT.match(stripped) or _access_of(stripped):
            raise _at(number, f"not an extent: {_shown(stripped)}")
        if len(extents) > MAX_EXTENTS:
            raise _at(number, f"more than {MAX_EXTENTS} extents")
    _take_encoding(out, found)
    for key, (raw, number) in found.items():
        out.settings[key] = _decoded(out, raw, number)
        out._place[key] = number - 1
    _take_header(out)
    _take_extents(out, extents)
    return out


def is_descriptor(head: bytes) -> bool:
    """True when a file that begins with ``head`` is a descriptor: behind comments and empty lines
    the first thing said is a version."""
    for line in head.removeprefix(b"\xef\xbb\xbf").splitlines():
        stripped = line.strip()
        if stripped.lower().startswith(b"# disk descriptorfile"):
            return True
        if stripped and not stripped.startswith(b"#"):
            return re.match(rb"version[ \t]*=[ \t]*[123](\D|$)", stripped, re.I) is not None
    return False


def _take_encoding(out: Descriptor, found: dict[str, tuple[bytes, int]]) -> None:
    raw, number = found.get("encoding") or found.get("ddb.encoding") or (b"UTF-8", 0)
    out.encoding = raw.decode("ascii", "replace")
    codec = ENCODINGS.get(out.encoding.strip().lower())
    if codec is None:
        raise UnsupportedFeature(f"encoding {out.encoding[:40]!r} of the descriptor, line {number}")
    out.codec = codec


def _take_header(out: Descriptor) -> None:
    def line(key: str) -> int:
        return out._place[key] + 1

    version = out.settings.get("version")
    if version is not None and version not in ("1", "2", "3"):
        raise UnsupportedFeature(f"descriptor version {version[:20]!r}, line {line('version')}")
    for key in ("cid", "parentcid"):
        value = out.settings.get(key)
        if value is None:
            continue
        if not re.fullmatch(r"(0x)?[0-9A-Fa-f]{1,8}", value):
            raise _at(line(key), f"'{value[:40]}' is not a content identifier")
        number = int(value, 16)
        if key == "cid":
            out.cid = number
        else:
            out.parent_cid = number
    out.create_type = out.settings.get("createtype", "")
    out.parent_hint = out.settings.get("parentfilenamehint") or None


def _take_extents(out: Descriptor, found: list[tuple[int, re.Match[bytes]]]) -> None:
    total = 0
    for number, match in found:
        access, kind = match[1].decode().upper(), match[3].decode().upper()
        if kind not in TYPES:
            raise UnsupportedFeature(f"extent type {kind[:20]}, line {number} of the descriptor")
        sectors, offset = int(match[2]), None if match[5] is None else int(match[5])
        total += sectors
        if total > _MAX_SECTORS or (offset or 0) > _MAX_SECTORS:
            raise _at(number, "the extent is too large")
        name = None if match[4] is None else _decoded(out, match[4], number)
        if kind == "ZERO":
            name = offset = None
        elif not name:
            raise _at(number, f"an extent of type {kind} has a file name")
        device = _decoded(out, match[6] or b"", number)
        out.extents.append(ExtentLine(access, sectors, kind, name, offset, device, number))


def _unquoted(raw: bytes) -> bytes:
    return raw[1:-1] if len(raw) > 1 and raw[0] == raw[-1] == 0x22 else raw


def _access_of(line: bytes) -> bool:
    return line.split(None, 1)[0].upper() in (b"RW", b"RDONLY", b"NOACCESS")


def _errors(codec: str) -> str:
    # Names of files that are not UTF-8 survive, as everywhere.
    return "surrogateescape" if codec == "utf-8" else "strict"


def _decoded(out: Descriptor, raw: bytes, number: int) -> str:
    try:
        return raw.decode(out.codec, _errors(out.codec))
    except UnicodeDecodeError:
        raise _at(number, f"the text is not {out.encoding}") from None


def _shown(raw: bytes) -> str:
    return raw[:80].decode("utf-8", "backslashreplace")


def _at(number: int, what: str) -> MalformedImage:
    return MalformedImage(f"line {number} of the descriptor: {what}")


def format_extent(extent: ExtentLine) -> str:
    """An extent as a line of a descriptor, without its end.

    Raises UsageError for a name that cannot stand between quotes.
    """
    parts: list[Any] = [extent.access, extent.sectors, extent.type]
    if extent.name is not None:
        parts.append(between_quotes(extent.name))
        if extent.offset is not None:
            parts.append(extent.offset)
        if extent.device:
            parts.append(extent.device)
    return " ".join(map(str, parts))


def between_quotes(name: str) -> str:
    """``name`` between quotes.  Raises UsageError when that cannot be undone."""
    if any(c in name for c in '"\r\n\0'):
        raise UsageError(f"The name {name!r} cannot be written into a VMDK descriptor")
    return f'"{name}"'
