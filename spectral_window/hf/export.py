"""A model as two graphs that run without this package: for ONNX Runtime, or for torch.export.load.

    prefill   (input_ids, positions)        -> (logits, states)     a text of any length
    step      (input_ids, states before)    -> (logits, states)     one token of each row

Both take any number of rows. The states have the same size after any number of tokens, so a program
that calls `step` needs no cache of its own: what one call returns is an input of the next. A graph
holds PyTorch's own operations alone, in float32 (the convolution's state and the memory's chunks in
float64); what was written is read again and compared with the model before the folder is there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from spectral_window.errors import IntegrityError, UserError
from spectral_window.files import write_folder
from spectral_window.hf.model import SWHForCausalLM
from spectral_window.nn.mixers import map_state
from spectral_window.ops.documents import Documents

FORMATS = ("onnx", "torch")
LARGEST_ERROR = 1e-5  # relative rms of the difference between a graph's outputs and the model's
WEIGHTS = "weights.bin"  # both ONNX graphs read this file
INLINE_BYTES = 1024  # smaller constants stand in the graph itself

Run = Callable[[Sequence[Tensor]], list[Tensor]]


def named_states(model: SWHForCausalLM, rows: int) -> dict[str, Tensor]:
    """Return the states of `rows` rows before any token, each tensor by its name in the graphs.

    Example:
        >>> from spectral_window import SWHConfig
        >>> config = SWHConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, window=2)
        >>> list(named_states(SWHForCausalLM(config), 1))
        ['0.spectral', '0.window.key', '0.window.value', '0.window.position']
    """
    states = enumerate(_empty_states(model, rows))
    return {name: x for index, state in states for name, x in _named(str(index), state)}


def _empty_states(model: SWHForCausalLM, rows: int) -> list[Any]:
    return [
        layer.mixer.init_state(rows, dtype=model.dtype, device="cpu")
        for layer in model.model.layers
    ]


def _named(prefix: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield prefix, state
    elif state is not None:
        for field, part in zip(state._fields, state, strict=True):
            yield from _named(f"{prefix}.{field}", part)


class Prefill(nn.Module):
    """(input_ids [B, T], positions [B, T]) -> logits [B, T, V] and the tensors of the states."""

    def __init__(self, model: SWHForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        before = (None,) * len(self.model.model.layers)
        return _run(self.model, input_ids, Documents(positions, checked=True), before)


class Step(nn.Module):
    """(input_ids [B, 1], the tensors of the states) -> logits [B, 1, V] and those after it."""

    def __init__(self, model: SWHForCausalLM):
        super().__init__()
        self.model = model
        self.like = _empty_states(model, 1)

    def forward(self, input_ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        each = iter(states)
        before = [map_state(state, lambda _: next(each)) for state in self.like]
        return _run(self.model, input_ids, None, before)


def _run(
    model: SWHForCausalLM, ids: Tensor, documents: Documents | None, before: Sequence[Any]
) -> tuple[Tensor, ...]:
    inner = model.model
    x, after = inner.embed_tokens(ids), []
    for layer, state in zip(inner.layers, before, strict=True):
        x, state = layer(x, documents, state)
        after += [tensor for _, tensor in _named("", state)]
    return model.lm_head(inner.norm(x)), *after


def export(
    model: SWHForCausalLM,
    tokenizer: Any,
    folder: Path | str,
    format: str = "onnx",
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Write `model` as the graphs `prefill` and `step`, with its tokenizer and a README of both.

    Args:
        model: on the CPU; weights that are not float32 are exported in float32.
        tokenizer: saved beside the graphs.
        folder: a new folder.
        format: "onnx" (prefill.onnx, step.onnx and the weights of both in weights.bin), or "torch"
            (prefill.pt2 and step.pt2, each with the weights).
        note: receives a line before each part of the work.

    Returns:
        The largest error of each graph as read from its file: relative rms of the difference from
        the model, over logits and states, for packed, padded and single rows.

    Raises:
        UserError: a model whose state grows, an unknown format, a folder that exists, or packages
            that are missing.
        IntegrityError: a graph computes something else than the model; nothing is left behind.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise UserError(f"format '{format}' (export): choose {' or '.join(FORMATS)}")
    if not model.constant_state:
        raise UserError(
            f"mixer '{model.config.mixer}' keeps all keys and values (export): the states of a "
            "graph have a fixed size; export a model of spectral_window or memory"
        )
    if folder.exists():
        raise UserError(f"it exists ({folder}): choose a new folder")
    if format == "onnx":
        _require_onnx()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if model.dtype != torch.float32:
        model = nn.Module.to(copy.deepcopy(model), torch.float32)
    model = model.eval()
    errors: dict[str, float] = {}

    def write(temporary: Path) -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            paths = _write_onnx(model, temporary, note) if format == "onnx" else None
            paths = paths or _write_torch(model, temporary, note)
            note("reading the files again, to compare them with the model")
            errors.update(_compare(model, *(_reader(path) for path in paths)))
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(_readme(model, format), encoding="utf-8")

    write_folder(folder, write, needs=4 * model.count_parameters())
    return errors


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{error.name} is missing (export): pip install 'spectral-window[export]', or take "
            "--format torch"
        ) from None


# ------------------------------------------------------------------------------ the graphs


def _programs(
    model: SWHForCausalLM, note: Callable[[str], None]
) -> Iterator[tuple[str, ExportedProgram]]:
    """Yield each graph with its name."""
    batch, time = Dim("batch"), Dim("time")
    ids, positions = _rows(model, 41)
    states = tuple(named_states(model, 2).values())
    rows = {0: batch}
    note("recording the graph of a text")
    yield (
        "prefill",
        torch.export.export(
            Prefill(model),
            (ids, positions),
            dynamic_shapes=({0: batch, 1: time}, {0: batch, 1: time}),
            # that chunks fill whole tiles holds for any length; the exporter need not prove it
            prefer_deferred_runtime_asserts_over_guards=True,
        ),
    )
    note("recording the graph of a token")
    yield (
        "step",
        torch.export.export(
            Step(model), (ids[:, :1], *states), dynamic_shapes=(rows, (rows,) * len(states))
        ),
    )


def _write_torch(model: SWHForCausalLM, folder: Path, note: Callable[[str], None]) -> list[Path]:
    paths = []
    for name, program in _programs(model, note):
        torch.export.save(program, folder / f"{name}.pt2")
        paths.append(folder / f"{name}.pt2")
    return paths


def _write_onnx(model: SWHForCausalLM, folder: Path, note: Callable[[str], None]) -> list[Path]:
    import onnx_ir

    states = list(named_states(model, 1))
    graphs = {}
    for name, program in _programs(model, note):
        inputs = ["positions"] if name == "prefill" else [f"past.{x}" for x in states]
        note(f"translating {name} to ONNX")
        exported: Any = torch.onnx.export(
            program,
            input_names=["input_ids", *inputs],
            output_names=["logits", *(f"present.{x}" for x in states)],
            dynamo=True,
            verbose=False,
        )
        graphs[name] = exported.model
        _name_axes(graphs[name].graph)
    _share_weights([model.graph for model in graphs.values()], folder)
    paths = []
    for name, graph in graphs.items():
        onnx_ir.save(graph, folder / f"{name}.onnx")
        paths.append(folder / f"{name}.onnx")
    return paths


def _name_axes(graph: Any) -> None:
    """Call the sizes that vary batch and time, as the README does."""
    import onnx_ir

    names = dict(zip(map(str, graph.inputs[0].shape), ("batch", "time"), strict=True))
    for value in (*graph.inputs, *graph.outputs):
        named = [x if isinstance(x, int) else names.get(str(x), str(x)) for x in value.shape]
        value.shape = onnx_ir.Shape(named)


def _share_weights(graphs: Sequence[Any], folder: Path) -> None:
    """Move the weights of all `graphs` to one file, equal ones once."""
    import onnx_ir

    places: dict[tuple[Any, ...], int] = {}
    with (folder / WEIGHTS).open("wb") as file:
        for graph in graphs:
            for name, value in graph.initializers.items():
                weight = value.const_value
                if weight is None or weight.nbytes < INLINE_BYTES:
                    continue
                content = weight.tobytes()
                key = (weight.dtype, tuple(weight.shape), content)
                if key not in places:
                    file.write(bytes(-file.tell() % 64))  # aligned, as a mapped file wants it
                    places[key] = file.tell()
                    file.write(content)
                value.const_value = onnx_ir.ExternalTensor(
                    WEIGHTS,
                    places[key],
                    len(content),
                    weight.dtype,
                    shape=weight.shape,
                    name=name,
                    base_dir=folder,
                )


# ------------------------------------------------------------------------------ the check


def _rows(model: SWHForCausalLM, time: int) -> tuple[Tensor, Tensor]:
    """Return ids and positions [2, T]: two packed documents, and padding on both sides."""
    ids = torch.arange(2 * time).mul(7).add(3).remainder(model.config.vocab_size).view(2, time)
    half, fifth = time // 2, time // 5
    packed = torch.cat((torch.arange(half), torch.arange(time - half)))
    padded = torch.arange(-fifth, time - fifth)
    padded = torch.where((padded < 0) | (padded >= time - 2 * fifth), -1, padded)
    return ids, torch.stack((packed, padded))


def _compare(model: SWHForCausalLM, prefill: Run, step: Run) -> dict[str, float]:
    """Return the error of each graph; raises IntegrityError where one is too large."""
    errors = {"prefill": 0.0, "step": 0.0}
    one = torch.ones(1, 1, dtype=torch.int64)
    cases = [_rows(model, time) for time in (41, 150)] + [(one, one - 1)]
    for ids, positions in cases:
        want = Prefill(model)(ids, positions)
        errors["prefill"] = max(errors["prefill"], *map(_error, prefill((ids, positions)), want))
        inputs = (ids[:, :1], *want[1:])
        errors["step"] = max(errors["step"], *map(_error, step(inputs), Step(model)(*inputs)))
    for name, error in errors.items():
        if not error <= LARGEST_ERROR:
            raise IntegrityError(
                f"the graph {name} differs from the model by {error:.1e} (export): versions of "
                "torch and of the runtime do not fit; nothing was written"
            )
    return errors


def _error(got: Tensor, want: Tensor) -> float:
    """Relative rms of the difference."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return torch.inf
    got, want = got.double(), want.double()
    size = float(want.square().mean().sqrt())
    difference = float((got - want).square().mean().sqrt())
    return difference / size if size else difference


