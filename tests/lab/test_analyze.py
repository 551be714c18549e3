"""The analysis: numbers that agree with the definitions, and with what was built into a model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from spectral_window.commands import analyze as command
from spectral_window.data.text import open_corpus
from spectral_window.data.tokenizers import load_tokenizer
from spectral_window.errors import UserError
from spectral_window.hf import SWHConfig, SWHForCausalLM
from spectral_window.lab import analyze as lab
from spectral_window.lab.kernel_figures import draw_all
from spectral_window.nn.fusions import FUSIONS
from spectral_window.nn.kernels import KERNELS
from spectral_window.ops.modes import Modes, kernel
from spectral_window.training.recipes import resolve
from spectral_window.training.trainer import train

STEPS = 3
ANGLES = np.linspace(0, np.pi, 33)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps."""
    root = tmp_path_factory.mktemp("analyze")
    words = np.random.default_rng(0).integers(0, 50, 20_000)
    texts = root / "texts.jsonl"
    texts.write_text(
        "".join(
            json.dumps({"text": " ".join(f"word{w}" for w in part)}) + "\n"
            for part in np.split(words, 20)
        )
    )
    recipe = resolve(
        "tiny",
        [
            "tokenizer=bytes",
            f"steps={STEPS}",
            "warmup_steps=1",
            "device=cpu",
            "match=none",
            "seed=3",
        ],
    ).replace(data=(str(texts),), valid_fraction=0.2, eval_tokens=512)
    train(recipe, root / "run")
    return root / "run"


def model_of(run: Path) -> SWHForCausalLM:
    return SWHForCausalLM.from_pretrained(run / "model").eval()


def small(**fields: object) -> SWHForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 257,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "window": 4,
        "initializer_range": 0.3,
    }
    return SWHForCausalLM(SWHConfig(**{**shape, **fields})).eval()


def analyzed(model: SWHForCausalLM, run: Path, **more: object) -> dict:
    stream = open_corpus(run / "data").valid
    return lab.analyze(model, stream, length=64, max_tokens=512, **more)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- the kernels


def test_a_frequency_response_is_the_transform_of_the_impulse_response() -> None:
    rng = np.random.default_rng(0)
    decay, turn, gain = rng.uniform(0.05, 2, (3, 6, 2))
    modes = Modes(*(torch.tensor(part) for part in (decay, turn, gain)))
    want = np.abs(kernel(modes, 1000).numpy() @ np.exp(-1j * np.arange(1000)[:, None] * ANGLES))
    np.testing.assert_allclose(lab.frequency_response(modes, ANGLES), want, rtol=1e-9)
    assert lab.impulse_response(modes, 50).shape == (6, 50)


def test_a_mode_that_never_decays_has_an_infinite_response_at_its_frequency() -> None:
    response = lab.frequency_response(Modes(torch.zeros(1), torch.zeros(1)), ANGLES)[0]
    assert not np.isfinite(response[0])
    assert np.isfinite(response[1:]).all()


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_kernel_has_half_lives_and_both_responses(name: str) -> None:
    (found,) = lab.read_kernels(small(kernel=name, num_hidden_layers=1))
    assert found.slowest.shape == (16,)
    assert (found.half_life > 0).all()
    impulse = lab.impulse_response(found.modes, 4096)
    want = np.abs(impulse @ np.exp(-1j * np.arange(4096)[:, None] * ANGLES))
    got = lab.frequency_response(found.modes, ANGLES)
    settled = np.abs(impulse[:, -1]) < 1e-9  # else 4,096 tokens are not all of the kernel
    np.testing.assert_allclose(got[settled], want[settled], rtol=1e-4, atol=1e-5)
    assert settled.any()


def test_the_half_life_of_a_filter_is_that_of_the_exponential_it_samples() -> None:
    model = small(kernel="free_form", num_hidden_layers=1)
    life = torch.tensor([1.0, 2.0, 5.0, 20.0]).repeat(4)
    part = model.model.layers[0].mixer.kernel
    lags = torch.arange(part.weights.shape[1])
    with torch.no_grad():
        part.weights.copy_(torch.exp(-math.log(2) * (lags + 1e-3) / life[:, None]))
    np.testing.assert_allclose(lab.read_kernels(model)[0].half_life, life, atol=1)


