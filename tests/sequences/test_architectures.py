"""Each architecture computes what its sequences alone give, or is refused by name: as docs/architectures.md has it. A
handful by default; every one with RDO_ARCHITECTURES=all, or =write, which writes that list anew."""

from __future__ import annotations

import os

import pytest

from architectures import HEAD, LIST, NAMES, line

ASKED = os.environ.get("RDO_ARCHITECTURES")
FEW = ["gemma2", "cohere", "qwen3", "phi3", "falcon", "bloom", "mixtral", "mamba", "ctrl", "cpmant", "llama4_text"]


def listed() -> dict[str, str]:
    """The rows of the list, by `model_type`."""
    return {text.split("`")[1]: text for text in LIST.read_text().splitlines() if text.startswith("| `")}


@pytest.mark.skipif(ASKED != "write", reason="writes docs/architectures.md with RDO_ARCHITECTURES=write")
def test_what_is_found_is_written():
    rows = [line(name) for name in NAMES]
    LIST.write_text(HEAD + "\n".join(rows) + "\n")


def test_the_list_is_whole_and_holds_no_wrong_number():
    assert set(listed()) == set(NAMES)
    assert not [text for text in listed().values() if "| WRONG |" in text]


@pytest.mark.parametrize("name", list(NAMES) if ASKED == "all" else FEW)
def test_an_architecture_is_right_or_refused(name: str):
    assert line(name) == listed()[name]
