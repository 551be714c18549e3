"""Every kernel, every fusion and the memory in a whole model: training, decoding, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_window.data.tokenizers import load_tokenizer
from spectral_window.generation.session import Session
from spectral_window.generation.session_file import leaves
from spectral_window.hf import SWHForCausalLM
from spectral_window.hf import model as model_file
from spectral_window.nn.fusions import FUSIONS
from spectral_window.nn.kernels import KERNELS, Kernel
from spectral_window.nn.layers import no_weight_decay
from spectral_window.nn.mixers import map_state
from spectral_window.ops import METHODS
from tests.hf.small import error, small_model, tokens

OWNERS = {"kernel": "kernel", "fusion": "fusion", "mixer": "memory"}
MEMORY = {"mixer": "memory"}
PARTS = [{"kernel": name} for name in KERNELS] + [{"fusion": name} for name in FUSIONS] + [MEMORY]
every_part = pytest.mark.parametrize("part", PARTS, ids=lambda part: "-".join(*part.items()))
every_kernel = pytest.mark.parametrize("name", KERNELS)
# what is kept in float32 and has a part of its own in the mixer's state
STATEFUL = [part for part in PARTS if "fusion" not in part]
every_stateful = pytest.mark.parametrize("part", STATEFUL, ids=lambda part: "-".join(*part.items()))


def owned_by(part: dict[str, str]) -> str:
    """The mixer's module that holds the parameters of `part`."""
    return next(owner for key, owner in OWNERS.items() if key in part)


def bytes_of(state: Any) -> int:
    sizes: list[int] = []
    map_state(state, lambda t: sizes.append(t.nbytes) or t)
    return sum(sizes)


@every_part
@torch.no_grad()
def test_prefill_then_decode_gives_the_logits_of_one_forward(part: dict[str, str]) -> None:
    model, ids = small_model(**part), tokens(2, 40)
    whole = model(ids, use_cache=False).logits
    out = model(ids[:, :23], use_cache=True)
    parts = [out.logits]
    for t in range(23, 40):
        out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
        parts.append(out.logits)
    assert error(torch.cat(parts, 1), whole) <= 5e-6


@every_part
@torch.no_grad()
def test_padded_and_packed_rows_are_each_document_alone(part: dict[str, str]) -> None:
    model, ids = small_model(**part), tokens(1, 30)
    mask = torch.tensor([[0] * 5 + [1] * 25])
    padded = model(ids, attention_mask=mask).logits[:, 5:]
    assert error(padded, model(ids[:, 5:]).logits) <= 5e-6
    packed = model(ids, position_ids=torch.tensor([[*range(11), *range(19)]])).logits
    assert error(packed[:, :11], model(ids[:, :11]).logits) <= 5e-6
    assert error(packed[:, 11:], model(ids[:, 11:]).logits) <= 5e-6


@every_part
def test_segments_and_their_states_are_those_of_one_call(
    part: dict[str, str], monkeypatch: Any
) -> None:
    model, ids = small_model(**part), tokens(2, 37)
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        monkeypatch.setattr(model_file, "SEGMENT", 7)
        parts = model(ids, use_cache=True)
    assert error(parts.logits, whole.logits) <= 5e-6
    for mine, one in zip(parts.past_key_values.layers, whole.past_key_values.layers, strict=True):
        for name, end in leaves("", one.state):
            assert error(dict(leaves("", mine.state))[name], end) <= 5e-6, name


@every_part
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_generation_with_a_cache_is_generation_without(
    part: dict[str, str], how: dict[str, Any]
) -> None:
    model = small_model(**part)
    ids = tokens(1, 7).repeat(1, 3)
    plain = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    beams = {k: v for k, v in how.items() if k == "num_beams"}
    want = model.generate(ids, use_cache=False, **plain, **beams)
    assert torch.equal(model.generate(ids, **plain, **how), want)


@every_part
def test_the_disk_gives_back_the_same_model(part: dict[str, str], tmp_path: Path) -> None:
    """Loaded models are built without memory first: nothing may live outside the weights."""
    model, ids = small_model(**part), tokens(2, 20)
    model.save_pretrained(tmp_path)
    again = SWHForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@every_part
