"""The server: OpenAI's shapes, and every limit refused in one line of JSON."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from anyio import to_thread
from fastapi.testclient import TestClient

from bloomery.data import tokenizer as tokenizers
from bloomery.model.generate import NoNumbers
from bloomery.model.transformer import Transformer
from bloomery.serve import guards, server
from bloomery.serve.guards import MAX_BODY_BYTES, BodyLimit, Message
from bloomery.serve.server import create_app, listen, read_token
from bloomery.serve.talker import Talker
from bloomery.spec.errors import InputError
from bloomery.spec.model import Model

CONTEXT = 64
TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def talker() -> Talker:
    tokenizer = tokenizers.train(iter(["hello world, how are you?", "一二三四五"] * 20), 300)
    torch.manual_seed(0)
    model = Model(layers=1, hidden=16, heads=2, ffn_hidden=32, vocab=tokenizer.size, max_seq_len=CONTEXT)
    return Talker("toy", "sft", Transformer(model).eval(), tokenizer)


@pytest.fixture
def client(talker: Talker) -> Iterator[TestClient]:
    with TestClient(create_app(talker), base_url="http://127.0.0.1") as client:
        yield client


def chat(client: TestClient, **changes: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "seed": 1, **changes}
    return client.post("/v1/chat/completions", json=body)


def refused(response: Any, status: int, *words: str) -> None:
    """An OpenAI error object with the status, holding every word."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] is None or isinstance(error["code"], str)
    for word in words:
        assert word in error["message"], error