def test_the_chosen_channels_go_from_fast_to_slow() -> None:
    (found,) = lab.read_kernels(small(num_hidden_layers=1))
    lives = [found.slowest[channel] for channel in lab.chosen_channels(found).values()]
    assert lives == sorted(lives)
    assert lives[-1] == found.slowest.max()


# ------------------------------------------------------------------------------------- the branches


def test_energy_is_what_enters_the_papers_sum(trained: Path) -> None:
    model = model_of(trained)
    stream = open_corpus(trained / "data").valid
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    fusion = model.model.layers[1].mixer.fusion
    handle = fusion.register_forward_pre_hook(lambda part, args: kept.append(args))
    loss, layers = lab.branch_energy(model, stream, length=64, max_tokens=512)
    handle.remove()
    with torch.no_grad():
        spectral = torch.cat([fusion.norm(s) for s, _ in kept]).square().mean()
        local = torch.cat([w for _, w in kept]).square().mean()
    assert layers[1]["spectral"] == pytest.approx(float(spectral), rel=1e-5)
    assert layers[1]["window"] == pytest.approx(float(local), rel=1e-5)
    assert layers[1]["spectral_share"] == pytest.approx(float(spectral / (spectral + local)))
    assert loss > 0


@pytest.mark.parametrize("fusion", sorted(FUSIONS))
def test_a_branch_that_says_nothing_has_no_energy_and_is_not_missed(
    fusion: str, trained: Path
) -> None:
    model = small(fusion=fusion)
    for layer in model.model.layers:
        layer.mixer.local_proj.weight.data.zero_()
    facts = analyzed(model, trained)
    assert facts["silenced"]["window"] == pytest.approx(0, abs=1e-6)
    assert facts["silenced"]["spectral"] != pytest.approx(0, abs=1e-6)
    for layer in facts["layers"]:
        assert layer["energy"]["spectral_share"] == pytest.approx(1.0)
        assert layer["silenced"]["window"] == pytest.approx(0, abs=1e-6)


def test_silencing_both_branches_is_a_model_without_mixers(trained: Path) -> None:
    """One layer at a time adds up to nothing in particular; a spectral-only model without its
    branch is one whose mixers give zeros."""
    model = small(branches=("spectral",))
    stream = open_corpus(trained / "data").valid
    text = {"length": 64, "max_tokens": 512}
    silenced = lab.silenced_loss(model, stream, "spectral", **text)
    intact = lab.branch_energy(model, stream, **text)[0]
    for layer in model.model.layers:
        layer.mixer.out_proj.weight.data.zero_()
    assert silenced == pytest.approx(lab.branch_energy(model, stream, **text)[0], abs=1e-6)
    assert silenced != pytest.approx(intact, abs=1e-6)


def test_the_model_is_left_as_it_was(trained: Path) -> None:
    model = model_of(trained)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        before = model(tokens).logits
        generator = torch.get_rng_state()
        analyzed(model, trained, begun=lab.read_kernels(lab.initial_model(model, 3)))
        assert torch.equal(torch.get_rng_state(), generator)
        assert torch.equal(model(tokens).logits, before)


# ---------------------------------------------------------------------------------------- the drift


def test_the_seed_gives_back_the_weights_a_run_began_with(trained: Path) -> None:
    """After three small steps every decay is near where this seed drew it, and nowhere near where
    another did."""
    model = model_of(trained)
    now = np.concatenate([each.half_life for each in lab.read_kernels(model)])
    for seed, near in ((3, True), (4, False)):
        begun = lab.read_kernels(lab.initial_model(model, seed))
        ratio = np.log2(now / np.concatenate([each.half_life for each in begun]))
        assert (np.median(np.abs(ratio)) < 0.05) == near


