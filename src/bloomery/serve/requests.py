"""What may be asked over HTTP, after OpenAI's API: fields with their limits.

A field that is null has its default. One that would change the answer, and is not supported, is refused by name unless
it says what happens anyway; those that change nothing here (user, metadata, store, ...) are left alone. Any other is
a mistake, and refused with the nearest that there is.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from bloomery.spec.errors import InputError, nearest_match

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}
"""Fields that would change the answer, and the values under which they do not."""
HARMLESS = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
)
"""Fields that change no answer here: whose it is, where it is kept, how soon it comes."""


def _one_text(content: Any) -> Any:
    """A message's text, also where it comes as a list of parts."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    if not content or len(texts) < len(content):
        raise InputError("only parts {type: text, text: ...} are supported")
    return "\n".join(texts)


def _one_prompt(prompt: Any) -> Any:
    """A text or token ids, also where they are the only item of a list of prompts."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt)):
        return prompt
    raise InputError("one prompt is supported: a text, token ids, or a list with one of either")


def _words(stop: Any) -> Any:
    """Up to 4 non-empty words; one may stand alone."""
    words = [stop] if isinstance(stop, str) else stop
    if isinstance(words, list) and (len(words) > 4 or any(isinstance(w, str) and not 0 < len(w) <= 256 for w in words)):
        raise InputError("at most 4 words of 1 to 256 characters")
    return words


Text = Annotated[str, Field(max_length=1 << 20)]


class StreamOptions(BaseModel):
    """`include_usage`: a last chunk counts tokens."""

    include_usage: bool | None = False


class Request(BaseModel):
    """What both endpoints share."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1, strict=True)
    temperature: float = Field(default=0.7, ge=0, le=2, strict=True)
    top_p: float = Field(default=0.95, gt=0, le=1, strict=True)
    top_k: int = Field(default=0, ge=0, strict=True)
    n: int = Field(default=1, ge=1, le=4, strict=True)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, strict=True)
    stop: Annotated[list[str], BeforeValidator(_words)] = []
    stream: bool = Field(default=False, strict=True)
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _said(cls, values: Any) -> Any:
        """What is not null. Raises InputError for a field whose wish would not be met, or that is none."""
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        for key, harmless in UNSUPPORTED.items():
            if key in given and not any(_same(given[key], one) for one in harmless):
                accepted = ["none of it", *map(json.dumps, harmless)]
                raise InputError("not supported", where=key, accepted=accepted)
        known = [*cls.model_fields, *UNSUPPORTED, *HARMLESS]
        for key in given:
            if key not in known:
                raise InputError("no such field", where=key, nearest=nearest_match(key, cls.model_fields))
        return given


def _same(one: Any, other: Any) -> bool:
    """Equal, and both or neither of them a truth value: `logprobs: 0` asks for something, `false` does not."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: Annotated[Text | list[int], BeforeValidator(_one_prompt)] = ""


class ChatMessage(BaseModel):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_one_text)]

    @property
    def turn(self) -> tuple[str, str]:
        """Role and text; `developer` is OpenAI's newer word for `system`."""
        return ("system" if self.role == "developer" else self.role, self.content)


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(default=None, ge=1, strict=True)
    messages: list[ChatMessage] = Field(min_length=1, max_length=256)
