"""A summary of run folders: the numbers to compare, the memory it needs, what it learned,
and the verdict between runs.

The verdict follows the held-out losses, whichever model they favour, and says what weakens it:
sizes or amounts of text that differ, other data, a run without a result, a gap too small to mean
anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from spectral_window.errors import SpectralWindowError
from spectral_window.lab import figures
from spectral_window.lab.runs import Run

MISSING = "missing"
CONTEXTS = tuple(2**k for k in range(8, 21))
TIE = 0.005  # nats per token; another random seed moves the loss of a run of minutes by more


@dataclass(frozen=True)
class Verdict:
    """The answer in a line, what it rests on, and what weakens it."""

    headline: str
    detail: str
    caveats: tuple[str, ...]


@dataclass(frozen=True)
class Measure:
    """A row of the comparison: `better` is "low", "high" or "" (then no cell is marked best);
    values closer than the share `margin` count as equal, because times on a shared machine vary."""

    name: str
    note: str
    value: Callable[[Run], float | None]
    text: Callable[[float], str]
    better: str = ""
    margin: float = 0.0


def parameters(run: Run) -> float | None:
    """How many parameters the run's model has, or None; known from the start of a run."""
    count = run.number("parameters")
    return run.config.get("parameters") if count is None else count


def held_out_loss(run: Run) -> float | None:
    """Held-out loss at the end of the run, nats per token, or None."""
    return run.number("eval_loss")


MEASURES: tuple[Measure, ...] = (
    Measure("Parameters", "", parameters, lambda v: f"{v:,.0f}"),
    Measure(
        "Held-out loss", "nats per token", held_out_loss, lambda v: f"{v:.4f}", "low"
    ),
    Measure(
        "Perplexity", "per token", lambda r: r.number("perplexity"), lambda v: f"{v:.2f}", "low"
    ),
    Measure(
        "Bits per byte", "of held-out text", lambda r: r.number("bits_per_byte"),
        lambda v: f"{v:.4f}", "low",
    ),
    Measure(
        "Training speed", "tokens per second", lambda r: r.number("tokens_per_second"),
        lambda v: f"{v:,.0f}", "high", 0.05,
    ),
    Measure(
        "Peak memory", "of the training process", lambda r: r.number("peak_memory_bytes"),
        figures.size, "low", 0.05,
    ),
    Measure("Training tokens", "", lambda r: r.number("tokens"), lambda v: f"{v:,.0f}"),
    Measure(
        "Wall time", "of training", lambda r: r.number("wall_seconds"),
        figures.duration, "low", 0.05,
    ),
)  # fmt: skip


def compare(runs: Sequence[Run]) -> Verdict:
    """Which run has the lowest held-out loss, by how much, and what the comparison lacks."""
    scored = sorted(
        ((loss, run) for run in runs if (loss := held_out_loss(run)) is not None),
        key=lambda pair: pair[0],
    )
    unscored = [run.label for run in runs if held_out_loss(run) is None]
    caveats = [f"{label}: held-out loss missing." for label in unscored]
    if not scored:
        return Verdict("Held-out loss: missing", "No run here has a result yet.", tuple(caveats))
    (best, first), rest = scored[0], scored[1:]
    if not rest:
        detail = f"Held-out loss {best:.3f} nats per token, {parameters_text(first)}."
        return Verdict(f"{first.label}: {bits_text(first)}", detail, tuple(caveats))
    second_loss, second = rest[0]
    gap = second_loss - best
    if gap < TIE:
        headline = f"{first.label} and {second.label} learn equally well"
    else:
        headline = f"{first.label} predicts unseen text better, by {gap:.3f} nats per token"
    detail = (
        f"Held-out loss {best:.3f} against {second_loss:.3f} for {second.label}"
        f"{_common_size(first, second)}{_common_tokens(first, second, caveats)}."
    )
    if first.fingerprint() != second.fingerprint():
        caveats.append("The runs were made from different data, so their losses do not compare.")
    if gap >= TIE:
        detail += f" Perplexity {math.exp(best):.1f} against {math.exp(second_loss):.1f}."
    caveats.append("One run of each, one seed: a demonstration, not a benchmark.")
    return Verdict(headline, detail, tuple(caveats))


