"""The delta-rule memory in chunks: linear time in plain torch, on any device.

Differentiable any number of times. Inside a chunk of C tokens all writes together are the solution
of one triangular system (Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule
over Sequence Length"). Let G_t be the sum of -decay over the tokens of the chunk up to t, S the
state before the chunk, and u_t = beta_t (v_t - a_t S_{t-1}^T k_t) the write of token t at its key:

    (I + A) U = diag(beta) (V - diag(e^G) K S),   A[t, s] = beta_t e^(G_t - G_s) k_t . k_s,  s < t
    out       = diag(e^G) Q S + P U,              P[t, s] = e^(G_t - G_s) q_t . k_s,         s <= t
    S after   = e^(G_C) S + sum_s e^(G_C - G_s) k_s u_s^T

The system, A and P do not depend on the state, so they are computed for all chunks at once. The
loop over chunks has three products per chunk, and one state per chunk is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from spectral_window.ops import recorded
from spectral_window.ops.documents import Documents, Tokens
from spectral_window.ops.tracing import is_exporting, is_recorded

CHUNK = 64


def chunked(
    inputs: Sequence[Tensor], state: Tensor, documents: Documents | None
) -> tuple[Tensor, Tensor]:
    """`delta_memory` for checked inputs: move tokens to chunks, compute, move back.

    Args:
        inputs: q, k [B, T, H, K], v [B, T, H, V], beta [B, T, H, 1] and optionally decay
            [B, T, H, 1]; not empty.
        state: [B, H, K, V] in the dtype to compute in.
        documents: documents and padding, or None where every row continues its state.

    Returns:
        out [B, T, H, V] and the final state [B, H, K, V], both in the state's dtype.
    """
    if documents is None:
        return _rows(inputs, state)
    if is_recorded():
        return _recorded(inputs, state, documents.positions)
    return _documents(inputs, state, documents)


def _rows(inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """Every row is one document that continues its state."""
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


class _Grid(NamedTuple):
    """Documents sorted by length, the longest first, so that their n-th chunks are adjacent.

    Attributes:
        size: tokens per chunk.
        total: number of chunks.
        counts: number of documents that have an n-th chunk.
        token: [n], the tokens' places among all B*T.
        slot: [n], their places in the grid.
        row: [documents], in the order of the grid: their rows.
        goes_on: [documents], whether they continue a state.
        last: [B], the last document of each row, numbered in the order in which documents end.
        alive: [B], whether a row has any document.
    """

    size: int
    total: int
    counts: list[int]
    token: Tensor
    slot: Tensor
    row: Tensor
    goes_on: Tensor
    last: Tensor
    alive: Tensor


def _cut(tokens: Tokens) -> _Grid:
    length = tokens.length
    size = min(CHUNK, int(length.max())) if len(length) else 1
    chunks = -(-length // size)
    order = chunks.argsort(descending=True)  # documents by rank
    rank = order.argsort()
    most = int(chunks.max()) if len(length) else 0
    count = (chunks > torch.arange(most, dtype=torch.int64, device="cpu")[:, None]).sum(1)
    begin = count.cumsum(0) - count
    place = (
        torch.arange(len(tokens.token), dtype=torch.int64, device="cpu")
        - tokens.head[tokens.document]
    )
    slot = (begin[place // size] + rank[tokens.document]) * size + place % size
    # documents end in the order of their number of chunks, and for equal numbers by rank
    turn = chunks[order].argsort(stable=True).argsort()
    last = tokens.last.clamp(min=0)
    if len(length):
        last = turn[rank[tokens.document[last]]]
    head = tokens.head[order]
    return _Grid(
        size,
        int(count.sum()),
        count.tolist(),
        tokens.token,
        slot,
        tokens.row[head],
        tokens.position[head] != 0,
        last,
        tokens.last >= 0,
    )


def _documents(
    inputs: Sequence[Tensor], state: Tensor, documents: Documents
) -> tuple[Tensor, Tensor]:
    value = inputs[2].to(state.dtype)
    grid = documents.plan("chunked_delta", _cut)
    if not grid.total:  # padding alone: zeros
        return value.masked_fill(
            torch.ones_like(value, dtype=torch.bool, device=value.device), 0.0
        ), state
    heads, size, total = value.shape[2], grid.size, grid.total

    def cells(x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1).index_select(0, grid.token).to(state.dtype)
        places = tokens.new_zeros(total * size, heads, x.shape[3])
        places = places.index_copy(0, grid.slot, tokens).view(total, size, heads, -1)
        return places.transpose(1, 2).reshape(total * heads, size, -1)

    goes_on = grid.goes_on[:, None, None, None]
    before = torch.where(goes_on, state.index_select(0, grid.row), 0.0)
    y, ended = _over_chunks([cells(x) for x in inputs], before.flatten(0, 1), grid.counts)
    y = y.view(total, heads, size, -1).transpose(1, 2).flatten(0, 1).index_select(0, grid.slot)
    out = torch.zeros_like(value).flatten(0, 1).index_copy(0, grid.token, y)
    final = ended.view(-1, *state.shape[1:]).index_select(0, grid.last)
    alive = grid.alive[:, None, None, None]
    return out.view(value.shape), torch.where(alive, final, state)


def _recorded(inputs: Sequence[Tensor], state: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The method for recorded graphs, where no shape may depend on positions.

    Rows keep their length, and what precedes the start of a token's document is masked. Values that
    are not finite are left out, and the outputs of their document from there on are NaN.
    """
    rows = recorded.tokens_first(positions)
    tokens = [rows.gather(x.to(state.dtype)) for x in inputs]
    time = tokens[0].shape[1]
    written = torch.cat([x.flatten(2) for x in tokens[1:]], -1)
    spoilt = recorded.since_head(~torch.isfinite(written).all(-1), rows.head)
    exporting = is_exporting()
    # for any length: one more than there are, so that their number is never 1
    more = CHUNK if exporting else 0
    begin = torch.arange(0, time + more, CHUNK, dtype=torch.int64, device=state.device)
    index = begin[:, None] + torch.arange(CHUNK, dtype=torch.int64, device=state.device)
    at, inside = index.clamp(max=time - 1).flatten(), (index < time)[:, None, :, None, None]

    def grid(x: Tensor) -> Tensor:  # [B, T, *] -> [G, B, C, *]
        return x.index_select(1, at).unflatten(1, (-1, CHUNK)).movedim(1, 0)

    def finite(x: Tensor) -> Tensor:  # [B, T, H, *] -> [G, B, H, C, *]
        x = grid(x)
        return torch.where(inside & torch.isfinite(x), x, 0.0).transpose(2, 3)

    memory = torch.where(rows.continues[:, None, None, None], state, 0.0)
    parts = [begin, grid(rows.head), *map(finite, tokens)]
    if exporting:
        memory, out = scan(_chunk, memory, parts)
    else:
        outs = []
        for c in range(len(begin)):
            memory, out = _chunk(memory, [x[c] for x in parts])
            outs.append(out)
        out = torch.stack(outs)
    out = out.movedim(0, 2).flatten(2, 3)
    out = out[:, :, :time].transpose(1, 2)
    final = torch.where(spoilt[:, -1, None, None, None], torch.nan, memory)
    final = torch.where((rows.tokens > 0)[:, None, None, None], final, state)
    return rows.scatter(out.masked_fill(spoilt[..., None, None], torch.nan)), final


