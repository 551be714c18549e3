"""Documents and padding inside rows, and chunk grids that start at position 0 of each document.

All operators cut time into chunks. The chunks are counted per *document* and not per row: a padded,
packed or continued row must give the numbers of each document alone. So tokens are moved to a grid
in which every chunk holds one document; different documents cannot mix, not even through a NaN.

`Documents` is built once per forward pass and handed to all layers. What methods derive from the
positions (the tokens, their documents, their places in a grid) is computed on the CPU, so that no
layer waits for a device, and only when a method asks for it. Compiled code and recorded graphs use
the positions themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops.tracing import readable


class Tokens(NamedTuple):
    """The n tokens that are not padding, in row order, and their documents; on the CPU.

    Attributes:
        token: [n], index among the B*T tokens.
        row: [n], their row.
        position: [n], their position inside their document.
        document: [n], the number of their document, 0 ... documents - 1.
        head: [documents], the index, among the n tokens, of the first token of each document.
        last: [B], the index, among the n tokens, of the last token of each row; -1 for a row
            without tokens.
    """

    token: Tensor
    row: Tensor
    position: Tensor
    document: Tensor
    head: Tensor
    last: Tensor

    @property
    def length(self) -> Tensor:
        """The number of tokens of each document in this call: [documents]."""
        return torch.diff(self.head, append=self.head.new_tensor([len(self.token)]))

    def each(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (head, indices of its tokens among the B*T) for every document."""
        ends = [*self.head.tolist()[1:], len(self.token)]
        for head, end in zip(self.head.tolist(), ends, strict=False):  # of no document: no end
            yield head, self.token[head:end]

    @property
    def goes_on(self) -> Tensor:
        """Which documents continue a state, as they do not start at position 0: [documents]."""
        return self.position[self.head] != 0


class Documents:
    """The documents and the padding of rows [B, T].

    Args:
        positions: [B, T] int64 on the inputs' device, see `spectral_window.ops`.
        host: the same tensor on the CPU, if there is one; else it is copied when first needed.
        checked: the caller guarantees that the positions continue the states they are used with.

    Example:
        Two documents in one row, and a row with padding on the left:

        >>> documents = Documents(torch.tensor([[0, 1, 2, 0, 1], [-1, -1, 0, 1, 2]]))
        >>> documents.tokens.length
        tensor([3, 2, 3])
    """

    def __init__(self, positions: Tensor, host: Tensor | None = None, *, checked: bool = False):
        self.positions = positions
        self.host = positions if host is None and positions.device.type == "cpu" else host
        self.checked = checked
        self._tokens: Tokens | None = None
        self._plans: dict[Hashable, Any] = {}

    @property
    def shape(self) -> torch.Size:
        """(B, T)."""
        return self.positions.shape

    @property
    def tokens(self) -> Tokens:
        """The tokens, computed once. Waits for the device if the positions are not on the CPU."""
        if self._tokens is None:
            if self.host is None:
                self.host = self.positions.cpu()
            self._tokens = read_tokens(self.host)
        return self._tokens

    def plan(self, key: Hashable, make: Callable[[Tokens], Any]) -> Any:
        """Return `make(tokens)`, computed once for each `key`.

        `make` returns a NamedTuple of numbers and of tensors on the CPU; the tensors are moved to
        the positions' device.
        """
        if key not in self._plans:
            plan = make(self.tokens)
            home = self.positions.device
            moved = (x.to(home) if isinstance(x, Tensor) else x for x in plan)
            self._plans[key] = type(plan)(*moved)
        return self._plans[key]

    def check(self, continued: Tensor | None, *, wait: bool = False) -> None:
        """Check that every position starts a document or follows the position before it.

        Args:
            continued: [B], the position at which the state of a row continues; the first document
                of the row may start there instead of at 0. None if there is no state; an entry of
                -1 allows any position, for a state that does not store it.
            wait: also check positions on a device, and wait for it.

        Raises:
            UserError: a position that does neither; the message has its row and column.
        """
        if self.checked or not readable(self.positions) or (self.host is None and not wait):
            return
        check_counting(self.tokens, self.shape[1], continued)

    def columns(self, part: slice) -> Documents:
        """Return the documents of some columns; of all columns, this object itself."""
        if not part.start and part.stop is None:
            return self
        host = None if self.host is None else self.host[:, part]
        return Documents(self.positions[:, part], host, checked=self.checked)

    def rows(self, fn: Callable[[Tensor], Tensor]) -> Documents:
        """Return the documents after `fn` selected, repeated or moved rows."""
        return Documents(fn(self.positions), checked=self.checked)

    def to(self, device: Any, non_blocking: bool = False, **_: Any) -> Documents:
        """Move to another device: some libraries move a layer's inputs to the layer's device."""
        if torch.device(device) == self.positions.device:
            return self
        moved = self.positions.to(device, non_blocking=non_blocking)
        return Documents(moved, self.host, checked=self.checked)


