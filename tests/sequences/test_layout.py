"""Tree and padded layouts against an obvious account of them: a tree holds every distinct prefix exactly once."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import random_tree, words
from rdo.sequences.layout import Padded, PrefixTree, common_prefix_length, count_unique, make_layout

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
    assert len(tree) == len(prefixes) == len(tree.ids) == len(tree.positions)
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


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_tree_holds_every_distinct_prefix_once(name: str):
    check_tree(EXAMPLES[name])


@given(random_trees())
def test_a_random_tree_holds_every_distinct_prefix_once(sequences: Sequences):
    check_tree(sequences)


@given(random_trees())
def test_the_count_needs_no_tree(sequences: Sequences):
    assert count_unique(sequences) == len(PrefixTree(sequences)) == len(distinct_prefixes(sequences))


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
    assert len(flat) == flat.ids.numel()
    for s, ids in enumerate(sequences):
        assert flat.mask[s].tolist() == [1] * len(ids) + [0] * (flat.width - len(ids))
        assert flat.ids.flatten()[flat.index(s, np.arange(len(ids)))].tolist() == list(ids)
        assert flat.index(s, len(ids) - 1).tolist() == [s * flat.width + len(ids) - 1]


def test_a_pair_shares_its_query_and_a_difference_its_first_response_too():
    a, b = QUERY + FIRST, QUERY + SECOND
    assert count_unique([a, b]) == 6 + 4 + 5
    # f(a, b) and f(a, a) read query and first response once; f(b, a) shares the query alone.
    assert count_unique([a + SECOND, a + FIRST, b + FIRST]) == 6 + (4 + 5 + 4) + (5 + 4)


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_common_prefix_length(first: list[int], second: list[int]):
    shared = common_prefix_length(np.array(first), np.array(second))
    assert first[:shared] == second[:shared]
    assert shared in (len(first), len(second)) or first[shared] != second[shared]


def test_layouts_go_by_name():
    assert isinstance(make_layout("tree", [QUERY]), PrefixTree)
    assert isinstance(make_layout("padded", [QUERY]), Padded)
