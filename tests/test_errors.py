"""Mistakes of a user are one line that says what, where and what to do, whatever is mistaken; ours are not."""

from __future__ import annotations

import errno
import os
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rdo import main
from rdo.artifacts import MissingInput
from rdo.checks import CONF, compose_config
from rdo.errors import UserError, explained
from rdo.main import check_arguments, check_command_line, check_run_dir, with_command
from test_configuration import LEAVES
from tiny import TINY

ROOT = Path(__file__).parents[1]
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())


def only_line(text: str) -> str:
    """The one line that was printed."""
    (line,) = text.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The line that a command line is refused with, before hydra sees it."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            check_command_line(list(arguments))
        assert ended.value.code == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        return only_line(shown.err)

    return run


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
    st.sampled_from(sorted(LEAVES)),
    st.sampled_from([*GROUPS, "loss.beta", "loss.name", "loss.pairs", "row", "hydra.job.name", "hydra"]),
    st.sampled_from(sorted(LEAVES)).map(lambda key: key[1:] + "x"),
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
@example(["stage=sft", "-m", "rc.alpha=[0,1],2"])
@settings(max_examples=60, deadline=None)
def test_whatever_is_typed_composes_or_is_refused_in_one_line(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "check_run_dir", lambda run_dir: None)  # or it would make folders of any name
        message = "none"
        try:
            check_arguments(arguments)
        except UserError as error:
            message = str(error)
        except SystemExit as ended:
            message = f"--version ended with {ended.code}"
    assert message
    assert message != "--version ended with 2"
    assert not any(c in "\n\r\x1b\x7f\u202e\u2028" or "\ud800" <= c <= "\udfff" for c in message)


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--seed=1", "--seed=1: there is no such option; a setting is KEY=VALUE, without dashes"),
        ("-x", "-x: there is no such option"),
        ("--cfg", "argument --cfg/-c: expected one argument"),
        ("rc.alpha", "rc.alpha: a setting is KEY=VALUE"),
        ("", "an empty argument"),
        ("run_dir=~/x", "two kinds of quotes"),
        ("seed=1e3", "seed=1e3: must be a whole number"),
        ("seed=null", "seed=null: cannot be null"),
        ("build_inputs=perhaps", "build_inputs=perhaps: must be true or false"),
        ("eval.judges=oracle", "eval.judges=oracle: must be a list"),
        ("align.learning_rate=inf", "must be above 0 and finite"),
        ("model.hidden_size=99999999999", "at most 2.14748e+09"),
        ("hydra/launcher=slurn", "hydra/launcher=slurn: must be one of basic"),
    ],
)
def test_mistakes_in_writing_are_named(refused, argument, named):
    assert named in refused(argument)


@pytest.mark.parametrize(
    "value",
    ["data/a(1).jsonl", "it's.jsonl", "a=b.jsonl", "[a,b", 'a"b', "é.jsonl", "a!b", "~/x", "https://x.y/z?a=1", "${x"],
)
def test_the_quotes_that_are_proposed_for_a_value_give_it_back(refused, value):
    message = refused(f"run_dir={value}")
    found = re.search(r"the value holds .* and needs two kinds of quotes, (.*?)(; if it is meant .*)?$", message)
    assert found
    (argument,) = shlex.split(found[1])
    assert OverridesParser.create().parse_overrides([argument])[0].value() == value


def test_options_may_stand_behind_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_command_line(["stage=align", "-m", "rc.alpha=0,1"]) == ["-m", "stage=align", "rc.alpha=0,1"]


def test_a_damaged_file_of_conf_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("defaults: [schema, _self_]\nrc: {alpha: [0.5\n")
    monkeypatch.setattr("rdo.configuration.CONF", tmp_path)
    with pytest.raises(UserError, match=r"config\.yaml"):
        compose_config([])
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="must have the default `schema`"):
        compose_config([])


# ---------------------------------------------------------------------------------------------------------------------
# The folder of a run
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_dir_that_cannot_be_written_to_is_said_first(tmp_path, refused, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "else")
    assert "is a file, not a folder" in refused(f"run_dir={tmp_path}/file")
    assert "not a directory" in refused(f"run_dir={tmp_path}/file/run")
    assert "is a file, not a folder" in refused(f"run_dir={tmp_path}/dangling")
    assert "cannot be written to" in refused("run_dir=/proc/run")
    assert "cannot be written to (file name too long)" in refused(f"run_dir={tmp_path}/{'x' * 300}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]

    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(main, "TemporaryFile", full)
    assert "cannot be written to (no space left on device); make room" in refused(f"run_dir={tmp_path}/run")


def test_a_run_dir_is_made_with_what_leads_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_run_dir(Path("runs/toy"))
    assert (tmp_path / "runs" / "toy").is_dir()
    check_run_dir(tmp_path / "runs" / "other")
    assert list((tmp_path / "runs").rglob("*")) == [tmp_path / "runs" / "toy", tmp_path / "runs" / "other"]


def test_help_and_the_config_are_shown_without_a_look_at_run_dir(tmp_path):
    (tmp_path / "file").write_text("mine")
    for option in (["--help"], ["--cfg", "job"]):
        assert check_command_line([*option, f"run_dir={tmp_path}/file"]) == [*option, f"run_dir={tmp_path}/file"]


# ---------------------------------------------------------------------------------------------------------------------
# What the machine refuses
# ---------------------------------------------------------------------------------------------------------------------


def refusal(error: BaseException, run_dir: Path | None = None) -> str:
    known = explained(error, run_dir)
    assert known is not None
    return str(known)


def allocate() -> None:
    torch.empty(2**60)  # beyond any address space


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: not enough memory"),
    ],
)
def test_out_of_memory_names_the_settings_that_save_some(error):
    assert "lower engine.tokens_per_micro_batch (training, scoring) or eval.batch_size" in refusal(error)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_costs_nothing(number, tmp_path):
    for error in (OSError(number, "", "a/file"), OSError(number, ""), RuntimeError("StreamWriter failed writing")):
        assert "nothing finished is lost, and the same command goes on" in refusal(error, tmp_path)
    assert refusal(OSError(number, "", "a/file")).startswith("a/file: ")
    assert refusal(OSError(number, ""), tmp_path).startswith(f"{tmp_path}: ")


