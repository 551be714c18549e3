"""Promises of generation/engine.py: rows run together, and each is as it would be alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_window import SWHConfig, SWHForCausalLM, nn
from spectral_window.errors import DivergedError, UserError
from spectral_window.generation.decoding import Sampling
from spectral_window.generation.engine import Engine, Row, RowsDivergedError
from spectral_window.nn.mixers import MIXERS, map_state
from tests.ops.recorder import Recorder

GREEDY = Sampling(temperature=0)
VOCABULARY = 61
# of different ages: the fourth and the last have the same length
PROMPTS = [[1], [7, 8, 9], list(range(20)), [5] * 11, list(range(40, 10, -1)), [2, 3] * 5 + [4]]
VARIANTS: dict[str, dict[str, Any]] = {
    # (the laboratory's mixers have no state)
    **{name: {"mixer": name} for name, m in MIXERS.items() if m.__module__.startswith(nn.__name__)},
    "shifted_keys": {"mixer": "attention", "shifted_keys": True},
    "fir": {"kernel": "free_form"},
    "modes": {"kernel": "multi_mode", "branches": ("spectral",)},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def tiny(variant: str = "spectral_window") -> SWHForCausalLM:
    torch.manual_seed(0)
    config = SWHConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        window=4, initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        **VARIANTS[variant],
    )  # fmt: skip
    return SWHForCausalLM(config).eval()


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny())


def begun(engine: Engine, ids: list[int], *, segment: int | None = None, **options: Any) -> Row:
    """A row that has read its prompt but for the newest token."""
    row = engine.add(ids, **{"sampling": GREEDY, "seed": 1, **options})
    while engine.prefill(row, segment):
        pass
    return row


def step(engine: Engine, rows: list[Row]) -> tuple[list[int], list[Tensor]]:
    """One token of each row, and the logits it was drawn from."""
    engine.step(rows)
    logits = [row.logits for row in rows if row.logits is not None]
    tokens = engine.sample(rows)
    for row, token in zip(rows, tokens, strict=True):
        engine.extend(row, [token])
    return tokens, logits


def write(engine: Engine, rows: Iterable[Row], count: int) -> list[list[int]]:
    """`count` tokens of each row."""
    rows = list(rows)
    steps = [step(engine, rows)[0] for _ in range(count)]
    return [list(tokens) for tokens in zip(*steps, strict=True)]


def alone(model: Any, ids: list[int], count: int, **options: Any) -> tuple[list[int], Tensor]:
    """The tokens and logits [count, V] of a row that has an engine for itself."""
    engine = Engine(model)
    row = begun(engine, ids, **options)
    steps = [step(engine, [row]) for _ in range(count)]
    return [tokens[0] for tokens, _ in steps], torch.stack([logits[0] for _, logits in steps])


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two logits agree within 2e-6 of their root mean square."""
    return bool((a - b).square().mean().sqrt() <= 2e-6 * b.square().mean().sqrt())


@every_variant
def test_one_row_writes_what_transformers_generate_writes(variant):
    model = tiny(variant)
    for ids in PROMPTS[:3]:
        prompt = torch.tensor([ids])
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False
        )
        assert alone(model, ids, 12)[0] == out[0, len(ids) :].tolist()


@every_variant
def test_rows_that_join_and_leave_at_every_step_are_as_each_alone(variant):
    """Row n joins at step 2 n, its prompt read between the others' steps, and leaves after 9."""
    model = tiny(variant)
    engine = Engine(model)
    rows: dict[int, Row] = {}
    texts: dict[int, list[int]] = {n: [] for n in range(len(PROMPTS))}
    outputs: dict[int, list[Tensor]] = {n: [] for n in range(len(PROMPTS))}
    for time in range(2 * len(PROMPTS) + 9):
        joining, odd = divmod(time, 2)
        if not odd and joining < len(PROMPTS):
            rows[joining] = engine.add(PROMPTS[joining], GREEDY, seed=1)
        for row in rows.values():
            engine.prefill(row, 17)
        running = {n: row for n, row in rows.items() if len(row.unread) == 1}
        tokens, logits = step(engine, list(running.values()))
        for n, token, output in zip(running, tokens, logits, strict=True):
            texts[n].append(token)
            outputs[n].append(output)
            if len(texts[n]) == 9:
                engine.drop(rows.pop(n))
    assert not rows
    assert not engine.rows
    for n, ids in enumerate(PROMPTS):
        expected, logits_alone = alone(model, ids, 9)
        assert texts[n] == expected
        assert all(map(close, outputs[n], logits_alone))


@pytest.mark.parametrize("variant", ["spectral_window", "memory"])
def test_replayed_tokens_are_as_usual_and_states_stay_values(variant):
    """CUDA graphs need a GPU: a recorder for a CPU stands for them."""
    recorder = Recorder()
    model = tiny(variant)
    engine, usual = Engine(model, recorder=recorder), Engine(model)
    written = []
    for each in (engine, usual):
        rows = [begun(each, ids, sampling=Sampling(temperature=1)) for ids in PROMPTS[1:4]]
        first = write(each, rows, 8)
        twin = each.copy(rows[0])
        rest = write(each, rows[:2], 6), write(each, [twin, rows[2]], 6)
        written.append((first, rest))
    assert written[0] == written[1]
    constant = model.constant_state
    assert bool(recorder.replayed) == constant
    assert recorder.recorded == (2 if constant else 0)  # three rows, and two


