"""Every registered task: its labels, its solver and ceiling, its seeds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from spectral_window.data.tasks import IGNORED, TASKS, ceiling, generator, make, register
from spectral_window.data.tasks.task import Task
from spectral_window.errors import UserError

POSED = [name for name in TASKS if not name.startswith("published-")]
every_task = pytest.mark.parametrize("name", TASKS)
every_posed = pytest.mark.parametrize("name", POSED)


def draw(name: str, rows: int = 500, length: int = 48, seed: int = 3, split: str = "test"):
    return make(name).batch(generator(seed, split), rows, length)


@every_task
@pytest.mark.parametrize("length", [32, 33, 64, 257])
def test_a_batch_has_its_shape_and_asks_tokens_of_the_vocabulary(name, length):
    task = make(name)
    inputs, labels, distance = task.batch(generator(0, "train"), 7, length)
    # sorting needs an even length: it may be one shorter than asked
    assert inputs.shape == labels.shape == distance.shape
    assert inputs.shape[0] == 7
    assert length - 1 <= inputs.shape[1] <= length
    asked = labels != IGNORED
    assert asked.any(1).all(), "a row asks nothing"
    for tokens in (inputs, labels[asked]):
        assert tokens.min() >= 0
        assert tokens.max() < task.vocab_size
    assert (distance[~asked] == 0).all()


@every_posed
@pytest.mark.parametrize("length", [32, 100, 1024])
def test_a_posed_task_is_answered_without_error(name, length):
    assert ceiling(make(name), length, rows=300) == 1.0


@pytest.mark.parametrize(
    ("name", "length", "best"),
    [
        # over 300,000 sequences; standard error 0.001
        ("published-associative", 32, 0.863),
        ("published-associative", 128, 0.574),
        ("published-induction", 32, 0.816),
        ("published-needle", 256, 0.275),
        ("published-sorting", 32, 0.978),
    ],
)
def test_the_published_tasks_cannot_be_solved_beyond_their_ceiling(name, length, best):
    assert ceiling(make(name), length, rows=20_000) == pytest.approx(best, abs=0.01)


@pytest.mark.parametrize("name", ["published-associative", "published-needle"])
def test_no_guess_beats_the_published_solver(name):
    """Taking the first, or the last, occurrence of the key scores less than the vote."""
    task = make(name)
    inputs, labels, _ = task.batch(generator(1, "test"), 20_000, 64)
    truth, places = labels[:, -1], task.places(64)
    meant = inputs[:, :places] == inputs[:, -1:]
    rows = np.arange(len(inputs))
    best = (task.solve(inputs)[:, -1] == truth).mean()
    first = (inputs[rows, meant.argmax(1) + 1] == truth).mean()
    last = (inputs[rows, places - meant[:, ::-1].argmax(1)] == truth).mean()
    assert max(first, last) <= best + 0.005


@every_task
def test_the_same_seed_draws_the_same_and_another_split_other_sequences(name):
    again = draw(name).inputs
    assert np.array_equal(draw(name).inputs, again)
    seen = {row.tobytes() for row in draw(name, split="train").inputs}
    assert not seen & {row.tobytes() for row in again}
    assert not np.array_equal(draw(name, seed=4).inputs, again)


SEVERAL = {  # what is asked may stand several times, and why
    "sorting": "tokens are sorted, not looked up",
    "two-token-keys": "each token of a key stands in other keys",
    "overwriting": "a key is written again",
    "parity": "there are two tokens",
    "permutations": "there are six tokens",
}


@pytest.mark.parametrize("name", [name for name in POSED if name not in SEVERAL])
def test_noise_keys_and_values_never_meet(name):
    """Without the pairs there is nothing to answer with: a key stands once before it is asked."""
    inputs, labels, _ = draw(name, length=200)
    for row, label in zip(inputs, labels, strict=True):
        for at in np.flatnonzero(label != IGNORED):
            assert (row[:at] == row[at]).sum() == 1


LATER = {  # how many tokens after its key the answer stands
    "recall": 1, "needle": 1, "induction": 1, "mqar": 1, "overwriting": 1, "two-token-keys": 1,
    "value-first": -1, "gap": None, "two-hops": None,
}  # fmt: skip


@every_posed
def test_distance_leads_from_the_question_to_its_key(name):
    inputs, labels, distance = draw(name)
    if name not in LATER:
        assert not distance.any(), "an answer without a place has no distance"
        return
    rows, at = np.nonzero(labels != IGNORED)
    place = at - distance[rows, at]
    assert (inputs[rows, place] == inputs[rows, at]).all()
    if LATER[name] is not None:
        assert (inputs[rows, place + LATER[name]] == labels[rows, at]).all()


def test_permutations_move_three_things_one_after_another():
    every = list(itertools.permutations(range(3)))
    inputs, labels, _ = draw("permutations", rows=20)
    for row, label in zip(inputs, labels, strict=True):
        places = [0, 1, 2]  # of the three things
        for token, product in zip(row, label, strict=True):
            places = [every[token][place] for place in places]
            assert places == list(every[product])
    task = make("permutations")
    assert task.solve(np.array([[2, 1, 1, 5]])).tolist() == [[2, 4, 2, 3]]


def looked_up(inputs: np.ndarray, labels: np.ndarray, distance: np.ndarray):
    """For every question: its row from the key on, up to the separator, and the answer."""
    for row, label, far in zip(inputs, labels, distance, strict=True):
        end = int(np.flatnonzero(row == 0)[0])
        for at in np.flatnonzero(label != IGNORED):
            yield row[at - far[at] : end], label[at]


@pytest.mark.parametrize("gap", [1, 4, 12])
def test_a_gap_of_noise_and_nothing_else_parts_a_key_from_its_value(gap):
    task = make("gap", gap=gap, pairs=2)
    noise, seen = 1 + task.keys + task.values, set()
    for row, answer in looked_up(*task.batch(generator(0, "test"), 500, 40)):
        between = int(np.flatnonzero(row < noise)[1]) - 1  # where the next token is no noise
        assert row[between + 1] == answer
        seen.add(between)
    assert seen == set(range(1, gap + 1))


def test_neither_token_of_a_two_token_key_tells_it():
    for row, answer in looked_up(*draw("two-token-keys")):
        assert row[1] == answer
    inputs = draw("two-token-keys").inputs
    for row in inputs:
        given = row[: int(np.flatnonzero(row == 0)[0])]
        keys = given[(given > 0) & (given <= 16)].reshape(4, 2)
        assert len({tuple(key) for key in keys}) == 4
        for column in keys.T:
            assert np.unique(column, return_counts=True)[1].tolist() == [2, 2]


def test_of_an_overwritten_key_the_last_value_is_asked():
    written = []
    for row, label, far in zip(*draw("overwriting"), strict=True):
        end = int(np.flatnonzero(row == 0)[0])
        for at in np.flatnonzero(label != IGNORED):
            places = np.flatnonzero(row[:end] == row[at])
            assert at - far[at] == places[-1]
            written.append(len(places))
    assert set(written) >= {1, 2, 3}, "a model could count instead of replacing"


def test_two_hops_lead_through_another_key_in_either_order():
    inputs, labels, distance = draw("two-hops")
    later = set()
    for row, label, far in zip(inputs, labels, distance, strict=True):
        for at in np.flatnonzero(label != IGNORED):
            first = at - far[at]
            (second,) = (p for p in np.flatnonzero(row == row[first + 1]) if p != first + 1)
            assert row[second + 1] == label[at]
            later.add(bool(second > first))
    assert later == {True, False}


def test_sorting_asks_the_whole_order_token_by_token():
    inputs, labels, _ = draw("sorting", length=21)
    given, asked = inputs[:, :10], labels[:, 10:]
    assert (np.sort(given, 1) == asked).all()
    assert (inputs[:, 11:] == asked[:, :-1]).all(), "each token is read after it was asked"


def test_mqar_asks_every_key_once_and_near_ones_more_often():
    labels = draw("mqar", rows=2000, length=256).labels
    asked = labels != IGNORED
    assert (asked.sum(1) == 8).all()
    gaps = np.nonzero(asked)[1]
    assert np.median(gaps) < 256 / 4, "the gaps follow a power law"


@every_posed
def test_answers_and_places_are_spread_evenly(name):
    """No answer is likelier than others by more than chance, so guessing does not pay."""
    _, labels, _ = draw(name, rows=4000)
    if name == "sorting":
        return
    answers = labels[labels != IGNORED]
    _, counts = np.unique(answers, return_counts=True)
    expected = counts.mean()
    assert np.abs(counts - expected).max() < 6 * np.sqrt(expected)


def test_errors_name_what_is_wrong():
    with pytest.raises(UserError, match="did you mean 'needle'"):
        make("needel")
    with pytest.raises(UserError, match="did you mean 'pairs'"):
        make("recall", pair=3)
    with pytest.raises(UserError, match="length 5"):
        make("recall").batch(generator(0, "test"), 2, 5)
    with pytest.raises(UserError, match="split"):
        generator(0, "valid")
    with pytest.raises(ValueError, match="registered already"):
        register("needle")(Task)
