"""What is needed of HTTP/1.1 (RFC 9112) to answer one request on a connection: bytes in, a request
out.  The peer is not trusted: what comes before its empty line has a bound, and a body is not
read."""

from __future__ import annotations

import re

from ..records import NamedTuple

HEAD_LIMIT = 8 << 10
_LINE = re.compile(rb"([A-Z]{1,16}) ([!-~]{1,2048}) HTTP/1\.[01]")
_END = re.compile(rb"\r?\n\r?\n")
_REASONS = {
    200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
}  # fmt: skip


class Request(NamedTuple):
    """What was asked; ``status`` is the answer already where it is not 200."""

    status: int
    method: str = "GET"
    path: str = ""


class HttpServer:
    """The request on one connection."""

    def __init__(self) -> None:
        self._head = bytearray()

    def receive(self, data: bytes) -> Request | None:
        """The request, once its head is whole."""
        looked_at = max(len(self._head) - 3, 0)
        self._head += data
        end = _END.search(self._head, looked_at)
        if end is None:
            return Request(431) if len(self._head) > HEAD_LIMIT else None
        match = _LINE.fullmatch(self._head[: end.start()].partition(b"\n")[0].rstrip(b"\r"))
        if match is None:
            return Request(400)
        method, target = (part.decode("ascii") for part in match.groups())
        if method not in ("GET", "HEAD"):
            return Request(405, method)
        return Request(200, method, target.partition("?")[0])


def response(request: Request, body: bytes, type: str = "text/plain; charset=utf-8") -> bytes:
    """The answer to ``request``, behind which the connection is closed."""
    reason = _REASONS[request.status]
    if request.status != 200:
        body = f"{request.status} {reason}\n".encode()
    lines = [
        f"HTTP/1.1 {request.status} {reason}",
        f"Content-Type: {type}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if request.status == 405:
        lines.append("Allow: GET, HEAD")
    head = "\r\n".join(lines).encode("ascii") + b"\r\n\r\n"
    return head if request.method == "HEAD" else head + body
