"""What stands before the endpoints: who may ask, how many at once, how large and how slow a body may be.

Refusals have OpenAI's form.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi.responses import JSONResponse

MAX_BODY_BYTES = 1 << 20
MAX_REQUESTS = 32
"""Fewer than the threads that answers are drawn in (40), so that none waits for a thread."""
BODY_S = 30.0
"""How long a body may take to come: a client that stops half-way keeps its place no longer."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_KINDS = {401: "authentication_error", 500: "server_error", 503: "server_error"}


def problem(status: int, message: str, *, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    error = {"message": message, "type": _KINDS.get(status, "invalid_request_error"), "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status)


class BodyLimit:
    """Refuses bodies past the limit, by their stated length or, for chunked ones, as they come in; and slow ones."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI: reads the whole body (at most the limit) and hands it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = stated.isdigit() and int(stated) > MAX_BODY_BYTES
        try:
            body = b"" if too_large else await asyncio.wait_for(_whole_body(receive), BODY_S)
        except TimeoutError:
            late = problem(408, f"a body that comes within {BODY_S:g} s is accepted")
            late.headers["connection"] = "close"
            await late(scope, receive, send)
            return
        if body is None:
            return
        if too_large or len(body) > MAX_BODY_BYTES:
            await problem(413, f"a body of at most {MAX_BODY_BYTES} bytes is accepted")(scope, receive, send)
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replay, send)


async def _whole_body(receive: Receive) -> bytes | None:
    """The body, or so much of it that it is seen to be too large; None when the client has gone."""
    body, more = b"", True
    while more and len(body) <= MAX_BODY_BYTES:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body, more = body + message.get("body", b""), bool(message.get("more_body"))
    return body


class RequestLimit:
    """Refuses requests while as many as the limit are under way."""

    def __init__(self, app: Any) -> None:
        self.app, self.under_way = app, 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.under_way >= MAX_REQUESTS:
            await problem(503, f"{MAX_REQUESTS} requests are under way; try again later")(scope, receive, send)
            return
        self.under_way += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.under_way -= 1


class LoopbackNames:
    """Refuses requests that are addressed to another name than the loopback's: a page has had its name rebound."""

    def __init__(self, app: Any, is_ours: Callable[[str], bool]) -> None:
        self.app, self.is_ours = app, is_ours

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and not self.is_ours(_host(scope)):
            await problem(400, "the host header names another machine than this one's loopback")(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _host(scope: Message) -> str:
    """The host a request is addressed to, without port and brackets."""
    named = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
    return named[1:].partition("]")[0] if named.startswith("[") else named.partition(":")[0]


class BearerToken:
    """Refuses requests without the token, before their body is read."""

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.expected = app, token.encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        scheme, _, given = dict(scope.get("headers", [])).get(b"authorization", b"").partition(b" ")
        known = scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self.expected)
        if scope["type"] == "http" and not known:
            refusal = problem(401, "a bearer token is needed")
            refusal.headers["www-authenticate"] = "Bearer"
            await refusal(scope, receive, send)
            return
        await self.app(scope, receive, send)
