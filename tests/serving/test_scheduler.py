"""Promises of serving/scheduler.py: texts join and leave at every step, and each is as alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from spectral_window.errors import DivergedError, UserError
from spectral_window.generation.decoding import Sampling
from spectral_window.generation.engine import Engine
from spectral_window.generation.session import Session
from spectral_window.nn.mixers import map_state
from spectral_window.serving import scheduler as module
from spectral_window.serving.prefixes import Prefixes
from spectral_window.serving.scheduler import Job, Piece, QueueFull, Scheduler, Scored, Stopping
from tests.serving.conftest import END, tiny

GREEDY = Sampling(temperature=0)


class Text:
    """What a job gave."""

    def __init__(self, prompt: Sequence[int], max_tokens: int = 12, **options: Any) -> None:
        self.pieces: list[Piece] = []
        self.done = threading.Event()
        options = {"sampling": GREEDY, **options}
        self.job = Job(prompt, max_tokens, self.receive, **options)

    def receive(self, piece: Piece) -> None:
        self.pieces.append(piece)
        if piece.last:
            self.done.set()

    @property
    def text(self) -> str:
        self.done.wait()
        if self.pieces[-1].error is not None:
            raise self.pieces[-1].error
        return "".join(piece.text for piece in self.pieces)

    @property
    def finish(self) -> str | None:
        self.done.wait()
        return self.pieces[-1].finish

    @property
    def tokens(self) -> list[Scored]:
        self.done.wait()
        return [token for piece in self.pieces for token in piece.tokens]


@pytest.fixture
def start(model, tokenizer):
    """Make a scheduler, which is stopped after the test: `start(texts)` runs them, all from the
    first round on."""
    made = []

    def call(texts: Sequence[Text] = (), **options: Any) -> Scheduler:
        given = {"model": model, "tokenizer": tokenizer, **options}
        scheduler = Scheduler(given.pop("model"), given.pop("tokenizer"), **given)
        made.append(scheduler)
        for text in texts:
            scheduler.submit([text.job])
        scheduler.start()
        return scheduler

    yield call
    for scheduler in made:
        scheduler.stop(cut=True)
        assert scheduler.join()


def prompts(count: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(256, (1 + n % 13,), generator=draw).tolist() for n in range(count)]


# ------------------------------------------------------------------------------- as alone


def test_the_same_greedy_text_and_logits_alone_and_among_63_others(start):
    given = prompts(64)
    options = {"alternatives": 257, "eos": frozenset()}
    together = [Text(ids, **options) for ids in given]
    start(together, prefix_bytes=0)
    for n in (0, 31, 63):
        alone = Text(given[n], **options)
        start([alone], prefix_bytes=0)
        assert alone.text == together[n].text
        for one, other in zip(alone.tokens, together[n].tokens, strict=True):
            assert (one.token, one.offset) == (other.token, other.offset)
            a, b = (torch.tensor([value for _, value in sorted(t.top)]) for t in (one, other))
            assert (a - b).square().mean().sqrt() <= 2e-6 * b.square().mean().sqrt()


@pytest.mark.parametrize("mixer", ["spectral_window", "memory", "attention"])
def test_a_text_is_what_a_session_writes_with_the_same_seed(start, tokenizer, mixer):
    """Also with one slot, also where states grow."""
    model = tiny(mixer=mixer)
    sampling = {"temperature": 0.9, "top_k": 50}
    texts = [
        Text([END, *b"hello %d" % n], 20, seed=n, sampling=Sampling(**sampling), eos={END})
        for n in range(6)
    ]
    start(texts, model=model, slots=4)
    for n, text in enumerate(texts):
        session = Session(model, tokenizer, seed=n)
        session.feed(f"hello {n}")
        assert text.text == "".join(session.stream(20, **sampling))


def test_one_slot_serves_all_one_after_another(start):
    texts = [Text(ids) for ids in prompts(5)]
    scheduler = start(texts, slots=1)
    assert len({text.text for text in texts}) > 1
    assert not scheduler.running


def test_a_long_prompt_is_read_between_the_tokens_of_others(start):
    """A prompt of 8 rounds delays nobody by more than a round a token."""
    long = Text(prompts(1)[0] * (8 * module.READ_TOKENS), 1)
    order: list[str] = []
    short = Text([1, 2, 3], 6)
    for name, text in (("long", long), ("short", short)):
        text.job.receive = _noting(order, name, text.receive)
    start([long, short])
    assert long.done.wait()
    assert order.index("long") > order.index("short") + 4


def _noting(order: list[str], name: str, receive: Callable[[Piece], None]) -> Any:
    def note(piece: Piece) -> None:
        order.append(name)
        receive(piece)

    return note


# ------------------------------------------------------------------------------- stop strings


def cut(text: str, stop: str) -> str:
    return text[: text.index(stop)] if stop in text else text


def test_a_stop_string_ends_a_text_across_tokens_and_is_never_sent(start):
    """Tokens are bytes, so every stop string of several characters spans several."""
    options = {"seed": 3, "sampling": Sampling(temperature=1.0), "eos": frozenset()}
    whole = Text([*b"hello"], 60, **options)
    start([whole])
    full = whole.text
    for begin in (0, 5, 11):
        stop = full[begin : begin + 3]
        text = Text([*b"hello"], 60, stops=(stop, "never"), alternatives=0, **options)
        start([text])
        assert text.text == cut(full, stop)
        assert text.finish == "stop"
        assert all(token.offset < len(text.text) for token in text.tokens)
        shown = ""
        for piece in text.pieces:  # at no time was more out than that
            shown += piece.text
            assert cut(full, stop).startswith(shown)


def test_no_piece_has_half_a_character(start, model):
    """A model of bytes whose text is made to be characters of two to four bytes."""
    content = "héllo wörld 世界 🎉👩‍👩‍👧".encode()
    writer = Writer(model, [*content])
    text = Text([1], len(content), eos=frozenset())
    start([text], model=writer)
    assert text.text == content.decode()
    assert len(text.pieces) == len(content)
    assert "\ufffd" not in "".join(piece.text for piece in text.pieces)


class Writer(torch.nn.Module):
    """A model whose likeliest next token is the next of a text: after n tokens, the n-th."""

    def __init__(self, model: Any, content: list[int]) -> None:
        super().__init__()
        self.inner, self.content, self.at = model, content, 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, ids: Any, **options: Any) -> Any:
        output = self.inner(ids, **options)
        output.logits = torch.full_like(output.logits, -9.0)
        output.logits[..., self.content[self.at]] = 9.0
        self.at += 1
        return output


# ------------------------------------------------------------------------------- failing alone


def test_a_prompt_that_the_engine_refuses_fails_alone(start):
    good, bad = Text([1, 2, 3]), Text([1, 999, 3])
    start([good, bad])
    assert good.text
    with pytest.raises(UserError, match="token 1 is 999"):
        _ = bad.text


def test_a_text_whose_numbers_overflow_fails_alone(start, model):
    """The state of a session is not finite; those beside it never see that."""
    engine = Engine(model)
    row = engine.add([1, 2, 3], GREEDY)
    while engine.prefill(row):
        pass
    engine.step([row])
    states = [
        map_state(s, lambda t: t * torch.nan if t.is_floating_point() else t) for s in row.states
    ]
    engine.restore(row, states, 3)
    bad = Text([4], row=row)
    good = [Text(ids) for ids in prompts(6)]
    start([*good[:3], bad, *good[3:]])
    with pytest.raises(DivergedError):
        _ = bad.text
    alone = Text(prompts(6)[4])
    start([alone])
    assert good[4].text == alone.text


class Fragile(Writer):
    """A model that cannot run one token: whatever batch it is in raises."""

    def forward(self, ids: Any, **options: Any) -> Any:
        if bool((ids == 13).any()):
            raise RuntimeError("13 in this batch")
        return self.inner(ids, **options)


def test_a_forward_that_raises_is_tried_again_without_the_row_that_cannot_run(start, model):
    good, bad = [Text(ids) for ids in ([1, 2], [3], [4, 5, 6], [7])], Text([1, 13])
    start([*good[:2], bad, *good[2:]], model=Fragile(model, []))
    with pytest.raises(RuntimeError, match="13"):
        _ = bad.text
    for text in good:
        alone = Text(text.job.prompt)
        start([alone])
        assert text.text == alone.text


def test_after_a_bug_in_a_round_the_next_texts_are_written(start, monkeypatch):
    scheduler = start()
    whole = Scheduler._read
    monkeypatch.setattr(Scheduler, "_read", lambda self: 1 / 0)
    failed = Text([1, 2, 3])
    scheduler.submit([failed.job])
    with pytest.raises(ZeroDivisionError):
        _ = failed.text
    monkeypatch.setattr(Scheduler, "_read", whole)
    text = Text([1, 2, 3])
    scheduler.submit([text.job])
    assert text.text
    assert not scheduler.engine.rows


# ------------------------------------------------------------------------------- leaving


def test_a_cancelled_text_leaves_its_row_and_a_waiting_one_the_queue(start):
    running, waiting = Text([1, 2, 3], 10**9, eos=frozenset()), Text([4, 5], 10**9)
    after = Text([6])
    scheduler = start([running, waiting, after], slots=1, memory=1 << 40)
    scheduler.cancel([waiting.job])
    assert waiting.finish == "length"
    scheduler.cancel([running.job])
    assert running.finish == "length"
    assert after.text
    assert not scheduler.engine.rows


def test_more_than_slots_and_queue_is_refused_and_leaves_the_rest_alone(model, tokenizer):
    scheduler = Scheduler(model, tokenizer, slots=2, queue=1)
    texts = [Text(ids) for ids in prompts(3)]
    scheduler.submit([text.job for text in texts])
    with pytest.raises(QueueFull, match="3 texts are waiting"):
        scheduler.submit([Text([1]).job])
    with pytest.raises(UserError, match="4 texts at once"):
        scheduler.submit([Text([1]).job for _ in range(4)])
    scheduler.start()
    assert all(text.text for text in texts)
    scheduler.stop()
    assert scheduler.join()


def test_a_state_that_fits_no_memory_is_refused_and_others_wait_for_room(model, tokenizer):
    """A Transformer's states grow: one of 16 tokens fits, two do not, and one of 21 never does."""
    grows = tiny(mixer="attention")
    scheduler = Scheduler(grows, tokenizer, memory=2 * grows.state_bytes(20))
    with pytest.raises(UserError, match="ask for fewer tokens"):
        scheduler.submit([Text([1], 20).job])
    most = []
    texts = [Text([1], 15), Text([2], 15)]
    for text in texts:
        text.job.receive = _watching(most, scheduler, text.receive)
    scheduler.submit([text.job for text in texts])
    scheduler.start()
    assert all(text.text for text in texts)
    scheduler.stop()
    assert scheduler.join()
    assert max(most) == 1


