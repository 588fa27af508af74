"""What is said over HTTP, after OpenAI's API: answers whole or in pieces. What may be asked is in `requests`."""

from __future__ import annotations

import json
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from bloomery.data.order import nth_seed
from bloomery.model.generate import NoNumbers, Sampling
from bloomery.serve.guards import problem
from bloomery.serve.requests import ChatRequest, CompletionRequest, Request
from bloomery.serve.talker import Answer, Talker
from bloomery.spec.errors import InputError

LOG = logging.getLogger("uvicorn.error")
DEFAULT_MAX_TOKENS = 128
CLIENT_GONE = 499
"""For the log alone: nobody is there to read it."""


class NoSuchModel(InputError):
    """Another model than the one served was asked for."""


class PastContext(InputError):
    """Prompt and answer are longer than the model's context."""


def failed(error: Exception) -> JSONResponse:
    """No fault of the request; what else was raised goes to the log, not to whoever asked."""
    known = isinstance(error, NoNumbers)
    return problem(500, str(error) if known else "the answer could not be computed; the server's log says why")


@dataclass(frozen=True)
class _Asked:
    """A request with its prompt's tokens, how many more may be drawn, and what every part of the answer begins with."""

    request: Request
    ids: list[int]
    max_new: int
    head: dict[str, Any]
    chat: bool

    def usage(self, drawn: int) -> dict[str, int]:
        """Tokens of the prompt and of the answers."""
        return {"prompt_tokens": len(self.ids), "completion_tokens": drawn, "total_tokens": len(self.ids) + drawn}

    def sampling(self, number: int) -> Sampling:
        """How answer `number` is drawn."""
        asked = self.request
        seed = None if asked.seed is None else nth_seed(asked.seed, number)
        return Sampling(asked.temperature, asked.top_k, asked.top_p, seed)


