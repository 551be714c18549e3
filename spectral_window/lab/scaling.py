"""What a training on many GPUs would need, on paper: memory, traffic and time of a step.

Nothing here is measured on a cluster. Parameters, states and operations are those of the model
itself; the rest is counted, from what FSDP2 and context parallelism exchange and what a layer keeps
for its backward pass. Every assumption is a constant below, with its source.

    Layout     how GPUs share the work: replicas x shards x context
    estimate   one step of a model under a layout: an `Estimate`
    fit        the layout with the least context parallelism that fits the GPUs' memory
    table      rows of these: sizes, numbers of GPUs, contexts, and models side by side
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spectral_window.errors import ResourceError, UserError, unknown
from spectral_window.hf.config import PRESETS, SWHConfig
from spectral_window.hf.model import SWHForCausalLM, match_parameters
from spectral_window.lab.bench import gpu_roofline
from spectral_window.lab.jobs import Row
from spectral_window.nn.memory import LAG, TAPS

# ------------------------------------------------------------------------------------ the machine

# The card is `gpu_roofline`'s, an NVIDIA H100 SXM5.
CARD_BYTES = 80e9  # of its memory
USABLE = 0.9  # of that: the rest is for NCCL's buffers, the CUDA context and fragments (our guess)
# Share of the peak of 16-bit products that a step reaches. Llama 3 was trained at 38 to 43 % on up
# to 16,384 H100s (arXiv 2407.21783, table 4); these kernels have not been tried at such sizes.
REACHED = 0.4
MACHINE = 8  # GPUs joined by NVLink
NVLINK = 450e9  # bytes/s in each direction, of a GPU (NVIDIA's datasheet of the H100 SXM5)
# bytes/s in each direction, of a GPU: one 400 Gbit/s InfiniBand port each (NVIDIA DGX H100)
INFINIBAND = 50e9

# ----------------------------------------------------------------------------------- the training

# As `training/sharded.py` and AdamW have them: float32 weight, gradient and two moments, sharded
STATE_BYTES = {"weights": 4, "gradients": 4, "moments": 8}
GATHERED = 2  # bytes of a weight while a layer computes: bfloat16
REDUCED = 4  # bytes of a gradient on its way: float32
LAYERS_GATHERED = 2  # the one that computes and the next, which FSDP2 fetches meanwhile
STREAM = 4  # bytes of a number between layers, which stays float32 under autocast
COMPUTED = 2  # bytes of a number inside a layer: bfloat16
# Bytes of a logit: bfloat16, float32 for the loss, the gradients of both
LOGIT_BYTES = 2 + 4 + 4 + 2
# Tokens whose logits exist at once: beyond so many the head and the loss must go by chunks. That is
# an assumption: this package computes all logits of a micro-batch at once.
LOGIT_TOKENS = 16_384
BACKWARD = 2  # times the operations of the forward pass

# What a layer keeps per token for its backward pass: rows of D channels between layers, of D inside
# it, and of the feed-forward width. A test measures them by the tensors that a layer saves.
KEPT = {
    "spectral_window": (2, 9, 3),
    "memory": (2, 18, 3),
    "attention": (2, 6, 3),
}
# Gradients inside a layer, beside what it keeps, while it computes backward (our guess)
GRADIENTS_INSIDE = 0.5
# What a layer moves through memory per token, forward and backward: rows of D channels and of the
# feed-forward width, without weights. Those of `gpu_roofline`, beside which a test holds them; the
# Transformer's are counted likewise: products 24, norms and sums 16, RoPE 8, fused attention 12.
MOVED = {
    "spectral_window": (79, 17),
    "memory": (165, 17),
    "attention": (60, 17),
}

SIZES = ("125m", "1.3b", "7b")
MODELS = {  # name -> preset and mixer
    "SWH with memory": ("memory", "memory"),
    "SWH": ("paper", "spectral_window"),
    "Transformer": ("memory", "attention"),
}
GPUS = (1, 8, 64, 512)
CONTEXTS = (8_192, 131_072, 1_048_576, 16_777_216)
TOKENS = 16_384  # of a step on each GPU, where rows are shorter


class Model(NamedTuple):
    """The counts of a model, which no layout changes.

    Attributes:
        config: its config.
        parameters: all of them.
        block: of a layer.
        model: the model without weights.
    """

    config: SWHConfig
    parameters: int
    block: int
    network: SWHForCausalLM

    def state_bytes(self, context: int) -> int:
        """Return the bytes of a row's state after `context` tokens, in bfloat16."""
        return self.network.state_bytes(context)

    def flops(self, context: int) -> int:
        """Return the operations of forward and backward per token of rows of `context` tokens."""
        return (1 + BACKWARD) * self.network.flops_per_token(context)


