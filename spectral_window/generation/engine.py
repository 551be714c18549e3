"""Token ids in, token ids out, for any number of rows. No text, no files.

A `Row` is one sequence. Its tokens are either in its state or unread; after a step all are in the
state, and the row has logits for its next token. An `Engine` runs rows through a model, in any
combination and at any ages:

    engine = Engine(model)
    rows = [engine.add(ids, Sampling(temperature=0), seed=7) for ids in prompts]
    for row in rows:
        while engine.prefill(row):  # one segment; other rows may step in between
            pass
    while rows:
        engine.step(rows)  # one forward for all
        for row, token in zip(rows, engine.sample(rows)):
            engine.extend(row, [token])
        for row in [row for row in rows if row.tokens_seen >= limit]:
            engine.drop(row)
            rows.remove(row)

Rows do not see each other. A state has the batch as the first dimension of every tensor, and a
row's numbers depend on that row alone. A batched product may round differently from that of one
row, so logits agree within 2e-6 and not in every bit.

States are values. A forward makes new ones and changes none, so a copy of a row shares its state,
and after any exception (Ctrl-C, out of memory) all rows are as they were before the call.

Rows that ran together stay together. Their states are one `Batch`, and a row is an index in it.
States are selected and concatenated only when another set of rows runs. States of constant size are
batched at any ages, after a row's first token. A state that grows (the Transformer baseline) has
the length of its row, so rows of the same age run together, and each age is a forward.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectral_window.errors import DivergedError, UserError
from spectral_window.generation.decoding import Sampling, require_int
from spectral_window.hf.cache import Cache, SWHCacheLayer, state_identity
from spectral_window.nn.mixers import map_state
from spectral_window.ops.cuda_graphs import Recorder, Replayed


@dataclass(frozen=True, eq=False)
class Batch:
    """The states of rows that ran together.

    Attributes:
        layers: the state of each layer's mixer, B rows in every tensor; None before the first
            token.
        size: B.
        dtype: that of the hidden states that made them.
        device: theirs.
    """

    layers: tuple[Any, ...]
    size: int
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def select(self, indices: Sequence[int]) -> Batch:
        """Return the states of the rows `indices`; this batch itself for all of them in order."""
        if list(indices) == list(range(self.size)):
            return self
        index = torch.tensor(indices, dtype=torch.int64, device=self.device)
        layers = tuple(
            map_state(state, lambda t: t.index_select(0, index.to(t.device)))
            for state in self.layers
        )
        return Batch(layers, len(indices), self.dtype, self.device)


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Join the rows of all `batches`, whose states have equal shapes, one after another."""
    if len(batches) == 1:
        return batches[0]

    def join(*states: Any) -> Any:
        if states[0] is None:
            return None
        if isinstance(states[0], Tensor):
            return torch.cat(states)
        return type(states[0])(*map(join, *states))

    layers = tuple(map(join, *(batch.layers for batch in batches)))
    first = batches[0]
    return Batch(layers, sum(batch.size for batch in batches), first.dtype, first.device)


@dataclass(eq=False)
class Row:
    """One sequence of an engine; made by `Engine.add`.

    Attributes:
        sampling: how its tokens are drawn.
        generator: its own random numbers.
        seed: what they started from.
        place: its state: a batch and the index in it.
        unread: its newest tokens, which the state has not seen; never changed in place.
        logits: [V] float32 on the CPU, after its newest token; None while tokens are unread.
        tokens_seen: the number of its tokens, the unread ones included.
        drawn: how often a token was drawn.
    """

    sampling: Sampling
    generator: torch.Generator
    seed: int
    place: tuple[Batch, int]
    unread: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    tokens_seen: int = 0
    drawn: int = 0

    @property
    def state_seen(self) -> int:
        """How many of its tokens the state has seen."""
        return self.tokens_seen - len(self.unread)

    @property
    def states(self) -> tuple[Any, ...]:
        """The state of each layer's mixer, batch 1."""
        batch, index = self.place
        return batch.select([index]).layers

    def reseed(self, seed: int | None) -> None:
        """Restart its random numbers from `seed`, 0 ... 2**63 - 1; None takes a fresh one.

        Raises:
            UserError: the seed is out of range.
        """
        if seed is None:
            seed = int.from_bytes(os.urandom(7), "big")
        require_int("seed", seed, "a whole number from 0 to 2**63 - 1", lambda n: 0 <= n < 2**63)
        self.generator.manual_seed(seed)
        self.seed = seed