def read_tokens(positions: Tensor) -> Tokens:
    """Return the tokens of `positions` [B, T] on the CPU."""
    rows, time = positions.shape
    flat = positions.reshape(-1)
    token = torch.nonzero(flat >= 0).squeeze(1)
    position = flat[token]
    row = token // max(time, 1)
    begins = position == 0
    begins[:1] = True
    begins[1:] |= row[1:] != row[:-1]
    last = torch.full((rows,), -1, dtype=torch.int64, device="cpu")
    last.scatter_reduce_(
        0, row, torch.arange(len(token), dtype=torch.int64, device="cpu"), reduce="amax"
    )
    head = torch.nonzero(begins).squeeze(1)
    return Tokens(token, row, position, begins.cumsum(0) - 1, head, last)


def check_counting(tokens: Tokens, time: int, continued: Tensor | None) -> None:
    """Check the positions of rows of `time` columns; see `Documents.check`."""
    position, row = tokens.position, tokens.row
    before = torch.full_like(position, -1)
    before[1:] = position[:-1]
    row_begins = torch.ones_like(row, dtype=torch.bool, device="cpu")
    row_begins[1:] = row[1:] != row[:-1]
    follows = position == before + 1
    if continued is not None:
        goes_on = continued.to(position.device)[row]
        follows = torch.where(row_begins, (position == goes_on) | (goes_on < 0), follows)
    else:
        follows = follows & ~row_begins
    wrong = ~(follows | (position == 0))
    if wrong.any():
        at = int(wrong.nonzero()[0, 0])
        b, t = divmod(int(tokens.token[at]), time)
        raise UserError(
            f"position {int(position[at])} at row {b}, column {t} (positions): a document counts "
            "0, 1, 2, ... or goes on where its state stopped; mark padding with -1"
        )


def anywhere(batch: int) -> Tensor:
    """Return `continued` for states that do not store their position: [B], all -1."""
    return torch.full((batch,), -1, dtype=torch.int64, device="cpu")


