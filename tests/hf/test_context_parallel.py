"""A row in spans gives the outputs, the gradients and the states of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from spectral_window import SWHConfig, SWHForCausalLM
from spectral_window.errors import UserError
from spectral_window.ops.context_parallel import ContextParallel
from tests.hf.small import error, small_model
from tests.processes import THREADS
from tests.shared_rows import in_threads

VOCABULARY = 23
MODELS = {
    "paper": {"mixer": "spectral_window"},
    "memory": {"mixer": "memory", "memory_heads": 2},
    "short convolution": {"mixer": "memory", "short_convolution": True},
    "closing": {"mixer": "memory", "write_gate": "closing", "kernel": "multi_mode"},
    "reflecting": {"mixer": "memory", "write_gate": "reflecting", "memory_heads": 2},
    "short filter": {"mixer": "memory", "kernel": "short_filter", "window": 1},
    "long filter": {"mixer": "spectral_window", "kernel": "free_form"},
    "window alone": {"mixer": "spectral_window", "branches": ("window",)},
    "convolution alone": {"mixer": "spectral_window", "branches": ("spectral",)},
}


def model_of(dtype=torch.float64, **options):
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 2, "window": 4, "initializer_range": 0.3}
    model = SWHForCausalLM(SWHConfig(**common | options)).to(dtype)
    for parameter in model.parameters():  # kernels keep their float32 otherwise
        parameter.data = parameter.data.to(dtype)
    return model


def rows_of(kind, time, parts):
    """The arguments of a model for two rows of a kind."""
    ids = torch.randint(0, VOCABULARY, (2, time))
    inputs = {"input_ids": ids, "labels": ids}
    border = time * (parts // 2) // parts  # where a span starts
    if kind == "packed":
        starts = torch.zeros(2, time, dtype=torch.int64)
        for row, start in ((0, border), (1, time // 3), (1, time - 1)):
            starts[row, start] = start
        inputs["position_ids"] = torch.arange(time) - starts.cummax(1).values
    elif kind == "padded":
        mask = torch.ones(2, time, dtype=torch.int64)
        mask[0, : border or 1] = 0  # all of the first spans
        mask[1, time // 2] = mask[1, -1] = 0
        inputs["attention_mask"] = mask
    return inputs


def compared(model, inputs, parts):
    """Logits and gradients of spans and of one process, after a comparison of the losses.

    The gradients are of a float64 loss; the model's own is float32.
    """

    def gradients(logits):
        mixed = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(logits.shape)
        (logits.double() * mixed).tanh().sum().backward()
        found = [p.grad for p in model.parameters()]
        model.zero_grad()
        return found

    alone = model(**inputs, use_cache=False)
    spans = in_threads(parts, lambda it: model(**inputs, context_parallel=it, use_cache=False))
    torch.testing.assert_close(sum(span.loss for span in spans), alone.loss, rtol=2e-6, atol=0)
    logits = torch.cat([span.logits for span in spans], 1)
    return (logits, *gradients(logits)), (alone.logits, *gradients(alone.logits))


@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_spans_equal_one_process(name, kind):
    model = model_of(**MODELS[name])
    for parts, time in ((1, 9), (2, 30), (3, 13), (4, 4)):
        found, expected = compared(model, rows_of(kind, time, parts), parts)
        for mine, other in zip(found, expected, strict=True):
            scale = other.abs().max().clamp(min=1e-6)  # a gradient may be 0 but for rounding
            assert (mine - other).abs().max() < 1e-9 * scale


@pytest.mark.parametrize("name", MODELS)
def test_float32_differs_by_rounding(name):
    found, expected = compared(model_of(torch.float32, **MODELS[name]), rows_of("packed", 70, 3), 3)
    assert error(found[0], expected[0]) < 2e-6
    flat = [torch.cat([x.flatten() for x in gradients[1:]]) for gradients in (found, expected)]
    assert error(*flat) < 2e-6


def test_the_last_process_has_the_cache_of_the_row():
    model = model_of(**MODELS["memory"]).eval()
    ids = torch.randint(0, VOCABULARY, (2, 29))
    mask = torch.ones(2, 29, dtype=torch.int64)
    mask[0, :12] = mask[1, -2:] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=True).past_key_values

        def prefilled(it):
            with torch.no_grad():  # which a thread has of its own
                inputs = {"attention_mask": mask, "context_parallel": it}
                return model(ids, **inputs, use_cache=True).past_key_values

        cache = in_threads(3, prefilled)[-1]
        assert cache.get_seq_length() == 29
        more = torch.cat((mask, torch.ones(2, 5, dtype=torch.int64)), 1)
        mine, other = (
            model(ids[:, :5], attention_mask=more, past_key_values=each).logits
            for each in (cache, whole)
        )
    assert torch.allclose(mine, other, rtol=0, atol=1e-12)


def test_what_cannot_be_shared_is_refused():
    ids = torch.randint(0, VOCABULARY, (1, 9))

    def refuses(match, model, **inputs):
        with pytest.raises(UserError, match=match):
            in_threads(2, lambda it: model(**inputs, context_parallel=it))

    refuses(
        "rows of Transformer models cannot be shared", model_of(mixer="attention"), input_ids=ids
    )
    model = model_of()
    refuses("rows of 1 tokens over 2 processes", model, input_ids=ids[:, :1])
    cache = model(ids, use_cache=True).past_key_values
    refuses("beside a cache of 9 tokens", model, input_ids=ids, past_key_values=cache)
    with pytest.raises(UserError, match="there is no process group"):
        ContextParallel()


def test_a_mixer_says_of_itself_that_rows_can_be_shared():
    """A subclass may pass more between tokens than its base."""
    mixer = model_of().model.layers[0].mixer
    kind = type(mixer)

    class More(kind):
        pass

    kind.check_in_spans()
    with pytest.raises(UserError, match="cannot be shared"):
        More.check_in_spans()


# ------------------------------------------------------------------------------ real processes


def summed_gradients(model):
    """Gradients, added over the processes, as one vector; the model has none afterwards."""
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    dist.all_reduce(found)
    return found


def shared(model, inputs, context):
    """Logits of the rows, the gradients, and the bytes that this process sent for them."""
    before = context.sent
    output = model(**inputs, context_parallel=context, use_cache=False)
    output.loss.backward()
    rows = [None] * context.size
    dist.all_gather_object(rows, output.logits.detach())
    return torch.cat(rows, 1), summed_gradients(model), context.sent - before


def agree(model, inputs, context):
    """Compare with the same rows in this process alone; return the bytes sent."""
    logits, gradients, sent = shared(model, inputs, context)
    output = model(**inputs, use_cache=False)
    (output.loss / context.size).backward()
    assert error(logits, output.logits) < 2e-6
    assert error(gradients, summed_gradients(model)) < 2e-6
    return sent


def work(rank, processes, folder):
    torch.set_num_threads(THREADS)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=processes)
    context = ContextParallel()
    model = small_model(mixer="memory", memory_heads=2).train()
    torch.manual_seed(1)  # 50 and 100 tokens: spans of 16, 17, 17 and of 33, 33, 34
    inputs = rows_of("packed", 50, 3)
    sent = [agree(model, rows, context) for rows in (inputs, rows_of("plain", 100, 3))]

    # the state of each layer, and the memory's matrices: to each later process, and back from it
    # as gradients, whatever the number of tokens
    state = model.state_bytes(100, batch_size=2)
    positions = 2 * 2 * 8  # of the window, which are known
    matrices = 2 * 2 * 2 * 16 * 16 * 4
    each = state - positions + matrices
    assert sent == [each * (processes - 1)] * 2

    # layers that are recomputed exchange again, in the same order
    expected = shared(model, inputs, context)
    # transformers 5.17 has another name for it
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    found = shared(model, inputs, context)
    assert torch.equal(found[0], expected[0])
    assert error(found[1], expected[1]) < 1e-6
    assert found[2] == expected[2] + each * (processes - 1 - rank)
    for layer in model.model.layers:
        layer.gradient_checkpointing = False

    # without a gradient for the embedding, the first exchange has some all the same
    model.model.embed_tokens.requires_grad_(False)
    agree(model, inputs, context)
    dist.barrier()
    dist.destroy_process_group()


def test_processes_equal_one_and_send_as_much_for_any_length(tmp_path):
    mp.spawn(work, (3, str(tmp_path)), nprocs=3)