class RowsDivergedError(DivergedError):
    """The logits of `rows` are not finite. The other rows can go on without them.

    Attributes:
        rows: those rows.
    """

    def __init__(self, rows: Sequence[Row]):
        row, several = rows[0], f", {len(rows)} rows" if len(rows) > 1 else ""
        super().__init__(
            f"non-finite logits at step {row.drawn} (after {row.tokens_seen} tokens{several}): "
            "numbers overflow in this model; use an earlier checkpoint, or load it in float32"
        )
        self.rows = list(rows)


class Engine:
    """Runs rows of token ids through one model.

    Args:
        model: a `SWHForCausalLM`; it is put into eval mode.
        vocab_size: how many ids may be drawn, where that is less than the model's vocabulary (a
            vocabulary rounded up has entries that mean nothing).
        recorder: what records a token's forward to replay it; None for CUDA graphs on a GPU, and
            nothing elsewhere.

    Attributes:
        rows: the rows that were added and not dropped.
    """

    def __init__(
        self, model: Any, vocab_size: int | None = None, recorder: Recorder | None = None
    ) -> None:
        self.model = model.eval()
        self.input_vocab_size = int(model.config.vocab_size)
        self.vocab_size = self.input_vocab_size if vocab_size is None else vocab_size
        self.rows: set[Row] = set()
        self._segment = int(model.segment)
        self._constant_state = bool(model.constant_state)
        # The cache that the model is called with. It holds states during a forward only.
        self._identity = state_identity(model.config)
        self._layers = [SWHCacheLayer() for _ in model.model.layers]
        self._cache = Cache(layers=list(self._layers))
        self._nothing_read = Batch((None,) * len(self._layers), 1)
        self._tokens: Replayed | None = None
        if self._constant_state and (recorder is not None or model.device.type == "cuda"):
            self._tokens = Replayed(self._next_token, model.device, recorder=recorder)
            self._like: tuple[Any, ...] = ()  # states of the kind that is run

    # -- rows

    def add(
        self,
        ids: Sequence[int] = (),
        sampling: Sampling = Sampling(),  # noqa: B008 (a value)
        *,
        seed: int | None = None,
    ) -> Row:
        """Add a row of the tokens `ids`, all unread.

        Args:
            ids: token ids, possibly none.
            sampling: how its tokens are drawn.
            seed: as for `Row.reseed`.

        Raises:
            UserError: an id is outside the vocabulary, or the seed or top_k out of range.
        """
        sampling.check_vocabulary(self.input_vocab_size)
        row = Row(sampling, torch.Generator("cpu"), 0, (self._nothing_read, 0))
        row.reseed(seed)
        self.rows.add(row)
        try:
            if len(ids):
                self.extend(row, ids)
        except BaseException:
            self.rows.discard(row)
            raise
        return row

    def extend(self, row: Row, ids: Sequence[int]) -> None:
        """Append `ids` to a row, unread: a prompt, or the token that was drawn for it.

        Raises:
            UserError: there are no ids, or one is outside the model's vocabulary.
        """
        self._check_rows([row])
        ids = list(ids)
        if not ids:
            raise UserError("the prompt is empty (prompt): give at least one token")
        for index, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int):
                raise UserError(f"token {index} is {token!r} (prompt): token ids are whole numbers")
            if not 0 <= token < self.input_vocab_size:
                raise UserError(
                    f"token {index} is {token} (prompt): "
                    f"ids go from 0 to {self.input_vocab_size - 1}"
                )
        with self.all_or_nothing([row]):
            row.unread = row.unread + ids
            row.tokens_seen += len(ids)
            row.logits = None

    def copy(self, row: Row, sampling: Sampling | None = None, *, seed: int | None = None) -> Row:
        """Add a row with the tokens and the state of `row`, independent of it from here on.

        The state is shared and not copied, so a prefix that many requests have in common is read
        once. Sampling and random numbers are those of `row`, unless others are given.
        """
        self._check_rows([row])
        if sampling is not None:
            sampling.check_vocabulary(self.input_vocab_size)
        twin = Row(**vars(row))
        twin.sampling = sampling or row.sampling
        twin.generator = torch.Generator("cpu")
        twin.generator.set_state(row.generator.get_state())
        if seed is not None:
            twin.reseed(seed)
        self.rows.add(twin)
        return twin

    def adopt(self, row: Row) -> None:
        """Add a row as it is that was made by another engine of this model, and is dropped there.

        Its state stays shared with whoever holds it. From here on only this engine may run it.
        """
        row.sampling.check_vocabulary(self.input_vocab_size)
        self.rows.add(row)

    def drop(self, row: Row) -> None:
        """Forget a row. The memory of its state is free when the rows that it ran with step again.

        Raises:
            UserError: the row is not of this engine.
        """
        self._check_rows([row])
        self.rows.remove(row)

    def restore(self, row: Row, states: Sequence[Any], seen: int) -> None:
        """Replace a row's tokens and state by those of another row of this model or an equal one.

        Args:
            row: the row to change.
            states: `Row.states` of the other.
            seen: how many tokens those states have seen.
        """
        self._check_rows([row])
        with self.all_or_nothing([row]):
            row.place = Batch(tuple(states), 1, self.model.dtype, self.model.device), 0
            row.unread, row.tokens_seen, row.logits = [], seen, None

    # -- the model

    def prefill(self, row: Row, segment: int | None = None) -> bool:
        """Read one segment of a row's unread tokens, at most up to the newest, which `step` reads.

        A scheduler calls this between the steps of other rows.

        Args:
            row: the row.
            segment: at most so many tokens; None for the model's own number.

        Returns:
            Whether more are left to read.
        """
        self._check_rows([row])
        if segment is not None:
            require_int("segment", segment, "a number of tokens >= 1", lambda n: n >= 1)
        count = min(self._segment if segment is None else segment, len(row.unread) - 1)
        if count > 0:
            with self.all_or_nothing([row]):
                self._forward([row], count)
        return len(row.unread) > 1

    def step(self, rows: Iterable[Row]) -> None:
        """Read the newest token of each row, so that all have logits. Rows that have logits already
        stay as they are.

        This is one forward for all rows; where states grow, one for each age.

        Raises:
            UserError: a row has more than one unread token.
        """
        ready: dict[Hashable, list[Row]] = {}
        for row in self._check_rows(rows):
            if len(row.unread) > 1:
                raise UserError(f"{len(row.unread)} tokens are unread (step): call prefill before")
            if row.unread:
                seen = row.state_seen
                ready.setdefault(bool(seen) if self._constant_state else seen, []).append(row)
        with self.all_or_nothing(row for group in ready.values() for row in group):
            for group in ready.values():
                self._forward(group, 1)

    def sample(self, rows: Iterable[Row]) -> list[int]:
        """Draw the next token of each row, by its own sampling and random numbers.

        The tokens are not appended: that is for `extend`, and until then each row has its logits.

        Raises:
            UserError: a row has no logits.
            RowsDivergedError: logits are not finite; then nothing is drawn.
        """
        rows = self._check_rows(rows)
        outputs = [row.logits for row in rows if row.logits is not None]
        if len(outputs) < len(rows):
            raise UserError("a row has no logits (sample): call step before")
        # -inf alone is a model's way to forbid a token; NaN, +inf or nothing left to choose is an
        # accident.
        diverged = [
            row
            for row, logits in zip(rows, outputs, strict=True)
            if bool(logits.isnan().any()) or not math.isfinite(float(logits.max()))
        ]
        if diverged:
            raise RowsDivergedError(diverged)
        generators = [row.generator.get_state() for row in rows]
        try:
            tokens = [
                row.sampling.draw(logits, row.generator)
                for row, logits in zip(rows, outputs, strict=True)
            ]
        except BaseException:
            for row, state in zip(rows, generators, strict=True):
                row.generator.set_state(state)
            raise
        for row in rows:
            row.drawn += 1
        return tokens

    @contextmanager
    def all_or_nothing(self, rows: Iterable[Row]) -> Iterator[None]:
        """Restore `rows` after an exception: tokens, states, logits (not their generators).

        States are values, so a copy of them costs nothing.
        """
        before = [(row, vars(row).copy()) for row in rows]
        try:
            yield
        except BaseException:
            for row, fields in before:
                vars(row).update(fields)
            raise

    def _check_rows(self, rows: Iterable[Row]) -> list[Row]:
        rows = list(rows)
        if not self.rows.issuperset(rows):
            raise UserError("a row is not of this engine, or was dropped (rows): add it")
        if len(set(rows)) < len(rows):
            raise UserError("a row is given twice (rows): pass each once")
        return rows

    def _forward(self, rows: list[Row], count: int) -> None:
        """Run the next `count` unread tokens of `rows`, whose states have equal shapes."""
        parts = by_batch(rows)
        rows = [row for part in parts.values() for row in part]
        unread = [row.unread[:count] for row in rows]
        ids = torch.tensor(unread, dtype=torch.int64, device=self.model.device)
        with torch.inference_mode():
            batch = concatenate(
                [batch.select([row.place[1] for row in part]) for batch, part in parts.items()]
            )
            output, batch = self._run(ids, batch, [row.state_seen for row in rows])
            logits = None  # a prompt's, before its end, are of no use
            if len(rows[0].unread) == count:
                logits = output[:, -1, : self.vocab_size].float().cpu()
            self._release(parts, set(rows))
        for index, row in enumerate(rows):
            row.place = batch, index
            row.unread = row.unread[count:]
            row.logits = None if logits is None else logits[index]

    def _run(self, ids: Tensor, batch: Batch, seen: list[int]) -> tuple[Tensor, Batch]:
        """Return the logits [B, 1, V] after the last of `ids` [B, T], and the states there.

        Args:
            ids: the next tokens of the rows.
            batch: their states.
            seen: how many tokens each state has seen.
        """
        if self._tokens is not None and ids.shape[1] == 1 and batch.layers[0] is not None:
            return self._replay(self._tokens, ids, batch, seen)
        start = None
        if min(seen) < max(seen):
            start = torch.tensor(seen, dtype=torch.int64, device=batch.device)
        return self._call(ids, batch, max(seen), start)

    def _call(
        self, ids: Tensor, batch: Batch, seen: int, start: Tensor | None
    ) -> tuple[Tensor, Batch]:
        """`_run` as a call of the model. seen: the most tokens that a state has seen; start: of
        each row [B], None if all have seen as many."""
        try:
            for layer, state in zip(self._layers, batch.layers, strict=True):
                if state is None:
                    layer.reset()
                    continue
                layer.state, layer.seen, layer.start = state, seen, start
                layer.batch_size, layer.dtype, layer.device = batch.size, batch.dtype, batch.device
                layer.owner, layer.is_initialized = self._identity, True
            output = self.model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            first = self._layers[0]
            states = tuple(layer.state for layer in self._layers)
            return output.logits, Batch(states, len(ids), first.dtype, first.device)
        finally:
            for layer in self._layers:
                layer.state = None

    def _replay(
        self, tokens: Replayed, ids: Tensor, batch: Batch, seen: list[int]
    ) -> tuple[Tensor, Batch]:
        """`_run` for one token of each row, by a recording: its states are copied in and out."""
        self._like = batch.layers
        start = torch.tensor(seen, dtype=torch.int64, device="cpu")
        inputs = {"ids": ids, "start": start}
        inputs |= {f"state {i}": x for i, x in enumerate(_tensors(batch.layers))}
        logits, states = tokens(inputs)
        kept = [torch.empty_like(x) for x in states]
        torch._foreach_copy_(kept, states)
        layers = _with_tensors(batch.layers, kept)
        return logits.clone(), Batch(layers, batch.size, batch.dtype, batch.device)

    def _next_token(self, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return logits, and the tensors of the states, from inputs as `_replay` names them."""
        states = [x for name, x in inputs.items() if name.startswith("state")]
        layers = _with_tensors(self._like, states)
        ids = inputs["ids"]
        before = Batch(layers, len(ids), self.model.dtype, ids.device)
        # no mixer of constant size asks how many tokens were seen: its state knows
        logits, batch = self._call(ids, before, 1, inputs["start"])
        return logits, _tensors(batch.layers)

    def _release(self, batches: Container[Batch], running: set[Row]) -> None:
        """Move rows that were left behind in `batches` to a batch without the others: else a row
        that waits would keep the old states of those that ran in memory."""
        for batch, rows in by_batch(self.rows - running).items():
            if batch in batches and batch.size > 1:
                indices = sorted({row.place[1] for row in rows})  # copies share one
                rest = batch.select(indices)
                for row in rows:
                    row.place = rest, indices.index(row.place[1])
                    row.logits = None if row.logits is None else row.logits.clone()


def _tensors(layers: Iterable[Any]) -> list[Tensor]:
    """The tensors of states, in a fixed order."""
    found: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        found.append(x)
        return x

    for state in layers:
        map_state(state, note)
    return found


def _with_tensors(layers: Iterable[Any], tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """States like `layers` of other tensors, which `_tensors` would return."""
    each = iter(tensors)
    return tuple(map_state(state, lambda _: next(each)) for state in layers)


def by_batch(rows: Iterable[Row]) -> dict[Batch, list[Row]]:
    """Group `rows` by the batch of their states, each group in the order of the batch."""
    groups: dict[Batch, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.place[0], []).append(row)
    for group in groups.values():
        group.sort(key=lambda row: row.place[1])
    return groups
