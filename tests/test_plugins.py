"""Parts from outside: a mixer and a kernel with an option each, and a method of an operator,
registered in this file alone.

All that a part of the package itself can do they can do by that: the command line reads their
options, files hold them, caches and sessions are told apart by them, errors name them; a method is
chosen, tried by the contract suite, shown by `info` and lined up in the benchmark.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from spectral_window.cli import main
from spectral_window.errors import UserError
from spectral_window.generation.session import Session
from spectral_window.generation.session_file import fingerprint
from spectral_window.hf import SWHConfig, SWHForCausalLM
from spectral_window.hf.model import count_parameters
from spectral_window.lab.bench import operators as bench
from spectral_window.lab.experiments.trainings import Text, Training
from spectral_window.nn.fusions import FUSIONS
from spectral_window.nn.kernels import KERNELS, Filter, Kernel
from spectral_window.nn.layers import MLPS, SwiGLU
from spectral_window.nn.mixers import MIXERS, Mixer
from spectral_window.nn.options import Option, all_options, recorded
from spectral_window.nn.spectral_window import SpectralWindowMixer
from spectral_window.ops import METHODS, Method, Modes, Taps, enrol
from spectral_window.ops import resolve as resolve_method
from spectral_window.training.loading import load
from spectral_window.training.recipes import Recipe, resolve
from spectral_window.training.trainer import _differences, model_config
from tests.contracts import methods
from tests.processes import python

WIDTH = Option("toy_width", int, 3, at_least=2, help="tokens that a toy sees")
REACH = Option("toy_reach", float, 2.0, above=0.0, help="tokens that a toy kernel remembers")


class ToyKernel(Kernel):
    """exp(-t / toy_reach) times a learned gain."""

    def __init__(self, channels: int, toy_reach: float = REACH.default):
        super().__init__(channels)
        self.reach = toy_reach
        self.gain = nn.Parameter(torch.ones(channels, 1))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self) -> Modes:
        decay = torch.full_like(self.gain, 1 / self.reach)
        return Modes(decay, torch.zeros_like(decay), self.gain)


class ToyFilter(Filter):
    """Learned taps: the token and those before it, all alike at first."""

    def __init__(self, channels: int, width: int):
        super().__init__(channels)
        self.weights = nn.Parameter(torch.empty(channels, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weights)

    def forward(self) -> Taps:
        return Taps(self.weights)


class ToyState(NamedTuple):
    """The last toy_width - 1 inputs [B, toy_width - 1, D]."""

    inputs: Tensor


class Toy(Mixer):
    """A filter of toy_width taps between two maps."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.width = self.settings["toy_width"]
        self.in_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)
        self.kernel = ToyFilter(self.hidden_size, self.width)
        self.out_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)

    def forward(
        self, x: Tensor, positions: Tensor | None = None, state: ToyState | None = None
    ) -> tuple[Tensor, ToyState]:
        y, inputs = self.kernel.convolve(
            self.in_proj(x),
            state=None if state is None else state.inputs,
            positions=positions,
            method=self.method("fir"),
        )
        return self.out_proj(y), ToyState(inputs)

    def operators(self) -> list[tuple[str, tuple[Any, ...]]]:
        return [("fir", tuple(self.kernel()))]

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> ToyState:
        shape = batch_size, self.width - 1, self.hidden_size
        return ToyState(torch.zeros(shape, dtype=dtype, device=device))

    def state_bytes(
        self, context: int, *, batch_size: int = 1, dtype: torch.dtype = torch.float32
    ) -> int:
        return batch_size * (self.width - 1) * self.hidden_size * dtype.itemsize

    def flops_per_token(self, context: int) -> int:
        return 2 * sum(parameter.numel() for parameter in self.parameters())


def register() -> None:
    MIXERS.register("toy", WIDTH)(Toy)
    KERNELS.register("toy_kernel", REACH)(ToyKernel)


@pytest.fixture(scope="module", autouse=True)
def plugin() -> Iterator[None]:
    register()
    yield
    del MIXERS["toy"], KERNELS["toy_kernel"]


KNOBS = """
    tokenizer=bytes hidden_size=16 num_hidden_layers=2 num_attention_heads=2 sequence_length=32
    batch_size=4 micro_batch_size=4 steps=4 warmup_steps=1 save_every=2 eval_every=4
    matmul_precision=highest device=cpu
""".split()  # noqa: SIM905 (as a user types them)
TOY = ["mixer=toy", "toy_width=4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a toy, trained by the command line."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "text.txt").write_text("A cat sat on a mat, and a dog ran by. " * 60)
    data = ["--data", str(folder / "text.txt"), "--out", str(folder / "run")]
    assert main(["train", "tiny", *KNOBS, *TOY, *data]) == 0
    return folder / "run"


