"""Micro-batches: every example in exactly one, none over the budget unless one example alone is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from helpers import random_tree
from rdo.sequences.layout import LayoutName, Padded, PrefixTree, cost, count_unique, pack

examples = st.lists(st.builds(random_tree, st.integers(0, 1000), st.integers(1, 5), st.integers(1, 12)), max_size=12)
layouts = st.sampled_from(["tree", "padded"])


@given(examples, layouts, st.integers(1, 200))
def test_every_item_is_in_one_batch_and_no_batch_is_over_budget(
    made: list[list[tuple[int, ...]]], layout: LayoutName, budget: int
):
    batches = pack(made, layout, budget)
    assert sorted(number for batch in batches for number in batch) == list(range(len(made)))
    for batch in batches:
        sequences = [ids for number in batch for ids in made[number]]
        tokens = len(PrefixTree(sequences) if layout == "tree" else Padded(sequences))
        assert tokens <= budget or len(batch) == 1


@given(examples, st.integers(1, 200))
def test_a_tree_packs_what_begins_alike_and_rows_by_their_width(made: list[list[tuple[int, ...]]], budget: int):
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