def _chunk(memory: Tensor, part: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Compute one chunk of rows for a recorded graph.

    Args:
        memory: the state before the chunk [B, H, K, V].
        part: the place of the chunk's first token []; the places where its tokens' documents start
            [B, C]; then the inputs of `chunked`, [B, H, C, *].

    Returns:
        The state after the chunk, and its outputs [B, H, C, V].
    """
    begin, own, query, key, value, write, *decay = part
    same = (own[:, :, None] == own[:, None]).tril()[:, None]  # [B, 1, C, C]
    enters = (own < begin.clamp(min=1))[:, None, :, None]  # [B, 1, C, 1]
    since = -decay[0].cumsum(2) if decay else torch.zeros_like(write)
    between = torch.where(same, (since - since.transpose(2, 3)).exp(), 0.0)
    entry_decay = torch.where(enters, since.exp(), 0.0)  # of the state before the chunk
    overlap = write * (key @ key.transpose(2, 3)) * between
    targets = value - torch.where(enters, entry_decay * (key @ memory), 0.0)
    written = _solve(overlap.tril(-1), write * targets)
    read = torch.where(enters, entry_decay * (query @ memory), 0.0)
    out = read + ((query @ key.transpose(2, 3)) * between) @ written
    last = between[:, :, -1, :, None]  # decay from each write to the end of the chunk
    carried = torch.where(enters[:, :, -1:], entry_decay[:, :, -1:] * memory, 0.0)
    return carried + (key * last).transpose(2, 3) @ written, out


def _solve(lower: Tensor, right: Tensor) -> Tensor:
    """Solve (I + lower) x = right for strictly lower triangular matrices [..., C, C].

    An exported graph has products alone, since ONNX knows no triangular system: it doubles the
    blocks of the inverse, [[P, 0], [-R L P, R]] of the inverses P and R of two neighbours and the
    block L below them. Unlike a sum of powers this is as exact as substitution.
    """
    if not is_exporting():
        return torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    size = lower.shape[-1]
    place = torch.arange(size, dtype=torch.int64, device=lower.device)
    inverse = (place[:, None] == place).to(lower.dtype).expand_as(lower)
    block = 1
    while block < size:
        row, column = place[:, None] // block, place // block
        below = torch.where((row % 2 == 1) & (row - 1 == column), lower, 0.0)
        inverse = inverse - inverse @ below @ inverse
        block *= 2
    return inverse @ right


def _over_chunks(
    inputs: Sequence[Tensor], state: Tensor, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Compute the memory over chunks [G * H, C, *].

    The first counts[0] * H are the first chunks of the documents, the next counts[1] * H are the
    second chunks of the first counts[1] documents, and so on.

    Args:
        inputs: as in `chunked`, with zeros in empty places.
        state: [documents * H, K, V].
        counts: number of documents that have an n-th chunk.

    Returns:
        out [G * H, C, V], and the states after each document, in the order in which they end.
    """
    q, k, v, beta = inputs[:4]
    heads = state.shape[0] // counts[0]
    written_keys = k * beta
    overlap = torch.bmm(written_keys, k.transpose(1, 2))
    scores = torch.bmm(q, k.transpose(1, 2)).tril()
    chunk_decays: Sequence[Tensor] = ()
    rows = [count * heads for count in counts]
    if len(inputs) > 4:
        since = -inputs[4].cumsum(1)  # G_t
        later = torch.ones_like(overlap, dtype=torch.bool, device=overlap.device).triu(1)
        between = (since - since.transpose(1, 2)).masked_fill(later, -torch.inf).exp()
        overlap, scores = overlap * between, scores * between
        written_keys, q = written_keys * since.exp(), q * since.exp()
        k = k * (since[:, -1:] - since).exp()
        chunk_decays = since[:, -1:].exp().split(rows)
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
        if chunk_decays:
            state = state * chunk_decays[n]
        state = torch.baddbmm(state, key.transpose(1, 2), written)
        more = rows[n + 1] if n + 1 < len(rows) else 0
        if more < rows[n]:
            state, end = state.split((more, rows[n] - more))
            ended.append(end)
    return torch.baddbmm(torch.cat(outs), scores, torch.cat(writes)), torch.cat(ended)


def differentiate_again(
    tensors: Sequence[Tensor | None],
    positions: Tensor | None,
    grad: Tensor | None,
    grad_final: Tensor | None,
) -> list[Tensor | None]:
    """Compute a method's gradients by operations that can be differentiated themselves.

    Args:
        tensors: the method's inputs q, k, v, beta [B, T, H], decay [B, T, H] or None, state or
            None.
        positions: [B, T], or None.
        grad: the gradient of the output, or None.
        grad_final: the gradient of the final state, or None.

    Returns:
        The gradients of `tensors`, None for those that need none.
    """
    asked = [x for x in tensors if x is not None and x.requires_grad]
    with torch.enable_grad():
        q, k, v, beta, decay, state = tensors
        assert q is not None
        assert k is not None
        assert v is not None
        assert beta is not None
        inputs = [q, k, v, beta[..., None], *([] if decay is None else [decay[..., None]])]
        documents = None if positions is None else Documents(positions, checked=True)
        if state is None:
            before = q.new_zeros(
                q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=torch.float64
            )
        else:
            before = state.double()
        out, final = chunked(inputs, before, documents)
        final = final.to(torch.float32 if state is None else state.dtype)
        given = ((out.to(v.dtype), grad), (final, grad_final))
        known = [(y, g) for y, g in given if g is not None and y.requires_grad]
        derivatives = torch.autograd.grad(
            [y for y, _ in known],
            asked,
            [g for _, g in known],
            create_graph=True,
            allow_unused=True,
        )
    by_id = {id(x): d for x, d in zip(asked, derivatives, strict=True)}
    return [None if x is None else by_id.get(id(x)) for x in tensors]