def chunk_grid(document: Tensor, coordinate: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cut documents into chunks of `size` tokens, at coordinates that are multiples of `size`.

    Args:
        document: [n] int64, the document of each token; each of 0 ... documents - 1 occurs.
        coordinate: [n] int64.
        size: tokens per chunk.

    Returns:
        slot [n]: token i is at place slot % size of chunk slot // size. first [G] bool: whether a
        chunk is the first of its document.
    """
    documents = int(document.max()) + 1 if len(document) else 0
    chunk = coordinate // size
    bounds = torch.zeros(2, documents, dtype=torch.int64, device="cpu")
    low = bounds[0].scatter_reduce(0, document, chunk, reduce="amin", include_self=False)
    high = bounds[1].scatter_reduce(0, document, chunk, reduce="amax", include_self=False)
    count = high - low + 1
    base = count.cumsum(0) - count
    first = torch.zeros(int(count.sum()), dtype=torch.bool, device="cpu")
    first[base] = True
    slot = (base[document] + chunk - low[document]) * size + coordinate % size
    return slot, first


def split_finite(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split x into its finite values and the others (without a gradient), zeros elsewhere.

    In a product with the first part, a weight of zero cannot pass a NaN on.
    """
    finite = torch.where(torch.isfinite(x), x, 0.0)
    return finite, (x - finite).detach()


def each_document(
    run: Callable[..., tuple[Tensor, Tensor]],
    inputs: list[Tensor],
    state: Tensor,
    documents: Documents,
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """Apply `run(*inputs, state)` to every document separately, in a loop: for slow methods.

    Args:
        run: takes one row of the inputs and of the state, and returns (out [1, n, ...],
            state [1, ...]).
        inputs: tensors [B, T, ...].
        state: [B, ...].
        documents: documents and padding.
        like: has the shape and dtype of the whole output.

    Returns:
        out (0 at padding), and the states after the last token of each row.
    """
    tokens = documents.tokens
    flat = [x.flatten(0, 1) for x in inputs]
    whole, final = torch.zeros_like(like).flatten(0, 1), list(state.unbind(0))
    for head, place in tokens.each():
        row, home = int(tokens.row[head]), place.to(state.device)
        fresh = int(tokens.position[head]) == 0
        before = torch.zeros_like(state[:1]) if fresh else final[row][None]
        out, end = run(*(x[home][None] for x in flat), before)
        whole = whole.index_copy(0, home, out[0])
        final[row] = end[0]
    return whole.view(like.shape), torch.stack(final)


def positions_from_cu_seqlens(
    cu_seqlens: Tensor, batch: int, time: int, begin: Tensor | None = None
) -> Tensor:
    """Return `positions` [B, T] of documents that are cut at `cu_seqlens`.

    Args:
        cu_seqlens: offsets into the B*T tokens; every row also starts a document.
        batch: B.
        time: T.
        begin: [B], the position of the first token of each row, for rows that continue a state;
            None for 0.

    Raises:
        UserTypeError: a dtype that is not int32 or int64.
        UserError: offsets that do not rise from 0 to B*T.

    Example:
        >>> positions_from_cu_seqlens(torch.tensor([0, 2, 5]), batch=1, time=5)
        tensor([[0, 1, 0, 1, 2]])
    """
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise UserTypeError(f"cu_seqlens is {cu_seqlens.dtype}: pass int32 or int64")
    cuts = cu_seqlens.to(torch.int64)
    total = batch * time
    sound = cuts.dim() == 1 and cuts.shape[0] > 0
    if sound and readable(cuts):
        ends = int(cuts[0]) == 0 and int(cuts[-1]) == total
        sound = ends and not bool((cuts[1:] < cuts[:-1]).any())
    if not sound:
        shown = cuts.flatten()[:8].tolist() if readable(cuts) else list(cuts.shape)
        raise UserError(
            f"cu_seqlens {shown}... : must begin at 0, never fall, and end at {total}, all tokens"
        )
    index = torch.arange(total, dtype=torch.int64, device=cuts.device)
    heads = torch.zeros(total + 1, dtype=torch.int64, device=cuts.device)
    heads = heads.index_copy(0, cuts, cuts)
    row_begins = index // max(time, 1) * time
    heads = torch.maximum(heads[:total], row_begins)
    head = heads.cummax(0).values
    positions = (index - head).view(batch, time)
    if begin is not None and time:
        in_first = head.view(batch, time) == index.view(batch, time)[:, :1]
        positions = torch.where(
            in_first, positions + begin.to(positions.device)[:, None], positions
        )
    return positions


def given_documents(
    positions: Tensor | Documents | None,
    cu_seqlens: Tensor | None,
    x: Tensor,
    begin: Tensor | None = None,
) -> Documents | None:
    """Return the documents that `positions` or `cu_seqlens` describe.

    Args:
        positions: [B, T], or documents.
        cu_seqlens: offsets.
        x: the input [B, T, ...].
        begin: as in `positions_from_cu_seqlens`.

    Returns:
        The documents; None if neither is given, so that each row continues its state.

    Raises:
        UserError: a wrong shape or device, or descriptions that disagree.
        UserTypeError: a wrong dtype.
    """
    if positions is None and cu_seqlens is None:
        return None
    batch, time = x.shape[:2]
    tensor = positions.positions if isinstance(positions, Documents) else positions
    for name, value in (("positions", tensor), ("cu_seqlens", cu_seqlens)):
        if value is not None and value.device != x.device:
            raise UserError(f"{name} is on {value.device}, the input on {x.device}: move it there")
    if tensor is None:
        assert cu_seqlens is not None
        return Documents(positions_from_cu_seqlens(cu_seqlens, batch, time, begin))
    if tensor.dtype not in (torch.int32, torch.int64):
        raise UserTypeError(f"positions are {tensor.dtype}: pass int64")
    if tensor.shape != (batch, time):
        raise UserError(
            f"positions are {tuple(tensor.shape)}: expected {(batch, time)}, like the input"
        )
    if isinstance(positions, Documents):
        documents = positions
    else:
        documents = Documents(tensor.to(torch.int64))
    if cu_seqlens is not None:
        expected = positions_from_cu_seqlens(cu_seqlens, batch, time, begin)
        if readable(tensor, expected) and not torch.equal(documents.positions, expected):
            raise UserError("positions and cu_seqlens disagree: pass one of them")
    return documents


def documents_after(
    state: Tensor | None,
    positions: Tensor | Documents | None,
    cu_seqlens: Tensor | None,
    u: Tensor,
) -> Documents | None:
    """Return the documents of u after a state that does not store its position.

    A document that starts at a position other than 0 continues the state.
    """
    begin = None
    if cu_seqlens is not None and state is not None:
        begin = torch.ones(u.shape[0], dtype=torch.int64, device=u.device)
    documents = given_documents(positions, cu_seqlens, u, begin)
    if documents is not None and (state is None or u.shape[1] > 1):
        documents.check(None if state is None else anywhere(u.shape[0]))
    return documents
