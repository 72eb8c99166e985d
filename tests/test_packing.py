"""Micro-batches: every item in exactly one, none over the budget unless one item alone is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from helpers import tree
from rdo.forest import Flat, Forest, LayoutName
from rdo.packing import cost, pack

items = st.lists(st.builds(tree, st.integers(0, 1000), st.integers(1, 5), st.integers(1, 12)), max_size=12)
layouts = st.sampled_from(["forest", "flat"])


@given(items, layouts, st.integers(1, 200), st.booleans())
def test_every_item_is_in_one_batch_and_no_batch_is_over_budget(
    made: list[list[tuple[int, ...]]], layout: LayoutName, budget: int, by_length: bool
):
    batches = pack(made, layout, budget, by_length)
    assert sorted(number for batch in batches for number in batch) == list(range(len(made)))
    for batch in batches:
        sequences = [ids for number in batch for ids in made[number]]
        tokens = len(Forest(sequences) if layout == "forest" else Flat(sequences))
        assert tokens <= budget or len(batch) == 1


@given(items, st.integers(1, 200))
def test_a_forest_keeps_the_order_unless_told_otherwise(made: list[list[tuple[int, ...]]], budget: int):
    assert [n for batch in pack(made, "forest", budget) for n in batch] == list(range(len(made)))
    widths = [cost(made[n], "forest")[1] for batch in pack(made, "forest", budget, by_length=True) for n in batch]
    assert widths == sorted(widths)


def test_as_many_as_fit_go_together():
    made = [[(1, 2, 3)], [(4, 5, 6)], [(7, 8, 9)]]
    assert pack(made, "forest", 6) == pack(made, "flat", 6) == [[0, 1], [2]]
    # A shared query counts once in a forest, and once a row in the flat layout.
    assert cost([(1, 2, 3), (1, 2, 4)], "forest") == (4, 3)
    assert cost([(1, 2, 3), (1, 2)], "flat") == (6, 3)