OWN = """
from spectral_window.nn.options import Option
from spectral_window.nn.mixers import register
from spectral_window.nn.spectral_window import SpectralWindowMixer

@register("halved", Option("halved_by", float, 2.0, above=0.0, help="it divides"))
class Halved(SpectralWindowMixer):
    def forward(self, x, positions=None, state=None):
        y, state = super().forward(x, positions, state)
        return y / self.settings["halved_by"], state
"""


def test_a_module_of_ones_own_is_known_to_the_commands_that_are_told_of_it(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "text.txt").write_text("A cat sat on a mat, and a dog ran by. " * 60)
    program = "-m", "spectral_window", "--plugin", "mine"
    train = "train", "tiny", *KNOBS, "mixer=halved", "halved_by=3", "--data", "text.txt"

    def run(*words: str) -> tuple[int, str]:
        child = python(*words, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                       stderr=subprocess.STDOUT)  # fmt: skip
        said = child.communicate()[0]
        return child.returncode, said

    assert run(*program, *train, "--out", "run")[0] == 0
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["command"].startswith("spectral-window --plugin mine train tiny")
    assert about["recipe"]["halved_by"] == 3
    assert run(*program, "generate", "run", "A cat", "--max-new-tokens", "3")[0] == 0
    code, said = run("-m", "spectral_window", "generate", "run", "A cat")
    assert (code, "halved" in said, "Traceback" in said) == (2, True, False)


def test_a_plugin_that_cannot_be_imported_is_a_line_that_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_plugin.py").write_text("1 / 0")
    for name, reason in (("no_such_plugin", "No module"), ("broken_plugin", "division by zero")):
        assert main(["--plugin", name, "info", "nothing"]) == 2
        said = capsys.readouterr().err
        assert name in said
        assert reason in said


def small(**fields: Any) -> SWHForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SWHConfig(vocab_size=61, initializer_range=0.2, **shape, **fields)
    return SWHForCausalLM(config).eval()


def test_the_command_line_trains_it_and_files_hold_its_option(trained: Path) -> None:
    run = json.loads((trained / "config.json").read_text())
    saved = json.loads((trained / "model" / "config.json").read_text())
    assert run["recipe"]["toy_width"] == run["model"]["toy_width"] == saved["toy_width"] == 4
    assert Recipe.from_dict(run["recipe"]).model["toy_width"] == 4
    assert "toy_reach" not in run["recipe"] | run["model"] | saved


def test_it_is_matched_in_size_with_the_papers_layer() -> None:
    whole = count_parameters(model_config(resolve("tiny", KNOBS), 257))
    for width in (2, 9):
        toy = model_config(resolve("tiny", [*KNOBS, "mixer=toy", f"toy_width={width}"]), 257)
        assert abs(count_parameters(toy) - whole) <= 0.01 * whole
    paper = model_config(resolve("tiny", KNOBS), 257)
    assert count_parameters(paper.papers_layer()) == count_parameters(paper)


CODE = """
import sys
from tests import test_plugins
test_plugins.register()
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    print(model.config.toy_width, float(model(torch.arange(40)[None]).logits.abs().sum()))
"""


def test_a_fresh_process_that_registers_it_loads_it(trained: Path) -> None:
    child = python("-c", CODE, trained / "model", stdout=subprocess.PIPE, text=True)
    width, total = child.communicate()[0].split()
    assert child.returncode == 0
    model = SWHForCausalLM.from_pretrained(trained / "model").eval()
    assert int(width) == 4
    with torch.no_grad():
        here = float(model(torch.arange(40)[None]).logits.abs().sum())
    assert float(total) == pytest.approx(here, rel=1e-4)


def test_a_resumed_run_ends_with_the_same_bits(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(trained, tmp_path / "run")
    for name in ("checkpoints/step-4", "model"):
        shutil.rmtree(copy / name)
    (copy / "result.json").unlink()
    data = ["--data", str(trained.parent / "text.txt"), "--out", str(copy), "--resume"]
    assert main(["train", "tiny", *KNOBS, "mixer=toy", "toy_width=5", *data]) != 0
    assert "toy_width was 4 and is 5" in capfd.readouterr().err
    assert main(["train", "tiny", *KNOBS, *TOY, *data]) == 0
    one, two = (load_file(run / "model" / "model.safetensors") for run in (trained, copy))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_beams_and_sessions_go_on_from_its_state(trained: Path, tmp_path: Path) -> None:
    loaded = load(trained, device="cpu")
    model, ids = loaded.model.eval(), torch.arange(65, 83).view(2, 9)
    plain, cached = (
        model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=use)
        for use in (False, True)
    )
    assert torch.equal(plain, cached)
    session = Session(model, loaded.tokenizer, seed=1)
    session.feed("a cat ")
    whole = "".join(session.stream(12))
    again = Session(model, loaded.tokenizer, seed=1)
    again.feed("a cat ")
    first = "".join(again.stream(5))
    again.save(tmp_path / "s.session")
    gone_on = Session.load(tmp_path / "s.session", model, loaded.tokenizer)
    assert first + "".join(gone_on.stream(7)) == whole