def _reader(path: Path) -> Run:
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()
        return lambda inputs: list(program(*inputs))
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        arrays = (x.contiguous().numpy() for x in inputs)
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(x) for x in outputs]

    return run


def _readme(model: SWHForCausalLM, format: str) -> str:
    """Return what the graphs take and return, for who opens the folder."""
    vocabulary, ending = model.config.vocab_size, "onnx" if format == "onnx" else "pt2"
    rows = []
    for name, tensor in named_states(model, 1).items():
        shape = ", ".join(map(str, ("batch", *tensor.shape[1:])))
        rows.append(f"| `{name}` | [{shape}] | {str(tensor.dtype).removeprefix('torch.')} |")
    return f"""# A model of spectral-window as graphs

Two graphs of one model of {model.count_parameters():,} parameters. Ids are int64, logits float32.

- `prefill.{ending}`: `input_ids` [batch, time] and `positions` [batch, time] (int64) give `logits`
  [batch, time, {vocabulary}] and the states after the last token of each row.
- `step.{ending}`: `input_ids` [batch, 1] and the states before give `logits`
  [batch, 1, {vocabulary}] and the states after.

`positions` counts 0, 1, 2, ... in each document: 0 begins one, so several can stand in a row; -1 is
padding, which no token sees. Logits at padding mean nothing. The logits after a token are those of
the token that follows it.

The states, in this order after the first input and after the first output; ONNX calls the inputs
`past.NAME` and the outputs `present.NAME`. Their size does not depend on the number of tokens.

| name | shape | type |
| --- | --- | --- |
{chr(10).join(rows)}

`tokenizer.json` is the tokenizer, for the package tokenizers.
"""
