"""Who may talk to the server: hosts, origins, the token, and how often.

A page of another site must not reach a server on this machine, even if the browser lets it try
(DNS rebinding, cross-site WebSockets). So every request names a host that is allowed, everything
that changes something comes from a page of this server or from a program with the token, and the
token itself stands in the fragment of the address, which browsers send to nobody.
"""

from __future__ import annotations

import hmac
import re
import secrets
import threading
import time
from collections.abc import Iterable
from typing import Any

SAFE = ("GET", "HEAD")
MOST_ADDRESSES = 10_000  # that are counted at a time
_HOST = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(?::[0-9]+)?")  # a name or [address], and a port


def new_token() -> str:
    """32 random bytes for an address."""
    return secrets.token_urlsafe(32)


class Guard:
    """Checks of one server.

    Args:
      token: what clients must know; None lets all in.
      hosts: names that requests may address, without port, e.g. `127.0.0.1`.
    """

    def __init__(self, token: str | None, hosts: Iterable[str]):
        self._token = token
        self._hosts = frozenset(host.lower() for host in hosts)

    def knows(self, token: str | None) -> bool:
        """Whether a token is the right one; takes the same time for all wrong ones."""
        if self._token is None:
            return True
        given = (token or "").encode("utf-8", "replace")
        return hmac.compare_digest(given, self._token.encode())

    def host(self, value: str) -> bool:
        """Whether the Host of a request is allowed."""
        found = _HOST.fullmatch(value.strip().lower())
        return found is not None and found[1] in self._hosts

    def origin(self, origin: str | None, host: str, scheme: str, authorized: bool) -> bool:
        """Whether something that changes anything may come from there.

        Args:
          origin: what the request says; browsers always say it.
          host: of the request.
          scheme: http or https.
          authorized: whether the request carries the token itself, as programs do.
        """
        if origin is None:
            return authorized
        return origin.lower() == f"{scheme}://{host.lower()}" and self.host(host)


def bearer(header: str | None) -> str | None:
    """The token of an Authorization header."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


class Rate:
    """At most so many events in a window, for each address.

    Args:
      most: events.
      seconds: of the window.
    """

    def __init__(self, most: int, seconds: float):
        self.most, self.seconds = most, seconds
        self._times: dict[str, list[float]] = {}
        self._lock = threading.Lock()

    def allows(self, address: str, now: float | None = None) -> bool:
        """Count an event of an address, and say whether it is one too many."""
        now = time.monotonic() if now is None else now
        with self._lock:
            recent = [t for t in self._times.get(address, []) if now - t < self.seconds]
            if len(recent) >= self.most:
                self._times[address] = recent
                return False
            if address not in self._times and len(self._times) >= MOST_ADDRESSES:
                self._times.pop(next(iter(self._times)))
            self._times[address] = [*recent, now]
            return True


HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self'"
    " blob:; connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
}


class GuardMiddleware:
    """ASGI: refuses requests from elsewhere before they reach the app, and adds `HEADERS`."""

    def __init__(self, app: Any, guard: Guard):
        self.app, self.guard = app, guard

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        names = [name.lower() for name, _ in scope["headers"]]
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE
        secure = scope.get("scheme") in ("https", "wss")
        refusal = ""
        if any(names.count(name) > 1 for name in (b"host", b"origin")):
            refusal = "expected one host and one origin"
        elif not self.guard.host(host):
            refusal = "this host is not allowed"
        elif changes:
            token = bearer(headers.get(b"authorization"))
            authorized = token is not None and self.guard.knows(token)
            scheme = "https" if secure else "http"
            if not self.guard.origin(headers.get(b"origin"), host, scheme, authorized):
                refusal = "this origin is not allowed"
        if refusal:
            await _refuse(scope, send, refusal)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self.app(scope, receive, with_headers)


async def _refuse(scope: Any, send: Any, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 4403, "reason": reason})
        return
    body = reason.encode()
    await send(
        {
            "type": "http.response.start",
            "status": 403,
            "headers": [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))],
        }
    )
    await send({"type": "http.response.body", "body": body})
