"""Secrets by name: passphrases and keys that options such as ``key-secret`` refer to.

A secret never stands among a disk's options, because those are shown (``json:`` names, ``-o``
lines).  The options hold its *id*; the bytes travel beside them, as ``options["secrets"]``, to the
format that needs them, and appear in no message and in no ``repr``.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

from .errors import UnsupportedFeature, UsageError
from .hints import TYPE_CHECKING
from .records import NamedTuple

if TYPE_CHECKING:
    from .authz import Authz

TYPE = "secret"
TLS_TYPES = {"tls-creds-x509": "x509", "tls-creds-psk": "psk"}
FORMATS = ("raw", "base64")
EXTRA = "diskwright[crypto]"
"""The extra that brings the library of ciphers."""

_PROPERTIES = ("qom-type", "id", "data", "file", "format", "keyid", "iv")
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_KEY_BYTES = 32
_BLOCK = 16
_NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/=\s]")


class TlsCredentials(NamedTuple):
    """What one end of a TLS connection shows and trusts, by files in ``folder``.

    ``kind`` is ``x509`` (``ca-cert.pem``, ``ca-crl.pem``, ``client-cert.pem``, ``client-key.pem``,
    ...; without a folder the system's own certificates are trusted) or ``psk`` (``keys.psk``, or
    ``key_file``).  ``password`` opens the private key."""

    id: str
    kind: str
    folder: str = ""
    endpoint: str = "client"
    verify_peer: bool = True
    username: str = ""
    key_file: str = ""
    password: bytes | None = None


_TLS_PROPERTIES = {
    "x509": ("dir", "endpoint", "verify-peer", "passwordid", "sanity-check", "priority"),
    "psk": ("dir", "endpoint", "username", "verify-peer", "priority"),
}


class Secrets(Mapping[str, bytes]):
    """The secrets of one command or program: id -> bytes."""

    def __init__(self, given: Mapping[str, bytes | str] | None = None) -> None:
        self._found: dict[str, bytes] = {}
        self.credentials: dict[str, TlsCredentials] = {}
        """TLS credentials; their ids are not those of secrets."""
        self.authz: dict[str, Authz] = {}
        """Who is admitted, by ``authz-...`` objects."""
        for name, value in (given or {}).items():
            self.put(name, value.encode() if isinstance(value, str) else bytes(value))

    def __getitem__(self, name: str) -> bytes:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        return f"Secrets({', '.join(self._found)})"

    def put(self, name: str, value: bytes) -> None:
        """Add a secret.  Raises UsageError for a name that is none, or that is taken."""
        self._check_id(name)
        self._found[name] = value

    def _check_id(self, name: str) -> None:
        if not _ID.fullmatch(name):
            raise UsageError(
                "Parameter 'id' expects an identifier\nIdentifiers consist of letters, digits, "
                "'-', '.', '_', starting with a letter."
            )
        if name in self._found or name in self.credentials or name in self.authz:
            raise UsageError(
                f"attempt to add duplicate property '{name}' to object (type 'container')"
            )

    def forget(self, name: str) -> None:
        """Take an object back, of whatever type.  Raises KeyError."""
        for objects in (self._found, self.credentials, self.authz):
            if name in objects:
                del objects[name]
                return
        raise KeyError(name)

    def define(
        self, definition: str | Mapping[str, Any], read: Callable[[str], bytes] | None = None
    ) -> str:
        """Add the secret, the TLS credentials or the authorisation of an object definition as
        qemu's tools take it, and return its id.

        ``secret,id=ID,data=TEXT`` or ``file=PATH``, ``format=raw`` (default) or ``base64``; with
        ``keyid=ID`` (a secret of 32 bytes defined before) and ``iv=BASE64`` the data are
        encrypted with AES-256-CBC and padded as PKCS #7 says.  A comma in a value is written
        twice.  Instead of text it may be the object itself, with ``qom-type``.  ``read`` reads a
        file; without it none is read.

        ``tls-creds-x509,id=ID,dir=PATH,endpoint=client`` and ``tls-creds-psk`` with ``username``:
        see :class:`TlsCredentials`; their files are read when a connection is made.
        ``authz-simple,id=ID,identity=NAME``, ``authz-list`` and ``authz-listfile``: see
        :mod:`.authz`.

        Raises UsageError and UnsupportedFeature.
        """
        given = split(definition) if isinstance(definition, str) else dict(definition)
        kind = given.get("qom-type")
        if kind is None:
            raise UsageError("Parameter 'qom-type' is missing")
        if not isinstance(kind, str):
            raise UsageError("Invalid parameter type for 'qom-type', expected: string")
        tls = TLS_TYPES.get(kind)
        if kind.startswith("authz-"):
            return self._authorise(kind, given, read)
        if kind != TYPE and tls is None:
            raise UsageError(f"Parameter 'qom-type' does not accept value '{kind}'")
        known: tuple[str, ...] = _PROPERTIES
        if tls is not None:
            known = ("qom-type", "id", *_TLS_PROPERTIES[tls])
        for key, value in given.items():
            if key not in known:
                raise UsageError(f"Parameter '{key}' is unexpected")
            if not isinstance(value, str) and not (tls and isinstance(value, bool)):
                raise UsageError(f"Invalid parameter type for '{key}', expected: string")
        name: str | None = given.get("id")
        if name is None:
            raise UsageError("Parameter 'id' is missing")
        if tls is None:
            self.put(name, self._value(given, read))
        else:
            self._check_id(name)
            self.credentials[name] = self._tls(name, tls, given)
        return name

    def _authorise(
        self, kind: str, given: dict[str, Any], read: Callable[[str], bytes] | None
    ) -> str:
        from .authz import TYPES, authz_of

        if kind not in TYPES:
            raise UsageError(f"Parameter 'qom-type' does not accept value '{kind}'")
        del given["qom-type"]
        name = given.pop("id", None)
        if not isinstance(name, str):
            raise UsageError("Parameter 'id' is missing")
        self._check_id(name)
        self.authz[name] = authz_of(kind, given, read)
        return name

    def _tls(self, name: str, kind: str, given: Mapping[str, Any]) -> TlsCredentials:
        endpoint = given.get("endpoint", "client")
        if endpoint not in ("client", "server"):
            raise UsageError(f"Parameter 'endpoint' does not accept value '{endpoint}'")
        verify = given.get("verify-peer", True)
        if verify not in (True, False, "on", "off", "yes", "no", "true", "false"):
            raise UsageError("Parameter 'verify-peer' expects 'on' or 'off'")
        key = given.get("passwordid")
        return TlsCredentials(
            name,
            kind,
            given.get("dir", ""),
            endpoint,
            verify in (True, "on", "yes", "true"),
            given.get("username", ""),
            password=None if key is None else find(self, key),
        )

    def _value(self, given: Mapping[str, str], read: Callable[[str], bytes] | None) -> bytes:
        form = given.get("format", "raw")
        if form not in FORMATS:
            raise UsageError(f"Parameter 'format' does not accept value '{form}'")
        if "data" in given and "file" in given:
            raise UsageError("'file' and 'data' are mutually exclusive")
        if "data" in given:
            data = given["data"].encode("utf-8", "surrogateescape")
        elif "file" in given:
            data = _content(given["file"], read)
        else:
            raise UsageError("Either 'file' or 'data' must be provided")
        if "keyid" in given:
            return self._decrypted(data, form, given)
        return from_base64(data) if form == "base64" else data

    def _decrypted(self, data: bytes, form: str, given: Mapping[str, str]) -> bytes:
        key = find(self, given["keyid"])
        if len(key) != _KEY_BYTES:
            raise UsageError(f"Key should be {_KEY_BYTES} bytes in length")
        if "iv" not in given:
            raise UsageError("IV is required to decrypt secret")
        iv = from_base64(given["iv"].encode("utf-8", "surrogateescape"))
        if len(iv) != _BLOCK:
            raise UsageError(f"IV should be {_BLOCK} bytes in length not {len(iv)}")
        if form == "base64":
            data = from_base64(data)
        if len(data) % _BLOCK or not data:
            raise UsageError(f"Length {len(data)} must be a multiple of block size {_BLOCK}")
        try:
            ciphers = import_module("cryptography.hazmat.primitives.ciphers")
        except ImportError as error:
            raise UnsupportedFeature(f"an encrypted secret (install {EXTRA})") from error
        cipher = ciphers.Cipher(ciphers.algorithms.AES(key), ciphers.modes.CBC(iv))
        machine = cipher.decryptor()
        plain: bytes = machine.update(data) + machine.finalize()
        padding = plain[-1]
        if not 1 <= padding <= _BLOCK:
            raise UsageError("Incorrect number of padding bytes found on decrypted data")
        return plain[:-padding]


def find(secrets: Mapping[str, bytes] | None, name: str) -> bytes:
    """The secret with the id ``name``.  Raises UsageError when there is none."""
    if secrets is None or name not in secrets:
        raise UsageError(f"No secret with id '{name}'")
    return secrets[name]


def split(text: str) -> dict[str, Any]:
    """The properties in ``secret,id=...``, or in a JSON object.  Raises UsageError."""
    if text.lstrip().startswith("{"):
        import json

        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise UsageError("JSON parse error, invalid object definition") from None
        if not isinstance(found, dict):
            raise UsageError("JSON parse error, invalid object definition")
        return found
    out: dict[str, Any] = {}
    for i, part in enumerate(text.replace(",,", "\0").split(",")):
        name, equals, value = part.replace("\0", ",").partition("=")
        if not equals:
            if i:
                raise UsageError(f"Expected '=' after parameter '{name}'")
            if not name:
                continue
            name, value = "qom-type", name
        out[name] = value
    return out


def from_base64(data: bytes) -> bytes:
    """Decode; missing padding and line ends are taken as qemu's tools take them.

    Raises UsageError.
    """
    if _NOT_BASE64.search(data):
        raise UsageError("Base64 data contains invalid characters")
    packed = b"".join(data.split()).rstrip(b"=")
    if len(packed) % 4 == 1:
        packed = packed[:-1]
    try:
        return binascii.a2b_base64(packed + b"=" * (-len(packed) % 4))
    except binascii.Error:
        raise UsageError("Base64 data is not valid") from None


def _content(path: str, read: Callable[[str], bytes] | None) -> bytes:
    if read is None:
        raise UsageError(f"Unable to read {path}: files are not read here")
    try:
        return read(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"Unable to read {path}: Failed to open file “{path}”: {why}") from error
