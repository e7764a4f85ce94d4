"""What a call of the Python API is given beside its options: a disk's name, its policy (with the
folders that are open, and what paths of other machines mean here), and its secrets.

The nearest place wins that says something of the policy: the call, the environment, the user's
configuration file.  Of folders and mappings all places count.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from ..errors import UsageError
from ..graph.gate import VARIABLE as POLICY_VARIABLE
from ..graph.gate import Gate
from ..hints import TYPE_CHECKING, Any, Protocol
from ..records import NamedTuple

if TYPE_CHECKING:
    from ..secrets import Secrets

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class FileObject(Protocol):
    """An open, seekable file of bytes: what ``open(..., "rb")``, :class:`io.BytesIO` and fsspec
    make.  To be written to it needs ``write``, ``flush`` and ``truncate``, too."""

    def read(self, size: int, /) -> bytes: ...
    def seek(self, offset: int, whence: int = ..., /) -> int: ...


Source = Path | Mapping[str, Any] | FileObject
"""A path, a ``json:`` or ``proto:`` name, a dict of options, or an open file."""

VARIABLE = "DISKWRIGHT_MAP_PATH"
ALLOW_VARIABLE = "DISKWRIGHT_ALLOW"
CONFIG_VARIABLE = "DISKWRIGHT_CONFIG"
"""Path of the configuration file; empty for none."""


class Policy(NamedTuple):
    """What images may make us open: ``name`` is ``untrusted``, ``local`` or ``trusted`` (empty: as
    the environment says); ``allow`` are folders that are open under ``local`` beside an image's
    own; ``map_paths`` says which folders here stand for prefixes of the paths that images name
    (``{"D:/VMs": "/srv/vms"}``), before those of the environment."""

    name: str = ""
    allow: tuple[str, ...] = ()
    map_paths: Mapping[str, str] = {}


class Settings(NamedTuple):
    """What the configuration file says; empty where it does not or is not there."""

    policy: str = ""
    allow: tuple[str, ...] = ()
    map_paths: Mapping[str, str] = {}


def reference_of(source: Source) -> str | Mapping[str, Any]:
    """A caller's path, name, dict of options or open file as the graph takes it.

    Raises TypeError for anything else."""
    if isinstance(source, Mapping):
        return source
    if isinstance(source, str | bytes | os.PathLike):
        return os.fsdecode(source)
    if not (hasattr(source, "read") and hasattr(source, "seek")):
        hint = ": open it first" if hasattr(source, "open") else ""
        raise TypeError(
            f"a disk is a path, a dict of options or an open file, not {source!r}{hint}"
        )
    return {"file": {"driver": "file-object", "object": source, "label": _label(source)}}


def name_of(source: Source) -> str:
    """What messages call it."""
    if isinstance(source, Mapping):
        return str(dict(source))
    return os.fsdecode(source) if isinstance(source, str | bytes | os.PathLike) else _label(source)


def _label(file: FileObject) -> str:
    for attribute in ("full_name", "path", "name"):
        name = getattr(file, attribute, None)
        if isinstance(name, str) and name:
            return name
    return f"<{type(file).__name__}>"


def gate_of(policy: str | Policy | None = None, typed: Iterable[str] = ()) -> Gate:
    """The gate with ``policy`` (None: what the variable DISKWRIGHT_POLICY or else the configuration
    file says, otherwise ``local``), which admits ``typed`` references.  Raises UsageError."""
    given = policy if isinstance(policy, Policy) else Policy(policy or "")
    user = settings()
    environment = os.environ.get(ALLOW_VARIABLE, "").split(os.pathsep)
    return Gate(
        given.name or os.environ.get(POLICY_VARIABLE) or user.policy or "local",
        typed,
        {**user.map_paths, **from_environment(), **given.map_paths},
        (*given.allow, *filter(None, environment), *user.allow),
    )


def settings() -> Settings:
    """The user's configuration file, if there is one: DISKWRIGHT_CONFIG, or
    ``diskwright/config.toml`` in the folder where programs keep such (``$XDG_CONFIG_HOME``,
    ``~/.config``, ``%APPDATA%``).  Raises UsageError for what is wrong in it."""
    path = os.environ.get(CONFIG_VARIABLE)
    if path is None:
        home = os.environ.get("APPDATA" if os.name == "nt" else "XDG_CONFIG_HOME")
        path = os.path.join(home or os.path.expanduser("~/.config"), "diskwright", "config.toml")
    try:
        file = open(path, "rb") if path else None
    except OSError as error:
        if isinstance(error, FileNotFoundError | NotADirectoryError) and (
            CONFIG_VARIABLE not in os.environ
        ):
            return Settings()
        raise UsageError(
            f"The configuration file '{path}' cannot be read: {error.strerror} "
            f"({CONFIG_VARIABLE} names another one; where it is empty, there is none)"
        ) from error
    if file is None:
        return Settings()
    import tomllib

    with file:
        try:
            found = tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"'{path}': {error}") from error
    allow, paths = found.pop("allow", []), found.pop("map-path", {})
    policy = found.pop("policy", "")
    for key in found:
        raise UsageError(f"'{path}': unknown key '{key}'")
    if not isinstance(policy, str):
        raise UsageError(f"'{path}': 'policy' is a word")
    if not isinstance(allow, list) or not all(isinstance(name, str) for name in allow):
        raise UsageError(f"'{path}': 'allow' is a list of folders")
    if not isinstance(paths, dict) or not all(isinstance(name, str) for name in paths.values()):
        raise UsageError(f"'{path}': 'map-path' is a table of paths and folders")
    folders = (os.path.join(os.path.dirname(path), os.path.expanduser(name)) for name in allow)
    return Settings(policy, tuple(folders), paths)


def from_environment() -> dict[str, str]:
    """The mappings in DISKWRIGHT_MAP_PATH: ``FROM=TO;FROM=TO``, a semicolon in a path doubled."""
    text = os.environ.get(VARIABLE, "")
    return pairs(
        (part.replace("\0", ";") for part in text.replace(";;", "\0").split(";")), VARIABLE
    )


def pairs(words: Iterable[str], by: str) -> dict[str, str]:
    """``FROM=TO`` words as a dict; ``by`` is what a message calls them.  Raises UsageError."""
    out: dict[str, str] = {}
    for word in filter(None, words):
        prefix, equals, directory = word.partition("=")
        if not (prefix and equals and directory):
            raise UsageError(f"{by} expects FROM=TO, not '{word}'")
        out[prefix] = directory
    return out


def kept(given: Mapping[str, bytes | str] | None) -> Secrets | None:
    """What a program gave as ``secrets``; text is taken as UTF-8.  Raises UsageError."""
    if given is None:
        return None
    from ..secrets import Secrets

    return given if isinstance(given, Secrets) else Secrets(given)