@functools.cache
def model(name: str, size: str) -> Model:
    """Return the counts of a model of `MODELS` at a size of `PRESETS`.

    The Transformer has as many parameters as the SWH with memory, within 1 %.

    Raises:
        UserError: an unknown name or size.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    preset, mixer = MODELS[name]
    if size not in PRESETS[preset]:
        raise unknown("size", size, PRESETS[preset])
    config = SWHConfig.preset(preset, size=size)
    if mixer != config.mixer:
        config = match_parameters(config.papers_layer(mixer), _network(config).count_parameters())
    network = _network(config)
    block = sum(p.numel() for p in network.model.layers[0].parameters())
    return Model(config, network.count_parameters(), block, network)


def _network(config: SWHConfig) -> SWHForCausalLM:
    with torch.device("meta"):
        network = SWHForCausalLM(config)
    network.tie_weights()
    return torch.nn.Module.to(network, torch.bfloat16)


@dataclass(frozen=True)
class Layout:
    """How GPUs share a step: replicas x shards x context of them.

    Attributes:
        replicas: copies of the model's parameters; 1 under `shard=full`, one per machine under
            `shard=hybrid`.
        shards: groups that have rows of their own and share one copy of the parameters.
        context: GPUs of a group, each with a span of its rows (`context_parallel`).
    """

    replicas: int = 1
    shards: int = 1
    context: int = 1

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return self.replicas * self.shards * self.context

    @property
    def holders(self) -> int:
        """GPUs that hold a copy of the parameters together."""
        return self.shards * self.context


@dataclass(frozen=True)
class Estimate:
    """One optimiser step of a model under a layout, of one micro-batch.

    Attributes:
        layout: of the GPUs.
        context: tokens of a row.
        keep: whether activations are kept, and not computed again in the backward pass.
        tokens: of the step, over all GPUs.
        memory: bytes on each GPU by what they are for.
        traffic: bytes that a GPU receives in a step, by what for.
        seconds: least time of a step by what takes it. They overlap: products run while weights
            arrive, so the longest is the step's.
        flops: operations of a GPU in a step, those of checkpointing among them.
    """

    layout: Layout
    context: int
    keep: bool
    tokens: int
    memory: dict[str, float]
    traffic: dict[str, float]
    seconds: dict[str, float]
    flops: float

    @property
    def bytes(self) -> float:
        """Memory of each GPU."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a card has that much."""
        return self.bytes <= USABLE * CARD_BYTES

    @property
    def step(self) -> float:
        """Seconds of a step where everything overlaps."""
        return max(self.seconds.values())

    @property
    def step_alone(self) -> float:
        """Seconds of a step where nothing overlaps."""
        return sum(self.seconds.values())

    @property
    def bound(self) -> str:
        """What takes the step's time."""
        return max(self.seconds, key=lambda what: self.seconds[what])

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.tokens / self.step