def _watching(most: list[int], scheduler: Scheduler, receive: Callable[[Piece], None]) -> Any:
    def watch(piece: Piece) -> None:
        most.append(len(scheduler.running))
        receive(piece)

    return watch


def test_stopping_lets_texts_end_and_begins_none(start):
    text = Text([1, 2, 3], 30, eos=frozenset())
    scheduler = start([text])
    scheduler.stop()
    with pytest.raises(Stopping):
        scheduler.submit([Text([1]).job])
    assert scheduler.join()
    assert text.job.made == 30


def test_a_cut_ends_running_texts_as_they_are_and_fails_waiting_ones(start):
    running, waiting = Text([1, 2, 3], 10**9, eos=frozenset()), Text([1], 10**9)
    scheduler = start([running, waiting], slots=1, memory=1 << 40)
    while not running.pieces:
        running.done.wait(0.01)
    scheduler.stop(cut=True)
    assert running.finish == "length"
    with pytest.raises(Stopping):
        _ = waiting.text


# ------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize("mixer", ["memory", "attention"])
def test_texts_of_one_prompt_read_it_once_and_write_what_each_would_alone(start, mixer):
    model = tiny(mixer=mixer)
    ids = prompts(13)[12] * 60
    options = {"sampling": Sampling(temperature=1.0), "eos": frozenset()}
    texts = [Text(ids, seed=n, **options) for n in range(8)]
    start(texts, model=model)
    found = [text.text for text in texts]
    assert [text.job.cached for text in texts] == [0] + [len(ids) - 1] * 7
    separate = [Text(ids, seed=n, **options) for n in range(8)]
    start(separate, model=model, prefix_bytes=0)
    assert [text.text for text in separate] == found
    assert [text.job.cached for text in separate] == [0] * 8