def test_a_model_without_weights_begins_as_one_that_was_made(
    part: dict[str, str], tmp_path: Path
) -> None:
    """What a file lacks is drawn as in a new model, and what it has is kept."""
    from safetensors.torch import load_file, save_file

    model = small_model(**part)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    place = f"model.layers.0.mixer.{owned_by(part)}."
    owned = sorted(name for name in weights if name.startswith(place))
    dropped = owned[:1]  # one of several, or the only one
    for name in dropped:
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    torch.manual_seed(5)
    again = SWHForCausalLM.from_pretrained(tmp_path).state_dict()
    for name in owned:
        assert again[name].isfinite().all(), name
        assert float(again[name].abs().max()) < 20, name
        assert name in dropped or torch.equal(again[name], model.state_dict()[name]), name


@every_stateful
@torch.no_grad()
def test_a_cast_model_keeps_its_kernels_and_its_state_bytes(
    part: dict[str, str], tmp_path: Path
) -> None:
    model = small_model(**part)
    owner = owned_by(part)
    before = copy.deepcopy(model.model.layers[0].mixer.get_submodule(owner).state_dict())
    model = model.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = SWHForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for one in (model, again):
        kept = one.model.layers[0].mixer.get_submodule(owner).state_dict()
        assert all(torch.equal(kept[k], before[k]) for k in before)
    cache = again(tokens(3, 20), use_cache=True).past_key_values
    assert sum(bytes_of(layer.state) for layer in cache.layers) == again.state_bytes(20, 3)
    assert again.state_bytes(20) == again.state_bytes(10**6)


@every_stateful
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_session_goes_on_from_the_disk(
    part: dict[str, str], dtype: torch.dtype, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer("bytes")
    model = small_model(**part, vocab_size=len(tokenizer)).to(dtype)

    def begun() -> Session:
        session = Session(model, tokenizer, seed=1)
        session.feed("hello world")
        return session

    whole = "".join(begun().stream(20, ignore_eos=True))
    session = begun()
    first = "".join(session.stream(8, ignore_eos=True, finish=False))
    session.save(tmp_path / "s")
    rest = Session.load(tmp_path / "s", model, tokenizer).stream(12, ignore_eos=True)
    assert first + "".join(rest) == whole


@every_part
def test_a_step_of_training_moves_every_parameter_and_lowers_the_loss(
    part: dict[str, str],
) -> None:
    model, ids = small_model(initializer_range=0.1, **part).train(), tokens(4, 50)
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, value in model.named_parameters():
        assert value.isfinite().all(), name
        assert not torch.equal(value, before[name]), name


@every_stateful
def test_no_kernel_is_decayed_or_initialised_like_a_map(part: dict[str, str]) -> None:
    model = small_model(**part, initializer_range=0.001)
    kept = no_weight_decay(model)
    for prefix, module in model.named_modules():
        if isinstance(module, Kernel):
            for own, value in module.named_parameters(prefix):
                assert own in kept
                if own.endswith("_bias"):
                    assert not value.any()
                    continue
                assert float(value.detach().abs().max()) > 0.01, f"{own} was drawn as a map's"


@every_kernel
@torch.no_grad()
def test_autocast_does_not_change_the_kernel(name: str) -> None:
    kernel = KERNELS[name](8)
    plain = kernel()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = kernel()
    for a, b in zip(plain, cast, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_info_names_the_methods_of_the_memory(capsys: Any) -> None:
    import json

    from spectral_window.commands import info

    info.run(model="small", overrides=["mixer=memory"], context=[1024], device="cpu", json=True)
    methods = {
        (row["op"], row["use"]): row for row in json.loads(capsys.readouterr().out)["methods"]
    }
    assert methods["delta", "prefill"]["method"] in METHODS["delta"]
    assert methods["delta", "step"]["method"] in METHODS["delta"]
    assert {"spectral", "window", "linear"} <= {op for op, _ in methods}


def test_info_names_the_method_of_finite_filters(capsys: Any) -> None:
    """A filter of taps has no recurrence; saying "scan" would be wrong."""
    import json

    from spectral_window.commands import info

    finite = {"free_form": ("fft", "step"), "short_filter": ("compiled", "compiled")}
    for name in (*finite, "log_spaced"):
        info.run(
            model="small", overrides=[f"kernel={name}"], context=[1024], device="cpu", json=True
        )
        facts = json.loads(capsys.readouterr().out)
        methods = {(row["op"], row["use"]): row["method"] for row in facts["methods"]}
        if name in finite:
            assert (methods["fir", "prefill"], methods["fir", "step"]) == finite[name]
        else:
            assert methods["spectral", "prefill"] in METHODS["spectral"]
        rows = facts["contexts"]
        assert rows[0]["state_bytes"] > 0