def estimate(
    model: Model, layout: Layout, context: int, *, rows: int | None = None, keep: bool = False
) -> Estimate:
    """Return what one step of a training needs.

    Args:
        model: of `model`.
        layout: how GPUs share it.
        context: tokens of a row.
        rows: of each group of `layout.context` GPUs; None: as many as make `TOKENS` a GPU.
        keep: keep all activations, and do not compute them again in the backward pass.

    Raises:
        UserError: sizes that are not positive.
    """
    if (
        min(context, layout.replicas, layout.shards, layout.context, 1 if rows is None else rows)
        < 1
    ):
        raise UserError(f"context {context}, {layout} (scaling): use whole numbers above 0")
    if rows is None:
        rows = max(1, TOKENS * layout.context // context)
    config = model.config
    local = rows * context / layout.context  # tokens of a GPU
    memory = _memory(model, layout, rows, local, keep)
    exchanged = rows * _exchanged(model, context / layout.context, layout.context, keep)
    traffic = {
        "weights": (1 if layout.holders == 1 else 2)
        * _received(GATHERED * model.parameters, layout.holders),
        "gradients": _received(REDUCED * model.parameters, layout.holders),
        # an all-reduce of the shards: each is reduced and gathered
        "replicas": 2 * _received(REDUCED * model.parameters / layout.holders, layout.replicas),
        "context": config.num_hidden_layers * exchanged,
    }
    passes = 1 + BACKWARD + (0 if keep else 1)
    flops = local * passes * model.network.flops_per_token(context)
    rows_moved, wide_moved = MOVED[config.mixer]
    numbers = rows_moved * config.hidden_size + wide_moved * int(config.intermediate_size or 0)
    moved = local * config.num_hidden_layers * COMPUTED * numbers * passes / (1 + BACKWARD)
    moved += local * LOGIT_BYTES * config.vocab_size + passes * GATHERED * model.parameters
    moved += sum(gpu_roofline.ADAMW) * model.parameters / layout.holders
    seconds = {
        "products": flops / (REACHED * gpu_roofline.TENSOR),
        "memory": moved / gpu_roofline.MEMORY,
        "network": _wire(traffic["weights"] + traffic["gradients"], layout.holders)
        + _wire(traffic["replicas"], layout.gpus)
        + _wire(traffic["context"], layout.context, point_to_point=True),
    }
    tokens = rows * context * layout.replicas * layout.shards
    return Estimate(layout, context, keep, tokens, memory, traffic, seconds, flops)


def _memory(model: Model, layout: Layout, rows: int, local: float, keep: bool) -> dict[str, float]:
    config = model.config
    memory = {k: n * model.parameters / layout.holders for k, n in STATE_BYTES.items()}
    ends = model.parameters - config.num_hidden_layers * model.block
    if layout.holders > 1:  # whole weights, and whole gradients of one layer before they are sent
        whole = LAYERS_GATHERED * model.block + ends
        memory["gathered"] = GATHERED * whole + REDUCED * max(model.block, ends)
    else:
        memory["gathered"] = GATHERED * (model.parameters if keep else model.block)  # of autocast
    between, inside, wide = KEPT[config.mixer]
    width, hidden = config.hidden_size, int(config.intermediate_size or 0)
    layer = local * (STREAM * between * width + COMPUTED * (inside * width + wide * hidden))
    layer += local * COMPUTED * (inside * width + wide * hidden) * GRADIENTS_INSIDE
    boundary = local * STREAM * width
    memory["activations"] = (
        config.num_hidden_layers * layer if keep else config.num_hidden_layers * boundary + layer
    )
    memory["logits"] = min(local, LOGIT_TOKENS) * LOGIT_BYTES * config.vocab_size
    if layout.context > 1 and config.mixer != "attention":  # what all earlier spans have sent
        sent = rows * (layout.context - 1) * span_bytes(config)
        memory["states"] = sent * (config.num_hidden_layers if keep else 1)
    return memory


def span_bytes(config: SWHConfig) -> float:
    """Return the bytes that a span of a row hands to each later one, in one layer.

    They are the state that it leaves (`ops/spans.py`), whatever its length; of the memory also the
    matrix by which the span multiplies the state before it, which has the same size.
    """
    width = config.hidden_size
    window = 2 * 2 * config.window * width * COMPUTED
    convolution = 16 * width  # one complex float64
    if config.mixer != "memory":
        return window + convolution
    last = (LAG - 1) * width * COMPUTED  # queries
    if config.short_convolution:
        last += 3 * (TAPS - 1) * width * COMPUTED
    return window + convolution + last + 2 * 4 * width * width // config.memory_heads


def _exchanged(model: Model, span: float, parts: int, keep: bool) -> float:
    """Return the bytes that a GPU receives for a row in a layer, forward and backward.

    The most of any GPU: the last receives from all earlier ones forward, the first from all later
    ones backward.
    """
    config = model.config
    if config.mixer == "attention":
        # keys and values of every other span pass by (ring attention, arXiv 2310.01889): forward,
        # again if that is computed again, and backward together with their gradients
        times = 1 + (0 if keep else 1) + 2
        return times * (parts - 1) * span * 2 * config.hidden_size * COMPUTED
    return (2 if keep else 3) * (parts - 1) * span_bytes(config)


def _received(count: float, group: int) -> float:
    """Return what each of `group` GPUs receives of `count` bytes that they gather, or reduce."""
    return count * (group - 1) / group


def _wire(received: float, group: int, *, point_to_point: bool = False) -> float:
    """Return seconds to receive that many bytes, in a group of neighbouring GPUs.

    A collective's ring passes each machine once, over all of its ports; so a GPU's port carries the
    part of the machine's bytes that come from others, divided by its GPUs.
    """
    inside = received / NVLINK
    if group <= MACHINE:
        return inside
    if point_to_point:  # all but the neighbours on the same machine
        return max(inside, received * (group - MACHINE) / max(group - 1, 1) / INFINIBAND)
    machines = group / MACHINE
    whole = received * group / (group - 1)
    return max(inside, whole * (machines - 1) / machines / MACHINE / INFINIBAND)


def layouts(gpus: int, *, hybrid: bool = False) -> Iterable[Layout]:
    """Yield layouts of so many GPUs, with 1, 2, 4, ... of them in a group that shares rows."""
    holders = min(gpus, MACHINE) if hybrid else gpus
    context = 1
    while holders % context == 0:
        yield Layout(gpus // holders, holders // context, context)
        context *= 2


def fit(model: Model, gpus: int, context: int, *, hybrid: bool = False) -> Estimate:
    """Return the estimate of the layout with the least context parallelism that fits.

    Activations are computed again in the backward pass only where they would not fit otherwise.

    Args:
        model: of `model`.
        gpus: all of them.
        context: tokens of a row.
        hybrid: share parameters within each machine, and not among all GPUs.

    Raises:
        ResourceError: none fits; it says what is missing in the best of them.
    """
    closest: Estimate | None = None
    for layout in layouts(gpus, hybrid=hybrid):
        for keep in (True, False):
            found = estimate(model, layout, context, keep=keep)
            if found.fits:
                return found
            if closest is None or found.bytes < closest.bytes:
                closest = found
    assert closest is not None
    most = max(closest.memory, key=lambda what: closest.memory[what])
    raise ResourceError(
        f"{model.parameters:,} parameters at {context:,} tokens of context do not fit {gpus} GPUs "
        f"(scaling): {closest.bytes / 1e9:,.0f} GB on each, most of it {most}, and "
        f"{USABLE * CARD_BYTES / 1e9:,.0f} GB can be used; use more GPUs, a shorter context or a "
        "smaller model"
    )


# ---------------------------------------------------------------------------------------- rows


def table(
    sizes: Sequence[str] = SIZES,
    gpus: Sequence[int] = GPUS,
    contexts: Sequence[int] = CONTEXTS,
    models: Sequence[str] = tuple(MODELS),
    *,
    hybrid: bool = False,
) -> list[Row]:
    """Return a row for every size, number of GPUs, context and model.

    Returns:
        Rows {size, gpus, context, model, fits}; where it fits also context_parallel, shards,
        replicas, activations ("kept" or "again"), memory and traffic (bytes by what for), seconds
        (by what takes them), tokens (of a step), tokens_per_second, alone_per_second (where nothing
        overlaps) and bound; else why.
    """
    rows: list[Row] = []
    for size in sizes:
        for count in gpus:
            for context in contexts:
                for name in models:
                    row: Row = {"size": size, "gpus": count, "context": context, "model": name}
                    rows.append(row)
                    try:
                        found = fit(model(name, size), count, context, hybrid=hybrid)
                    except ResourceError as error:
                        row |= {"fits": False, "why": str(error)}
                        continue
                    row |= {
                        "fits": True,
                        "context_parallel": found.layout.context,
                        "shards": found.layout.shards,
                        "replicas": found.layout.replicas,
                        "activations": "kept" if found.keep else "again",
                        "memory": found.memory,
                        "traffic": found.traffic,
                        "seconds": found.seconds,
                        "tokens": found.tokens,
                        "tokens_per_second": found.tokens_per_second,
                        "alone_per_second": found.tokens / found.step_alone,
                        "bound": found.bound,
                    }
    return rows


Cells = tuple[tuple[str, ...], list[tuple[str, ...]]]  # a head, and rows


def cells(rows: list[Row]) -> Cells:
    """Return the rows of `table` as cells."""
    head = (
        *("size", "GPUs", "context", "model", "GPUs a row", "activations"),
        *("GB a GPU", "GB received", "s a step", "tokens/s", "without overlap", "limit"),
    )
    lines: list[tuple[str, ...]] = []
    for row in rows:
        about = (row["size"], f"{row['gpus']}", f"{row['context']:,}", row["model"])
        if not row["fits"]:
            lines.append((*about, *["-"] * 7, "memory"))
            continue
        memory, received = sum(row["memory"].values()), sum(row["traffic"].values())
        lines.append(
            (
                *about,
                f"{row['context_parallel']}",
                row["activations"],
                f"{memory / 1e9:.1f}",
                _short(received / 1e9),
                _short(row["tokens"] / row["tokens_per_second"]),
                _thousands(row["tokens_per_second"]),
                _thousands(row["alone_per_second"]),
                row["bound"],
            )
        )
    return head, lines


def part_cells(rows: list[Row]) -> Cells:
    """Return what a GPU's memory and traffic consist of, a column for each row of `table`."""
    head = ("GB", *(f"{row['model']}, {row['context']:,}" for row in rows))
    lines: list[tuple[str, ...]] = []
    for kind in ("memory", "traffic"):
        for what in dict.fromkeys(what for row in rows for what in row[kind]):
            numbers = [row[kind].get(what, 0.0) / 1e9 for row in rows]
            if any(numbers):
                lines.append((f"{kind}: {what}", *map(_short, numbers)))
    return head, lines


def model_cells(sizes: Sequence[str] = SIZES, contexts: Sequence[int] = CONTEXTS) -> Cells:
    """Return what models are and do, whatever trains them."""
    ends = (contexts[0], contexts[-1])
    head = (
        *("size", "model", "parameters"),
        *(f"state at {context:,}, MB" for context in ends),
        *(f"GFLOP a token at {context:,}" for context in ends),
    )
    lines: list[tuple[str, ...]] = []
    for size in sizes:
        for name in MODELS:
            each = model(name, size)
            lines.append(
                (
                    *(size, name, f"{each.parameters:,}"),
                    *(_short(each.state_bytes(context) / 1e6) for context in ends),
                    *(_short(each.flops(context) / 1e9) for context in ends),
                )
            )
    return head, lines


def _short(value: float) -> str:
    """Write a number with three digits: 0.00123, 1.23, 123, 1,230."""
    if value == 0:
        return "-"
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def _thousands(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.0f}"


# ------------------------------------------------------------------------------------- a picture


def draw(path: Path, size: str = "7b", gpus: int = 512) -> Path:
    """Draw speed, and the bytes exchanged within rows, against context; return `path`."""
    from matplotlib.axes import Axes
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from spectral_window.lab import figures

    contexts = [2**n for n in range(13, 25)]
    rows = {name: table([size], [gpus], contexts, [name]) for name in MODELS}

    def axis(axes: Axes) -> None:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_locator(LogLocator(base=8, numticks=9))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _context(x)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.set_xlabel("tokens of context")

    def lines(axes: Axes, curves: dict[str, list[tuple[int, float]]], label: str) -> None:
        axis(axes)
        for index, (name, points) in enumerate(curves.items()):
            # the widest first: where curves meet all can be seen
            style: dict[str, Any] = {
                "color": figures.SERIES[index],
                "lw": 4.2 - 1.3 * index,
                "label": name,
            }
            axes.plot(*zip(*points, strict=True), **style)
        axes.set_ylabel(label)

    speeds = {
        name: [(r["context"], r["tokens_per_second"] / gpus) for r in own if r["fits"]]
        for name, own in rows.items()
    }
    layout = Layout(1, gpus // MACHINE, MACHINE)

    def received(each: Model, context: int) -> float:
        found = estimate(each, layout, context, rows=1)
        return found.traffic["context"] / each.config.num_hidden_layers / 1e9

    exchanged = {name: [(c, received(model(name, size), c)) for c in contexts] for name in MODELS}
    panels = [
        figures.Panel(
            "speed",
            f"Training {size} on {gpus} GPUs",
            "",
            lambda axes: lines(axes, speeds, "tokens a second on each GPU"),
        ),
        figures.Panel(
            "exchange",
            f"A row over {MACHINE} GPUs",
            "",
            lambda axes: lines(axes, exchanged, "GB received a layer and row"),
        ),
    ]
    return figures.sheet(panels, 2, "counted, not measured", path)


def _context(value: float) -> str:
    return f"{value / 2**20:.0f}M" if value >= 2**20 else f"{value / 2**10:.0f}k"
