"""A server against generation one by one: `serve`.

So many clients ask at the same moment, each for a text of its own.

    one by one   a session each, one after another: what a program without a server does
    scheduler    all at once through `serving/scheduler.py`, without HTTP
    HTTP         all at once by HTTP on loopback, a thread and a connection a client

Greedy, of prompts that share nothing, with GPT-2's vocabulary. First the logits of all rows in one
step are compared with those of each row alone.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from spectral_window.data.tokenizers import HFTokenizer, load_tokenizer
from spectral_window.errors import ResourceError
from spectral_window.generation.decoding import Sampling
from spectral_window.generation.engine import Engine
from spectral_window.generation.session import Session
from spectral_window.hf.config import SWHConfig
from spectral_window.lab.bench.models import BARS, build
from spectral_window.lab.bench.timing import Call, Timing, disqualified, relative_error
from spectral_window.serving.scheduler import Job, Piece, Scheduler

CLIENTS = (1, 8, 32)
PROMPT, TOKENS = 64, 16
ONE_BY_ONE, SCHEDULER, HTTP = "one by one", "scheduler", "HTTP"


def bench_serve(dtype: torch.dtype, quick: bool) -> list[dict[str, Any]]:
    """Rows by clients, as the batch: the time until all have their texts, and tokens a second."""
    sizes: dict[str, Any] = {"num_hidden_layers": 6}
    if quick:
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "window": 8}
    tokenizer = load_tokenizer("gpt2")
    config = SWHConfig(vocab_size=len(tokenizer), **sizes)
    model = build(config, ("SWH",), dtype)["SWH"]
    length, count = (8, 4) if quick else (PROMPT, TOKENS)
    rows: list[dict[str, Any]] = []
    with ExitStack() as running:
        at_once = {
            SCHEDULER: _through_scheduler(model, tokenizer, running),
            HTTP: _through_http(model, tokenizer, running),
        }
        for clients in (1, 3) if quick else CLIENTS:
            prompts = _draw(len(tokenizer), clients, length)
            wrong = disqualified(partial(_error, model, prompts), BARS[dtype])
            timing = Timing(seconds=0.01 if quick else 3.0, longest=60.0)
            timing.out = dict.fromkeys(at_once, wrong) if wrong else {}
            calls: dict[str, Call] = {
                ONE_BY_ONE: partial(_one_by_one, model, tokenizer, prompts, count),
                **{name: partial(ask, prompts, count) for name, ask in at_once.items()},
            }
            for row in timing.run(calls, batch=clients, context=length):
                if row["status"] == "ok":
                    row["tokens_per_s"] = float(
                        f"{1000 * clients * count / row['milliseconds']:.4g}"
                    )
                rows.append(row)
    return rows


def _draw(size: int, clients: int, length: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(clients)
    return torch.randint(size, (clients, length), generator=g).tolist()


@torch.no_grad()
def _error(model: Any, prompts: list[list[int]]) -> float:
    """The relative error of the logits of all rows in one step against each row alone."""

    def logits(several: list[list[int]]) -> torch.Tensor:
        engine = Engine(model)
        rows = [engine.add(ids) for ids in several]
        for row in rows:
            while engine.prefill(row):
                pass
        engine.step(rows)
        return torch.stack([row.logits for row in rows if row.logits is not None])

    return relative_error(logits(prompts), torch.cat([logits([ids]) for ids in prompts]).double())


def _one_by_one(model: Any, tokenizer: HFTokenizer, prompts: list[list[int]], count: int) -> None:
    for ids in prompts:
        session = Session(model, tokenizer, seed=0)
        session.feed(ids)
        for _ in session.stream(count, temperature=0, ignore_eos=True):
            pass


Ask = Callable[[list[list[int]], int], None]


def _through_scheduler(model: Any, tokenizer: HFTokenizer, running: ExitStack) -> Ask:
    """Make a call that writes all prompts' texts at once. No prompt's state is kept: the same are
    asked again in every round."""
    scheduler = Scheduler(model, tokenizer, prefix_bytes=0)
    scheduler.start()

    def end() -> None:
        scheduler.stop(cut=True)
        scheduler.join()

    running.callback(end)

    def ask(prompts: list[list[int]], count: int) -> None:
        ended, failed = threading.Semaphore(0), []

        def receive(piece: Piece) -> None:
            if piece.error is not None:
                failed.append(piece.error)
            if piece.last:
                ended.release()

        scheduler.submit([Job(ids, count, receive, Sampling(temperature=0)) for ids in prompts])
        for _ in prompts:
            ended.acquire()
        if failed:
            raise failed[0]

    return ask


def _through_http(model: Any, tokenizer: HFTokenizer, running: ExitStack) -> Ask:
    """Make a call that asks a server for all prompts' texts at once; it is started by the first."""
    address: list[str] = []

    def begin() -> None:
        from spectral_window.serving.server import in_background
        from spectral_window.serving.service import Limits, Service

        service = Service(model, tokenizer, limits=Limits(prefix_bytes=0))
        address.append(running.enter_context(in_background(service)))

    def ask_one(ids: list[int], count: int) -> None:
        connection = http.client.HTTPConnection(address[0].removeprefix("http://"))
        body = {"prompt": ids, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = json.load(connection.getresponse())
        connection.close()
        if answer["usage"]["completion_tokens"] != count:
            raise ResourceError(f"{answer['usage']} and not {count} tokens")

    def ask(prompts: list[list[int]], count: int) -> None:
        if not address:
            begin()
        with ThreadPoolExecutor(len(prompts)) as clients:
            for done in [clients.submit(ask_one, ids, count) for ids in prompts]:
                done.result()

    return ask