@pytest.mark.parametrize(
    ("number", "named"),
    [
        (errno.EACCES, "a/file: permission denied"),
        (errno.EROFS, "a/file: permission denied"),
        (errno.ENOTDIR, "a/file: not a directory"),
        (errno.EISDIR, "a/file: is a directory"),
        (errno.ENAMETOOLONG, "a/file: file name too long"),
        (errno.EMFILE, "a/file: too many open files; raise the limit (ulimit -n 4096)"),
    ],
)
def test_what_the_system_refuses_names_the_path(number, named):
    assert refusal(OSError(number, os.strerror(number), "a/file")).startswith(named)


def test_a_closed_pipe_is_said_where_it_is_standard_output(monkeypatch):
    broken = BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert explained(broken) is None  # a connection to another process, say
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert explained(broken) is None
        os.close(reader)
        assert "write it to a file" in refusal(broken)


def test_a_finished_folder_that_lost_a_file_is_named():
    run_dir = Path("runs/toy")
    error = OSError(errno.ENOENT, "", "runs/toy/score/reward-train-1f/scores.parquet")
    assert "remove runs/toy/score/reward-train-1f and run again" in refusal(error, run_dir)
    assert explained(OSError(errno.ENOENT, "", "elsewhere/file"), run_dir) is None
    assert explained(OSError(errno.ENOENT, "", "runs/toy/file"), run_dir) is None


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("x"), RuntimeError("shape mismatch"), OSError("x")])
def test_what_is_our_own_mistake_is_not_explained_away(error):
    assert explained(error) is None


def run_failing(train_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch, fail: Callable, *given: str) -> None:
    monkeypatch.setitem(main.STAGES, "sft", lambda run: fail())
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which --debug changes
    with pytest.raises(SystemExit) as ended:
        train_here("stage=sft", *given)
    assert ended.value.code == 1


def test_an_allocation_that_fails_is_one_line(tmp_path, train_here, monkeypatch, capsys):
    run_failing(train_here, monkeypatch, allocate, f"run_dir={tmp_path}")
    assert "out of memory: lower engine.tokens_per_micro_batch" in only_line(capsys.readouterr().err)


def test_a_mistake_of_ours_comes_with_its_traceback(tmp_path, train_here, monkeypatch, capsys):
    monkeypatch.setenv("SOME_API_KEY", "planted-value-123")

    def blunder() -> None:
        try:
            raise KeyError("first")
        except KeyError:
            raise ZeroDivisionError("planted-value-123 \x1b[2J") from None

    run_failing(train_here, monkeypatch, blunder, f"run_dir={tmp_path}")
    *traceback, last = capsys.readouterr().err.strip().splitlines()
    assert traceback[0] == "Traceback (most recent call last):"
    assert any("in blunder" in line for line in traceback)
    assert only_line(last).startswith(
        "error: ZeroDivisionError: [removed] \\x1b[2J; a mistake in rdo: please report it"
    )
    assert "--debug" in last
    assert not any("planted" in line for line in [*traceback[-1:], last])


@pytest.mark.parametrize("where", ["run", "command line"])
def test_debug_shows_the_traceback_of_a_users_mistake(tmp_path, train_here, monkeypatch, capsys, where):
    def refuse() -> None:
        raise UserError("the file is empty")

    run_failing(
        train_here, monkeypatch, refuse, f"run_dir={tmp_path}", "--debug", *(["rc=no"] if where != "run" else [])
    )
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback (most recent call last):")
    assert shown.strip().splitlines()[-1].startswith("error: the file is empty" if where == "run" else "error: rc=no")


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
        assert command[:2] == ["python", str(ROOT / "train.py")]
        assert "build_inputs=false" not in command
        made += [text for text in command if text.startswith("stage=")]
        assert len(made) < 9
        train_here(*command[2:])
        capsys.readouterr()
    assert made == ["stage=sft", "stage=rm", "stage=score", "stage=align"]


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("the input reference (responses) is not there; make it: x", "stage=align rc=diff"),
        ("the input score (reward-test) is not there; make it: x", "stage=eval rc=diff"),
        ("the input diffmodel (paper) is not there; make it: x", "stage=diffmodel rc=diff"),
    ],
)
def test_inputs_without_a_stage_of_their_own_are_made_by_the_one_that_reads_them(missing, told):
    message = str(with_command(MissingInput(missing), ["stage=eval", "rc=diff", "build_inputs=false"]))
    assert message.endswith(f"python train.py {told}")