def test_models_lists_the_one_model_with_its_context(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == ("toy-sft", CONTEXT)


def test_a_chat_answer_has_the_shape_of_openai(client: TestClient) -> None:
    found = chat(client).json()
    assert found["object"] == "chat.completion"
    (choice,) = found["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + found["usage"]["completion_tokens"]
    assert found["usage"]["completion_tokens"] <= 8


def test_one_seed_gives_one_answer_and_n_gives_different_ones(client: TestClient) -> None:
    texts = [choice["message"]["content"] for choice in chat(client, n=4, temperature=1.5).json()["choices"]]
    again = [choice["message"]["content"] for choice in chat(client, n=4, temperature=1.5).json()["choices"]]
    assert texts == again
    assert len(set(texts)) > 1


def test_answers_of_neighbouring_seeds_are_others(client: TestClient) -> None:
    first, second = (chat(client, n=2, temperature=1.5, max_tokens=30, seed=seed).json()["choices"] for seed in (1, 2))
    assert first[0]["message"] == chat(client, temperature=1.5, max_tokens=30).json()["choices"][0]["message"]
    assert first[1]["message"] != second[0]["message"]


@pytest.mark.parametrize(
    ("fault", "words"), [(NoNumbers("no scores"), "no scores"), (KeyError("weight"), "the server's log says why")]
)
def test_a_fault_of_the_server_has_the_shape_of_openai_too(
    talker: Talker, monkeypatch: pytest.MonkeyPatch, fault: Exception, words: str
) -> None:
    def talk(*_: Any, **__: Any) -> Iterator[str]:
        raise fault

    monkeypatch.setattr(Talker, "talk", talk)
    with TestClient(create_app(talker), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        response, streamed = chat(client), chat(client, stream=True)
    refused(response, 500, words)
    last = streamed.text.rstrip().rpartition("data: ")[2]
    assert json.loads(last)["error"] == response.json()["error"]
    assert response.json()["error"]["type"] == "server_error" and "weight" not in response.text


def post(body: dict[str, Any]) -> Message:
    """The scope of a POST to the completions."""
    return {
        "type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "body": json.dumps(body).encode(),
    }  # fmt: skip


def test_an_answer_whose_client_has_gone_is_not_drawn_to_its_end(
    talker: Talker, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, scope = list[str](), post({"prompt": "hello", "n": 2})
    messages = [{"type": "http.request", "body": scope["body"]}, {"type": "http.disconnect"}]

    def talk(*_: Any, **__: Any) -> Iterator[str]:
        for _ in range(50):
            drawn.append("piece")
            yield "piece"

    async def receive() -> Message:
        return messages.pop(0) if len(messages) > 1 else messages[0]

    async def send(_: Message) -> None:
        pass

    monkeypatch.setattr(Talker, "talk", talk)
    asyncio.run(create_app(talker)(scope, receive, send))
    assert len(drawn) == 1


def test_the_models_are_told_while_no_thread_is_free(talker: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, done = threading.Event(), threading.Event()

    def talk(*_: Any, **__: Any) -> Iterator[str]:
        begun.set()
        done.wait(20)
        yield "piece"

    async def ask() -> list[int]:
        to_thread.current_default_thread_limiter().total_tokens = 1
        transport = httpx.ASGITransport(create_app(talker))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            answer = asyncio.create_task(client.post("/v1/completions", json={"prompt": "hello"}))
            while not begun.is_set():
                await asyncio.sleep(0.001)
            models = await asyncio.wait_for(client.get("/v1/models"), 10)
            done.set()
            return [models.status_code, (await answer).status_code]

    monkeypatch.setattr(Talker, "talk", talk)
    assert asyncio.run(ask()) == [200, 200]


def test_a_stream_says_what_the_whole_answer_says(client: TestClient) -> None:
    whole = chat(client).json()["choices"][0]
    lines = [line[6:] for line in chat(client, stream=True).text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]


def test_a_completion_stops_before_a_stop_word(client: TestClient) -> None:
    body = {"prompt": "hello", "max_tokens": 20, "temperature": 0}
    text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    word = text[3:5]
    cut = client.post("/v1/completions", json={**body, "stop": word}).json()["choices"][0]
    assert cut["text"] == text[: text.index(word)]
    assert cut["finish_reason"] == "stop"
    short = client.post("/v1/completions", json={**body, "max_tokens": 2}).json()
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 2


def test_the_context_is_a_limit(client: TestClient) -> None:
    refused(chat(client, max_tokens=CONTEXT), 400, "context", str(CONTEXT))
    refused(chat(client, messages=[{"role": "user", "content": "z" * 500}]), 400, "context")
    long = client.post("/v1/completions", json={"prompt": "z" * 500})
    for response, field in ((chat(client, max_tokens=CONTEXT), "messages"), (long, "prompt")):
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", field)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"n": 5}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"messages": [{"role": "user", "content": None}]}, "content"),
        ({"messages": [{"role": "user", "content": []}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "content"),
        ({"messages": None}, "messages"),
        ({"stream": True, "n": 2}, "n"),
        ({"echo": True}, "echo"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 0}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"n": "1"}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": "8"}, "max_tokens"),
        ({"max_completion_tokens": True}, "max_completion_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": True}, "top_p"),
        ({"top_k": True}, "top_k"),
        ({"seed": True}, "seed"),
    ],
)
def test_values_past_a_limit_are_refused(client: TestClient, changes: dict[str, Any], word: str) -> None:
    response = chat(client, **changes)
    refused(response, 400, word)
    assert response.json()["error"]["param"] in (word, "messages")


def test_a_field_that_is_none_is_named_with_the_nearest(client: TestClient) -> None:
    refused(chat(client, max_token=1), 400, "max_token: no such field", "did you mean 'max_tokens'?")
    refused(chat(client, temprature=2), 400, "temprature: no such field", "did you mean 'temperature'?")
    assert chat(client, temprature=2).json()["error"]["param"] == "temprature"
    assert "did you mean" not in chat(client, logprob=True).json()["error"]["message"]
    assert chat(client, service_tier="auto", prompt_cache_key="x").status_code == 200


def test_a_message_names_the_field_and_not_its_type(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    response = client.post("/v1/completions", content=b'{"prompt": "\\ud800"}', headers=headers)
    refused(response, 400, "prompt: ")
    assert response.json()["error"]["param"] == "prompt"


TURNS = [("system", "be kind"), ("user", "hello"), ("assistant", "hi"), ("user", "and?")]


def test_a_conversation_with_a_model_that_knows_no_turns_is_refused(talker: Talker) -> None:
    messages = [{"role": role, "content": text} for role, text in TURNS]
    app = create_app(Talker("toy", "pretrain", talker.module, talker.tokenizer))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        refused(chat(client, messages=messages), 400, "no turns")
        assert chat(client, messages=messages).json()["error"]["param"] == "messages"
        assert chat(client, messages=messages[-1:]).status_code == 200


NULLS = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "stream",
    "stop",
    "logprobs",
    "tools",
    "response_format",
    "user",
)


def test_null_means_the_default_and_what_asks_for_nothing_is_taken(client: TestClient) -> None:
    plain = chat(client).json()["choices"]
    assert chat(client, **dict.fromkeys(NULLS)).json()["choices"] == plain
    neutral = {"presence_penalty": 0.0, "logprobs": False, "tools": [], "response_format": {"type": "text"}, "stop": []}
    assert chat(client, **neutral, user="me", metadata={"a": 1}).json()["choices"] == plain
    assert chat(client, seed=None, max_tokens=None, stream_options=None).status_code == 200


def test_parts_of_text_are_a_text_and_a_developer_is_the_system(client: TestClient) -> None:
    said = [{"role": "system", "content": "be\nkind"}, {"role": "user", "content": "hello"}]
    parts = [{"type": "text", "text": "be"}, {"type": "text", "text": "kind"}]
    other = [{"role": "developer", "content": parts}, {"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    whole, split = (chat(client, messages=messages).json() for messages in (said, other))
    assert (whole["choices"], whole["usage"]) == (split["choices"], split["usage"])


def test_another_model_is_not_found(client: TestClient) -> None:
    for response in (chat(client, model="other"), client.get("/v1/models/other"), client.get("/v1/models/a/b")):
        refused(response, 404, "no such model", "toy-sft")
        assert (response.json()["error"]["code"], response.json()["error"]["param"]) == ("model_not_found", "model")
    refused(client.post("/v1/completions", json={"model": "x", "prompt": "z" * 500}), 404)


def test_a_model_is_found_by_its_name(client: TestClient) -> None:
    (listed,) = client.get("/v1/models").json()["data"]
    assert client.get("/v1/models/toy-sft").json() == client.get("/v1/models/toy").json() == listed


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_ends_with_the_usage_when_asked(client: TestClient, path: str) -> None:
    said = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in path else {"prompt": "hello"}
    body = {**said, "max_tokens": 4, "seed": 1}
    usage = client.post(path, json=body).json()["usage"]
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    lines = [line[6:] for line in client.post(path, json=asked).text.split("\n\n") if line]
    *chunks, last = map(json.loads, lines[:-1])
    assert lines[-1] == "[DONE]"
    assert (last["choices"], last["usage"]) == ([], usage)
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert '"usage"' not in client.post(path, json={**body, "stream": True}).text


def test_a_tiny_temperature_is_greedy(client: TestClient) -> None:
    texts = [chat(client, temperature=t, seed=s).json()["choices"] for t, s in ((0, 1), (1e-44, 2), (9e-6, 3))]
    assert texts[0] == texts[1] == texts[2]


def test_a_prompt_may_be_token_ids_or_a_list_of_one(client: TestClient, talker: Talker) -> None:
    def completed(prompt: Any) -> Any:
        return client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4, "temperature": 0})

    ids = talker.tokenizer.encode("hello")
    texts = [completed(prompt).json()["choices"] for prompt in ("hello", ["hello"], ids, [ids])]
    assert all(text == texts[0] for text in texts)
    for wrong in (["a", "b"], [ids, ids], [], [[]], 5, [1, "a"], [1.5], [True], {"a": 1}):
        refused(completed(wrong), 400, "prompt", "one prompt is supported")
    refused(completed([10**6]), 400, "prompt", "tokens")
    refused(completed([-1]), 400, "prompt", "tokens")


def test_bodies_past_the_limit_are_refused_by_length_and_by_content(client: TestClient) -> None:
    large = b"x" * (MAX_BODY_BYTES + 1)
    refused(client.post("/v1/completions", content=large), 413, str(MAX_BODY_BYTES))
    pieces = (large[i : i + 65536] for i in range(0, len(large), 65536))
    refused(client.post("/v1/completions", content=pieces), 413, str(MAX_BODY_BYTES))


def test_what_is_not_json_is_refused(client: TestClient) -> None:
    for content, words in (
        (b"{", "valid JSON (Expecting"),
        (b"[1]", "JSON object"),
        (b"\xff", "body"),
        (b"[" * 9**5, ""),
    ):
        headers = {"content-type": "application/json"}
        refused(client.post("/v1/completions", content=content, headers=headers), 400, words)
    refused(client.post("/v1/completions", content=b"a=1", headers={"content-type": "text/plain"}), 400, "JSON object")
    refused(client.get("/nowhere"), 404)


def test_requests_under_a_foreign_name_are_refused(client: TestClient) -> None:
    for host in ("evil.example", "evil.example:8000", "10.0.0.1", "", "127.0.0.1.evil.example", "[::2]:80"):
        refused(client.get("/v1/models", headers={"host": host}), 400, "host")
    for host in ("127.0.0.1", "127.0.0.2:8000", "localhost:80", "LOCALHOST", "[::1]:8000", "[::1]"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_requests_past_the_limit_are_refused_in_the_form_of_all_errors(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "MAX_REQUESTS", 0)
    response = client.get("/v1/models")
    refused(response, 503, "under way")
    assert response.json()["error"]["type"] == "server_error"
    monkeypatch.setattr(guards, "MAX_REQUESTS", 1)
    assert [client.get("/v1/models").status_code for _ in range(3)] == [200] * 3


def test_a_body_that_does_not_come_keeps_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "BODY_S", 0.01)
    waiting, said = [{"type": "http.request", "body": b"{", "more_body": True}], list[Message]()

    async def receive() -> Message:
        return waiting.pop() if waiting else await asyncio.Future()

    async def send(message: Message) -> None:
        said.append(message)

    asyncio.run(BodyLimit(None)({"type": "http", "headers": []}, receive, send))
    assert said[0]["status"] == 408
    assert (b"connection", b"close") in said[0]["headers"]


def test_the_server_ends_though_a_client_holds_half_a_request(talker: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LAST_ANSWERS_S", 0)
    listener = listen("127.0.0.1", 0)
    running = uvicorn.Server(server._config(create_app(talker)))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    with socket.create_connection(listener.getsockname()) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
        while not running.server_state.tasks:
            time.sleep(0.01)
        running.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def test_a_token_opens_and_its_absence_does_not(talker: Talker) -> None:
    with TestClient(create_app(talker, token=TOKEN)) as client:
        refused(client.get("/v1/models"), 401, "token")
        assert client.get("/v1/models").headers["www-authenticate"] == "Bearer"
        assert client.get("/v1/models", headers={"authorization": f"bearer {TOKEN}"}).status_code == 200
        refused(client.get("/v1/models", headers={"authorization": f"Basic {TOKEN}"}), 401)
        refused(client.get("/v1/models", headers={"authorization": f"Bearer {TOKEN}x"}), 401)
        assert client.get("/v1/models", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_addresses_others_can_reach_need_a_token_file(tmp_path: Path, host: str) -> None:
    with pytest.raises(InputError, match="--token-file"):
        read_token(None, host)
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    assert read_token(path, host) == TOKEN


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_the_loopback_needs_none(host: str) -> None:
    assert read_token(None, host) is None


@pytest.mark.parametrize("content", [b"", b"short", b"has a space in it, though long", b"\xff\xfe not UTF-8 \x00" * 9])
def test_weak_tokens_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(InputError, match="token"):
        read_token(path, "127.0.0.1")


def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}: cannot listen there"):
            listen("127.0.0.1", port)


def test_an_address_of_ipv6_stands_in_brackets() -> None:
    assert server.address("::1", 8000) == "[::1]:8000"
    assert server.address("127.0.0.2", 8000) == "127.0.0.2:8000"
