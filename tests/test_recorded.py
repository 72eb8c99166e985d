"""What twenty steps of every stage gave when they were recorded is what they give now (see recorded.py)."""

import json

import pytest

import recorded


def test_twenty_steps_of_everything_give_the_recorded_numbers() -> None:
    """To the last bit on the machine that recorded them; elsewhere the losses to a ten-thousandth."""
    before = json.loads(recorded.RECORDED.read_text())
    found = recorded.measured()
    expected = {world: before["results"][world] for world in found}
    if recorded.machine() == before["machine"]:
        assert recorded.differences(expected, found) == []
        return
    assert {world: results.keys() for world, results in found.items()} == {w: r.keys() for w, r in expected.items()}
    for world, results in expected.items():
        for name, entry in results.items():
            if "losses" in entry:
                assert found[world][name]["losses"] == pytest.approx(entry["losses"], rel=1e-4), name
