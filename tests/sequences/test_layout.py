"""Tree and padded layouts against an obvious account of them: a tree holds every distinct prefix exactly once. And
micro-batches: every item in exactly one, none over the budget unless one item alone is."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import random_tree, words
from rdo.sequences.layout import LayoutName, Padded, PrefixTree, cost, count_unique, pack

Sequences = list[tuple[int, ...]]

COIN = random.Random(7)
QUERY, FIRST, SECOND = words(COIN, 6), words(COIN, 4), words(COIN, 5)
EXAMPLES: dict[str, Sequences] = {
    "one": [QUERY],
    "one token": [(5,)],
    "single tokens": [(5,), (6,), (5,)],
    "duplicates": [QUERY + FIRST, QUERY + FIRST, QUERY + FIRST],
    "prefix last": [QUERY + FIRST, QUERY],
    "prefix first": [QUERY, QUERY + FIRST],
    "pair": [QUERY + FIRST, QUERY + SECOND],
    "shared turns": [QUERY + FIRST, QUERY + SECOND + QUERY + FIRST, QUERY + SECOND + QUERY + SECOND],
    "nothing shared": [FIRST, SECOND, QUERY],
    "same tail": [QUERY + FIRST, SECOND + FIRST],
}


@st.composite
def random_trees(draw: st.DrawFn) -> Sequences:
    """Few distinct ids, so that prefixes are shared by chance, or sequences grown from each other."""
    if draw(st.booleans()):
        sequence = st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple)
        return draw(st.lists(sequence, min_size=1, max_size=12))
    return random_tree(draw(st.integers(0, 10_000)), count=draw(st.integers(1, 15)))


def distinct_prefixes(sequences: Sequences) -> set[tuple[int, ...]]:
    return {ids[: end + 1] for ids in sequences for end in range(len(ids))}


def check_tree(sequences: Sequences) -> None:
    tree = PrefixTree(sequences)
    prefixes = distinct_prefixes(sequences)
    assert len(tree) == len(prefixes) == len(tree.ids) == len(tree.positions) == count_unique(sequences)
    row_of: dict[tuple[int, ...], int] = {}
    for s, ids in enumerate(sequences):
        assert len(tree.rows[s]) == len(ids)
        assert tree.sequences[s].tolist() == list(ids)
        for position, row in enumerate(tree.rows[s].tolist()):
            assert row_of.setdefault(ids[: position + 1], row) == row
            assert tree.ids[row] == ids[position]
            assert tree.positions[row] == position
            assert tree.index(s, position).tolist() == [row]
    # One row a prefix and one prefix a row.
    assert sorted(row_of.values()) == list(range(len(prefixes)))
    check_segments(tree, row_of)


def check_segments(tree: PrefixTree, row_of: dict[tuple[int, ...], int]) -> None:
    """Every row lies in one segment, whose path is the rows of the prefixes of its last token."""
    prefix_of = {row: prefix for prefix, row in row_of.items()}
    covered = [row for segment in tree.segments for row in range(segment.start, segment.stop)]
    assert covered == list(range(len(tree)))
    for segment in tree.segments:
        last = prefix_of[segment.stop - 1]
        assert segment.path.tolist() == [row_of[last[: end + 1]] for end in range(len(last))]
        assert segment.path[segment.shared :].tolist() == list(range(segment.start, segment.stop))


@pytest.mark.parametrize("sequences", EXAMPLES.values(), ids=EXAMPLES)
def test_a_tree_holds_every_distinct_prefix_once(sequences: Sequences):
    check_tree(sequences)


@given(random_trees())
def test_a_random_tree_holds_every_distinct_prefix_once(sequences: Sequences):
    check_tree(sequences)


@given(random_trees(), st.randoms(use_true_random=False))
def test_the_order_of_the_list_does_not_matter(sequences: Sequences, coin: random.Random):
    order = list(range(len(sequences)))
    coin.shuffle(order)
    tree, shuffled = PrefixTree(sequences), PrefixTree([sequences[s] for s in order])
    assert torch.equal(tree.ids, shuffled.ids)
    assert torch.equal(tree.positions, shuffled.positions)
    for place, s in enumerate(order):
        assert np.array_equal(shuffled.rows[place], tree.rows[s])


@given(random_trees())
def test_flat_rows_hold_their_sequences_and_nothing_else_counts(sequences: Sequences):
    flat = Padded(sequences)
    assert flat.ids.shape == flat.mask.shape == (len(sequences), max(map(len, sequences)))
    for s, ids in enumerate(sequences):
        assert flat.mask[s].tolist() == [1] * len(ids) + [0] * (flat.width - len(ids))
        assert flat.ids.flatten()[flat.index(s, np.arange(len(ids)))].tolist() == list(ids)
        assert flat.index(s, len(ids) - 1).tolist() == [s * flat.width + len(ids) - 1]


def test_a_pair_shares_its_query_and_a_difference_its_first_response_too():
    a, b = QUERY + FIRST, QUERY + SECOND
    assert count_unique([a, b]) == 6 + 4 + 5
    # f(a, b) and f(a, a) read query and first response once; f(b, a) shares the query alone.
    assert count_unique([a + SECOND, a + FIRST, b + FIRST]) == 6 + (4 + 5 + 4) + (5 + 4)


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------

ITEMS = st.lists(st.builds(random_tree, st.integers(0, 1000), st.integers(1, 5), st.integers(1, 12)), max_size=12)


@given(ITEMS, st.sampled_from(["tree", "padded"]), st.integers(1, 200))
def test_every_item_is_in_one_batch_and_no_batch_is_over_budget(made: list[Sequences], layout: LayoutName, budget: int):
    batches = pack(made, layout, budget)
    assert sorted(number for batch in batches for number in batch) == list(range(len(made)))
    for batch in batches:
        sequences = [ids for number in batch for ids in made[number]]
        tokens = (PrefixTree(sequences) if layout == "tree" else Padded(sequences)).ids.numel()
        assert tokens <= budget or len(batch) == 1


@given(ITEMS, st.integers(1, 200))
def test_a_tree_packs_what_begins_alike_and_rows_by_their_width(made: list[Sequences], budget: int):
    beginnings = [made[n][0] for batch in pack(made, "tree", budget) for n in batch]
    assert beginnings == sorted(beginnings)
    widths = [cost(made[n], "padded")[1] for batch in pack(made, "padded", budget) for n in batch]
    assert widths == sorted(widths)


def test_records_of_one_query_are_computed_together():
    """Two labels of each of three queries, far apart in the data."""
    made = [[(query, 5, 6, 7, label)] for label in (1, 2) for query in (30, 10, 20)]
    batches = pack(made, "tree", 10)
    assert batches == [[1, 4], [2, 5], [0, 3]]
    assert sum(count_unique([ids for n in batch for ids in made[n]]) for batch in batches) == 18


def test_as_many_as_fit_go_together():
    made = [[(1, 2, 3)], [(4, 5, 6)], [(7, 8, 9)]]
    assert pack(made, "tree", 6) == pack(made, "padded", 6) == [[0, 1], [2]]
    # A shared query counts once in a tree, and once a row in the padded layout.
    assert cost([(1, 2, 3), (1, 2, 4)], "tree") == (4, 3)
    assert cost([(1, 2, 3), (1, 2)], "padded") == (6, 3)
