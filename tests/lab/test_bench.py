"""The benchmark checks before it times, and never shows a number it did not measure."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from spectral_window.cli.program import app
from spectral_window.errors import UserError
from spectral_window.lab import bench
from spectral_window.lab.bench import delta, figures, models, operators, roofline, targets
from spectral_window.lab.bench.timing import Timing
from spectral_window.training.machine import FLOAT32, folder_name
from spectral_window.training.recipes import MATMUL_SETTINGS

TIMED = ("milliseconds", "ratio")


def test_the_command_measures_writes_and_shows(tmp_path):
    words = ["bench", "spectral", "--quick", "--threads", "1", "--out", str(tmp_path)]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "the paper's FFT" in shown.output
    assert "QUICK" in shown.output
    folder = bench.place(tmp_path)  # speeds hold for one processor, and its folder names it
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    found = json.loads((folder / "spectral.json").read_text())
    assert [(g["threads"], g["dtype"]) for g in found["groups"]] == [
        (1, "float32"),
        (1, "bfloat16"),
    ]
    for group in found["groups"]:
        about = group["environment"]
        assert about["threads"] == 1
        assert about["processor"] in shown.output
        assert folder_name(about["processor"]) == folder.name
        assert about["matmul_precision_asked"] == "auto"
        assert about["matmul_precision"] in MATMUL_SETTINGS
        assert about["matmul_error"] < FLOAT32
        assert f"matmul_precision {about['matmul_precision']}" in shown.output
        assert about["allocator"]
        assert group["quick"] is True
        names = {row["contestant"] for row in group["rows"] if row["status"] == "ok"}
        assert {operators.GIVEN, operators.FRESH, "copy", operators.FRESH_COPY} <= names
    assert (folder / "spectral.png").stat().st_size > 10_000
    judged = json.loads((folder / "goals.json").read_text())["goals"]
    assert {goal["reached"] for goal in judged} == {"missing"}  # a trial reaches nothing


@pytest.mark.parametrize("dtype", bench.DTYPES)
@pytest.mark.parametrize(
    "name", [n for n in bench.BENCHES if n not in ("memory", "data", "sharded")]
)
def test_every_row_is_measured(name, dtype):
    rows = bench.measure(name, dtype, quick=True)
    assert rows
    for row in rows:
        assert row["status"] == "ok", row
        if not {"error", "slope"} & row.keys():
            assert row["milliseconds"] > 0
            assert row["ratio_p10"] <= row["ratio"] <= row["ratio_p90"]
    assert torch.get_float32_matmul_precision() == "highest"  # as it was


def test_peaks_are_measured_in_processes_of_their_own():
    from spectral_window.lab.bench import peaks

    given, *_ = rows = peaks.bench_memory(torch.float32, quick=True)
    if not peaks.RESET.exists():
        pytest.skip("the peak can be reset on Linux only")
    assert [row["status"] for row in rows] == ["ok"] * len(rows), rows
    assert given["inputs"] <= 0.5  # the scan needs next to nothing beyond y


def test_a_wrong_contestant_gets_no_time(monkeypatch):
    scan = operators.spectral_operators()["scan"]
    monkeypatch.setitem(operators.SPECTRAL, "wrong", lambda *inputs: scan(*inputs) * 1.001)
    rows = bench.measure("spectral", "float32", quick=True)
    rows = [row for row in rows if row["contestant"] == "wrong" and "error" not in row]
    assert rows
    for row in rows:
        assert row["status"].startswith("wrong: relative error 1.0e-03")
        assert not set(TIMED) & row.keys()


def test_a_wrong_method_of_the_memory_or_model_with_it_gets_no_time(monkeypatch):
    true = delta.methods
    monkeypatch.setattr(
        delta,
        "methods",
        lambda time: true(time) | {"wrong": lambda *inputs: true(time)["ours"](*inputs) * 1.001},
    )
    monkeypatch.setattr(delta, "HEADS", (1,))
    rows = bench.measure("memory_op", "float32", quick=True)
    rows = [row for row in rows if row["contestant"] == "wrong"]
    assert rows
    for row in rows:
        assert row["status"].startswith("wrong: relative error 1.0e-03")
        assert not set(TIMED) & row.keys()

    def judged(model, _):
        return {"SWH": "wrong: relative error"} if model.config.mixer == "memory" else {}

    monkeypatch.setattr(delta, "check", judged)
    monkeypatch.setattr(delta, "check_gradients", judged)
    rows = bench.measure("memory_layer", "float32", quick=True)
    for row in rows:
        assert ("milliseconds" in row) == (row["contestant"] == "SWH"), row


def test_the_floor_of_the_memory_multiplies_as_often_as_the_recurrence(monkeypatch):
    """Three multiply-adds an entry of the state: read at the key, write, read at the query."""
    asked = []
    monkeypatch.setattr(delta, "multiply", lambda *given: asked.append(given))
    for heads, backward in ((1, False), (3, False), (3, True)):
        delta.calls_of(delta.draw(12, heads, 5, torch.float32), backward)
        (((read, wrote),),), rows, dtype = asked.pop()
        assert dtype == torch.float32
        assert rows * read * wrote == 5 * heads * 3 * (12 // heads) ** 2 * (3 if backward else 1)


def test_a_model_with_wrong_logits_or_gradients_gets_no_time(monkeypatch):
    true = models.next_token
    monkeypatch.setattr(models, "next_token", lambda *args: (true(*args)[0] + 0.01, true(*args)[1]))
    rows = bench.measure("decode", "float32", quick=True)
    ours = [row for row in rows if row["contestant"] == "SWH"]
    assert len(ours) == 3
    assert all(row["status"].startswith("wrong") and "milliseconds" not in row for row in ours)
    monkeypatch.undo()

    step = models.train_step

    def forgetful(model, ids, dtype):
        step(model, ids, dtype)
        if dtype == torch.float32:
            model.lm_head.weight.grad.mul_(1.01)

    monkeypatch.setattr(models, "train_step", forgetful)
    rows = bench.measure("train", "float32", quick=True)
    assert all(r["status"].startswith("wrong") for r in rows if r["contestant"] == "SWH")


def test_a_failing_contestant_says_why_and_slow_ones_leave():
    def fail():
        raise RuntimeError("not enough memory: you tried to allocate 10 EB")

    timing = Timing(seconds=0.01, longest=-1.0, always=("ours",))
    calls = {"ours": lambda: None, "slow": lambda: None, "broken": fail}
    first = timing.run(calls, length=1)
    assert [row["status"] == "ok" for row in first] == [True, True, False]
    assert "10 EB" in first[2]["status"]
    second = timing.run(calls, length=2)
    assert second[0]["status"] == "ok"
    assert second[1]["status"].startswith("left out")
    assert not set(TIMED) & second[1].keys()


def test_ratios_are_of_the_same_round():
    spent = iter([2, 6] * 100)
    timing = Timing(seconds=0.0, fewest=5)
    rounds = [{"ours": float(k), "other": 3.0 * k} for k in (1, 5, 9)]
    timing._rounds = lambda *_: rounds
    ours, other = timing.run({"ours": lambda: next(spent), "other": lambda: next(spent)})
    assert (ours["ratio"], other["ratio"]) == (1.0, 3.0)
    assert (other["ratio_p10"], other["ratio_p90"]) == (3.0, 3.0)  # though the times differ
    assert other["milliseconds_p10"] < other["milliseconds_p90"]


def test_the_plain_contestants_compute_what_they_stand_for():
    q, k, v = operators.draw_qkv(100, torch.float32, False)
    whole = operators.full(q, k, v)
    one_window = operators.naive_chunks(q, k, v, window=100)
    torch.testing.assert_close(one_window, whole, atol=1e-5, rtol=1e-5)
    u, modes = operators.draw_spectral(50, torch.float32, False)
    direct = operators.direct_blocks(u, *modes[:2], (0, 40), length=10)
    fft = operators.paper_fft(u, *modes[:2])[0].double()
    torch.testing.assert_close(direct, torch.stack((fft[:10], fft[40:])), atol=1e-4, rtol=1e-4)


def test_the_floor_makes_the_products_of_the_model():
    config = models.shape(3, quick=True)
    model = models.SWHForCausalLM(config)
    inner = sum(p.numel() for n, p in model.model.layers.named_parameters() if p.dim() == 2)
    kernels = sum(
        p.numel() for n, p in model.named_parameters() if ".kernel." in n and p.dim() == 2
    )
    products = roofline.layer_products(config)
    assert 3 * sum(k * n for k, n in products) == inner - kernels


def test_baselines_are_equally_large():
    config = models.shape(12)
    with torch.device("meta"):
        size = models.count_inner(models.SWHForCausalLM(config))
        for name in models.BASELINES:
            model = models.build_baseline(name, config, size, torch.float32)
            layers = model.config.num_hidden_layers
            near = 0.5 / layers if name == "Mamba2" else 0.001  # by whole layers, by width
            assert abs(models.count_inner(model) / size - 1) <= near, name


@torch.no_grad()
@pytest.mark.parametrize("name", models.BASELINES)
def test_each_baseline_has_a_past_of_the_bytes_it_tells_or_says_why_not(name):
    """No kind of model is known by name outside its record."""
    config = models.shape(3, quick=True)
    torch.manual_seed(0)
    model = models.build(config, (name,), torch.float32)[name]
    token = models.draw_ids(config, 1, 1)
    logits, _ = models.next_token(model, token)
    assert logits.shape == (1, 1, config.vocab_size)
    if models.BASELINES[name].past is None:
        with pytest.raises(UserError, match="cannot be set to a context"):
            models.remember(model, 1000)
        return
    few, many = (models.remember(model, context) for context in (200, 1000))
    assert many[1] == few[1] * (5 if name == "Llama" else 1)
    after, _ = models.next_token(model, token, many[0])
    assert bool(after.isfinite().all())
    assert not torch.equal(after, logits)


def test_a_model_without_a_record_is_refused():
    class Other:
        config = object()

    with pytest.raises(UserError, match="no record of Other"):
        models.next_token(Other(), torch.zeros(1, 1, dtype=torch.int64))


def _group(rows, **more):
    return {"threads": 1, "dtype": "float32", "quick": False, "rows": rows, **more}


def test_goals_are_computed_from_the_rows():
    row = {"pass": "forward", "contestant": "copy", "status": "ok"}
    rows = [
        {**row, "length": 512, "ratio": 0.1},  # too short to count
        {**row, "length": 16_384, "ratio": 0.9},
        {**row, "length": 65_536, "ratio": 0.8},
        {**row, "length": 262_144, "status": "failed: no memory"},
    ]
    (copy,) = [
        g for g in targets.evaluate({"spectral": [_group(rows)]}) if "1.2 x a copy" in g["goal"]
    ]
    assert (copy["measured"], copy["reached"]) == (1.25, "not reached")  # the worst of them
    assert copy["at"] == "length 65,536"
    rows[2]["ratio"] = 0.85
    (copy,) = [
        g for g in targets.evaluate({"spectral": [_group(rows)]}) if "1.2 x a copy" in g["goal"]
    ]
    assert copy["reached"] == "reached"


def test_goals_without_rows_are_missing():
    trial = [_group([{"pass": "forward", "contestant": "copy", "status": "ok", "length": 16_384,
                      "ratio": 1.0}], quick=True)]  # fmt: skip
    for groups in ({}, {"spectral": trial}):
        judged = targets.evaluate(groups)
        assert len(judged) == len(targets.TARGETS)
        assert all(g["reached"] == "missing" and g["measured"] is None for g in judged)


def test_growth_of_memory_is_a_goal():
    peak = {"part": "prefill", "contestant": "SWH", "status": "ok"}
    rows = [
        {**peak, "length": 4096, "peak_bytes": 100},
        {**peak, "length": 65_536, "peak_bytes": 110},
    ]
    evaluated = targets.evaluate({"memory": [_group(rows)]})
    found = [g for g in evaluated if "prefill memory" in g["path"]]
    assert [(g["measured"], g["reached"]) for g in found] == [(1.1, "reached")]


def test_results_are_kept_beside_one_another(tmp_path):
    one, two = _group([1]), _group([2], threads=2)
    bench.save(tmp_path, "window", [two])
    bench.save(tmp_path, "window", [one])
    assert bench.load(tmp_path, "window") == [one, two]
    bench.save(tmp_path, "window", [_group([3])])
    assert [g["rows"] for g in bench.load(tmp_path, "window")] == [[3], [2]]
    with pytest.raises(UserError, match="holds real results"):
        bench.save(tmp_path, "window", [_group([4], quick=True)])


def test_pictures_say_what_is_missing(tmp_path):
    about = {"environment": {"processor": "a processor"}}
    nothing = [_group([{"contestant": "SWH", "status": "failed: ..."}], **about)]
    written = figures.draw_all({"decode": nothing}, tmp_path)
    assert [path.name for path in written] == ["decode.png"]


def test_an_unknown_bench_or_dtype_is_named():
    with pytest.raises(UserError, match="did you mean 'spectral'"):
        bench.chosen(["spectrl"])
    shown = CliRunner().invoke(app, ["bench", "--dtype", "float31"])
    assert isinstance(shown.exception, UserError)
    assert bench.chosen([]) == bench.chosen(["all"]) == list(bench.BENCHES)
