"""OpenAI-compatible HTTP over one model: /v1/models, /v1/completions, /v1/chat/completions, streaming included.

What would change the answer and is not supported is refused. Limits: a body of 1 MiB, prompt and answer within the
model's context, n <= 4, one answer computed at a time. Without a token file it listens on the loopback alone and
answers only requests addressed to it (no rebinding of names).
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from bloomery.serve.protocol import Endpoints, NoSuchModel
from bloomery.serve.talker import Talker
from bloomery.spec.errors import InputError, in_plain_words

MAX_BODY_BYTES = 1 << 20
MIN_TOKEN_CHARACTERS = 16
LOOPBACK_NAMES = ["127.0.0.1", "localhost", "[::1]"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def create_app(talker: Talker, *, token: str | None = None) -> FastAPI:
    """The application. With `token` every request needs `Authorization: Bearer TOKEN`."""
    app = FastAPI(title="bloomery", docs_url=None, redoc_url=None, openapi_url=None)
    Endpoints(talker, threading.Lock()).add_to(app)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(InputError, _refused)
    app.add_middleware(BodyLimit)
    if token is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_NAMES)
    else:
        app.add_middleware(BearerToken, token=token)
    return app


def _problem(status: int, message: str, *, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": code or status}
    return JSONResponse({"error": error}, status_code=status)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return _problem(400, f"the body is not valid JSON ({first['ctx']['error']} at character {first['loc'][-1]})")
    path = [str(part) for part in first["loc"] if part != "body"]
    if not path and first["type"] == "model_attributes_type":
        return _problem(400, "the body must be a JSON object, its content-type application/json")
    message = ": ".join(filter(None, (".".join(path), in_plain_words(str(first["msg"])))))
    return _problem(400, message, param=path[0] if path else None)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        return _problem(error.status_code, str(error.detail))
    if isinstance(error, NoSuchModel):
        return _problem(404, str(error), param="model", code="model_not_found")
    return _problem(400, str(error))


class BodyLimit:
    """Refuses bodies past the limit, by their stated length or, for chunked ones, as they come in."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI: reads the whole body (at most the limit) and hands it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = b"", not (stated.isdigit() and int(stated) > MAX_BODY_BYTES)
        too_large = not more
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body, more = body + message.get("body", b""), bool(message.get("more_body"))
            if len(body) > MAX_BODY_BYTES:
                too_large, more = True, False
        if too_large:
            response = _problem(413, f"a body of at most {MAX_BODY_BYTES} bytes is accepted")
            await response(scope, receive, send)
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replay, send)


class BearerToken:
    """Refuses requests without the token, before their body is read."""

    def __init__(self, app: Any, token: str) -> None:
        self.app, self.expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        if scope["type"] == "http" and not hmac.compare_digest(given, self.expected):
            await _problem(401, "a bearer token is needed")(scope, receive, send)
            return
        await self.app(scope, receive, send)


def read_token(path: Path | None, host: str) -> str | None:
    """The token of a file. Raises InputError when there is none and `host` can be reached from elsewhere."""
    if path is None:
        if not is_loopback(host):
            raise InputError("reachable from other machines: needs --token-file", where="--host", found=host)
        return None
    if not path.is_file():
        raise InputError("no such file", where=f"--token-file {path}")
    token = path.read_text(encoding="utf-8").strip()
    if len(token) < MIN_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
        accepted = f"one line of at least {MIN_TOKEN_CHARACTERS} printable ASCII characters"
        raise InputError("not a token", where=f"--token-file {path}", accepted=accepted)
    return token


def is_loopback(host: str) -> bool:
    """True when only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises InputError when the port is in use or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen there ({reason.lower()})", where=f"{host}:{port}") from None
    return listener


def serve_forever(talker: Talker, listener: socket.socket, *, token: str | None) -> None:
    """Answer until interrupted."""
    import uvicorn

    config = uvicorn.Config(create_app(talker, token=token), log_level="warning", limit_concurrency=64, lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])
