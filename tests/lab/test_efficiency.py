"""The efficiency suite times the published models as they are, and says what it did not measure."""

from __future__ import annotations

import json

import pytest
import torch

from spectral_window.errors import ResourceError, UserError
from spectral_window.hf.config import SWHConfig
from spectral_window.hf.model import SWHModel
from spectral_window.lab.bench.models import in_float64
from spectral_window.lab.bench.peaks import RESET
from spectral_window.lab.bench.timing import relative_error
from spectral_window.lab.experiments import efficiency, published
from spectral_window.lab.experiments import efficiency_measure as measure
from spectral_window.training.machine import FLOAT32, precision

QUICK = {"quick": True, "threads": 1}


def small(mixer: str) -> SWHModel:
    config = SWHConfig.preset("paper", size="tiny", num_hidden_layers=2, mixer=mixer)
    return SWHModel(config).eval()


@pytest.mark.parametrize("time", [1, 31, 33, 64, 100])  # the window is 32
@pytest.mark.parametrize("mixer", ["spectral_window", "attention"])
def test_published_models_are_ours_and_evaluating_twice_changes_nothing(mixer, time):
    model = small(mixer)
    ids = torch.randint(4096, (2, time))
    truth = measure.hidden_states(in_float64(model), ids)
    twice = measure.hidden_states(published.Published(model), ids)
    assert relative_error(twice, truth) < 2e-6
    assert torch.equal(twice, measure.hidden_states(published.Published(model, 1), ids))


def test_published_blocks_evaluate_their_mixer_twice():
    model = small("attention")
    calls: list[str] = []
    for name in ("mixer.out_proj", "mlp.down_proj"):
        part = model.layers[0].get_submodule(name)
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
    measure.hidden_states(published.Published(model), torch.zeros(1, 4, dtype=torch.int64))
    assert calls == ["mixer.out_proj", "mixer.out_proj", "mlp.down_proj"]


def test_a_model_with_wrong_hidden_states_gets_no_time(monkeypatch):
    model = published.Published(small("spectral_window"))
    assert measure.check(model) is None
    right = published.paper_fft
    monkeypatch.setattr(published, "paper_fft", lambda *args: right(*args).roll(1, 1))
    assert measure.check(model).startswith("wrong: relative error")


def test_sizes_are_unmatched_as_published_and_equal_when_well_posed():
    def sizes(form):
        models = (measure.build({"form": form, "shape": "tiny"}, name, 2) for name in names)
        return [sum(p.numel() for p in model.parameters()) for model in models]

    names = list(measure.MODELS)
    transformer, swh = sizes("published")
    assert swh - transformer == 2 * (2 * 128 * 128 + 4 * 128)  # two maps; bias, kernel, norm
    transformer, swh = sizes("posed")
    assert abs(transformer - swh) < 0.001 * swh


def test_matrices_that_do_not_fit_are_not_tried():
    config = SWHConfig.preset("paper")
    assert measure.too_large(config, 4096, 2 * 10**9) is None
    # two of 12 x 65,536^2 float32 and a mask
    assert measure.too_large(config, 65_536, 16 * 10**9) == "does not fit: needs 417 GB"


# -------------------------------------------------------------------------- results and summary


def row(form, contestant, length, milliseconds, peak, **more):
    about = {"form": form, "contestant": contestant, "length": length, "status": "ok", "layers": 2}
    return {**about, "milliseconds": milliseconds, "peak_bytes": peak, "ratio": 1.0, **more}


def finished(folder):
    """Results of all quick rows, with numbers that no machine gives; the path of the JSON."""
    path = folder / "efficiency.json"
    results = efficiency._open(folder, efficiency._settings("tiny", True, 1), True, "c")
    results["rows"] = [
        row(form, name, length, 1e9, 1)
        for form in efficiency.FORMS
        for length in efficiency.QUICK
        for name in measure.MODELS
    ]
    path.write_text(json.dumps(results))
    return path


