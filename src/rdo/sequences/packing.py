"""Dealing the items of an optimizer step (or of a scoring job) out to micro-batches by a token budget."""

from __future__ import annotations

from collections.abc import Sequence

from rdo.sequences.layout import LayoutName, TokenIds, count_unique


def cost(sequences: Sequence[TokenIds], layout: LayoutName) -> tuple[int, int]:
    """Tokens of an item that a model computes, and the item's widest row."""
    width = max(len(ids) for ids in sequences)
    return (count_unique(sequences) if layout == "tree" else len(sequences) * width), width


def pack(items: Sequence[Sequence[TokenIds]], layout: LayoutName, budget: int) -> list[list[int]]:
    """Numbers of the items of each micro-batch, no micro-batch above `budget` tokens unless one item alone is.

    The budget counts unique tokens of each item in a tree, and padded rows in the padded layout, which therefore packs
    items of similar length together. A tree packs items together that begin alike, so that what several records have
    in common (a query that was labelled twice, a dialogue and its continuation) is computed once for all of them. No
    result depends on the packing beyond rounding.
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


def deal(items: Sequence[Sequence[TokenIds]], layout: LayoutName, budget: int, processes: int) -> list[list[list[int]]]:
    """Each process's micro-batches, as numbers of the items: `pack` of the items that it is dealt.

    The largest goes first, always to who has least to do (longest processing time first, Graham 1969).
    """
    if processes == 1:
        return [pack(items, layout, budget)]
    costs = [cost(item, layout)[0] for item in items]
    hands: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for number in sorted(range(len(items)), key=lambda number: -costs[number]):
        least = loads.index(min(loads))
        hands[least].append(number)
        loads[least] += costs[number]
    dealt = []
    for hand in map(sorted, hands):
        batches = pack([items[number] for number in hand], layout, budget)
        dealt.append([[hand[n] for n in batch] for batch in batches])
    return dealt
