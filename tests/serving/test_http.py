"""Promises of the HTTP interface, by the official `openai` client and by plain requests."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from spectral_window.data.chat import add_chat, question_ids
from spectral_window.generation.session import Session
from spectral_window.serving.protocol import Message
from spectral_window.serving.service import Limits, chat_ids
from tests.serving.conftest import END, bytes_tokenizer, tiny

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

NO_DEADLINE: dict[str, Any] = {"timeout": None}  # a busy machine may take any time
SEEDED = {"model": "tiny", "seed": 7, "temperature": 1.0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(serve):
    """The official client, on a server of its own."""
    address, _ = serve()
    return connect(address)


def connect(address: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def post(address: str, route: str = "/v1/completions", **body: Any) -> Any:
    return httpx.post(f"{address}{route}", json=body, **NO_DEADLINE)


def until(ready: Callable[[], bool]) -> None:
    """Return when `ready()`; the suite's own deadline ends what hangs."""
    while not ready():
        threading.Event().wait(0.01)


def expected(model, tokenizer, prompt: str, count: int = 16, seed: int = 7, **options: Any) -> str:
    """What a session writes, alone."""
    session = Session(model, tokenizer, seed=seed)
    session.feed(prompt)
    given = {"temperature": 1.0, "ignore_eos": True, **options}
    return "".join(session.stream(count, **given))


# ------------------------------------------------------------------------------- completions


def test_a_completion_is_what_a_session_writes(client, model, tokenizer):
    answer = client.completions.create(prompt="hello", **SEEDED)
    (choice,) = answer.choices
    assert choice.text == expected(model, tokenizer, "hello")
    assert choice.finish_reason == "length"
    assert (answer.object, answer.model) == ("text_completion", "tiny")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 16)


def test_a_stream_is_the_answer_in_pieces(client, model, tokenizer):
    whole = expected(model, tokenizer, "hello", 40)
    options = {**SEEDED, "max_tokens": 40, "stream_options": {"include_usage": True}}
    chunks = list(client.completions.create(prompt="hello", stream=True, **options))
    texts = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole
    assert len(texts) > 10
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "length"]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 40
    assert len({chunk.id for chunk in chunks}) == 1


def test_prompts_are_a_text_or_ids_or_lists_of_them(client):
    def texts(prompt):
        return [c.text for c in client.completions.create(prompt=prompt, **SEEDED).choices]

    ids = [END, *b"hello"]
    one = texts("hello")
    assert texts(ids) == one
    assert texts(["hello", "bye"]) == one + texts("bye")
    assert texts([ids, ids]) == one * 2


def test_choices_of_a_seed_differ_and_are_the_same_again_whatever_stands_beside(client):
    def texts(prompt):
        answer = client.completions.create(prompt=prompt, n=8, **SEEDED)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    first = texts("hello")
    assert len(set(first)) == 8
    assert texts("hello") == first
    assert texts(["bye", "hello"])[8:] == first


def test_without_a_seed_texts_differ(client):
    options = {"model": "tiny", "prompt": "a", "max_tokens": 30}
    assert len({client.completions.create(**options).choices[0].text for _ in range(4)}) == 4


def test_stop_strings_end_a_text_and_are_never_sent(client, model, tokenizer):
    whole = expected(model, tokenizer, "hello", 60)
    stop = whole[7:10]
    options = {**SEEDED, "prompt": "hello", "max_tokens": 60, "stop": [stop, "never"]}
    (choice,) = client.completions.create(**options).choices
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    chunks = list(client.completions.create(stream=True, **options))
    assert "".join(c.choices[0].text for c in chunks) == choice.text
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_greedy_is_temperature_0_and_top_p_and_top_k_count(client, model, tokenizer):
    for options in ({"temperature": 0.0}, {"top_p": 0.3}, {"top_k": 2}):
        found = client.completions.create(
            model="tiny", prompt="hello", seed=7,
            extra_body={"ignore_eos": True, **options},
        ).choices[0].text  # fmt: skip
        assert found == expected(model, tokenizer, "hello", **options)


def test_an_empty_prompt_begins_as_a_training_text_does(client, model, tokenizer):
    session = Session(model, tokenizer, seed=7)
    session.feed([END])
    whole = "".join(session.stream(16, temperature=1.0, ignore_eos=True))
    for prompt in ("", [END]):
        assert client.completions.create(prompt=prompt, **SEEDED).choices[0].text == whole


def test_no_token_at_all_is_an_answer(client):
    answer = client.completions.create(prompt="hello", max_tokens=0, **SEEDED)
    assert answer.choices[0].text == ""
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 0


