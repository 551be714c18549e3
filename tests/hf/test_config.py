"""SWHConfig: closed, checked, and the same after a round trip."""

from __future__ import annotations

import json
import logging as python_logging
import math
from typing import Any

import pytest
from transformers import AutoConfig

from spectral_window.errors import UserError
from spectral_window.hf import SWHConfig, SWHForCausalLM, match_parameters
from spectral_window.hf.config import PRESETS, UNLIMITED
from spectral_window.hf.model import count_parameters
from tests.hf.small import MIXERS, small_config, small_model, tokens


@pytest.mark.parametrize(
    ("key", "nearest"),
    [("windw", "window"), ("hidden_sise", "hidden_size"), ("num_layers", "num_hidden_layers")],
)
def test_an_unknown_key_is_refused_and_names_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"unknown config key '{key}': did you mean '{nearest}'"):
        SWHConfig(**{key: 3})


@pytest.mark.parametrize("key", ["temperature", "max_length", "sliding_window", "per_layer_config"])
def test_keys_that_transformers_would_swallow_are_refused_too(key: str) -> None:
    with pytest.raises(UserError, match="unknown config key"):
        SWHConfig(**{key: 1})


COUNTS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "window")


@pytest.mark.parametrize("field", [*COUNTS, "intermediate_size", "training_length"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 8.0, True, "8", 2**40, math.nan, [8]])
def test_a_count_that_is_not_a_positive_whole_number_is_refused(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{field} is .* \(config\): use a whole number"):
        small_config(**{field: value})


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", math.nan])
def test_a_longest_context_that_is_no_count_is_refused_by_its_own_name(value: Any) -> None:
    with pytest.raises(UserError, match=r"max_position_embeddings is .* use a whole number"):
        small_config(max_position_embeddings=value)


@pytest.mark.parametrize("value", [0, 0.0, -0.0, -1e-9, -math.inf])
def test_an_angle_without_a_base_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"rope_theta is .* above 0"):
        small_config(rope_theta=value)
    config = small_config()
    config.rope_theta = value
    with pytest.raises(UserError, match=r"rope_theta is .* above 0"):
        SWHForCausalLM(config)


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta", "initializer_range"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "1e-6", True])
def test_a_number_that_is_not_finite_is_refused(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{field} is .* use a finite number"):
        small_config(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel": "damped_oscilator"}, "unknown kernel .* did you mean 'damped_oscillator'"),
        ({"fusion": "norm_ad"}, "unknown fusion .* did you mean 'norm_add'"),
        ({"mixer": "atention"}, "unknown mixer .* did you mean 'attention'"),
        ({"mixer": None}, "unknown mixer 'None'"),
        ({"mlp": "swigl"}, "unknown mlp .* did you mean 'swiglu'"),
        ({"branches": ("spectrl",)}, "unknown value of branches .* did you mean 'spectral'"),
        ({"branches": ()}, r"branches is \(\)"),
        ({"branches": "window"}, "branches is 'window'"),
        ({"branches": ("window", "window")}, "branches is .* name each once"),
        ({"num_attention_heads": 5}, "hidden_size 32 .* num_attention_heads 5 .* use 4 heads, or"),
        ({"num_attention_heads": 32}, "head size 1 is odd"),
        ({"use_cache": "yes"}, "use_cache is 'yes'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"eos_token_id": 61}, "eos_token_id is 61 .* 0 to 60"),
        ({"eos_token_id": [1, -2]}, "eos_token_id is -2"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        small_config(**fields)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_odd_head_size_is_fine_where_nothing_turns() -> None:
    assert small_config(num_attention_heads=32, branches=("spectral",)).head_dim == 1


def test_a_field_set_wrongly_later_is_refused_by_the_model_and_by_saving(tmp_path: Any) -> None:
    config = small_config()
    config.window = 0
    with pytest.raises(UserError, match="window is 0"):
        SWHForCausalLM(config)
    with pytest.raises(UserError, match="window is 0"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields", [{}, {"branches": ["window"]}, {"mlp": "gelu", "dtype": "float32"}]
)
def test_a_config_survives_json_unchanged(fields: dict[str, Any], tmp_path: Any) -> None:
    config = small_config(initializer_range=None, eos_token_id=[1, 2], **fields)
    config.architectures = ["SWHForCausalLM"]
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is SWHConfig
    assert again.to_dict() == {**config.to_dict(), "_name_or_path": again.name_or_path}
    assert SWHConfig(**config.to_dict()).to_dict() == config.to_dict()
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "layer_types" not in stored
    assert not {key for key in stored if "method" in key}, "a choice of speed is not architecture"


def test_attributes_of_other_libraries_are_not_saved_and_the_file_loads(tmp_path: Any) -> None:
    model = small_model()
    model.config.unsloth_version = "1.0"
    model.config.windw = 64
    with pytest.warns(
        UserWarning, match="not saved .*'unsloth_version'.*'windw': did you mean 'window'"
    ):
        model.save_pretrained(tmp_path)
    again = SWHForCausalLM.from_pretrained(tmp_path)
    assert again.config.window == model.config.window
    assert not hasattr(again.config, "windw")
    assert model.config.windw == 64
    # nor by the other ways: a dictionary that from_dict refused could not be loaded anywhere
    model.config.to_json_file(tmp_path / "whole.json", use_diff=False)
    for values in (model.config.to_dict(), json.loads((tmp_path / "whole.json").read_text())):
        assert AutoConfig.for_model(**values).to_dict() == model.config.to_dict()


def test_only_attention_has_a_longest_context() -> None:
    """Harnesses cut texts to it, and generate() warns beyond it and stops there by default."""
    swh, full = (
        small_config(mixer=mixer, training_length=77) for mixer in ("spectral_window", "attention")
    )
    assert swh.max_position_embeddings == UNLIMITED
    assert full.max_position_embeddings == 77
    assert swh.training_length == 77
    # lm-eval: the first of these attributes that a config has is the longest context
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    found = next(getattr(swh, name) for name in names if hasattr(swh, name))
    assert isinstance(found, int)
    assert found - 256 > 10**9
    swh.max_position_embeddings = 5
    assert (swh.training_length, swh.max_position_embeddings) == (5, UNLIMITED)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_config_file_from_before_says_the_training_length(mixer: str, tmp_path: Any) -> None:
    stored = small_config(mixer=mixer).to_dict() | {"max_position_embeddings": 256}
    del stored["training_length"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.training_length == 256
    assert config.max_position_embeddings == (256 if mixer == "attention" else UNLIMITED)
    config.save_pretrained(tmp_path / "again")
    assert AutoConfig.from_pretrained(tmp_path / "again").to_dict() == {
        **config.to_dict(), "_name_or_path": str(tmp_path / "again")
    }  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_generating_beyond_the_training_length_is_no_news() -> None:
    from transformers.utils import logging

    model, messages = small_model(training_length=8), []
    handler = python_logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.get_logger().addHandler(handler)
    try:
        out = model.generate(tokens(1, 7), max_new_tokens=9, do_sample=False)
    finally:
        logging.get_logger().removeHandler(handler)
    assert out.shape == (1, 16)
    assert not [message for message in messages if "maximum length" in message]


def test_the_order_of_branches_means_nothing() -> None:
    one, other = (
        small_config(branches=b) for b in (["window", "spectral"], ("spectral", "window"))
    )
    assert one == other


def test_a_foreign_config_file_switches_nothing_and_imports_nothing() -> None:
    config = SWHConfig(
        auto_map={"AutoConfig": "evil.Config"},
        trust_remote_code=True,
        _attn_implementation_internal="paged|evil/kernel",
    )
    assert config == SWHConfig()
    assert config.auto_map == {}


def test_every_keyword_that_transformers_itself_passes_is_accepted() -> None:
    SWHConfig(
        architectures=["SWHForCausalLM"],
        attn_implementation="sdpa",
        dtype="bfloat16",
        id2label={0: "a", 1: "b"},
        label2id={"a": 0, "b": 1},
        name_or_path="somewhere",
        num_labels=2,
        output_attentions=False,
        output_hidden_states=True,
        problem_type=None,
        return_dict=True,
        torch_dtype="bfloat16",
        transformers_version="5.0.0",
        use_cache=False,
    )


@pytest.mark.parametrize(
    ("size", "heads"), [(16, 1), (32, 1), (48, 3), (64, 1), (160, 5), (768, 12), (2048, 32)]
)
@pytest.mark.parametrize("mixer", MIXERS)
def test_the_defaults_fit_every_even_width(size: int, heads: int, mixer: str) -> None:
    """Tools build a small config by its width alone; 12 heads do not divide 32 channels."""
    config = SWHConfig(hidden_size=size, mixer=mixer)
    assert config.num_attention_heads == heads
    assert SWHConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_the_paper_preset_is_the_papers_model() -> None:
    config = SWHConfig.preset("paper", size="125m")
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (
        12,
        768,
        12,
    )
    assert (config.vocab_size, config.window, config.intermediate_size) == (50304, 32, 2048)
    assert config == SWHConfig()
    D = 768
    # q, k, v, local, conv, out; the bias of conv, decay, frequency and three norms; swiglu
    block = 6 * D * D + 6 * D + 3 * D * 2048
    assert count_parameters(config) == 12 * block + 2 * 50304 * D + D


@pytest.mark.parametrize("size", PRESETS["memory"])
def test_the_memory_preset_is_the_paper_preset_with_a_memory_as_large_for_each_channel(size):
    """A head for each 128 channels: the state and the work a channel are the same at every size."""
    paper, memory = (SWHConfig.preset(name, size=size) for name in ("paper", "memory"))
    assert memory.mixer == "memory"
    assert memory.hidden_size == 128 * memory.memory_heads
    assert memory.papers_layer() == paper


@pytest.mark.parametrize("size", PRESETS["paper"])
def test_every_preset_is_a_valid_config_and_takes_overrides(size: str) -> None:
    config = SWHConfig.preset(size=size, window=64, mixer="attention")
    assert (config.window, config.mixer) == (64, "attention")


def test_a_wrong_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown size '125M': did you mean '125m'"):
        SWHConfig.preset("paper", size="125M")
    with pytest.raises(UserError, match="unknown preset 'papr': did you mean 'paper'"):
        SWHConfig.preset("papr")
    with pytest.raises(UserError, match="did you mean 'window'"):
        SWHConfig.preset("paper", size="tiny", windw=3)


@pytest.mark.parametrize("mixer", ["spectral_window", "attention"])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
@pytest.mark.parametrize("tied", [False, True])
def test_two_mixers_meet_at_one_size(mixer: str, mlp: str, tied: bool) -> None:
    target = small_model(tie_word_embeddings=tied).count_parameters()
    config = small_config(mixer=mixer, mlp=mlp, tie_word_embeddings=tied)
    matched = match_parameters(config, target)
    built = SWHForCausalLM(matched).count_parameters()
    assert abs(built - target) < 0.01 * target
    assert built == count_parameters(matched)
    assert {k: v for k, v in matched.to_dict().items() if k != "intermediate_size"} == {
        k: v for k, v in config.to_dict().items() if k != "intermediate_size"
    }


def test_the_125m_baseline_can_match_swh_within_a_hundredth() -> None:
    target = count_parameters(SWHConfig.preset("paper", size="125m"))
    baseline = match_parameters(SWHConfig.preset("paper", size="125m", mixer="attention"), target)
    assert abs(count_parameters(baseline) - target) < 1e-4 * target


@pytest.mark.parametrize("target", [1000, 0, -5])
def test_a_size_that_cannot_be_met_is_an_error(target: int) -> None:
    with pytest.raises(UserError, match="cannot be met"):
        match_parameters(small_config(), target)
