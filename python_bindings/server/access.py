"""Who may ask the server, and how many at a time: decided before anything of a request is read."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from blockffn.server.errors import ApiError

OPEN_PATHS = ("/", "/health")  # without a key: the page asks for it
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Access:
    """Who may ask. keys: one of these as bearer token; none: whoever reaches the address.

    hosts: names under which the server may be called, against pages that rebind a name of theirs to this machine; any
    where there is a key.
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = LOCAL_HOSTS


class Guard:
    """Host, key and number of requests, before anything of a request is read."""

    def __init__(self, app: ASGIApp, access: Access, most: int) -> None:
        self._app, self._access, self._most = app, access, most
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refusal(scope["path"], headers)
        if refused is not None:
            await refused.response()(scope, receive, send)
            return
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1

    def _refusal(self, path: str, headers: dict[str, str]) -> ApiError | None:
        if self._open >= self._most:
            return ApiError(429, f"{self._open} requests are open, and at most that many may be", retry_after=1)
        keys = self._access.keys
        if not keys:
            host = headers.get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in self._access.hosts:
                return ApiError(403, f"host: expected {' or '.join(self._access.hosts)}, found {host[:80]!r}")
            return None
        if path in OPEN_PATHS:
            return None
        kind, _, given = headers.get("authorization", "").partition(" ")
        known = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
        if kind.lower() == "bearer" and any(known):
            return None
        return ApiError(
            401, "expected one of this server's keys as 'Authorization: Bearer KEY'", code="invalid_api_key"
        )