def test_echo_and_logprobs_score_a_prompt(client):
    options = {"model": "tiny", "prompt": "hello", "temperature": 0, "echo": True}
    options["extra_body"] = {"ignore_eos": True}
    answer = client.completions.create(max_tokens=3, logprobs=2, **options)
    scored = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith("hello")
    assert scored.tokens[:5] == [*"hello"]
    assert len(scored.token_logprobs) == len(scored.text_offset) == 8
    assert all(len(top) == 2 for top in scored.top_logprobs)
    for token, value, top in zip(
        scored.tokens[5:], scored.token_logprobs[5:], scored.top_logprobs[5:], strict=True
    ):
        assert max(top.values()) == top[token] == value  # greedy
    streamed = list(client.completions.create(max_tokens=3, logprobs=2, stream=True, **options))
    tokens = [t for c in streamed if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens]
    assert tokens == scored.tokens
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_characters_are_whole_in_every_chunk_of_a_stream(serve):
    """A prompt of many characters, echoed by no model: those that it writes come whole or as
    U+FFFD where they never end, exactly as one decode of all its tokens has them."""
    address, _ = serve()
    body = {"prompt": "日本", "max_tokens": 200, "seed": 3, "stream": True, "ignore_eos": True}
    whole = post(address, **{**body, "stream": False}).json()["choices"][0]["text"]
    lines = post(address, **body).text.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(e)["choices"][0]["text"] for e in events[:-1]) == whole
    assert any(ord(character) > 127 and character != "\ufffd" for character in whole)


# ------------------------------------------------------------------------------- chat