def test_a_common_beginning_is_read_once_in_segments(start):
    system = prompts(13)[12] * 50
    first, second = Text([*system, 1, 2, 3]), Text([*system, 4, 5, 6])
    scheduler = start([first])
    assert first.text
    scheduler.submit([second.job])
    alone = Text([*system, 4, 5, 6])
    start([alone])
    assert second.text == alone.text
    assert second.job.cached == len(system) // module.SEGMENT * module.SEGMENT > 0


def test_prefixes_stay_within_their_bytes_and_drop_the_ones_used_longest_ago():
    state = [torch.zeros(25)]  # 100 bytes
    kept = Prefixes(250)
    kept.keep([1, 2, 3], 2, state)
    kept.keep([4, 5, 6], 3, state)
    assert kept.find([1, 2, 9]) == (2, state)
    kept.keep([7, 8], 2, state)
    assert kept.bytes == 200
    assert kept.find([4, 5, 6, 7]) is None  # used longest ago
    assert kept.find([1, 2]) is None  # a token must be left to read
    assert kept.find([1, 2, 3]) == (2, state)
    assert kept.find([2, 1, 3]) is None
    kept.keep([1], 1, [torch.zeros(100)])  # larger than all
    assert len(kept) == 2


# ------------------------------------------------------------------------------- scores


def test_a_scored_prompt_has_the_log_probabilities_of_one_forward(start, model):
    ids = [END, *b"hello world"]
    text = Text(ids, 4, alternatives=2, score_prompt=True, unscored=1, eos=frozenset())
    start([text])
    written = [token.token for token in text.tokens]
    assert written[: len(ids) - 1] == ids[1:]
    with torch.no_grad():
        logits = model(torch.tensor([[END, *written]])).logits[0].double().log_softmax(-1)
    for n, token in enumerate(text.tokens):
        assert token.logprob == pytest.approx(float(logits[n, token.token]), abs=1e-5)
        assert token.top[0][0] == int(logits[n].argmax())


def test_a_scored_prompt_draws_nothing_and_may_be_all_there_is(start):
    text = Text([*b"abc"], 0, alternatives=0, score_prompt=True)
    start([text])
    assert text.text == ""
    assert [token.token for token in text.tokens] == [*b"abc"]
    assert [token.offset for token in text.tokens] == [0, 1, 2]
    assert text.tokens[0].logprob is None
    assert text.job.made == 0