@every_variant
def test_the_same_text_alone_and_among_63_others(variant):
    model = tiny(variant)
    engine = Engine(model)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(VOCABULARY, (1 + n % 13,), generator=draw).tolist() for n in range(64)]
    texts = write(engine, [begun(engine, ids) for ids in prompts], 10)
    for n in (0, 31, 63):
        assert texts[n] == alone(model, prompts[n], 10)[0]


@pytest.mark.parametrize("segment", [1, 2, 7, 100])
@every_variant
def test_segments_of_any_size_leave_the_same_state(variant, segment):
    model = tiny(variant)
    expected, logits_alone = alone(model, PROMPTS[4], 3)
    tokens, logits = alone(model, PROMPTS[4], 3, segment=segment)
    assert tokens == expected
    assert close(logits, logits_alone)


@every_variant
def test_a_copy_shares_the_state_and_goes_its_own_way(variant):
    model = tiny(variant)
    engine = Engine(model)
    prefix = begun(engine, PROMPTS[2])
    copies = [engine.copy(prefix) for _ in range(3)]
    assert all(copy.place is prefix.place for copy in copies)
    for n, copy in enumerate(copies):
        engine.extend(copy, [n, 50])
        while engine.prefill(copy):
            pass
    texts = write(engine, copies, 6)
    for n, text in enumerate(texts):
        assert text == alone(model, [*PROMPTS[2], n, 50], 6)[0]
    assert write(engine, [prefix], 6) == [alone(model, PROMPTS[2], 6)[0]]


def test_a_copy_in_the_middle_of_a_batch_draws_as_its_original(engine):
    rows = [begun(engine, ids, sampling=Sampling(1.0), seed=3) for ids in PROMPTS[:3]]
    write(engine, rows, 3)
    twin, other = engine.copy(rows[1]), engine.copy(rows[1], seed=4)
    texts = write(engine, [*rows, twin, other], 20)
    assert texts[3] == texts[1] != texts[4]


@every_variant
def test_dropping_a_row_in_the_middle_changes_no_other(variant):
    model = tiny(variant)
    engine = Engine(model)
    rows = [begun(engine, ids) for ids in PROMPTS[:4]]
    before = write(engine, rows, 3)
    engine.drop(rows.pop(1))
    after = write(engine, rows, 5)
    for n, text in zip((0, 2, 3), after, strict=True):
        assert before[n] + text == alone(model, PROMPTS[n], 8)[0]


def test_every_row_draws_by_its_own_sampling_and_seed(engine):
    sampling = [GREEDY, Sampling(1.0), Sampling(2.0, top_k=5), Sampling(0.7, top_p=0.8)]
    options = [{"sampling": s, "seed": n % 2} for n, s in enumerate(sampling)]
    rows = [begun(engine, PROMPTS[1], **each) for each in options]
    texts = write(engine, rows, 25)
    assert len({tuple(text) for text in texts}) == 4
    for text, each in zip(texts, options, strict=True):
        assert text == alone(engine.model, PROMPTS[1], 25, **each)[0]


