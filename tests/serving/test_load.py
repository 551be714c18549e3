"""Many clients at once: none is lost, and none gets what another asked for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx

from spectral_window.generation.decoding import Sampling
from spectral_window.generation.engine import Engine
from spectral_window.serving.service import Limits
from tests.serving.conftest import END
from tests.serving.test_http import NO_DEADLINE

CLIENTS, TOKENS = 200, 16


def expected(model: Any, prompts: list[list[int]], tokenizer: Any) -> list[str]:
    """What each prompt's greedy text is, by the engine alone, without a scheduler."""
    engine = Engine(model, len(tokenizer))
    rows = [engine.add(ids, Sampling(temperature=0)) for ids in prompts]
    for row in rows:
        while engine.prefill(row):
            pass
    written: list[list[int]] = [[] for _ in rows]
    for _ in range(TOKENS):
        engine.step(rows)
        for row, token, text in zip(rows, engine.sample(rows), written, strict=True):
            text.append(token)
            engine.extend(row, [token])
    return [tokenizer.decode(text, skip_special_tokens=True) for text in written]


async def ask(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> str:
    """The text of one request; of a stream, when all of it has come."""
    if not body["stream"]:
        answer = await http.post(url, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]
    text = ""
    async with http.stream("POST", url, json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line and line != "data: [DONE]":
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert line == "data: [DONE]" or line == ""
    return text


def test_200_clients_at_once_get_each_their_own_text(serve, model, tokenizer, tmp_path):
    """A third streams, a third has sessions, a third waits for the whole; all differ, and share a
    beginning."""
    address, service = serve(limits=Limits(slots=32, queue=CLIENTS), sessions=tmp_path)
    texts = [f"the same beginning, and then client {n}" for n in range(CLIENTS)]
    bodies = [
        {
            "prompt": text,
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": n % 3 == 0,
            **({"session_id": str(n)} if n % 3 == 1 else {}),
        }
        for n, text in enumerate(texts)
    ]

    async def ask_all() -> list[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, **NO_DEADLINE) as http:
            url = f"{address}/v1/completions"
            return await asyncio.gather(*(ask(http, url, body) for body in bodies))

    found = asyncio.run(ask_all())
    whole = expected(model, [[END, *text.encode()] for text in texts], tokenizer)
    for n, (text, right) in enumerate(zip(found, whole, strict=True)):
        # (a session keeps half a character at the end for its next request)
        assert text == right or (n % 3 == 1 and right.rstrip("\ufffd") == text.rstrip("\ufffd"))
    assert len(set(found)) > CLIENTS // 4
    assert service.scheduler.idle
    assert not service.scheduler.engine.rows
    assert len(list(tmp_path.glob("*.session"))) == sum(n % 3 == 1 for n in range(CLIENTS))
