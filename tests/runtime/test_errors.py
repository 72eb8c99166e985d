"""Mistakes of a user are one line that says what, where and what to do, whatever is mistaken; ours are not."""

from __future__ import annotations

import errno
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rdo import main
from rdo.checks import CONF, compose_config, setting_names
from rdo.runtime.errors import NotFiniteError, UserError
from tiny import TINY

ROOT = Path(__file__).parents[2]
LEAVES = sorted(setting_names())
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())


def only_line(text: str) -> str:
    """The one line that was printed."""
    (line,) = text.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def train_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs train.py in this process."""

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *arguments])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    return run


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

GRAMMAR = st.sampled_from(["=", "+", "++", "~", "@", ".", ",", "[", "]", "{", "}", "(", ")", "${", "$", "'", '"', "\\",
                           "/", ":", " ", "-", "--", "-m", "%", "*", "null", "???", "nan", "inf", "1", "${seed}",
                           "${model.name}", "${oc.env:NOPE}", "${now:%Y}", "${oc.decode:[}", "range(3)", "choice(1,2)",
                           "int(3)", "interval(0,1)", "\n", "\x1b[2J", "\x00", "\u202e", "\ud800"])  # fmt: skip
texts = st.text(alphabet=st.characters(codec=None), max_size=8)
keys = st.one_of(
    st.sampled_from(LEAVES),
    st.sampled_from([*GROUPS, "loss.beta", "loss.name", "loss.pairs", "row", "hydra.job.name", "hydra"]),
    st.sampled_from(LEAVES).map(lambda key: key[1:] + "x"),
    texts,
)
values = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["null", "true", "toy", "none", "diff", "dpo", "[]", "[a,1]", "{}", "{a: 1}", "''", "-1", "1e400"]),
    st.lists(st.one_of(GRAMMAR, texts), max_size=4).map("".join),
    texts,
)
overrides = st.one_of(
    st.tuples(st.sampled_from(["", "", "", "+", "++", "~"]), keys, values).map(lambda parts: "{}{}={}".format(*parts)),
    keys.map("~{}".format),
    st.lists(st.one_of(GRAMMAR, texts, keys), max_size=6).map("".join),
)


@given(st.lists(overrides, min_size=1, max_size=3))
@example(["~model"])
@example(["seed=${seed}"])
@example(["loss={}"])
@example(["row=null"])
@settings(max_examples=60, deadline=None)
def test_whatever_is_typed_composes_or_is_refused_in_one_line(arguments):
    message = "none"
    try:
        compose_config(arguments)
    except UserError as error:
        message = str(error)
    assert message
    assert not any(c in "\n\r\x1b\x7f\u202e\u2028" or "\ud800" <= c <= "\udfff" for c in message)


def test_options_may_stand_behind_settings(tmp_path, train_here, capsys):
    with pytest.raises(SystemExit):
        train_here("stage=align", "-m", "rc.alpha=0,2", f"run_dir={tmp_path}")
    assert "rc.alpha=2" in only_line(capsys.readouterr().err)


def test_a_damaged_file_of_conf_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("defaults: [schema, _self_]\nrc: {alpha: [0.5\n")
    monkeypatch.setattr("rdo.checks.CONF", tmp_path)
    with pytest.raises(UserError, match=r"config\.yaml"):
        compose_config([])


# ---------------------------------------------------------------------------------------------------------------------
# Errors of a stage
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(tmp_path, train_here, monkeypatch, capsys) -> Callable[..., str]:
    """What a stage that raises an error leaves on standard error."""

    def run(error: Callable[[], Any], *given: str) -> str:
        monkeypatch.setitem(main.STAGES, "sft", lambda run: error())
        monkeypatch.setenv("RDO_DEBUG", "0")  # which --debug changes
        with pytest.raises(SystemExit) as ended:
            train_here("stage=sft", f"run_dir={tmp_path}", *given)
        assert ended.value.code == 1
        return capsys.readouterr().err

    return run


LESS = "; lower engine.tokens_per_micro_batch (training, scoring) or eval.batch_size (generation)"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("row 3:\n  is \x1b[2J empty"), "row 3: is \\x1b[2J empty"),
        (NotFiniteError("loss nan", ["a", "b"], "look"), "loss nan; records a, b; look"),
        (ZeroDivisionError("by\nzero"), "ZeroDivisionError: by zero"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "OSError: [Errno 28] No space left on device: 'a/b'"),
        (MemoryError(), f"MemoryError: {LESS}"),
        (torch.OutOfMemoryError("CUDA out of memory."), f"OutOfMemoryError: CUDA out of memory.{LESS}"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), f"RuntimeError: CUBLAS_STATUS_ALLOC_FAILED{LESS}"),
    ],
)
def test_an_error_is_one_line_whatever_it_says(failing, error, line):
    def fail() -> None:
        raise error

    assert failing(fail) == f"error: {line}\n"


def test_an_allocation_that_fails_says_what_needs_less(failing):
    assert LESS in only_line(failing(lambda: torch.empty(2**60)))  # beyond any address space


@pytest.mark.parametrize(("given", "last"), [([], "error: the file is empty"), (["rc=no"], "error: rc=no")])
def test_debug_shows_the_traceback(failing, given, last):
    def refuse() -> None:
        raise UserError("the file is empty")

    shown = failing(refuse, "--debug", *given)
    assert shown.startswith("Traceback (most recent call last):")
    assert shown.strip().splitlines()[-1].startswith(last)


# ---------------------------------------------------------------------------------------------------------------------
# Inputs that are not there
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_that_is_printed_makes_the_input(tmp_path, train_here, capsys):
    """Each one that is told is run, until the first command runs through."""
    mine = [*TINY, f"run_dir={tmp_path}/my runs", "eval.judges=[reward]", "rc=reward"]
    first = ["stage=eval", "build_inputs=false", *mine]
    made = []
    while True:
        try:
            train_here(*first)
            break
        except SystemExit:
            line = only_line(capsys.readouterr().err)
        command = shlex.split(line.partition("make it: ")[2])
        assert command[:2] == ["python", "train.py"]
        assert "build_inputs=false" not in command
        made += [text for text in command if text.startswith("stage=")]
        assert len(made) < 9
        train_here(*command[2:])
        capsys.readouterr()
    assert made == ["stage=sft", "stage=rm", "stage=score", "stage=align"]
