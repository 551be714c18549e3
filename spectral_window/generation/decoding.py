"""From logits to text: draw a token, turn tokens into characters, stop at a text.

Each part has a bounded memory, so it may run for ever: drawing has a random generator, decoding a
window of the last tokens, stopping the end of the text that can still become a stop string.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_window.errors import UserError

MAX_STOPS, MAX_STOP_LENGTH = 64, 1024
LIKELIEST = 4096  # tokens that are sorted first


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token (greedy), 1 the model's own
            distribution.
        top_k: only the k likeliest tokens; 0 keeps all.
        top_p: only the likeliest tokens that together have this probability; 1 keeps all.

    Raises:
        UserError: a value is outside its range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require_number(
            "temperature", self.temperature, "a number >= 0; 0 is greedy", lambda x: x >= 0
        )
        require_number("top_p", self.top_p, "a number in (0, 1]; 1 keeps all", lambda x: 0 < x <= 1)
        require_int("top_k", self.top_k, "a whole number >= 0; 0 keeps all", lambda x: x >= 0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError where top_k exceeds the vocabulary."""
        if self.top_k > vocab_size:
            raise UserError(
                f"top_k is {self.top_k} (sampling): there are {vocab_size} tokens; 0 keeps all"
            )

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """Draw a token id from float logits `[V]`, with one number of `generator` (greedy: none).

        The distribution is built in float64 and inverted at one uniform number, so a seed gives the
        same text whatever the vocabulary's size or the device.
        """
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.double()
        # Subtracting the maximum first keeps a tiny temperature from overflowing: the best token
        # stays at 0.
        logits = (logits - logits.max()) / self.temperature
        if 0 < self.top_k < logits.numel():
            # Ties with the k-th token stay in, so the choice does not depend on their order.
            logits = logits.masked_fill(logits < logits.topk(self.top_k).values[-1], -math.inf)
        probability = logits.softmax(-1)
        uniform = torch.rand((), generator=generator, dtype=torch.float64, device="cpu")
        return self._invert(probability, uniform, LIKELIEST)

    def _invert(self, probability: Tensor, uniform: Tensor, count: int) -> int:
        """Return the token at `uniform` of the distribution, likeliest first.

        Sorting a large vocabulary takes longer than all the rest, so the `count` likeliest are
        sorted first, and all only where those do not settle it.
        """
        part = count < probability.numel()
        ranked, token = _rank(probability, count) if part else _rank(probability)
        mass = ranked.cumsum(-1)
        if self.top_p < 1:
            if part and mass[-1] < self.top_p:
                return self._invert(probability, uniform, probability.numel())
            # The likeliest token always stays; the one that crosses top_p is the last to stay.
            mass = mass[: int((mass < self.top_p).sum()) + 1]
            at = uniform * mass[-1]
        else:
            at = uniform * (probability.sum() if part else mass[-1])
            if part and at >= mass[-1]:
                return self._invert(probability, uniform, probability.numel())
        index = int(torch.searchsorted(mass, at, right=True))
        return int(token[min(index, int((ranked[: mass.numel()] > 0).sum()) - 1)])


def _rank(probability: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the `count` largest of `probability` (None: all; more where some are equal to the
    last) and their places: in descending order, equal ones by place."""
    if count is None:
        return probability.sort(descending=True, stable=True)
    least = probability.topk(count, sorted=False).values.min()
    # (what top_k has forbidden is 0)
    place = ((probability >= least) & (probability > 0)).nonzero().squeeze(-1)
    ranked, order = probability[place].sort(descending=True, stable=True)
    return ranked, place[order]


def require_number(name: str, value: Any, rule: str, holds: Callable[[float], bool]) -> None:
    """Raise UserError, which states `rule`, unless `value` is a finite number that `holds`."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or not holds(value)
    ):
        raise UserError(f"{name} is {value!r} (sampling): it must be {rule}")


def require_int(name: str, value: Any, rule: str, holds: Callable[[int], bool]) -> None:
    """Raise UserError, which states `rule`, unless `value` is a whole number that `holds`."""
    if isinstance(value, bool) or not isinstance(value, int) or not holds(value):
        raise UserError(f"{name} is {value!r} (sampling): it must be {rule}")