@pytest.mark.parametrize("forward", [1, 2, 3])
def test_an_exception_in_a_step_leaves_all_rows_as_they_were(forward):
    """Of the Transformer's ages the first had run already when the second failed."""
    model = tiny("attention")
    engine = Engine(model)
    rows = [begun(engine, ids) for ids in PROMPTS[:3]]
    texts = write(engine, rows, 2)
    before = [(row.place, row.unread, row.tokens_seen) for row in rows]
    forwards = 0

    def interrupt(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == forward:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step(rows)
    forwards = forward - 1
    with pytest.raises(KeyboardInterrupt):
        engine.step(rows[:1])
    handle.remove()
    assert [(row.place, row.unread, row.tokens_seen) for row in rows] == before
    for n, text in enumerate(write(engine, rows, 4)):
        assert texts[n] + text == alone(model, PROMPTS[n], 6)[0]


class Broken(Sampling):
    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        raise KeyboardInterrupt


def test_an_exception_while_drawing_takes_back_the_random_numbers(engine):
    rows = [begun(engine, ids, sampling=Sampling(1.0)) for ids in PROMPTS[:3]]
    engine.step(rows)
    before = [row.generator.get_state() for row in rows]
    rows[2].sampling = Broken()
    with pytest.raises(KeyboardInterrupt):
        engine.sample(rows)
    assert all(map(torch.equal, before, [row.generator.get_state() for row in rows]))


@pytest.mark.parametrize("variant", ["spectral_window", "memory"])
def test_a_row_that_is_not_finite_is_reported_alone(variant):
    model = tiny(variant)
    engine = Engine(model)
    rows = [begun(engine, ids, sampling=Sampling(1.0), seed=5) for ids in PROMPTS[1:5]]
    texts = write(engine, rows, 2)
    ill = rows[1]
    spoilt = [
        map_state(state, lambda t: t * math.nan if t.is_floating_point() else t)
        for state in ill.states
    ]
    engine.restore(ill, spoilt, ill.state_seen)
    engine.extend(ill, [3])
    engine.step(rows)
    with pytest.raises(RowsDivergedError, match=r"non-finite logits at step 2 \(after") as caught:
        engine.sample(rows)
    assert isinstance(caught.value, DivergedError)
    assert caught.value.rows == [ill]
    engine.drop(ill)
    rows.remove(ill)
    for n, text in zip((0, 2, 3), write(engine, rows, 4), strict=True):
        assert texts[n] + text == alone(model, PROMPTS[1 + n], 6, sampling=Sampling(1.0), seed=5)[0]


def test_a_row_that_waits_holds_no_state_but_its_own(engine):
    rows = [begun(engine, ids) for ids in PROMPTS[1:]]
    engine.step(rows)
    waiting, *running = rows
    assert waiting.place[0] is running[0].place[0]
    logits = waiting.logits
    tokens = engine.sample(running)
    for row, token in zip(running, tokens, strict=True):
        engine.extend(row, [token])
    engine.step(running)
    assert waiting.place[0].size == 1
    assert waiting.logits.untyped_storage().nbytes() == logits.nbytes
    assert torch.equal(waiting.logits, logits)
    for layer in engine._layers:
        assert layer.state is None


def test_a_prompt_read_by_one_row_leaves_the_others_in_one_batch(engine):
    rows = [begun(engine, ids) for ids in PROMPTS[1:5]]
    write(engine, rows, 2)
    twin = engine.copy(rows[3])
    engine.extend(rows[1], [1, 2, 3])
    engine.prefill(rows[1])
    assert {row.place[0].size for row in (rows[0], rows[2], rows[3], twin)} == {3}
    assert twin.place == rows[3].place == (rows[0].place[0], 2)
    texts = write(engine, rows, 4)
    assert texts[2] == alone(engine.model, PROMPTS[3], 6)[0][2:]


def test_rows_that_stay_together_are_not_gathered_again(engine, monkeypatch):
    rows = [begun(engine, ids) for ids in PROMPTS[:4]]
    write(engine, rows, 2)
    batches = []
    run = engine._run
    monkeypatch.setattr(
        engine, "_run", lambda ids, batch, seen: batches.append(batch) or run(ids, batch, seen)
    )
    for _ in range(2):
        batch = rows[2].place[0]
        step(engine, rows[::-1])  # in any order
        assert batches.pop() is batch


@pytest.mark.parametrize(("variant", "forwards"), [("spectral_window", 1), ("attention", 2)])
def test_one_forward_a_step_or_one_for_each_age_where_the_state_grows(variant, forwards):
    model = tiny(variant)
    engine = Engine(model)
    rows = [begun(engine, PROMPTS[n]) for n in (2, 3, 5)]
    calls: list[int] = []
    model.register_forward_hook(lambda _, __, out: calls.append(len(out.logits)))
    engine.step(rows)
    assert len(calls) == forwards
    assert sum(calls) == 3
    engine.step(rows)  # all have logits: nothing to do
    assert len(calls) == forwards


def test_tokens_beyond_the_vocabulary_given_are_never_drawn():
    engine = Engine(tiny(), vocab_size=9)
    row = begun(engine, [60, 3], sampling=Sampling(9.0))
    assert max(write(engine, [row], 40)[0]) == 8


def test_what_cannot_be_is_refused(engine):
    row = engine.add([1, 2, 3], seed=0)
    stranger = Engine(engine.model).add([1])
    dropped = engine.add([1])
    engine.drop(dropped)
    refused = [
        ("3 tokens are unread", lambda: engine.step([row])),
        ("no logits", lambda: engine.sample([row])),
        ("given twice", lambda: engine.step([row, row])),
        ("not of this engine", lambda: engine.step([stranger])),
        ("not of this engine", lambda: engine.extend(dropped, [1])),
        ("segment", lambda: engine.prefill(row, 0)),
        ("empty", lambda: engine.extend(row, [])),
        ("token 1 is 61", lambda: engine.extend(row, [1, VOCABULARY])),
        ("whole numbers", lambda: engine.add([1.5])),
        ("seed", lambda: engine.add([1], seed=-1)),
        ("top_k", lambda: engine.add([1], Sampling(top_k=VOCABULARY + 1))),
    ]
    for message, call in refused:
        with pytest.raises(UserError, match=message):
            call()
    assert engine.rows == {row}
    assert row.unread == [1, 2, 3]


@every_variant
def test_a_row_goes_on_in_another_engine_of_the_model(variant):
    model = tiny(variant)
    first, second = Engine(model), Engine(model)
    row = begun(first, PROMPTS[2])
    text = write(first, [row], 4)[0]
    first.drop(row)
    beside = begun(second, PROMPTS[1])
    second.adopt(row)
    text += write(second, [row, beside], 5)[0]
    assert text == alone(model, PROMPTS[2], 9)[0]
    with pytest.raises(UserError, match="not of this engine"):
        first.step([row])