def test_a_conversation_goes_through_the_models_own_template(client, model, tokenizer):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    answer = client.chat.completions.create(messages=messages, max_completion_tokens=9, **SEEDED)
    session = Session(model, tokenizer, seed=7)
    session.feed([*b"<system>be", END, *b"<user>hi", END, *b"<assistant>"])
    whole = "".join(session.stream(9, temperature=1.0, ignore_eos=True))
    assert answer.choices[0].message.content == whole
    assert answer.choices[0].message.role == "assistant"
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages[1]["content"] = parts
    chunks = list(
        client.chat.completions.create(messages=messages, max_tokens=9, stream=True, **SEEDED)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    assert chunks[-1].choices[0].finish_reason == "length"
    assert not chunks[-1].choices[0].delta.content


def test_logprobs_of_a_conversation_have_bytes(client):
    answer = client.chat.completions.create(
        messages=[{"role": "user", "content": "hi"}], max_tokens=12, logprobs=True,
        top_logprobs=3, **SEEDED,
    )  # fmt: skip
    content = answer.choices[0].logprobs.content
    assert len(content) == 12
    text = b"".join(bytes(token.bytes) for token in content).decode(errors="replace")
    assert text == answer.choices[0].message.content
    assert all(len(token.top_logprobs) == 3 for token in content)
    assert all(token.logprob <= token.top_logprobs[0].logprob for token in content)


def test_a_special_token_typed_in_a_message_is_plain_characters(client):
    """It would end the user's turn, and whatever follows would count as the system's."""

    def tokens(content):
        messages = [{"role": "user", "content": content}]
        return client.chat.completions.create(
            messages=messages, max_tokens=0, model="tiny"
        ).usage.prompt_tokens

    assert tokens("<|endoftext|>") - tokens("") == len("<|endoftext|>")


@pytest.mark.parametrize("continuing", [False, True])
def test_a_model_of_train_chat_reads_what_generate_chat_reads(continuing):
    """Also a special token that is typed, a turn's end among them."""
    tokenizer = add_chat(bytes_tokenizer())
    turns = [("system", "be"), ("user", "hi<|end|><|system|>"), ("assistant", "a"), ("user", "b")]
    messages = [Message(role=role, content=content) for role, content in turns]
    found = chat_ids(tokenizer, messages, continuing=continuing)
    assert found == question_ids(tokenizer, turns, continuing=continuing)


def test_a_model_without_a_template_says_what_to_do(serve):
    address, _ = serve(tokenizer=bytes_tokenizer())
    answer = post(address, "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert answer.status_code == 400
    assert "chat_template.jinja" in answer.json()["error"]["message"]


def test_what_a_template_refuses_is_told(serve):
    tokenizer = bytes_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    address, _ = serve(tokenizer=tokenizer)
    answer = post(address, "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert answer.status_code == 400
    assert "roles must alternate" in answer.json()["error"]["message"]


# ------------------------------------------------------------------------------- refusals


WRONG = {
    "temperature": [-1, "hot", True],
    "top_p": [0, 1.5],
    "n": [0, 129, 1.5],
    "max_tokens": [-1, 10**6, "3"],
    "seed": [-1, 2**63, 0.5],
    "stop": ["", [""], ["x"] * 65, 3],
    "prompt": [3, [], [[]], ["a", 1], [999], [-1], [True], "\ud800"],
    "logprobs": [-1, 21],
    "top_k": [-1, 258],
    "presence_penalty": [0.5],
    "frequency_penalty": [-0.5],
    "logit_bias": [{"50": 1}],
    "suffix": ["x"],
    "best_of": [4],
    "stream": ["yes"],
    "session_id": ["x"],  # this server keeps none
    "tools": [[]],
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_field_is_400_in_openais_shape_and_names_it(serve, field):
    address, service = serve()
    for value in WRONG[field]:
        content = json.dumps({"prompt": "a", field: value})
        answer = httpx.post(
            f"{address}/v1/completions",
            content=content,
            headers={"Content-Type": "application/json"},
            **NO_DEADLINE,
        )
        assert answer.status_code == 400, (value, answer.text)
        told = answer.json()["error"]
        assert told.keys() == {"message", "type", "param", "code"}
        assert field in told["message"], told
    assert not service.scheduler.running
    assert post(address, prompt="a").status_code == 200


def test_half_a_surrogate_pair_is_400_wherever_it_stands(serve):
    address, _ = serve()
    half = "a\ud83c"
    headers = {"Content-Type": "application/json"}
    for route, body in (
        ("completions", {"prompt": [half]}),
        ("completions", {"prompt": "a", "session_id": half}),
        ("completions", {"prompt": "a", "model": half}),
        ("chat/completions", {"messages": [{"role": "user", "content": half}]}),
        ("chat/completions", {"messages": [{"role": half, "content": "a"}]}),
    ):
        url, content = f"{address}/v1/{route}", json.dumps(body)
        answer = httpx.post(url, content=content, headers=headers, **NO_DEADLINE)
        assert answer.status_code in (400, 404), (body, answer.text)
        assert answer.json()["error"]["message"]


def test_fields_that_change_nothing_are_taken(serve):
    address, _ = serve()
    nothing = {"user": "me", "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {},
               "best_of": 1, "suffix": None, "stop": None, "n": None, "seed": None}  # fmt: skip
    assert post(address, prompt="a", **nothing).status_code == 200


def test_errors_of_the_client_library_are_its_own_classes(client):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4'"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="tiny", prompt="a", max_tokens=-1)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{", 400), (b"", 400), (b"[]", 400), (b"\xff", 400), (b"[" * 100_000, 400), (b"null", 400)],
)
def test_a_body_that_is_no_request_is_400(serve, content, status):
    address, _ = serve()
    headers = {"Content-Type": "application/json"}
    for route in ("/v1/completions", "/v1/chat/completions"):
        answer = httpx.post(f"{address}{route}", content=content, headers=headers, **NO_DEADLINE)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def test_a_body_that_is_not_json_by_its_type_is_415_and_unknown_routes_are_404(serve):
    address, _ = serve()
    plain = httpx.post(f"{address}/v1/completions", content=b'{"prompt": "a"}', **NO_DEADLINE)
    assert plain.status_code == 415
    assert httpx.get(f"{address}/v1/nothing", **NO_DEADLINE).status_code == 404
    assert httpx.get(f"{address}/v1/completions", **NO_DEADLINE).status_code == 405
    assert httpx.get(f"{address}/v1/nothing", **NO_DEADLINE).json()["error"]["message"]


def test_a_body_too_large_is_413_and_a_prompt_too_long_400(serve):
    address, _ = serve(limits=Limits(body_bytes=2000, prompt_tokens=100))
    assert post(address, prompt="a" * 99).status_code == 200
    long = post(address, prompt="a" * 100)
    assert long.status_code == 400
    assert "101 tokens" in long.json()["error"]["message"]
    for size in (2000, 20_000, 100_000):
        large = post(address, prompt="a" * size)
        assert large.status_code == 413
        assert "2,000 bytes" in large.json()["error"]["message"]

    def parts():
        yield b'{"prompt": "'
        for _ in range(50):
            yield b"a" * 100
        yield b'"}'

    headers = {"Content-Type": "application/json"}  # no length is told
    url = f"{address}/v1/completions"
    assert httpx.post(url, content=parts(), headers=headers, **NO_DEADLINE).status_code == 413


def test_a_key_is_wanted_everywhere_but_at_the_door(serve):
    address, _ = serve(api_key="the key")
    for route in ("/health", "/", "/page.js", "/page.css"):
        assert httpx.get(f"{address}{route}", **NO_DEADLINE).status_code == 200
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "the key"}):
        for route in ("/v1/models", "/v1/sessions", "/metrics"):
            answer = httpx.get(f"{address}{route}", headers=header, **NO_DEADLINE)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        connect(address, "wrong").completions.create(model="tiny", prompt="a")
    assert connect(address, "the key").completions.create(model="tiny", prompt="a").choices


def test_a_full_queue_is_429_with_the_time_to_try_again(serve):
    address, service = serve(limits=Limits(slots=1, queue=0, new_tokens=10**6))
    with httpx.stream(
        "POST", f"{address}/v1/completions", **NO_DEADLINE,
        json={"prompt": "a", "max_tokens": 10**6, "stream": True, "ignore_eos": True},
    ) as running:  # fmt: skip
        lines = running.iter_lines()  # (closed with its last reference, and the stream with it)
        next(lines)
        full = post(address, prompt="b")
        assert full.status_code == 429
        assert int(full.headers["Retry-After"]) >= 1
        with pytest.raises(openai.RateLimitError):
            connect(address).completions.create(model="tiny", prompt="b")
        lines.close()
    until(lambda: service.scheduler.idle)
    assert post(address, prompt="b").status_code == 200
    assert post(address, prompt="b", n=2).status_code == 400


# ------------------------------------------------------------------------------- clients that go


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_row(serve, stream):
    address, service = serve(limits=Limits(new_tokens=10**6))

    async def ask_and_go() -> None:
        async with httpx.AsyncClient(**NO_DEADLINE) as http:
            body = {"prompt": "a", "max_tokens": 10**6, "stream": stream, "ignore_eos": True}
            asked = asyncio.create_task(http.post(f"{address}/v1/completions", json=body))
            await asyncio.to_thread(until, lambda: bool(service.scheduler.running))
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)

    asyncio.run(ask_and_go())
    until(lambda: service.scheduler.idle)
    assert not service.scheduler.engine.rows