def test_the_summary_is_read_off_the_rows():
    rows = [row("posed", "transformer", t, t * t, 3 * t) for t in (512, 1024, 4096)]
    rows += [row("posed", "swh", t, 5 * t, 7, ratio=0.25) for t in (512, 1024, 4096)]
    rows += [row("posed", "swh", 8192, 5 * 8192 / 2, None, layers=1)]  # the same time a layer
    rows += [{"form": "published", "contestant": "swh", "length": 512, "status": "failed: ..."}]
    found = efficiency.summary({"rows": rows})
    assert found["slope"]["posed"] == {"transformer": 2.0, "swh": 1.0}
    assert found["time_ratio"] == {"published": None, "posed": 0.25}
    assert found["memory_ratio"]["posed"] == {"transformer": 8.0, "swh": 1.0}
    for key in ("slope", "memory_ratio"):
        assert found[key]["published"] == {"transformer": None, "swh": None}


def test_what_is_there_is_not_measured_again(tmp_path):
    path = finished(tmp_path)
    before = path.read_text()
    lines: list[str] = []
    efficiency.run(tmp_path, **QUICK, command="c", log=lines.append)
    assert not lines
    assert path.read_text() == before
    assert (tmp_path / "efficiency.png").stat().st_size > 10_000


def test_what_is_missing_is_measured_and_the_rest_stays(tmp_path):
    path = finished(tmp_path)
    results = json.loads(path.read_text())
    length = efficiency.QUICK[0]
    there = [r for r in results["rows"] if (r["form"], r["length"]) != ("published", length)]
    peak = next(r for r in there if r["form"] == "posed" and r["contestant"] == "swh")
    peak["peak_bytes"] = None
    path.write_text(json.dumps(results | {"rows": there}))
    lines: list[str] = []
    results = efficiency.run(tmp_path, **QUICK, command="c", log=lines.append)
    assert results == json.loads(path.read_text())
    assert results["quick"] is True
    assert results["environment"]["threads"] == 1
    assert results["environment"]["matmul_precision_asked"] == "auto"
    assert results["environment"]["matmul_error"] < FLOAT32
    assert (
        results["environment"]["matmul_precision"]
        == results["settings"]["matmul_precision"]
        == precision("auto", "cpu").in_force
    )
    # the times of one length, all of the published counter, and one peak
    assert len(lines) == 2 + 4 + 1
    rows = {(r["form"], r["contestant"], r["length"]): r for r in results["rows"]}
    for name in measure.MODELS:
        new = rows["published", name, length]
        assert new["status"] == "ok"
        assert 0 < new["p10"] <= new["milliseconds"] <= new["p90"] < 1e9
        assert rows["posed", name, length]["milliseconds"] == 1e9
    counter = [rows["published", n, t]["peak_bytes"] for n, t in sorted_passes()]
    assert counter == sorted(counter)  # it only ever grows, SWH after the Transformer
    assert counter[0] > 1
    if RESET.exists():
        assert rows["posed", "swh", length]["peak_bytes"] > 1


def sorted_passes():
    return [(name, length) for name in measure.MODELS for length in efficiency.QUICK]


def test_results_of_other_settings_are_never_replaced(tmp_path):
    path = finished(tmp_path)
    before = path.read_text()
    with pytest.raises(UserError, match="results of other settings: choose another"):
        efficiency.run(tmp_path, quick=True, threads=2, command="c", log=print)
    with pytest.raises(UserError, match="threads is 0"):
        efficiency.run(tmp_path, quick=True, threads=0, command="c", log=print)
    with pytest.raises(UserError, match="unknown size 'smal': did you mean 'small'"):
        efficiency.run(tmp_path, quick=False, shape="smal", threads=1, command="c", log=print)
    assert path.read_text() == before


def test_a_process_that_fails_says_why():
    results = {"settings": {"shape": "none", "threads": 1}, "quick": True}
    with pytest.raises(ResourceError, match="unknown size 'none'"):
        list(efficiency._measure("time", "posed", results, lengths=[[8, 1]]))
