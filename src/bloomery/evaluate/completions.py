"""What a model writes after some prompts: not a score, but what a person looks at first."""

from __future__ import annotations

from collections.abc import Sequence

from bloomery.data.tokenizer import Tokenizer
from bloomery.model.generate import Sampling, generate
from bloomery.model.transformer import Transformer


def prompt_ids(tokenizer: Tokenizer, prompt: str, room: int) -> list[int]:
    """Token ids of a prompt, the last `room` of them; an empty prompt starts a document."""
    ids = tokenizer.encode(prompt)
    if not ids:
        return [tokenizer.end if tokenizer.end is not None else 0]
    return ids[-room:]


def complete(
    module: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], *, max_new: int, sampling: Sampling
) -> list[str]:
    """The continuation of each prompt, without the prompt; long prompts keep their end."""
    room = max(1, module.model.max_seq_len - max_new)
    texts = []
    for prompt in prompts:
        ids = prompt_ids(tokenizer, prompt, room)
        new = generate(module, ids, max_new=max_new, sampling=sampling, stop=(tokenizer.end,), limit=tokenizer.size)
        texts.append(tokenizer.decode(list(new)))
    return texts