def state_bytes(run: Run) -> list[tuple[int, int]]:
    """(context, bytes) that the run's model keeps after `context` tokens in float32, by its own
    count.

    The model is built without memory from `model/config.json`;
    an absent or unreadable one gives [].
    """
    import torch

    from spectral_window.hf import SWHConfig, SWHForCausalLM

    if not (run.folder / "model" / "config.json").is_file():
        return []
    try:
        config = SWHConfig.from_pretrained(run.folder / "model")
    except (OSError, SpectralWindowError, ValueError, TypeError):
        return []
    with torch.device("meta"):
        model = SWHForCausalLM(config)
    return [(context, model.state_bytes(context)) for context in CONTEXTS]


def oscillators(run: Run) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Learned |decay| (per token) and frequency (radians per token) of every oscillator, an array a
    layer, from the run's saved weights; empty lists where there are none."""
    from safetensors import SafetensorError, safe_open

    decays: dict[int, np.ndarray] = {}
    frequencies: dict[int, np.ndarray] = {}
    pattern = re.compile(r"layers\.(\d+)\.mixer\.kernel\.(decay|frequency)$")
    for path in sorted((run.folder / "model").glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as weights:
                for key in weights.keys():  # noqa: SIM118 - not a dict
                    if match := pattern.search(key):
                        target = decays if match[2] == "decay" else frequencies
                        value = np.asarray(weights.get_tensor(key), dtype=np.float64).ravel()
                        target[int(match[1])] = np.abs(value) if match[2] == "decay" else value
        except (OSError, SafetensorError):
            return [], []
    layers = sorted(decays.keys() & frequencies.keys())
    return [decays[k] for k in layers], [frequencies[k] for k in layers]


def bits_text(run: Run) -> str:
    """'1.234 bits per byte'."""
    bits = run.number("bits_per_byte")
    return f"bits per byte {MISSING}" if bits is None else f"{bits:.3f} bits per byte"


def loss_text(run: Run) -> str:
    """Held-out loss to three places."""
    loss = held_out_loss(run)
    return MISSING if loss is None else f"{loss:.3f}"


def parameters_text(run: Run) -> str:
    """'3.1M parameters'."""
    count = parameters(run)
    return f"parameters {MISSING}" if count is None else f"{figures.count(count)} parameters"


def evaluation_text(runs: Sequence[Run]) -> str:
    """Which part of the held-out text the curves' dots are measured on, where it is not all."""
    for run in runs:
        part, whole = run.recipe("eval_tokens"), run.number("eval_tokens")
        if isinstance(part, int) and whole is not None and part < whole:
            return (
                f"The dots are measured on about {part:,} tokens of the held-out text, "
                f"the final numbers on all {whole:,.0f}."
            )
    return ""


def _common_size(first: Run, second: Run) -> str:
    a, b = parameters(first), parameters(second)
    if a is None or b is None:
        return ", sizes missing"
    if abs(a - b) <= 0.01 * max(a, b):
        return f", at {figures.count(a)} parameters each"
    return f", at unequal size ({figures.count(a)} and {figures.count(b)} parameters)"


def _common_tokens(first: Run, second: Run, caveats: list[str]) -> str:
    a, b = first.number("tokens"), second.number("tokens")
    if a is None or b is None:
        caveats.append("Training tokens missing: it is unknown whether both read the same amount.")
        return ""
    if a == b:
        return f", after the same {figures.count(a)} training tokens"
    caveats.append("The runs read different amounts of text, so this is not a fair comparison.")
    return f", after {figures.count(a)} and {figures.count(b)} training tokens"


def growth_text(state: Sequence[tuple[int, int]]) -> str:
    """How the bytes of `state_bytes` behave over ever longer texts."""
    if not state:
        return MISSING
    if state[-1][1] > state[-2][1]:
        return "grows too"
    start = next(context for context, size in state if size == state[-1][1])
    return "constant" if start == state[0][0] else f"constant from {start} tokens on"
