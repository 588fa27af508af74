"""What a model writes after some prompts: not a score, but what a person looks at first."""

from __future__ import annotations

from collections.abc import Sequence

from bloomery.data.tokenizer import Tokenizer
from bloomery.model.generate import Sampling, generate
from bloomery.model.transformer import Transformer


def prompt_ids(tokenizer: Tokenizer, prompt: str, room: int | None = None) -> list[int]:
    """Token ids of a prompt after those the model's texts start with, the last of them that fit `room`.

    An empty prompt starts a document. Raises InputError when the tokenizer has no token for that.
    """
    start, ids = list(tokenizer.ends.start), tokenizer.encode(prompt)
    if not ids:
        return start or [tokenizer.end if tokenizer.ends.bos is None else tokenizer.ends.bos]
    return start + (ids if room is None else ids[-max(1, room - len(start)) :])


def complete(
    module: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], *, max_new: int, sampling: Sampling
) -> list[str]:
    """The continuation of each prompt, without the prompt; long prompts keep their end."""
    room = max(1, module.model.max_seq_len - max_new)
    texts = []
    for prompt in prompts:
        ids = prompt_ids(tokenizer, prompt, room)
        stops, size, holes = tokenizer.ends.eos, tokenizer.size, tokenizer.holes(module.model.vocab)
        new = generate(module, ids, max_new=max_new, sampling=sampling, stop=stops, limit=size, holes=holes)
        texts.append(tokenizer.after(ids)(list(new)))
    return texts
