"""generate() with every option gives the tokens of a forward pass without a cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from spectral_window.hf import SWHCacheLayer, SWHForCausalLM
from tests.hf.small import MIXERS, error, small_model, tokens

NEW = 14  # tokens to generate: across chunks of 5


def greedy(model: SWHForCausalLM, x: Tensor, **how: Any) -> Any:
    return model.generate(
        x, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **how}
    )


def without_cache(model: SWHForCausalLM, x: Tensor, **how: Any) -> Tensor:
    return greedy(model, x, use_cache=False, **how)


# ---- ways to generate


def test_greedy_with_a_cache_equals_greedy_without(model: SWHForCausalLM) -> None:
    x = tokens(3, 11)
    assert torch.equal(greedy(model, x), without_cache(model, x))


def test_sampling_with_a_seed_is_repeatable_and_needs_no_cache(model: SWHForCausalLM) -> None:
    x = tokens(2, 11)
    drawn = []
    for use_cache in (True, False, True):
        torch.manual_seed(3)
        drawn.append(greedy(model, x, do_sample=True, top_k=20, use_cache=use_cache))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_several_samples_of_one_prompt_are_independent_rows(model: SWHForCausalLM) -> None:
    x = tokens(2, 11)
    torch.manual_seed(3)
    out = greedy(model, x, do_sample=True, num_return_sequences=3)
    assert out.shape == (6, 11 + NEW)
    torch.manual_seed(3)
    assert torch.equal(out, without_cache(model, x, do_sample=True, num_return_sequences=3))


@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_reorders_the_states(model: SWHForCausalLM, beams: int) -> None:
    x = tokens(2, 11)
    how = {"num_beams": beams, "length_penalty": 0.7, "num_return_sequences": 2}
    assert torch.equal(greedy(model, x, **how), without_cache(model, x, **how))


@pytest.mark.parametrize("where", ["same", "other"])
def test_assisted_decoding_takes_back_wrong_guesses(model: SWHForCausalLM, where: str) -> None:
    x = tokens(1, 11)
    other = small_model(seed=0 if where == "same" else 9, mixer="spectral_window")
    assert torch.equal(greedy(model, x, assistant_model=other), without_cache(model, x))


def test_assisted_decoding_where_about_half_of_the_guesses_hold(model: SWHForCausalLM) -> None:
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.lm_head.weight += 0.25 * torch.randn_like(assistant.lm_head.weight)
    x = tokens(1, 11)
    want = without_cache(model, x, max_new_tokens=40)
    assert torch.equal(greedy(model, x, assistant_model=assistant, max_new_tokens=40), want)


def test_prompt_lookup_takes_back_wrong_guesses(model: SWHForCausalLM) -> None:
    x = tokens(1, 7).repeat(1, 4)
    want = without_cache(model, x, max_new_tokens=30)
    assert torch.equal(greedy(model, x, prompt_lookup_num_tokens=4, max_new_tokens=30), want)


def test_early_exit_guesses_with_the_first_layers(model: SWHForCausalLM) -> None:
    x = tokens(1, 9)
    want = greedy(model, x, max_new_tokens=12)
    for layers in (1, 2):
        got = greedy(model, x, max_new_tokens=12, assistant_early_exit=layers)
        assert torch.equal(got, want)
        assert model.config.num_hidden_layers == 2


@pytest.mark.parametrize("layers", [0, 3])
def test_an_early_exit_that_cannot_be_leaves_the_model_whole(
    layers: int, model: SWHForCausalLM
) -> None:
    x = tokens(1, 9)
    want = model(x).logits
    with pytest.raises(ValueError, match="the model has 2, use 1 to 2"):
        greedy(model, x, max_new_tokens=4, assistant_early_exit=layers)
    assert model.config.num_hidden_layers == 2
    assert torch.equal(model(x).logits, want)


def test_an_interrupted_early_exit_leaves_the_model_whole(
    model: SWHForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = tokens(1, 9)
    want, running = model(x).logits, type(model.model)._running_layers

    def stop(base: Any) -> Any:
        if base.config.num_hidden_layers == 1:
            raise KeyboardInterrupt
        return running(base)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "_running_layers", stop)
        with pytest.raises(KeyboardInterrupt):
            greedy(model, x, max_new_tokens=4, assistant_early_exit=1)
    assert torch.equal(model(x).logits, want)


def test_assisted_decoding_can_be_continued_from_its_cache(model: SWHForCausalLM) -> None:
    x = tokens(1, 7).repeat(1, 3)
    out = greedy(model, x, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
    text = torch.ones_like(out.sequences)  # a generated 0 is no padding
    more = greedy(model, out.sequences, attention_mask=text, past_key_values=out.past_key_values)
    assert torch.equal(more, without_cache(model, x, max_new_tokens=2 * NEW))


@pytest.mark.parametrize("extra", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}])
def test_left_padded_rows_are_each_as_if_alone(
    model: SWHForCausalLM, extra: dict[str, Any]
) -> None:
    lengths, time = [11, 4, 1, 8], 11
    x, mask = tokens(4, time), torch.zeros(4, time, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, time - length :] = 1
    out = greedy(model, x.masked_fill(mask == 0, 0), attention_mask=mask, **extra)
    for row, length in enumerate(lengths):
        alone = greedy(model, x[row : row + 1, time - length :], **extra)
        assert torch.equal(out[row, time:], alone[0, length:]), row


@pytest.mark.parametrize("chunk", [1, 3, 5, 11, 64])
def test_chunked_prefill_is_prefill(model: SWHForCausalLM, chunk: int) -> None:
    x = tokens(2, 11)
    assert torch.equal(greedy(model, x, prefill_chunk_size=chunk), greedy(model, x))


@pytest.mark.parametrize("kind", ["static", "dynamic", "offloaded"])
def test_every_kind_of_cache_that_can_be_asked_for_is_ours(
    model: SWHForCausalLM, kind: str
) -> None:
    x = tokens(2, 11)
    assert torch.equal(greedy(model, x, cache_implementation=kind), greedy(model, x))


def test_generation_from_embeddings(model: SWHForCausalLM) -> None:
    x = tokens(2, 11)
    embeds = model.get_input_embeddings()(x).detach()
    out = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert torch.equal(out, greedy(model, x)[:, 11:])


# ---- going on from a cache


@pytest.mark.parametrize("padded", [False, True])
def test_generation_goes_on_from_a_returned_cache(model: SWHForCausalLM, padded: bool) -> None:
    x, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
    if padded:
        mask[0, :4] = 0
    out = greedy(model, x, attention_mask=mask, return_dict_in_generate=True)
    cache = out.past_key_values
    assert cache.get_seq_length() == 11 + NEW - 1
    longer = torch.cat([mask, torch.ones(2, NEW, dtype=torch.long)], 1)
    more = greedy(model, out.sequences, attention_mask=longer, past_key_values=cache)
    want = without_cache(model, x, attention_mask=mask, max_new_tokens=2 * NEW)
    assert torch.equal(more, want)


def test_a_prefix_can_be_read_once_and_continued_many_times(model: SWHForCausalLM) -> None:
    x = tokens(1, 16)
    with torch.no_grad():
        prefix = model(x[:, :9]).past_key_values
    for _ in range(2):
        cache = copy.deepcopy(prefix)
        assert torch.equal(greedy(model, x, past_key_values=cache), greedy(model, x))
    cache.batch_repeat_interleave(3)
    rows = x.repeat(3, 1)
    cache = copy.deepcopy(prefix)
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 3
    assert torch.equal(greedy(model, rows, past_key_values=cache), greedy(model, rows))


def test_a_cache_used_twice_is_right_or_refused(model: SWHForCausalLM) -> None:
    x = tokens(1, 11)
    outcomes = []
    for again in (x, x[:, :8], torch.cat([x, tokens(1, 40, seed=5)], 1)):
        out = greedy(model, x, return_dict_in_generate=True)
        text = torch.ones_like(again)
        try:
            got = greedy(model, again, attention_mask=text, past_key_values=out.past_key_values)
        except ValueError as refused:
            outcomes.append(str(refused))
            continue
        # 40 other tokens after the prompt: what the cache read is taken for the beginning, as with
        # every model of transformers; from there on it is right
        read = torch.cat([out.sequences[:, :-1], again[:, out.sequences.shape[1] - 1 :]], 1)
        want = without_cache(model, read, attention_mask=torch.ones_like(read))
        assert torch.equal(got[:, again.shape[1] :], want[:, read.shape[1] :])
        outcomes.append("right")
    assert "position_ids" in outcomes[0]
    assert "position_ids" in outcomes[1]
    assert outcomes[2] == "right"


@torch.no_grad()
def test_rows_of_a_cache_can_be_selected_reordered_and_repeated(model: SWHForCausalLM) -> None:
    x, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, :4] = 0
    want = model(x, attention_mask=mask).logits[:, 8:]
    cache = model(x[:, :8], attention_mask=mask[:, :8]).past_key_values
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 1, 1])), [2, 1, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([1, 0])), [1, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: [layer.offload() or layer.prefetch() for layer in c.layers], [0, 1, 2]),
    ):
        changed = copy.deepcopy(cache)
        change(changed)
        got = model(x[rows, 8:], attention_mask=mask[rows], past_key_values=changed).logits
        assert error(got, want[rows]) <= 5e-6, rows


@torch.no_grad()
@pytest.mark.parametrize("split", [(9,), (4, 5), (1, 1, 1, 6), (6, 3)])
@pytest.mark.parametrize("remove", [0, 1, 4, 8, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_cropping_gives_the_state_of_the_tokens_that_stay(
    model: SWHForCausalLM, split: tuple[int, ...], remove: int, padded: bool
) -> None:
    x, mask = tokens(2, 24), torch.ones(2, 24, dtype=torch.long)
    if padded:
        mask[1, 3:6] = 0
        mask[0, 9:11] = 0
    at = 7
    cache = model(x[:, :at], attention_mask=mask[:, :at]).past_key_values
    cache.activate_past_recording()
    for length in split:
        model(x[:, at : at + length], attention_mask=mask[:, : at + length], past_key_values=cache)
        at += length
    cache.crop(-remove)
    at -= remove
    assert cache.get_seq_length() == at
    got = model(x[:, at:], attention_mask=mask, past_key_values=cache).logits
    whole = model(x, attention_mask=mask).logits
    keep = mask[:, at:] == 1
    assert error(got[keep], whole[:, at:][keep]) <= 5e-6


@torch.no_grad()
def test_cropping_what_was_not_recorded_is_refused(model: SWHForCausalLM) -> None:
    x = tokens(1, 8)
    cache = model(x).past_key_values
    cache.crop(0)
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    model(x, past_key_values=cache)
    with pytest.raises(ValueError, match="pass minus the number"):
        cache.crop(3)
    with pytest.raises(ValueError, match="8 tokens can be taken back"):
        cache.crop(-9)
    assert cache.get_seq_length() == 16


@torch.no_grad()
def test_recording_forgets_so_that_memory_stays_bounded() -> None:
    model = small_model(num_hidden_layers=1)
    cache = model(tokens(1, 3)).past_key_values
    cache.activate_past_recording()
    for _ in range(8):
        model(tokens(1, 300), past_key_values=cache)
    recorded = sum(step.x.shape[1] for step in cache.layers[0]._past)
    assert 1024 <= recorded <= 1024 + 300


# ---- caches that do not fit


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 6}, "made by a model of"),
        ({"num_hidden_layers": 3}, "this model needs 3 of its own"),
        ({"branches": ("window",)}, "made by a model of"),
        ({"hidden_size": 64}, "made by a model of"),
        ({"num_attention_heads": 2}, "made by a model of"),
    ],
)
def test_a_cache_of_another_model_is_refused(
    model: SWHForCausalLM, fields: dict[str, Any], message: str
) -> None:
    cache = small_model(mixer=model.config.mixer, **fields)(tokens(1, 9)).past_key_values
    if "3" in message:
        with pytest.raises(ValueError, match="2 of its own"):
            model(tokens(1, 1), past_key_values=cache)
        return
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 1), past_key_values=cache)


@torch.no_grad()
def test_a_cache_of_another_batch_dtype_or_kind_is_refused(model: SWHForCausalLM) -> None:
    x = tokens(2, 9)
    cache = model(x).past_key_values
    with pytest.raises(ValueError, match="2 rows, the input 3"):
        model(tokens(3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match=r"is torch\.float32"):
        copy.deepcopy(model).to(torch.bfloat16)(x, past_key_values=cache)
    other = next(name for name in MIXERS if name != model.config.mixer)
    with pytest.raises(ValueError, match=r"made by a model of"):
        small_model(mixer=other)(x, past_key_values=cache)
    foreign = DynamicCache()
    foreign.layers = [DynamicLayer(), DynamicLayer()]
    with pytest.raises(ValueError, match="0 of ours"):
        model(x, past_key_values=foreign)
    with pytest.raises(TypeError, match="mixer states"):
        cache.update(x, x, 0)


@torch.no_grad()
def test_an_empty_cache_of_any_kind_is_filled_with_our_layers(model: SWHForCausalLM) -> None:
    x = tokens(2, 9)
    caches = [DynamicCache(), DynamicCache(config=model.config)]
    caches.append(
        StaticCache(config=model.config, max_cache_len=4)
    )  # constant memory is ours anyway
    for cache in caches:
        assert torch.equal(model(x, past_key_values=cache).logits, model(x).logits)
        assert all(isinstance(layer, SWHCacheLayer) for layer in cache.layers)
        assert cache.get_seq_length() == 9
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(x, past_key_values=cache).logits, model(x).logits)


@torch.no_grad()
def test_a_cache_that_an_exception_left_half_written_is_refused(model: SWHForCausalLM) -> None:
    x = tokens(1, 9)
    cache = model(x).past_key_values

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(x, past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match="half-written"):
        model(x, past_key_values=cache)


def test_the_cache_keeps_no_more_however_long_it_runs() -> None:
    model, x = small_model(), tokens(1, 9)

    def size(new: int) -> int:
        cache = greedy(model, x, max_new_tokens=new, return_dict_in_generate=True).past_key_values
        tensors = [t for layer in cache.layers for t in (layer.state.spectral, *layer.state.window)]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    assert size(5) == size(80)
