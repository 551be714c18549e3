"""The delta-rule memory in chunks: linear time in plain torch, on any device, differentiable any
number of times.

Inside a chunk of C tokens everything that is written is the solution of one triangular system
(Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence Length").
With G_t the sum of -decay over the chunk's tokens up to t, S the state before the chunk, and
u_t = beta_t (v_t - a_t S_{t-1}^T k_t) what token t writes at its key:

    (I + A) U = diag(beta) (V - diag(e^G) K S),   A[t, s] = beta_t e^(G_t - G_s) k_t . k_s,  s < t
    out       = diag(e^G) Q S + P U,              P[t, s] = e^(G_t - G_s) q_t . k_s,         s <= t
    S after   = e^(G_C) S + sum_s e^(G_C - G_s) k_s u_s^T

The system, A and P need no state, so they are made for all chunks at once; only three products a
chunk remain in the loop, and the state is kept once a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spectral_window.ops.documents import Documents, find_documents

CHUNK = 64


def chunked(
    inputs: Sequence[Tensor],
    state: Tensor,
    positions: Tensor | None,
    known: bool,
) -> tuple[Tensor, Tensor]:
    """`delta_memory` for checked inputs: move tokens to chunks, compute, move back.

    inputs: q, k [B, T, H, K], v [B, T, H, V], beta [B, T, H, 1] and, where there is one, decay
            [B, T, H, 1], none of them empty; state [B, H, K, V] in the dtype to compute in,
            positions [B, T] or None.
    known:  the state is a caller's, so a row's first document may begin at any position.

    Returns out [B, T, H, V] and the final state [B, H, K, V], both in the state's dtype.
    """
    if positions is None:
        return _rows(inputs, state)
    rows = positions.shape[0]
    any_position = (
        torch.full((rows,), -1, dtype=torch.int64, device=state.device) if known else None
    )
    return _documents(inputs, state, find_documents(positions, any_position))


def _rows(inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Every row is one document that goes on from its state."""
    batch, heads = state.shape[:2]
    time = inputs[0].shape[1]
    size = min(CHUNK, time)
    chunks = -(-time // size)

    def grid(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, chunks * size - time)).to(state.dtype)
        x = x.view(batch, chunks, size, heads, -1).permute(1, 0, 3, 2, 4)
        return x.reshape(chunks * batch * heads, size, -1)

    out, final = _over_chunks([grid(x) for x in inputs], state.flatten(0, 1), [batch] * chunks)
    out = out.view(chunks, batch, heads, size, -1).permute(1, 0, 3, 2, 4)
    return out.reshape(batch, chunks * size, heads, -1)[:, :time], final.view(state.shape)


def _documents(inputs: Sequence[Tensor], state: Tensor, docs: Documents) -> tuple[Tensor, Tensor]:
    """The documents side by side, the longest first, so that the n-th chunks of all that have so
    many lie together."""
    value = inputs[2].to(state.dtype)
    if not len(docs.token):  # padding alone: zeros
        return value.masked_fill(torch.ones_like(value, dtype=torch.bool), 0.0), state
    heads = value.shape[2]
    ends = torch.cat((docs.head[1:], docs.head.new_tensor([len(docs.token)])))
    length = ends - docs.head
    size = min(CHUNK, int(length.max()))
    chunks = -(-length // size)
    order = chunks.argsort(descending=True)  # documents by rank
    rank = order.argsort()
    bounds = torch.arange(int(chunks.max()), dtype=torch.int64, device=chunks.device)
    count = (chunks > bounds[:, None]).sum(1)  # documents that have an n-th chunk
    begin = count.cumsum(0) - count
    place = (
        torch.arange(len(docs.token), dtype=torch.int64, device=rank.device)
        - docs.head[docs.document]
    )
    slot = (begin[place // size] + rank[docs.document]) * size + place % size
    counts = count.tolist()
    total = sum(counts)

    def grid(x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1).index_select(0, docs.token).to(state.dtype)
        places = tokens.new_zeros(total * size, heads, x.shape[3]).index_copy(0, slot, tokens)
        return places.view(total, size, heads, -1).transpose(1, 2).reshape(total * heads, size, -1)

    head = docs.head[order]
    goes_on = (docs.position[head] != 0)[:, None, None, None]
    before = torch.where(goes_on, state.index_select(0, docs.row[head]), 0.0)
    y, ended = _over_chunks([grid(x) for x in inputs], before.flatten(0, 1), counts)
    y = y.view(total, heads, size, -1).transpose(1, 2).flatten(0, 1).index_select(0, slot)
    out = torch.zeros_like(value).flatten(0, 1).index_copy(0, docs.token, y)

    # documents end in the order of their chunks, and of equally many by rank
    turn = chunks[order].argsort(stable=True).argsort()
    last = turn[rank[docs.document[docs.last.clamp(min=0)]]]
    final = ended.view(len(order), *state.shape[1:]).index_select(0, last)
    alive = (docs.last >= 0)[:, None, None, None]
    return out.view(value.shape), torch.where(alive, final, state)


def _over_chunks(
    inputs: Sequence[Tensor], state: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The memory over chunks [G * H, C, *], where the first counts[0] * H are the documents' first
    chunks, the next counts[1] * H the second chunks of the first counts[1] documents, and so on.

    inputs as in `chunked`, with zeros in empty places; state [documents * H, K, V].
    Returns out [G * H, C, V] and the states after each document, in the order of their ends.
    """
    q, k, v, beta = inputs[:4]
    heads = state.shape[0] // counts[0]
    written_keys = k * beta
    overlap = torch.bmm(written_keys, k.transpose(1, 2))
    seen = torch.bmm(q, k.transpose(1, 2)).tril()
    kept: Sequence[Tensor] = ()
    rows = [count * heads for count in counts]
    if len(inputs) > 4:
        since = -inputs[4].cumsum(1)  # G_t
        later = torch.ones_like(overlap, dtype=torch.bool).triu(1)
        between = (since - since.transpose(1, 2)).masked_fill(later, -torch.inf).exp()
        overlap, seen = overlap * between, seen * between
        written_keys, q = written_keys * since.exp(), q * since.exp()
        k = k * (since[:, -1:] - since).exp()
        kept = since[:, -1:].exp().split(rows)
    solved = torch.linalg.solve_triangular(
        overlap.tril(-1), torch.cat((v * beta, written_keys), -1), upper=False, unitriangular=True
    )
    own, erased = solved.split((v.shape[2], k.shape[2]), -1)

    steps = zip(*(x.split(rows) for x in (q, k, own, erased)), strict=True)
    outs, writes, ended = [], [], []
    for n, (query, key, value, erase) in enumerate(steps):
        outs.append(torch.bmm(query, state))
        written = torch.baddbmm(value, erase, state, alpha=-1)
        writes.append(written)
        if kept:
            state = state * kept[n]
        state = torch.baddbmm(state, key.transpose(1, 2), written)
        more = rows[n + 1] if n + 1 < len(rows) else 0
        if more < rows[n]:
            state, end = state.split((more, rows[n] - more))
            ended.append(end)
    return torch.baddbmm(torch.cat(outs), seen, torch.cat(writes)), torch.cat(ended)
