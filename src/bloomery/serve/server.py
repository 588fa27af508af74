"""OpenAI-compatible HTTP over one model: /v1/models, /v1/completions, /v1/chat/completions, streaming included.

What would change the answer and is not supported is refused. Limits: a body of 1 MiB that comes within half a minute,
prompt and answer within the model's context, n <= 4, one answer computed at a time. Without a token file it listens on
the loopback alone and answers only requests addressed to it (no rebinding of names).
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from bloomery.model.generate import NoNumbers
from bloomery.serve.guards import BearerToken, BodyLimit, LoopbackNames, RequestLimit, problem
from bloomery.serve.protocol import Endpoints, NoSuchModel, PastContext, failed
from bloomery.serve.talker import Talker
from bloomery.spec.errors import InputError, in_plain_words

if TYPE_CHECKING:
    import uvicorn

MIN_TOKEN_CHARACTERS = 16
MAX_CONNECTIONS = 256
"""Past it the HTTP library answers, in words of its own; our limit of requests, which says it as JSON, lies below."""
LAST_ANSWERS_S = 5
"""How long requests that are under way may take on once the server is to end."""


def create_app(talker: Talker, *, token: str | None = None) -> FastAPI:
    """The application. With `token` every request needs `Authorization: Bearer TOKEN`."""
    app = FastAPI(title="bloomery", docs_url=None, redoc_url=None, openapi_url=None)
    Endpoints(talker, threading.Lock()).add_to(app)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(InputError, _refused)
    app.add_exception_handler(NoNumbers, _failed)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(BodyLimit)
    if token is None:
        app.add_middleware(LoopbackNames, is_ours=is_loopback)
    else:
        app.add_middleware(BearerToken, token=token)
    app.add_middleware(RequestLimit)
    return app


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return problem(400, f"the body is not valid JSON ({first['ctx']['error']} at character {first['loc'][-1]})")
    # Pydantic names a member of a union in the path, as `constrained-str`: no field a client has written.
    path = [str(part) for part in first["loc"] if part != "body" and re.fullmatch(r"\w+", str(part))]
    if not path and first["type"] == "model_attributes_type":
        return problem(400, "the body must be a JSON object, its content-type application/json")
    message = ": ".join(filter(None, (".".join(path), in_plain_words(str(first["msg"])))))
    named = getattr(first.get("ctx", {}).get("error"), "where", "")
    return problem(400, message, param=path[0] if path else named or None)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        return problem(error.status_code, str(error.detail))
    if isinstance(error, NoSuchModel):
        return problem(404, str(error), param="model", code="model_not_found")
    code = "context_length_exceeded" if isinstance(error, PastContext) else None
    return problem(400, str(error), param=getattr(error, "where", "") or None, code=code)


async def _failed(_: Request, error: Exception) -> JSONResponse:
    return failed(error)


def read_token(path: Path | None, host: str) -> str | None:
    """The token of a file. Raises InputError when there is none and `host` can be reached from elsewhere."""
    if path is None:
        if not is_loopback(host):
            raise InputError("reachable from other machines: needs --token-file", where="--host", found=host)
        return None
    if not path.is_file():
        raise InputError("no such file", where=f"--token-file {path}")
    token = path.read_bytes().decode("utf-8", errors="replace").strip()
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
        raise InputError(f"cannot listen there ({reason.lower()})", where=address(host, port)) from None
    return listener


def address(host: str, port: int) -> str:
    """Host and port as a URL has them: an address of IPv6 stands in brackets.

    >>> address("127.0.0.1", 8000), address("::1", 8000)
    ('127.0.0.1:8000', '[::1]:8000')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve_forever(talker: Talker, listener: socket.socket, *, token: str | None) -> None:
    """Answer until interrupted."""
    import uvicorn

    uvicorn.Server(_config(create_app(talker, token=token))).run(sockets=[listener])


def _config(app: FastAPI) -> uvicorn.Config:
    import uvicorn

    return uvicorn.Config(
        app,
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=LAST_ANSWERS_S,
        lifespan="off",
    )
