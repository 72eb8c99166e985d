"""The two layouts of a micro-batch, `PrefixTree` (every shared prefix once) and `Padded` (one padded row a sequence),
and which items go into one.

Stages list token sequences naively and say what to read where; a layout turns them into what a model runs on and
translates (sequence, position) into a row of the hidden states. Sharing is discovered, never declared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

LayoutName = Literal["tree", "padded"]
TokenIds = Sequence[int]


@dataclass(frozen=True)
class Segment:
    """The part of one sequence that no earlier sequence of the tree brought along.

    Its tokens lie in the flat rows [start, stop); `path` lists the rows of the whole sequence up to its last own
    token, so the last `stop - start` entries of `path` are the segment itself.
    """

    start: int
    stop: int
    path: np.ndarray

    @property
    def shared(self) -> int:
        """How many tokens of the path belong to earlier segments."""
        return len(self.path) - (self.stop - self.start)


class PrefixTree:
    """A radix trie over the sequences of a micro-batch, laid out in depth-first order as one flat row.

    Sorted sequences visit the trie depth first, and what each adds to it is exactly its tail beyond the longest
    prefix that it shares with its predecessor. So the trie needs no nodes: a sequence's rows are its predecessor's
    rows up to that prefix, then new ones. `ids` and `positions` are [tokens]; `rows[s]` maps the positions of
    sequence s to flat rows.
    """

    def __init__(self, sequences: Sequence[TokenIds]):
        self.sequences = [np.asarray(ids, dtype=np.int64) for ids in sequences]
        order = sorted(range(len(sequences)), key=lambda s: tuple(sequences[s]))
        self.rows: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(sequences)
        self.segments: list[Segment] = []
        previous_ids = previous_rows = np.empty(0, dtype=np.int64)
        tails, tail_positions, size = [], [], 0
        for s in order:
            ids = self.sequences[s]
            shared = common_prefix_length(previous_ids, ids)
            new = len(ids) - shared
            rows = np.concatenate([previous_rows[:shared], np.arange(size, size + new)])
            self.rows[s] = rows
            if new:
                self.segments.append(Segment(size, size + new, rows))
                tails.append(ids[shared:])
                tail_positions.append(np.arange(shared, len(ids)))
                size += new
            previous_ids, previous_rows = ids, rows
        self.ids = torch.from_numpy(np.concatenate(tails))
        self.positions = torch.from_numpy(np.concatenate(tail_positions))

    def __len__(self) -> int:
        """Tokens that the model computes: the unique ones."""
        return len(self.ids)

    def index(self, sequence: int, positions: np.ndarray | int) -> np.ndarray:
        """Rows of the hidden states [tokens, width] that hold these positions of a sequence."""
        return np.atleast_1d(self.rows[sequence][positions])


class Padded:
    """One right-padded row a sequence: the obvious layout, and the reference every tree test compares with."""

    def __init__(self, sequences: Sequence[TokenIds]):
        self.sequences = [np.asarray(ids, dtype=np.int64) for ids in sequences]
        self.width = max(len(ids) for ids in self.sequences)
        # The id under the mask is never attended to and never read, so that any valid id will do: 0, not "the pad
        # token", which many models do not have and others share with the end of the sequence.
        padded = np.zeros((len(self.sequences), self.width), dtype=np.int64)
        mask = np.zeros_like(padded)
        for s, ids in enumerate(self.sequences):
            padded[s, : len(ids)] = ids
            mask[s, : len(ids)] = 1
        self.ids = torch.from_numpy(padded)
        self.mask = torch.from_numpy(mask)

    def index(self, sequence: int, positions: np.ndarray | int) -> np.ndarray:
        """Rows of the hidden states, flattened to [sequences * width, width of the model]."""
        return np.atleast_1d(sequence * self.width + np.asarray(positions))


Layout = PrefixTree | Padded


def make_layout(name: LayoutName, sequences: Sequence[TokenIds]) -> Layout:
    """Lays a micro-batch of non-empty sequences out."""
    return PrefixTree(sequences) if name == "tree" else Padded(sequences)


def common_prefix_length(first: np.ndarray, second: np.ndarray) -> int:
    """How many leading ids two sequences share."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    return int(different.argmax()) if different.any() else length


def count_unique(sequences: Sequence[TokenIds]) -> int:
    """Tokens of the tree of these sequences, without building it."""
    arrays = [np.asarray(ids, dtype=np.int64) for ids in sorted(map(tuple, sequences))]
    shared = sum(common_prefix_length(a, b) for a, b in pairwise(arrays))
    return sum(len(ids) for ids in arrays) - shared


def cost(sequences: Sequence[TokenIds], layout: LayoutName) -> tuple[int, int]:
    """Tokens of an item that a model computes, and the item's widest row."""
    width = max(len(ids) for ids in sequences)
    return (count_unique(sequences) if layout == "tree" else len(sequences) * width), width


def pack(items: Sequence[Sequence[TokenIds]], layout: LayoutName, budget: int) -> list[list[int]]:
    """Numbers of the items of each micro-batch, no micro-batch above `budget` tokens unless one item alone is.

    The budget counts unique tokens of each item in a tree, and padded rows in the padded layout, which packs items of
    similar length together. A tree packs items together that begin alike, so that what they have in common (a query
    that was labelled twice, a dialogue and its continuation) is computed once.
    """
    costs = [cost(item, layout) for item in items]
    if layout == "padded":
        order = sorted(range(len(items)), key=lambda number: costs[number][1])
    else:
        order = sorted(range(len(items)), key=lambda number: tuple(items[number][0]))
    batches: list[list[int]] = []
    tokens = rows = 0
    for number in order:
        # Padded items come in order of their width, so that the newest is the widest.
        rows_after = rows + len(items[number])
        after = tokens + costs[number][0] if layout == "tree" else rows_after * costs[number][1]
        if batches and after <= budget:
            batches[-1].append(number)
            tokens, rows = after, rows_after
        else:
            batches.append([number])
            tokens, rows = costs[number][0], len(items[number])
    return batches


def to_device(array: np.ndarray | torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The array as a tensor on the device, which the host does not wait for: pinned memory is copied while a GPU is
    busy, and PyTorch keeps it until that is done."""
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def tensor_on(
    device: torch.device | str, values: Sequence[float] | Sequence[bool], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Numbers [values] on the device, of the dtype that they have by themselves unless another is given."""
    return to_device(torch.tensor(values, dtype=dtype), device)