def test_drift_sees_kernels_that_moved_and_not_those_that_stayed(trained: Path) -> None:
    model = model_of(trained)
    begun = lab.read_kernels(lab.initial_model(model, 3))
    stayed = analyzed(model, trained, begun=begun)["layers"][0]["drift"]
    with torch.no_grad():
        model.model.layers[0].mixer.kernel.decay.div_(4)
        model.model.layers[0].mixer.kernel.frequency.add_(0.5)
    moved = analyzed(model, trained, begun=begun)["layers"][0]["drift"]
    assert stayed["half_life_ks"] < stayed["ks_5_percent"] < moved["half_life_ks"]
    assert moved["half_life_log2_ratio"]["median"] == pytest.approx(2, abs=0.1)
    assert moved["frequency_moved"]["median"] == pytest.approx(0.5, abs=0.05)
    assert stayed["slower_by_half"] < 0.05
    assert moved["slower_by_half"] > 0.95


def test_ks_is_the_largest_distance_of_the_distributions() -> None:
    assert lab.ks_statistic(np.arange(4.0), np.arange(4.0)) == 0
    assert lab.ks_statistic(np.arange(4.0), np.arange(4.0) + 9) == 1
    assert lab.ks_statistic(np.array([1.0, 2, 3, 4]), np.array([3.0, 4, 5, 6])) == 0.5


# -------------------------------------------------------------------------------------- the command


def call(model: Path, **more: object) -> None:
    wanted: dict[str, object] = {"data": [], "out": None, "max_tokens": 512}
    wanted |= {"quick": False, "json": False, **more}
    command.run(model=str(model), device="cpu", **wanted)  # type: ignore[arg-type]


def test_the_command_writes_what_it_prints_and_draws_every_picture(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    call(trained, out=out, json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "analysis.json").read_text())
    assert printed["data"] == "the run's held-out text"
    assert printed["seed"] == 3
    names = {"impulse", "response", "half_lives", "poles", "branches", "drift"}
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{name}.svg").read_text()
    assert {path.stem for path in out.iterdir()} == names | {"analysis"}


def test_a_checkpoint_of_the_run_is_analyzed_with_the_runs_own_text_and_seed(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = (trained / "checkpoints").iterdir()
    call(checkpoint, quick=True)
    shown = capsys.readouterr()
    assert "the run's held-out text" in shown.out
    assert "seed 3" in shown.out
    assert command.QUICK_NOTE in shown.out
    assert shown.err == ""


def test_a_model_from_elsewhere_is_measured_on_the_text_that_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small(kernel="short_filter", fusion="gated").save_pretrained(tmp_path / "model")
    load_tokenizer("bytes").save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy.\n" * 40)
    call(tmp_path / "model", data=[str(tmp_path / "text.txt")], out=tmp_path / "out", json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["data"] == str(tmp_path / "text.txt")
    assert facts["seed"] is None
    assert facts["layers"][0]["oscillators"] == 0
    assert not (tmp_path / "out" / "poles.png").exists()
    assert (tmp_path / "out" / "impulse.png").exists()


def test_text_that_is_gone_is_replaced_with_a_warning(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    for path in (trained / "model").iterdir():
        (run / "model" / path.name).write_bytes(path.read_bytes())
    (run / "config.json").write_bytes((trained / "config.json").read_bytes())
    call(run, json=True)
    shown = capsys.readouterr()
    assert json.loads(shown.out)["data"] == "a part of Python's library"
    assert "held-out text is not here" in shown.err


@pytest.mark.parametrize("fields", [{"mixer": "attention"}, {"branches": ("window",)}])
def test_a_model_without_kernels_is_refused_in_one_line(fields: dict, tmp_path: Path) -> None:
    small(**fields).save_pretrained(tmp_path)
    load_tokenizer("bytes").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no learned kernels"):
        call(tmp_path)


def test_many_layers_still_make_readable_pictures(trained: Path, tmp_path: Path) -> None:
    model = small(num_hidden_layers=9)
    facts = analyzed(model, trained)
    paths = draw_all(facts, lab.read_kernels(model), tmp_path)
    assert {path.stem for path in paths} == {
        "impulse",
        "response",
        "half_lives",
        "branches",
        "poles",
    }
