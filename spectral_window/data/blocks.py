"""Training examples from a token stream, and their order.

The stream is one long row of tokens in which every document starts with `<|endoftext|>` (E):

    tokens      E a b c E d e f g E h ...
    block 0     E a b c                      block 1     E d e f        length 4
    labels        a b c E                    labels        d e f g      the stream, shifted by one
    positions   0 1 2 3                      positions   0 1 2 3        in the document and block

A block that starts inside a document contains only its own part of it. Every token except the first
of the stream is a label exactly once.

The order of an epoch is a permutation that is computed index by index from (seed, epoch). Nothing
is stored, so the memory does not grow with the data, and resuming at sample k means to start
counting at k.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from spectral_window.data.arrays import FileArray, SortedFileArray
from spectral_window.errors import UserError, UserTypeError

IGNORED = -100  # the label that losses ignore, as in PyTorch and transformers
ROUNDS = 8


class TokenStream:
    """The tokens of one split, in memory or in files.

    Args:
        tokens: [N], uint16 or uint32.
        documents: int64, the index at which each document starts.
        bytes: the UTF-8 bytes of text that the tokens stand for.
        name: what it is called in messages.
        roles: if the documents are conversations, the ids of the tokens that begin a turn; those
            of the last begin what is to be learned, the assistant's turns.
    """

    def __init__(
        self,
        tokens: np.ndarray | FileArray,
        documents: np.ndarray | SortedFileArray,
        bytes: int,
        name: str = "tokens",
        roles: Sequence[int] | None = None,
    ):
        self.tokens, self.documents, self.bytes, self.name = tokens, documents, bytes, name
        self.roles = roles

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        sizes = f"{len(self):,} tokens, {len(self.documents):,} documents, {self.bytes:,} bytes"
        return f"TokenStream({self.name}: {sizes})"


class PackedBlocks(Dataset):
    """A data set of blocks: item i has the tokens i*length ... of `stream`.

    An item is a dict of int64 tensors [length]:

    - `input_ids`;
    - `shift_labels`: the next token of the stream; -100 past its end;
    - `position_ids`: the position of each token in its document, or in the block if the document
      started earlier.

    The last block is padded with the document separator, with labels -100.

    Args:
        stream: the tokens.
        length: tokens per block.
        allow_short: accept a stream that is shorter than one block, for evaluation.

    Raises:
        UserError: a bad length, or a stream that is too short.

    Example:
        >>> stream = TokenStream(np.array([9, 1, 2, 3, 9, 4, 5], "u2"), np.array([0, 4]), bytes=5)
        >>> block = PackedBlocks(stream, 3)[1]
        >>> {name: values.tolist() for name, values in block.items()}
        {'input_ids': [3, 9, 4], 'shift_labels': [9, 4, 5], 'position_ids': [0, 0, 1]}
    """

    def __init__(self, stream: TokenStream, length: int, *, allow_short: bool = False):
        _check_length(length)
        targets = len(stream) - 1
        if targets < (1 if allow_short else length):
            raise UserError(
                f"{len(stream)} tokens are too few for a block of {length} and its labels "
                f"({stream.name}): add text, or shorten the sequences"
            )
        self.stream, self.length = stream, length
        self.blocks = -(-targets // length)

    @property
    def labels(self) -> int:
        """How many tokens the blocks together predict."""
        return len(self.stream) - 1

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.blocks:
            raise IndexError(f"block {index} of {self.blocks}")
        start = index * self.length
        window = np.asarray(self.stream.tokens[start : start + self.length + 1], dtype=np.int64)
        inputs = np.full(self.length, self.stream.tokens[0], dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        inputs[: len(window)] = window[: self.length]
        labels[: len(window) - 1] = window[1:]
        return {
            "input_ids": torch.from_numpy(inputs),
            "shift_labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(self._positions(start)),
        }

    def _positions(self, start: int) -> np.ndarray:
        """Return the distance of each place to the latest start of a document, or of the block."""
        documents = self.stream.documents
        first, last = documents.searchsorted([start, start + self.length])
        begins = np.zeros(self.length, dtype=np.int64)
        inside = np.asarray(documents[first:last], dtype=np.int64) - start
        begins[inside] = inside
        return np.arange(self.length, dtype=np.int64) - np.maximum.accumulate(begins)


class ConversationBlocks(Dataset):
    """A data set of rows of whole conversations, which predict the assistant's turns alone.

    An item is as of `PackedBlocks`, but a row holds whole documents, each at positions from 0 on,
    and the labels are -100 except for the tokens of answers and the end of each. A document of n
    tokens takes n - 1 places, for its last token is only a label. Rows are filled by best-fit
    decreasing: the longest document first, each into the fullest row that has room.

    Args:
        stream: the tokens, with `roles`.
        length: tokens per row.

    Raises:
        UserError: a bad length, or a document that is longer than a row.

    Example:
        >>> tokens = np.array([9, 7, 1, 6, 8, 2, 3, 6], "u2")  # 7: user, 8: assistant, 6: end
        >>> stream = TokenStream(tokens, np.array([0]), bytes=2, roles=[5, 7, 8])
        >>> row = ConversationBlocks(stream, 8)[0]
        >>> row["shift_labels"].tolist()
        [-100, -100, -100, -100, 2, 3, 6, -100]
    """

    def __init__(self, stream: TokenStream, length: int):
        _check_length(length)
        assert stream.roles is not None
        self.stream, self.length, self.roles = stream, length, list(stream.roles)
        starts = np.asarray(stream.documents[: len(stream.documents)], dtype=np.int64)
        sizes = np.diff(starts, append=len(stream)) - 1
        if sizes.max() > length:
            raise UserError(
                f"a conversation of {sizes.max() + 1} tokens ({stream.name}) in rows of {length}: "
                f"take a length of {sizes.max()} or more"
            )
        self.starts, self.sizes = starts, sizes
        self.rows: list[list[int]] = []
        spaces: list[int] = []  # that some row has left, rising
        with_space: dict[int, list[int]] = {}
        for document in np.argsort(-sizes, kind="stable").tolist():
            size = int(sizes[document])
            at = bisect_left(spaces, size)
            if at == len(spaces):
                row, space = len(self.rows), length
                self.rows.append([])
            else:
                space = spaces[at]
                row = with_space[space].pop()
                if not with_space[space]:
                    del spaces[at]
            self.rows[row].append(document)
            left = space - size
            if left and not with_space.setdefault(left, []):
                insort(spaces, left)
            if left:
                with_space[left].append(row)

    @property
    def labels(self) -> int:
        """How many tokens the rows together predict."""
        return sum(int((self[row]["shift_labels"] != IGNORED).sum()) for row in range(len(self)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"row {index} of {len(self.rows)}")
        inputs = np.full(self.length, self.stream.tokens[0], dtype=np.int64)
        labels = np.full(self.length, IGNORED, dtype=np.int64)
        positions = np.zeros(self.length, dtype=np.int64)
        at = 0
        for document in self.rows[index]:
            start, size = int(self.starts[document]), int(self.sizes[document])
            tokens = np.asarray(self.stream.tokens[start : start + size + 1], dtype=np.int64)
            here = slice(at, at + size)
            inputs[here], positions[here] = tokens[:-1], np.arange(size)
            labels[here] = np.where(self._answers(tokens), tokens, IGNORED)[1:]
            at += size
        positions[at:] = np.arange(self.length - at)  # the padding is a document of its own
        return {
            "input_ids": torch.from_numpy(inputs),
            "shift_labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }

    def _answers(self, tokens: np.ndarray) -> np.ndarray:
        """Return which tokens are written by the assistant: after its role, up to the next one."""
        begins = np.isin(tokens, self.roles)
        latest = np.maximum.accumulate(np.where(begins, np.arange(len(tokens)), 0))
        return (tokens[latest] == self.roles[-1]) & ~begins


def blocks_of(
    stream: TokenStream, length: int, *, allow_short: bool = False
) -> PackedBlocks | ConversationBlocks:
    """Return the training examples of a stream: blocks of text, or rows of conversations.

    Args:
        stream: the tokens.
        length: tokens per example.
        allow_short: see `PackedBlocks`.

    Raises:
        UserError: a bad length, or one that does not fit the stream.
    """
    if stream.roles is not None:
        return ConversationBlocks(stream, length)
    return PackedBlocks(stream, length, allow_short=allow_short)


def _check_length(length: int) -> None:
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise UserError(f"block length is {length!r}: give a whole number of at least 1")


class ShuffledBlocks(Sampler[int]):
    """A sampler of `count` samples, in a permutation for each epoch given by (seed, epoch).

    Sample k of the endless order is index `permute(k mod count)` of epoch `k div count`. This
    sampler yields samples start + rank, start + rank + world, ... So all ranks together see every
    sample exactly once per epoch, and the overall order does not depend on the number of ranks or
    DataLoader workers.

    Args:
        count: number of samples.
        seed: of the permutations.
        epochs: number of epochs; None for no end.
        start: number of samples that all ranks together have consumed; resumes exactly.
        rank: this process.
        world: number of processes.
        shuffle: False for the order of the data.

    Raises:
        UserError: a bad argument.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int = 0,
        epochs: int | None = 1,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
    ):
        if count < 1:
            raise UserError(f"{count} samples to shuffle: at least 1 is needed")
        if world < 1 or not 0 <= rank < world:
            raise UserError(f"rank {rank} of {world}: ranks count from 0")
        if start < 0 or (epochs is not None and epochs < 0):
            raise UserError(f"start {start}, epochs {epochs}: neither may be negative")
        self.count, self.seed, self.epochs, self.start = count, seed, epochs, start
        self.rank, self.world, self.shuffle = rank, world, shuffle

    def __len__(self) -> int:
        if self.epochs is None:
            raise UserTypeError("an endless order has no length")
        return len(range(self.start + self.rank, self.epochs * self.count, self.world))

    def __iter__(self) -> Iterator[int]:
        sample = self.start + self.rank
        epoch, order = -1, Permutation(self.count, self.seed, 0)
        while self.epochs is None or sample < self.epochs * self.count:
            now, place = divmod(sample, self.count)
            if now != epoch:
                epoch, order = now, Permutation(self.count, self.seed, now)
            yield order[place] if self.shuffle else place
            sample += self.world


class Permutation:
    """A pseudorandom permutation of range(count), computed index by index in constant memory.

    A Feistel network permutes the numbers of 2b bits: each round combines a hash of one half with
    the other half, which is invertible, so different inputs give different outputs. Results of
    `count` or above are passed through the network again until they are below.

    Example:
        >>> order = Permutation(5, seed=0, epoch=0)
        >>> sorted(order[i] for i in range(5))
        [0, 1, 2, 3, 4]
    """

    def __init__(self, count: int, seed: int, epoch: int):
        self.count = count
        self.half = max(1, ((count - 1).bit_length() + 1) // 2)
        self.mask = (1 << self.half) - 1
        drawn = hashlib.blake2b(f"{seed},{epoch}".encode(), digest_size=8 * ROUNDS).digest()
        self.keys = [int.from_bytes(drawn[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]

    def __getitem__(self, index: int) -> int:
        half, mask = self.half, self.mask
        while True:
            left, right = index >> half, index & mask
            for key in self.keys:
                mixed = ((right ^ key) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
                mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
                left, right = right, left ^ (mixed >> 32) & mask
            index = left << half | right
            if index < self.count:
                return index