class TextStream:
    """Turns tokens into text as they come, and shows only what no later token can change.

    A token may hold half a character, so tokens cannot be decoded one by one; decoding everything
    again each time would need all of it. Only the end of a text can change: an unfinished UTF-8
    character decodes to at most three U+FFFD at the very end. So a window of the last tokens is
    decoded, and all but those is final. The pieces joined, with `finish()`, equal one decode of all
    tokens (byte-level tokenizers: exactly, also for bytes that are no UTF-8).
    """

    # An unfinished character spans at most 3 bytes and each token has at least one; the 3 U+FFFD
    # held back may be whole invalid sequences of 3 bytes each. 16 tokens are more than enough.
    WINDOW = 16

    def __init__(self, tokenizer: Any, window: Iterable[int] = (), shown: int = 0) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)
        self.window = list(window)  # the last tokens
        self.shown = shown  # how many characters of the window's text are already out

    def _decode(self) -> tuple[str, int]:
        """Return the window's text, and how many of its first characters are final."""
        text = self.tokenizer.decode(self.window, clean_up_tokenization_spaces=False)
        return text, len(text) - min(len(text) - len(text.rstrip("\ufffd")), 3)

    def peek(self) -> str:
        """Return the window's text, shown or not."""
        return self._decode()[0]

    def push(self, token: int) -> str:
        """Return the text that `token` makes final, "" for special tokens."""
        if token in self.special:
            return ""
        self.window.append(token)
        text, final = self._decode()
        piece = text[self.shown : final]
        self.shown = max(self.shown, final)
        if len(self.window) > 2 * self.WINDOW:
            hidden = len(text) - self.shown
            self.window = self.window[-self.WINDOW :]
            self.shown = len(self._decode()[0]) - hidden
        return piece

    def skip(self, tokens: Sequence[int]) -> None:
        """Start after `tokens` (a prompt): they are context, and their text is not shown again."""
        self.window = [token for token in tokens if token not in self.special][-self.WINDOW :]
        self.shown = self._decode()[1]

    def finish(self) -> str:
        """Return the text held back, as it is: an unfinished character becomes U+FFFD."""
        text, _ = self._decode()
        piece = text[self.shown :]
        self.shown = len(text)
        return piece


class StopFilter:
    """Lets text through up to the first of some stop strings, however the text is cut into pieces.

    Attributes:
        stops: the stop strings.
        tail: the text held back: the longest end that can still become a stop string.
        stop: the stop string that ended the text, or None.
    """

    def __init__(self, stops: Sequence[str], tail: str = "") -> None:
        self.stops = tuple(stops)
        self.tail = tail
        self.stop: str | None = None

    def push(self, piece: str) -> str:
        """Return the text that is free to go; nothing after `stop` is set."""
        text = self.tail + piece
        # The stop string that is complete first wins (of two that end together the longer): so the
        # answer does not depend on how the text was cut.
        ends = [(at + len(stop), at, stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.stop = min(ends)
            self.tail = ""
            return text[:at]
        length = max(
            (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        free = len(text) - length
        self.tail = text[free:]
        return text[:free]

    def finish(self) -> str:
        """Return the text held back, when nothing more comes."""
        tail, self.tail = self.tail, ""
        return tail


def check_stops(stop: Sequence[str] | str) -> tuple[str, ...]:
    """Return the stop strings as a tuple.

    Raises:
        UserError: one is empty or too long, or there are too many.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise UserError(f"{len(stops)} stop strings (stop): give at most {MAX_STOPS}")
    for index, text in enumerate(stops):
        if not isinstance(text, str) or not text:
            raise UserError(f"stop string {index} is {text!r} (stop): give at least one character")
        if len(text) > MAX_STOP_LENGTH:
            size = f"{len(text)} characters"
            raise UserError(
                f"stop string {index} has {size} (stop): give at most {MAX_STOP_LENGTH}"
            )
    return stops