def test_info_describes_it(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(trained)]) == 0
    out = capfd.readouterr().out
    assert "toy_width" in out
    assert WIDTH.help in " ".join(out.split())
    assert "branches" not in out, "what it is not told"
    assert main(["info", str(trained), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["config"]["toy_width"] == 4


@torch.no_grad()
def test_the_cache_of_another_width_is_refused_by_the_name_of_the_field() -> None:
    ids = torch.arange(9)[None]
    cache = small(mixer="toy", toy_width=4)(ids).past_key_values
    with pytest.raises(UserError, match="toy_width 4 and not 3") as caught:
        small(mixer="toy")(ids, past_key_values=cache)
    assert "mixer" not in str(caught.value)
    other = small(kernel="toy_kernel", toy_reach=3.0)(ids).past_key_values
    with pytest.raises(UserError, match=r"toy_reach 3\.0 and not 2\.0"):
        small(kernel="toy_kernel")(ids, past_key_values=other)
    with pytest.raises(UserError, match="kernel 'toy_kernel' and not"):
        small()(ids, past_key_values=other)


def test_a_misspelt_option_is_named_back(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "tiny", "mixer=toy", "toy_widht=3"]) == 2
    assert "did you mean 'toy_width'?" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"toy_widht.*did you mean 'toy_width'"):
        small(mixer="toy", toy_widht=3)
    with pytest.raises(UserError, match=r"toy_widht.*did you mean 'toy_width'"):
        Toy(hidden_size=16, num_heads=2, toy_widht=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer": "toy", "toy_width": 1}, "toy_width is 1 .* a whole number, 2 to"),
        ({"mixer": "toy", "toy_width": "4"}, "toy_width is '4'"),
        ({"toy_width": 0}, "toy_width is 0"),  # though nothing would be told
        ({"kernel": "toy_kernel", "toy_reach": 0}, "toy_reach is 0 .* above 0"),
    ],
)
def test_a_bad_value_is_refused_at_once_and_when_it_was_set_later(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        small(**fields)
    config = SWHConfig()
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(UserError, match=message):
        config.validate()
    with pytest.raises(UserError, match=message.split(" ")[0]):
        resolve("tiny").replace(**fields)


def test_a_kernel_is_told_its_option_through_the_mixer() -> None:
    model = small(kernel="toy_kernel", toy_reach=7)
    assert model.model.layers[1].mixer.kernel.reach == 7.0
    mixer = MIXERS["spectral_window"](
        hidden_size=16, num_heads=2, window=8, kernel="toy_kernel", toy_reach=3.0
    )
    assert mixer.kernel.reach == 3.0
    assert MIXERS["spectral_window"](hidden_size=16, num_heads=2, window=8).window == 8
    with pytest.raises(UserError, match="toy_reach"):
        MIXERS["spectral_window"](hidden_size=16, num_heads=2, toy_reach=3.0)


def test_a_file_that_does_not_need_the_plugin_loads_without_it(tmp_path: Path) -> None:
    small(toy_width=3, toy_reach=2.0).save_pretrained(tmp_path / "paper")
    small(mixer="toy", toy_width=5).save_pretrained(tmp_path / "toy")
    held = json.loads((tmp_path / "paper" / "config.json").read_text())
    assert not [name for name in held if name.startswith("toy")]
    parts = MIXERS.pop("toy"), KERNELS.pop("toy_kernel")
    try:
        found = SWHForCausalLM.from_pretrained(tmp_path / "paper").config
        assert found.recorded() == small().config.recorded()
        with pytest.raises(UserError, match="toy_width"):
            SWHForCausalLM.from_pretrained(tmp_path / "toy")
    finally:
        MIXERS["toy"], KERNELS["toy_kernel"] = parts


@pytest.mark.parametrize(
    "name", ["hidden_size", "lr", "to_dict", "dtype", "num_labels", "top_k", "steps", "window"]
)
@pytest.mark.parametrize("registry", [MIXERS, KERNELS, FUSIONS, MLPS])
def test_an_option_takes_no_name_that_means_something_else(name: str, registry: Any) -> None:
    with pytest.raises(UserError, match=f"option '{name}' .*choose") as caught:
        registry.register("other", Option(name, int, 1, help=""))(type("Other", (Mixer,), {}))
    assert "\n" not in str(caught.value)
    assert "other" not in registry


def test_two_parts_share_an_option_by_declaring_the_same() -> None:
    class Wide(SwiGLU):
        pass

    try:
        MLPS.register("wide", WIDTH)(Wide)
        assert Wide.options == (WIDTH,)
        assert SwiGLU.options == ()
    finally:
        MLPS.pop("wide", None)


def test_a_part_may_be_given_one_option_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sessions, checkpoints and rows of results from before still fit; away from the default they
    do not."""
    model, recipe = small(), resolve("tiny", KNOBS)
    before, about = fingerprint(model), {"recipe": recipe.to_dict()}
    text, size = Text((), (), tmp_path), {"data": 1, "parameters": 1}
    text.__dict__["fingerprint"] = "tokens"
    key = Training("tiny", {}, "a", text).key
    later = Option("later", int, 1, help="")
    monkeypatch.setattr(SpectralWindowMixer, "options", (*SpectralWindowMixer.options, later))
    assert small().config.to_dict()["later"] == 1
    assert fingerprint(small()) == before
    assert fingerprint(small(later=2)) != before
    assert Training("tiny", {}, "a", text).key == key
    assert Training("tiny", {"later": 2}, "a", text).key != key
    now, other = resolve("tiny", KNOBS).to_dict(), resolve("tiny", [*KNOBS, "later=2"]).to_dict()
    assert now["later"] == 1
    assert not _differences(about | size, {"recipe": now} | size)
    assert _differences(about | size, {"recipe": other} | size) == ["later was 1 and is 2"]
    assert SWHConfig(**model.config.to_dict()).recorded() == small().config.recorded()


def test_what_counts_follows_the_parts_that_are_chosen() -> None:
    inner = Option("inner", int, 1, help="")
    outer = Option("outer", str, "toy_kernel", choices=KERNELS, help="")
    assert set(all_options([outer, inner])) == {"outer", "inner", "toy_reach"}
    names = [option.name for option in recorded([outer], {})]
    assert names == ["outer", "toy_reach"]
    assert [o.name for o in recorded([outer], {"outer": "pure_decay"})] == ["outer"]
    assert len(recorded([outer], {"outer": "pure_decay", "toy_reach": 9.0})) == 2


# ------------------------------------------------------------------------------ a method


def by_chunks(u: Tensor, modes: Modes, state: Any, documents: Any, out: Any) -> Any:
    return METHODS["spectral"]["chunked"].function(u, modes, state, documents, out)


def half_a_state(u: Tensor, modes: Modes, state: Any, documents: Any, out: Any) -> Any:
    return by_chunks(u, modes, None if state is None else state / 2, documents, out)


def no_bfloat16(u: Tensor, *_: Any) -> str | None:
    return "a toy does not round" if u.dtype == torch.bfloat16 else None


@pytest.fixture(params=[by_chunks])
def method(request: pytest.FixtureRequest) -> Iterator[Method]:
    toy = Method("toy", request.param, "as the chunks, under another name", no_bfloat16)
    enrol("spectral", toy, before="scan")
    yield toy
    del METHODS["spectral"]["toy"]


def test_a_method_is_chosen_with_the_reasons_of_those_before_it(method: Method) -> None:
    u = torch.randn(1, 8, 3)
    chosen = resolve_method("spectral", "auto", u)
    assert (chosen.name, chosen.reason) == ("toy", method.cost)
    assert [name for name, _ in chosen.passed] == ["step_compiled", "step"]
    half = resolve_method("spectral", "auto", u.bfloat16())
    assert half.name != "toy"
    assert ("toy", "a toy does not round") in half.passed
    with pytest.raises(UserError, match=r"'toy' \(spectral\): a toy does not round"):
        resolve_method("spectral", "toy", u.bfloat16())
    with pytest.raises(UserError, match="enrolled already"):
        enrol("spectral", method)


def test_the_contract_suite_tries_a_method(method: Method) -> None:
    asked = [promise for op, name, promise in methods.cases() if (op, name) == ("spectral", "toy")]
    assert len(asked) == len(methods.CONTRACTS["spectral"])
    for promise in asked:
        methods.keep("spectral", "toy", promise)


@pytest.mark.parametrize("method", [half_a_state], indirect=True)
def test_a_wrong_method_is_found_by_the_contract_suite(method: Method) -> None:
    with pytest.raises(AssertionError):
        methods.keep("spectral", "toy", "conv_carries_its_state")


def test_info_and_the_bench_show_a_method(
    method: Method, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "tiny"]) == 0
    assert method.cost in " ".join(capfd.readouterr().out.split())
    assert main(["info", "tiny", "--json"]) == 0
    (row, *_) = json.loads(capfd.readouterr().out)["methods"]
    assert (row["op"], row["use"], row["method"]) == ("spectral", "prefill", "toy")
    assert row["passed_over"].keys() == {"step_compiled", "step"}
    u, modes = bench.draw_spectral(16, torch.float32, False)
    assert "toy" in bench.spectral_calls(u, modes, False)
    assert {row["contestant"] for row in bench.far_errors(256, 8)} >= {"toy", "scan"}