class Endpoints:
    """The endpoints over one talker; `lock` lets one answer be computed at a time."""

    def __init__(self, talker: Talker, lock: threading.Lock) -> None:
        self.talker, self.lock = talker, lock
        self.name = f"{talker.name}-{talker.stage}"

    def add_to(self, app: FastAPI) -> None:
        """Register the endpoints. Tokens are counted and drawn in worker threads, so nothing else waits for them."""
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/completions", response_model=None)(self.completions)
        app.post("/v1/chat/completions", response_model=None)(self.chat_completions)

    async def models(self) -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [await self.model(self.name)]}

    async def model(self, name: str) -> dict[str, Any]:
        """The one model, by its name."""
        self._check_name(name)
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "bloomery"}
        return {**model, "max_model_len": self.talker.context}

    def _check_name(self, name: str) -> None:
        if name not in (self.name, self.talker.name):
            raise NoSuchModel("no such model", where="model", found=name, accepted=[self.name])

    async def completions(self, request: CompletionRequest, client: HttpRequest) -> Response:
        """Go on from a text, or from token ids as they are."""
        return await self._answer(await run_in_threadpool(self._completion, request), client)

    async def chat_completions(self, request: ChatRequest, client: HttpRequest) -> Response:
        """Answer a conversation."""
        return await self._answer(await run_in_threadpool(self._chat, request), client)

    def _completion(self, request: CompletionRequest) -> _Asked:
        prompt = request.prompt
        ids = self.talker.text_ids(prompt) if isinstance(prompt, str) else prompt
        if not 0 <= min(ids) <= max(ids) < self.talker.module.model.vocab:
            accepted = f"0 to {self.talker.module.model.vocab - 1}"
            raise InputError("not ids of this model's tokens", where="prompt", accepted=accepted)
        return self._asked(request, ids, request.max_tokens, chat=False)

    def _chat(self, request: ChatRequest) -> _Asked:
        """Raises InputError where the model would read the last message alone."""
        if len(request.messages) > 1 and not self.talker.reads_turns:
            problem = "this model knows no turns: it goes on from one message"
            raise InputError(problem, where="messages", found=len(request.messages), accepted="one message")
        ids = self.talker.chat_ids([message.turn for message in request.messages])
        return self._asked(request, ids, request.max_completion_tokens or request.max_tokens, chat=True)

    def _asked(self, request: Request, ids: list[int], max_tokens: int | None, *, chat: bool) -> _Asked:
        if request.model:
            self._check_name(request.model)
        room = self.talker.context - len(ids)
        if room < 1 or (max_tokens is not None and max_tokens > room):
            wanted = len(ids) + (max_tokens or 1)
            accepted = f"prompt and answer of at most {self.talker.context} tokens together"
            where = "messages" if chat else "prompt"
            raise PastContext("past the model's context", where=where, found=wanted, accepted=accepted)
        if request.stream and request.n > 1:
            raise InputError("one answer at a time can be streamed", where="n", found=request.n)
        name, kind = ("chatcmpl", "chat.completion") if chat else ("cmpl", "text_completion")
        head = {
            "id": f"{name}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if chat and request.stream else kind,
            "created": int(time.time()),
            "model": self.name,
        }
        return _Asked(request, ids, min(max_tokens or DEFAULT_MAX_TOKENS, room), head, chat)

    async def _answer(self, asked: _Asked, client: HttpRequest) -> Response:
        """A stream, or the whole; that is given up where its client goes away."""
        if asked.request.stream:
            return StreamingResponse(self._told(asked), media_type="text/event-stream")
        choices, drawn = [], 0
        for number in range(asked.request.n):
            answer = Answer()
            async for _ in iterate_in_threadpool(self._pieces(asked, answer, number)):
                if await client.is_disconnected():
                    return Response(status_code=CLIENT_GONE)
            drawn += answer.completion_tokens
            choices.append(_choice(number, answer.text, answer.finish_reason, asked.chat))
        return JSONResponse({**asked.head, "choices": choices, "usage": asked.usage(drawn)})

    def _pieces(self, asked: _Asked, answer: Answer, number: int) -> Iterator[str]:
        """Draw answer `number`; the lock is held for one piece at a time, so nobody waits for a slow reader."""
        settings: dict[str, Any] = {"sampling": asked.sampling(number), "stop": asked.request.stop}
        pieces = self.talker.talk(asked.ids, answer, max_new=asked.max_new, **settings)
        while True:
            with self.lock:
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _told(self, asked: _Asked) -> Iterator[str]:
        """The events; after a fault, which no status can tell any more, an error in OpenAI's form is the last."""
        try:
            yield from self._events(asked)
        except Exception as error:
            LOG.exception("an answer broke off")
            yield f"data: {bytes(failed(error).body).decode()}\n\n"

    def _events(self, asked: _Asked) -> Iterator[str]:
        """Server-sent events: a chat's role, a chunk per piece, why it ended, usage if asked for, then [DONE]."""
        answer, chat = Answer(), asked.chat
        counted = bool(asked.request.stream_options.include_usage)
        head = {**asked.head, "usage": None} if counted else asked.head
        if chat:
            opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield _event({**head, "choices": [opening]})
        for piece in self._pieces(asked, answer, 0):
            yield _event({**head, "choices": [_chunk(piece, None, chat)]})
        yield _event({**head, "choices": [_chunk("", answer.finish_reason, chat)]})
        if counted:
            yield _event({**head, "choices": [], "usage": asked.usage(answer.completion_tokens)})
        yield "data: [DONE]\n\n"


def _choice(number: int, text: str, reason: str, chat: bool) -> dict[str, Any]:
    content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text, "logprobs": None}
    return {"index": number, **content, "finish_reason": reason}


def _chunk(piece: str, reason: str | None, chat: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"delta": {"content": piece} if piece else {}} if chat else {"text": piece}
    return {"index": 0, **content, "finish_reason": reason}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