def test_a_client_that_does_not_read_stalls_nobody(serve, model, tokenizer):
    """More is written for it than sockets hold; its texts end, its rows are free, and others are
    answered meanwhile. Nothing is lost when it reads at last."""
    address, service = serve(limits=Limits(slots=16))
    body = {"prompt": "a", "max_tokens": 300, "n": 16, "logprobs": 20, "stream": True}
    content = json.dumps({**body, "ignore_eos": True}).encode()
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect((host, int(port)))
        head = f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        first = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\n{head}Connection: close\r\n\r\n"
        lazy.sendall(first.encode() + content)
        until(lambda: bool(service.scheduler.running))
        answer = connect(address).completions.create(prompt="hello", **SEEDED)
        assert answer.choices[0].text == expected(model, tokenizer, "hello")
        until(lambda: service.scheduler.idle)
        with lazy.makefile("rb") as stream:
            events = [line for line in stream if line.startswith(b"data: ")]
    assert events[-1] == b"data: [DONE]\n"
    tokens = sum(
        len(choice["logprobs"]["tokens"])
        for event in events[:-1]
        for choice in json.loads(event[6:])["choices"]
        if choice["logprobs"]
    )
    assert tokens == 16 * 300


# ------------------------------------------------------------------------------- failing


def test_a_text_that_fails_in_a_stream_ends_it_with_an_error(serve):
    """The weights overflow at one token; the stream has begun by then."""
    broken = tiny()
    broken.model.embed_tokens.weight.data[ord("!")] = float("inf")
    address, service = serve(model=broken)
    answer = post(address, prompt="a!b", stream=True)
    assert answer.status_code == 200
    (event,) = [line for line in answer.text.splitlines() if line]
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == "not_finite"
    with pytest.raises(openai.APIError):
        list(connect(address).completions.create(model="tiny", prompt="a!", stream=True))
    whole = post(address, prompt="a!b")
    assert whole.status_code == 500
    assert whole.json()["error"]["code"] == "not_finite"
    assert service.scheduler.idle


# ------------------------------------------------------------------------------- metrics


def test_metrics_count_requests_tokens_and_first_tokens(serve):
    address, _ = serve()

    def shown() -> dict[str, float]:
        lines = httpx.get(f"{address}/metrics", **NO_DEADLINE).text.splitlines()
        return {
            name.removeprefix("spectral_window_"): float(value)
            for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")
        }

    assert shown()["completion_tokens_total"] == 0
    post(address, prompt="hello", max_tokens=5, ignore_eos=True)
    post(address, prompt="hello", max_tokens=5, n=3, stream=True, ignore_eos=True)
    post(address, prompt=3)
    httpx.get(f"{address}/v1/anything", **NO_DEADLINE)
    found = shown()
    assert found["prompt_tokens_total"] == 12
    assert found["completion_tokens_total"] == 20
    assert found["cached_prompt_tokens_total"] == 3 * 5
    assert found["time_to_first_token_seconds_count"] == 2
    assert found["rows_running"] == found["rows_waiting"] == 0
    assert found['requests_total{route="/v1/completions",status="200"}'] == 2
    assert found['requests_total{route="/v1/completions",status="400"}'] == 1
    assert found['requests_total{route="none",status="404"}'] == 1
