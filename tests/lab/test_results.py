"""Intervals and verdicts: what they promise, and that no verdict is given where nothing was
measured."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spectral_window.errors import UserError
from spectral_window.lab import estimates, results
from spectral_window.lab.estimates import fisher, mean, share
from spectral_window.lab.paper import claims
from spectral_window.lab.paper.claims import FAILS, HOLDS, MISSING, ONLY_PUBLISHED

RNG = np.random.default_rng(0)


def test_a_single_models_interval_covers_its_share_as_often_as_it_says():
    truth, asked, covered = 0.97, 200, 0
    for right in RNG.binomial(asked, truth, 2000):
        found = share([(int(right), asked)])
        covered += found.low <= truth <= found.high
    assert covered / 2000 >= 0.93


def test_the_interval_of_seeds_covers_their_mean():
    covered = 0
    for _ in range(1000):
        found = mean(RNG.normal(3.5, 0.1, 3))
        covered += found.low <= 3.5 <= found.high
    assert 0.93 <= covered / 1000 <= 0.97


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (11, 2.201), (60, 2.000)]
)
def test_students_quantiles_are_those_of_the_tables(degrees, quantile):
    assert estimates._t(degrees) == pytest.approx(quantile, rel=0.015)


def test_seeds_that_differ_widen_the_interval_of_a_share():
    alike, apart = share([(500, 1000)] * 3), share([(100, 1000), (500, 1000), (900, 1000)])
    assert alike.value == apart.value == 0.5
    assert apart.high - apart.low > 5 * (alike.high - alike.low)
    assert apart.low >= 0.0
    assert apart.high <= 1.0


def test_a_perfect_score_has_an_interval_below_one():
    found = share([(2048, 2048)] * 3)
    assert found.value == found.high == 1.0
    assert 0.99 < found.low < 1.0


def test_one_seed_tells_nothing_of_seeds():
    found = mean([3.0])
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_fisher_is_the_papers_three_against_none():
    assert fisher(3, 64, 0, 64) == pytest.approx(0.122, abs=0.001)
    assert fisher(0, 64, 0, 64) == 1.0
    # against the definition, by enumeration of a small table
    assert fisher(3, 4, 1, 4) == pytest.approx((4 * 4 + 1) / math.comb(8, 4), rel=1e-12)


def test_quick_results_never_replace_real_ones(tmp_path):
    quick = {"quick": True, "command": "quick", "rows": [{"key": "a"}]}
    results.save(tmp_path, "synthetic", quick)
    results.save(tmp_path, "synthetic", quick | {"quick": False, "command": "real"})
    with pytest.raises(UserError, match="holds real results"):
        results.save(tmp_path, "synthetic", quick)
    assert results.load(tmp_path, "synthetic")["command"] == "real"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 3}'])
def test_a_damaged_file_is_no_result(tmp_path, text):
    (tmp_path / "ablate.json").write_text(text)
    assert results.load(tmp_path, "ablate") is None
    assert results.load(tmp_path, "absent") is None


# ------------------------------------------------------------------------------------- verdicts


def synthetic(scores: dict[tuple[str, str, int, str], float], seeds: int = 3) -> dict:
    """A suite in which the model `m` scored `scores[form, task, length, m]`."""
    rows = [
        {
            "form": form, "model": model, "training": "fixed",
            "tests": [
                {"task": task, "length": length, "right": round(1000 * score), "asked": 1000}
            ],
        }
        for (form, task, length, model), score in scores.items()
        for _ in range(seeds)
    ]  # fmt: skip
    tests = {(task, length) for _, task, length, _ in scores}
    ceilings = [{"task": task, "length": length, "ceiling": 1.0} for task, length in tests]
    return {"synthetic": {"rows": rows, "ceilings": ceilings}}


def verdict(found: dict, name: str) -> str:
    return next(claim.verdict for claim in claims.evaluate(found) if claim.name.startswith(name))


@pytest.mark.parametrize(
    ("published", "posed", "expected"),
    [
        ((0.86, 0.80), (0.9, 0.7), HOLDS),
        ((0.86, 0.80), (0.7, 0.7), ONLY_PUBLISHED),
        ((0.80, 0.80), (0.7, 0.9), FAILS),
        ((0.80, 0.86), (0.9, 0.7), HOLDS),
        (None, (0.9, 0.7), HOLDS),
        (None, (0.7, 0.7), MISSING),
        ((0.86, 0.80), None, MISSING),
        (None, None, MISSING),
    ],
)
def test_a_verdict_follows_from_both_measurements(published, posed, expected):
    scores = {}
    for form, task, pair in (
        ("published", "published-associative", published),
        ("posed", "recall", posed),
    ):
        if pair is not None:
            scores[form, task, 32, "SWH"], scores[form, task, 32, "Transformer"] = pair
    assert verdict(synthetic(scores), "Associative recall: above") == expected


def test_a_difference_within_the_noise_is_no_superiority_but_a_match():
    scores = {
        ("posed", "induction", 32, "SWH"): 0.81,
        ("posed", "induction", 32, "Transformer"): 0.80,
        ("posed", "recall", 32, "SWH"): 0.81,
        ("posed", "recall", 32, "Transformer"): 0.80,
        ("published", "published-associative", 32, "SWH"): 0.81,
        ("published", "published-associative", 32, "Transformer"): 0.80,
    }
    found = synthetic(scores)
    assert verdict(found, "Induction") == HOLDS, "the claim is that both are alike"
    assert verdict(found, "Associative recall: matches") == HOLDS
    assert verdict(found, "Associative recall: above") == FAILS


def language(part: str, ends: dict[str, list[float]]) -> dict:
    rows = [
        {"part": part, "variant": name, "seed": seed, "eval_loss": loss, "train_loss": loss,
         "lr": 1e-3, "initializer_range": 0.02, "parameters": 3_000_000, "tokens": 20_000_000}
        for name, losses in ends.items()
        for seed, loss in enumerate(losses)
    ]  # fmt: skip
    return {"lm-small": {"rows": rows}}


def test_lower_loss_needs_every_seed_to_be_ahead():
    ahead = language("main", {"SWH": [3.1, 3.2], "Transformer": [3.3, 3.4]})
    mixed = language("main", {"SWH": [3.1, 3.35], "Transformer": [3.3, 3.4]})
    one = language("main", {"SWH": [3.1], "Transformer": [3.3]})
    assert verdict(ahead, "Language") == HOLDS
    assert verdict(mixed, "Language") == MISSING, "the published form was not measured"
    assert verdict(one, "Language") == MISSING


def test_the_width_that_is_worse_at_the_end_does_not_count():
    found = language("main", {"SWH": [3.1, 3.2], "Transformer": [3.3, 3.4]})
    worse = found["lm-small"]["rows"][2] | {"initializer_range": 0.05, "eval_loss": 3.9}
    found["lm-small"]["rows"].append(worse)
    assert claims.losses(found, "lm-small", "main", "Transformer") == [3.3, 3.4]


def test_nothing_measured_gives_no_verdict():
    assert {claim.verdict for claim in claims.evaluate({})} == {MISSING}
    assert all(claim.well_posed == MISSING for claim in claims.evaluate({}))
