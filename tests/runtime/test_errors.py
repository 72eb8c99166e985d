"""Mistakes of a user are one line that says what, where and what to do, whatever is mistaken; ours are not."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rdo import main
from rdo.checks import CONF, compose_config, setting_names
from rdo.runtime.errors import NotFiniteError, UserError, printable
from tiny import TINY

LEAVES = sorted(setting_names())
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())

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


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["rc.alhpa=0.5"], "error: rc.alhpa: there is no such setting (did you mean rc.alpha?)"),
        (["stage=align", "seed=one"], "seed=one: must be"),
        (["stage=score", "rc=none"], "loss=dpo rc=none reads no scores: choose rc=reward or rc=diff"),
        # Sweeps: before the first job
        (["stage=align", "-m", "rc=diff", "rc.alpha=0.5,2"], "rc.alpha=2: must be"),  # options may stand anywhere
        (["--multirun", "loss=dpo,dpoo"], "loss=dpoo: must be one of"),
        (["row=dpo,dpoo"], "row=dpoo: must be one of"),
        (["stage=align", "loss=dpo,kto"], "; 3. To sweep over it, add --multirun"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_nothing_runs(arguments, line, tmp_path, refused):
    (said,) = refused(*arguments, f"run_dir={tmp_path / 'run'}").splitlines()
    assert said.startswith("error: ")
    assert line in said
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_damaged_file_of_conf_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("defaults: [schema, _self_]\nrc: {alpha: [0.5\n")
    monkeypatch.setattr("rdo.checks.CONF", tmp_path)
    with pytest.raises(UserError, match=r"config\.yaml"):
        compose_config([])


# ---------------------------------------------------------------------------------------------------------------------
# Errors of a stage
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(tmp_path, refused, monkeypatch) -> Callable[..., str]:
    """What a stage that fails leaves on standard error."""

    def run(work: Callable[[], Any], *given: str) -> str:
        monkeypatch.setitem(main.STAGES, "sft", lambda run: work())
        monkeypatch.setenv("RDO_DEBUG", "0")  # which --debug changes
        return refused("stage=sft", f"run_dir={tmp_path}", *given)

    return run


def fail(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


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
    assert failing(fail(error)) == f"error: {line}\n"


def test_an_allocation_that_fails_says_what_needs_less(failing):
    (line,) = failing(lambda: torch.empty(2**60)).splitlines()  # beyond any address space
    assert LESS in line


@pytest.mark.parametrize(("given", "last"), [([], "error: the file is empty"), (["rc=no"], "error: rc=no")])
def test_debug_shows_the_traceback(failing, given, last):
    shown = failing(fail(UserError("the file is empty")), "--debug", *given)
    assert shown.startswith("Traceback (most recent call last):")
    assert shown.strip().splitlines()[-1].startswith(last)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Grüße, 漢字, 👍", "plain, Grüße, 漢字, 👍"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x00\x07\x7f\x9b\r", "\\x00\\x07\\x7f\\x9b\\r"),
        ("\u202eevil\u2069\u200b\ufeff\u2028", "\\u202eevil\\u2069\\u200b\\ufeff\\u2028"),
        ("\U000e0041\ud800", "\\U000e0041\\ud800"),
    ],
)
def test_what_would_act_or_cannot_be_seen_is_shown_as_an_escape(text, shown):
    assert printable(text) == shown
    assert printable("a\tb\nc", keep="") == "a\\tb\\nc"


# ---------------------------------------------------------------------------------------------------------------------
# Inputs that are not there
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_that_is_printed_makes_the_input(tmp_path, train_here, refused):
    """Each one that is told is run, until the first command has nothing to ask for."""
    mine = [*TINY, f"run_dir={tmp_path}/my runs", "eval.judges=[reward]", "rc=reward"]
    first = ["stage=eval", "build_inputs=false", *mine]
    for stage in ("sft", "rm", "score", "align"):
        (line,) = refused(*first).splitlines()
        command = shlex.split(line.partition("make it: ")[2])
        assert command[:3] == ["python", "train.py", f"stage={stage}"]
        assert "build_inputs=false" not in command
        train_here(*command[2:])
    train_here(*first)
