"""The server's side of a QMP connection: bytes in, requests out; replies and events in, bytes out.

After QEMU's docs/interop/qmp-spec.rst.  It knows no command: it parses, keeps ids, and holds the
client to the negotiation of capabilities.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..records import NamedTuple
from .qjson import MESSAGE_LIMIT, JsonError, Messages

OOB = "oob"
"""The capability to run commands before those that came earlier."""
NEGOTIATE = "qmp_capabilities"
GENERIC = "GenericError"
NOT_FOUND = "CommandNotFound"
_MEMBERS = ("execute", "exec-oob", "arguments", "id")


class Fault(NamedTuple):
    """An error's class and text."""

    kind: str
    text: str


class Request(NamedTuple):
    """What a client sent: a command, or a ``fault`` to be answered in its turn.

    ``id`` is a tuple of it, empty where none was given (it may be any value).
    """

    command: str = ""
    arguments: Mapping[str, Any] = {}
    oob: bool = False
    id: tuple[Any, ...] = ()
    fault: Fault | None = None


class QmpSession:
    """One client.  ``version``: what ``query-version`` answers.

    ``negotiated`` are the capabilities that are in effect; None before the negotiation.
    """

    def __init__(
        self, version: Mapping[str, Any], *, pretty: bool = False, limit: int = MESSAGE_LIMIT
    ) -> None:
        self.capabilities = (OOB,)
        self.negotiated: frozenset[str] | None = None
        self._version = version
        self._indent = 4 if pretty else None
        self._messages = Messages(limit)

    def greeting(self) -> bytes:
        """What a client hears first."""
        return self._encoded(
            {"QMP": {"version": self._version, "capabilities": list(self.capabilities)}}
        )

    def receive(self, data: bytes | bytearray | memoryview) -> Iterator[Request]:
        """The requests that end in ``data``, in their order.  An iterator, because what one of them
        negotiates holds for the next."""
        for value in self._messages.feed(data):
            yield self._request(value)

    def refusal(self, request: Request) -> Fault | None:
        """Why the state of the negotiation forbids this command; None when it does not."""
        if self.negotiated is None and request.command != NEGOTIATE:
            return Fault(NOT_FOUND, f"Expecting capabilities negotiation with '{NEGOTIATE}'")
        if self.negotiated is not None and request.command == NEGOTIATE:
            text = "Capabilities negotiation is already complete, command ignored"
            return Fault(NOT_FOUND, text)
        return None

    def reply(self, request: Request, value: Any) -> bytes:
        """The answer to a command that was carried out."""
        return self._encoded({"return": value, **_id(request)})

    def fail(self, request: Request, fault: Fault) -> bytes:
        """The answer to one that was not."""
        error = {"class": fault.kind, "desc": fault.text}
        return self._encoded({**_id(request), "error": error})

    def event(self, name: str, data: Mapping[str, Any], microseconds: int) -> bytes:
        """An event; ``microseconds`` since 1970.  Empty before the negotiation."""
        if self.negotiated is None:
            return b""
        seconds, rest = divmod(microseconds, 1_000_000)
        found: dict[str, Any] = {
            "timestamp": {"seconds": seconds, "microseconds": rest},
            "event": name,
        }
        if data:
            found["data"] = data
        return self._encoded(found)

    def _encoded(self, value: Mapping[str, Any]) -> bytes:
        return json.dumps(value, indent=self._indent).encode("ascii") + b"\r\n"

    def _request(self, value: Any) -> Request:
        if isinstance(value, JsonError):
            return _refused(str(value))
        if not isinstance(value, dict):
            return _refused("QMP input must be a JSON object")
        id = (value["id"],) if "id" in value else ()
        command: str | None = None
        word = ""
        for name, member in value.items():
            known = name in _MEMBERS and (name != "exec-oob" or OOB in (self.negotiated or ()))
            if not known:
                return _refused(f"QMP input member '{name}' is unexpected", id)
            if name in ("execute", "exec-oob"):
                if not isinstance(member, str):
                    return _refused(f"QMP input member '{name}' must be a string", id)
                if command is not None:
                    return _refused("QMP input member 'execute' clashes with 'exec-oob'", id)
                command, word = member, name
            elif name == "arguments" and not isinstance(member, dict):
                return _refused("QMP input member 'arguments' must be an object", id)
        if command is None:
            return _refused("QMP input lacks member 'execute'", id)
        return Request(command, value.get("arguments", {}), word == "exec-oob", id)


def _refused(text: str, id: tuple[Any, ...] = ()) -> Request:
    return Request(id=id, fault=Fault(GENERIC, text))


def _id(request: Request) -> dict[str, Any]:
    return {"id": request.id[0]} if request.id else {}
