"""Which tokens begin and end the texts of a Hugging Face directory's model, in and out, and what else it says of them.

Ids come from config.json and generation_config.json, else from the names in tokenizer_config.json. Nothing is guessed:
an id that no token has is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bloomery.data.tokenizer import ASSISTANT, END, PAD, SPECIALS, USER, Ends, Tokenizer
from bloomery.evaluate.tensor_files import read_config, read_template
from bloomery.spec.errors import InputError
from bloomery.spec.seal import check_sums

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
SETTINGS = (TOKENIZER_CONFIG, TEMPLATE_FILE, GENERATION_CONFIG)
"""What an import keeps beside the tokenizer, for an export to start from."""
_KEPT = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "additional_special_tokens",
    "extra_special_tokens",
    "padding_side",
    "chat_template",
)
"""Of tokenizer_config.json; the rest names code, or is in tokenizer.json."""
_CONTENT = "{{ message['content']" + "".join(f" | replace('{mark}', '< {mark[1:]}')" for mark in SPECIALS) + " }}"
"""A mark that a message spells is broken by a blank: other programs would read it as the mark of a turn."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    + (ASSISTANT + _CONTENT + END)
    + "{% elif message['role'] in ['system', 'developer', 'user'] %}"
    + (USER + _CONTENT)
    + "{% else %}{{ raise_exception('no such role: ' + message['role']) }}{% endif %}"
    + ("{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}")
)
"""The token ids of `serve.talker.Talker.chat_ids`, of messages that spell no marks."""


def ends_of(source: Path, config: dict[str, Any], tokenizer: Tokenizer) -> Ends:
    """The ends of a directory's model. Raises InputError for what is no token id."""
    # A chat model's generation_config.json often knows more ends than its config.json, whose first is that of texts.
    said = {"config.json": config, GENERATION_CONFIG: _settings(source / GENERATION_CONFIG)}
    names = _settings(source / TOKENIZER_CONFIG)

    def stated(kind: str) -> tuple[int, ...]:
        key = f"{kind}_token_id"
        given = [token for file, values in said.items() for token in _ids(values.get(key), f"{source / file}: {key}")]
        found = tuple(dict.fromkeys(token for token in given if tokenizer.name(token) is not None))
        return found or _named(names.get(f"{kind}_token"), tokenizer)

    bos, eos, start = stated("bos"), stated("eos"), tokenizer.before("a")
    if not start and names.get("add_bos_token") is True:
        # Said beside tokenizer.json: older programs add it themselves.
        start = bos[:1]
    begins, turns = next(iter((*bos, *start, *tokenizer.ends.eos)), None), chat_template(source) == CHAT_TEMPLATE
    return Ends(bos=begins, eos=eos or tokenizer.ends.eos, start=start, turns=turns)


def chat_template(folder: Path) -> Any:
    """The chat template of a directory, in a file of its own or among the tokenizer's settings; None: it has none."""
    path = folder / TEMPLATE_FILE
    return read_template(path) if path.is_file() else _settings(folder / TOKENIZER_CONFIG).get("chat_template")


def kept_settings(data: Path, tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the directory that a model came from says of drawing, and of its tokens; nothing for a tokenizer of ours."""
    if tokenizer.own is None:
        return {}, {}
    check_sums(data, SETTINGS)
    names = _settings(data / TOKENIZER_CONFIG)
    return _settings(data / GENERATION_CONFIG), {key: names[key] for key in _KEPT if names.get(key) is not None}


def token_settings(tokenizer: Tokenizer, *, turns: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an exported directory says of the tokenizer: ids for its configs, names for tokenizer_config.json. `turns`:
    the model has read our marks of them."""
    ends, pad = tokenizer.ends, tokenizer.find(PAD)
    eos = ends.eos[0] if len(ends.eos) == 1 else list(ends.eos) or None
    ids = {"eos_token_id": eos, "bos_token_id": ends.bos, "pad_token_id": pad}
    names = {
        "eos_token": tokenizer.name(ends.eos[0]) if ends.eos else None,
        "bos_token": None if ends.bos is None else tokenizer.name(ends.bos),
        "pad_token": None if pad is None else PAD,
        "chat_template": CHAT_TEMPLATE if turns else None,
        "add_bos_token": True if ends.start and not tokenizer.before("a") else None,
    }
    return ids, {key: value for key, value in names.items() if value is not None}


def _settings(path: Path) -> dict[str, Any]:
    return read_config(path) if path.is_file() else {}


def _ids(value: Any, where: str) -> tuple[int, ...]:
    """One id, a list of them, or none."""
    given = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int for token in given):
        raise InputError("a token id or a list of them is expected", where=where, found=value)
    return tuple(token for token in given if 0 <= token < 2**32)


def _named(value: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token of a name, which may stand in an object with how text around it is read."""
    name = value.get("content") if isinstance(value, dict) else value
    found = tokenizer.find(name) if isinstance(name, str) else None
    return () if found is None else (found,)
