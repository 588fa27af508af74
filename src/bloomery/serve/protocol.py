"""What is said over HTTP, after OpenAI's API: requests with their limits, and answers whole or in pieces."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from bloomery.model.generate import Sampling
from bloomery.serve.talker import Answer, Talker
from bloomery.spec.errors import InputError

DEFAULT_MAX_TOKENS = 128
Text = Annotated[str, Field(max_length=1 << 20)]


class _Request(BaseModel):
    """What both endpoints share. Fields of OpenAI's that change nothing here are read and left alone."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.7, ge=0, le=2)
    top_p: float = Field(default=0.95, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    n: int = Field(default=1, ge=1, le=4)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: Annotated[str, Field(min_length=1, max_length=256)] | list[str] | None = None
    stream: bool = False

    def stop_words(self) -> list[str]:
        """Up to 4 non-empty words. Raises InputError."""
        words = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(words) > 4 or any(not 0 < len(word) <= 256 for word in words):
            raise InputError("at most 4 words of 1 to 256 characters", where="stop", found=len(words))
        return words


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Text = ""


class ChatMessage(BaseModel):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: Text


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(default=None, ge=1)
    messages: list[ChatMessage] = Field(min_length=1, max_length=256)


class Endpoints:
    """The three endpoints over one talker; `lock` lets one answer be computed at a time."""

    def __init__(self, talker: Talker, lock: threading.Lock) -> None:
        self.talker, self.lock = talker, lock
        self.name = f"{talker.name}-{talker.stage}"

    def add_to(self, app: FastAPI) -> None:
        """Register the endpoints. They are plain functions, so each runs in a worker thread."""
        app.get("/v1/models")(self.models)
        app.post("/v1/completions", response_model=None)(self.completions)
        app.post("/v1/chat/completions", response_model=None)(self.chat_completions)

    def models(self) -> dict[str, Any]:
        """The one model."""
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "bloomery"}
        return {"object": "list", "data": [{**model, "max_model_len": self.talker.context}]}

    def completions(self, request: CompletionRequest) -> Response:
        """Go on from a text."""
        return self._answer(request, self.talker.text_ids(request.prompt), request.max_tokens, chat=False)

    def chat_completions(self, request: ChatRequest) -> Response:
        """Answer a conversation."""
        ids = self.talker.chat_ids([(message.role, message.content) for message in request.messages])
        return self._answer(request, ids, request.max_completion_tokens or request.max_tokens, chat=True)

    def _answer(self, request: _Request, ids: list[int], max_tokens: int | None, *, chat: bool) -> Response:
        room = self.talker.context - len(ids)
        if room < 1 or (max_tokens is not None and max_tokens > room):
            wanted = len(ids) + (max_tokens or 1)
            accepted = f"prompt and answer of at most {self.talker.context} tokens together"
            raise InputError("past the model's context", found=wanted, accepted=accepted)
        if request.model and request.model not in (self.name, self.talker.name):
            raise InputError("no such model", where="model", found=request.model, accepted=[self.name])
        if request.stream and request.n > 1:
            raise InputError("one answer at a time can be streamed", where="n", found=request.n)
        words = request.stop_words()
        max_new = min(max_tokens or DEFAULT_MAX_TOKENS, room)
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.name,
        }
        if request.stream:
            events = self._events(request, ids, max_new, words, head, chat)
            return StreamingResponse(events, media_type="text/event-stream")
        choices, drawn = [], 0
        for number in range(request.n):
            answer = Answer()
            for _ in self._pieces(request, ids, answer, max_new, words, number):
                pass
            drawn += answer.completion_tokens
            choices.append(_choice(number, answer.text, answer.finish_reason, chat))
        usage = {"prompt_tokens": len(ids), "completion_tokens": drawn, "total_tokens": len(ids) + drawn}
        kind = "chat.completion" if chat else "text_completion"
        return JSONResponse({**head, "object": kind, "choices": choices, "usage": usage})

    def _pieces(
        self, request: _Request, ids: list[int], answer: Answer, max_new: int, words: list[str], number: int
    ) -> Iterator[str]:
        """Draw answer `number`; the lock is held for one piece at a time, so nobody waits for a slow reader."""
        seed = None if request.seed is None else request.seed + number
        sampling = Sampling(request.temperature, request.top_k, request.top_p, seed)
        pieces = self.talker.talk(ids, answer, max_new=max_new, sampling=sampling, stop=words)
        while True:
            with self.lock:
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _events(
        self, request: _Request, ids: list[int], max_new: int, words: list[str], head: dict[str, Any], chat: bool
    ) -> Iterator[str]:
        """Server-sent events: a chat's role, a chunk per piece, one with the reason it ended, then [DONE]."""
        answer = Answer()
        head = {**head, "object": "chat.completion.chunk" if chat else "text_completion"}
        if chat:
            opening = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield _event({**head, "choices": [opening]})
        for piece in self._pieces(request, ids, answer, max_new, words, 0):
            yield _event({**head, "choices": [_chunk(piece, None, chat)]})
        yield _event({**head, "choices": [_chunk("", answer.finish_reason, chat)]})
        yield "data: [DONE]\n\n"


def _choice(number: int, text: str, reason: str, chat: bool) -> dict[str, Any]:
    content = {"message": {"role": "assistant", "content": text}} if chat else {"text": text, "logprobs": None}
    return {"index": number, **content, "finish_reason": reason}


def _chunk(piece: str, reason: str | None, chat: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"delta": {"content": piece} if piece else {}} if chat else {"text": piece}
    return {"index": 0, **content, "finish_reason": reason}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
