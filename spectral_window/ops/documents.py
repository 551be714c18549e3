"""Where documents begin, and how they are cut into chunks from their own position 0.

Both branches cut time into chunks. The chunks belong to a *document*, never to the tensor: a
padded, packed or continued row must give the numbers of each document alone. So tokens are moved
to a grid in which every chunk holds one document only; what lies between documents cannot mix, not
even a NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spectral_window.errors import UserError, UserTypeError
from spectral_window.ops.dispatch import readable


class Documents(NamedTuple):
    """The n tokens that are not padding, in row order, and the documents they form.

    token:    [n] index into the B*T tokens.
    row:      [n] their row.
    position: [n] their position inside their document.
    document: [n] which document, 0 ... documents - 1.
    head:     [documents] the index, among the n tokens, of each document's first token.
    last:     [B] the index, among the n tokens, of each row's last token; -1 for a row without
              tokens.
    """

    token: Tensor
    row: Tensor
    position: Tensor
    document: Tensor
    head: Tensor
    last: Tensor


def find_documents(positions: Tensor, continued: Tensor | None = None) -> Documents:
    """Read `positions` [B, T] (see `spectral_window.ops`).

    continued: [B] the position at which a row's state goes on; a row's first document may begin
               there instead of at 0 (None: no state is given; an entry of -1: any position, the
               state does not know).
    Raises ValueError, naming row and column, where positions neither begin a document nor count on.
    """
    rows = positions.shape[0]
    flat = positions.reshape(-1)
    token = torch.nonzero(flat >= 0).squeeze(1)
    position = flat[token]
    row = token // max(positions.shape[1], 1)
    before = torch.full_like(position, -1)
    before[1:] = position[:-1]
    row_begins = torch.ones_like(row, dtype=torch.bool)
    row_begins[1:] = row[1:] != row[:-1]
    begins = row_begins | (position == 0)
    follows = position == before + 1
    if continued is not None:
        goes_on = continued.to(position.device)[row]
        follows = torch.where(row_begins, (position == goes_on) | (goes_on < 0), follows)
    else:
        follows = follows & ~row_begins
    wrong = ~(follows | (position == 0))
    if wrong.any():
        where = int(token[wrong.nonzero()[0, 0]])
        b, t = divmod(where, positions.shape[1])
        raise UserError(
            f"position {int(flat[where])} at row {b}, column {t} (positions): a document counts "
            "0, 1, 2, ... or goes on where its state stopped; mark padding with -1"
        )
    document = begins.cumsum(0) - 1
    last = torch.full((rows,), -1, dtype=torch.int64, device=positions.device)
    index = torch.arange(len(token), dtype=torch.int64, device=row.device)
    last.scatter_reduce_(0, row, index, reduce="amax")
    return Documents(token, row, position, document, torch.nonzero(begins).squeeze(1), last)


def anywhere(positions: Tensor) -> Tensor:
    """`continued` of a state that does not know its position: [B], of -1."""
    return torch.full((positions.shape[0],), -1, dtype=torch.int64, device=positions.device)


def chunk_grid(document: Tensor, coordinate: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cut documents into chunks of `size` at multiples of `size` of each token's `coordinate`.

    document, coordinate: [n] int64, each document 0 ... documents - 1 present.
    Returns (slot [n], first [G] bool): token i lies at place slot % size of chunk slot // size; a
    chunk is `first` where nothing of its document lies before it.
    """
    documents = int(document.max()) + 1 if len(document) else 0
    chunk = coordinate // size
    bounds = torch.zeros(2, documents, dtype=torch.int64, device=document.device)
    low = bounds[0].scatter_reduce(0, document, chunk, reduce="amin", include_self=False)
    high = bounds[1].scatter_reduce(0, document, chunk, reduce="amax", include_self=False)
    count = high - low + 1
    base = count.cumsum(0) - count
    total = int(count.sum())
    first = torch.zeros(total, dtype=torch.bool, device=document.device)
    first[base] = True
    slot = (base[document] + chunk - low[document]) * size + coordinate % size
    return slot, first


def split_finite(x: Tensor) -> tuple[Tensor, Tensor]:
    """x with zeros for what is not finite, and what is not finite with zeros for the rest (without
    a gradient): a product of the first lets no NaN through a weight of zero."""
    finite = torch.where(torch.isfinite(x), x, 0.0)
    return finite, (x - finite).detach()


def positions_from_cu_seqlens(
    cu_seqlens: Tensor, batch: int, time: int, begin: Tensor | None = None
) -> Tensor:
    """`positions` [B, T] of documents cut at `cu_seqlens`, offsets into the B*T tokens (a row
    always begins one).

    begin: [B] position of each row's first token, where the row continues from a state (None: 0).
    Raises TypeError for a dtype that is not int32 or int64, ValueError for anything but 0 <= ...
    <= B*T, rising, ending at B*T.
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


def given_positions(
    positions: Tensor | None, cu_seqlens: Tensor | None, x: Tensor, begin: Tensor | None = None
) -> Tensor | None:
    """`positions` checked against x [B, T, ...], or those that `cu_seqlens` means; None where
    neither is given."""
    batch, time = x.shape[:2]
    for name, value in (("positions", positions), ("cu_seqlens", cu_seqlens)):
        if value is not None and value.device != x.device:
            raise UserError(f"{name} is on {value.device}, the input on {x.device}: move it there")
    if positions is None:
        return (
            None
            if cu_seqlens is None
            else positions_from_cu_seqlens(cu_seqlens, batch, time, begin)
        )
    if positions.dtype not in (torch.int32, torch.int64):
        raise UserTypeError(f"positions are {positions.dtype}: pass int64")
    if positions.shape != (batch, time):
        raise UserError(
            f"positions are {tuple(positions.shape)}: expected {(batch, time)}, like the input"
        )
    positions = positions.to(torch.int64)
    if cu_seqlens is None:
        return positions
    meant = positions_from_cu_seqlens(cu_seqlens, batch, time, begin)
    if readable(positions, meant) and not torch.equal(positions, meant):
        raise UserError("positions and cu_seqlens disagree: pass one of them")
    return positions
