"""Nothing leaks and nothing acts: secrets stay in the environment, texts of the data are texts, no port is open."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from rdo.evaluation.numbers import describe
from rdo.runtime.errors import printable
from rdo.stages.sft import base_policy
from rdo.tracking import Tracker
from tiny import TINY, tiny_run
from tracked import wandb_records

# Put together here, so that no scanner takes them for real ones.
TOKENS = {
    "hugging face": "hf_" + "aB3" * 11 + "x",
    "wandb": "0123456789abcdef" * 2 + "01234567",
    "github": "ghp_" + "aB3" * 12,
}


def test_no_file_of_a_run_holds_a_secret_of_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKENS["hugging face"])
    monkeypatch.setenv("WANDB_API_KEY", TOKENS["wandb"])
    monkeypatch.setattr(sys, "argv", ["train.py", "stage=sft", *TINY, f"run_dir={tmp_path}"])
    runpy.run_path(str(Path(__file__).parents[2] / "train.py"), run_name="__main__")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"overrides.yaml", "hydra.yaml", "manifest.json"} <= {file.name for file in files}
    for text in [*(file.read_bytes() for file in files), *(part.encode() for part in capsys.readouterr())]:
        assert TOKENS["hugging face"].encode() not in text
        assert TOKENS["wandb"].encode() not in text


# ---------------------------------------------------------------------------------------------------------------------
# wandb and ports
# ---------------------------------------------------------------------------------------------------------------------

TRACKED = """
import os, sys
from pathlib import Path
from rdo.settings import TrackerConfig
from rdo.tracking import Tracker
from test_safety import listeners

with Tracker(TrackerConfig("wandb", "own", "group"), Path(sys.argv[1]), "a name", {"align": {"epochs": 3}}) as tracker:
    print("text on the terminal")
    tracker.log(1, {"loss": 0.5})
    print("listening:", *listeners())
"""


def descendants(parent: int) -> list[int]:
    """A process and all that it started."""
    found = [parent]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(after[1]) == parent:
            found += descendants(int(stat.parent.name))
    return found


def listeners() -> list[str]:
    """Addresses, in hexadecimal as the kernel has them, that this process or one that it started listens at."""
    inodes = set()
    for process in descendants(os.getpid()):
        for file in Path(f"/proc/{process}/fd").glob("*"):
            try:
                target = os.readlink(file)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(fields[1].partition(":")[0])
    return found


LOCAL = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
needs_proc = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's tables of sockets")


@needs_proc
def test_listeners_are_found():
    import socket

    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        assert "00000000" in listeners()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert set(listeners()) <= LOCAL


@needs_proc
@pytest.mark.skipif(shutil.which("git") is None, reason="plants a git remote")
def test_wandb_gets_no_secret_and_listens_to_nobody_else(tmp_path):
    """In a checkout whose remote holds a token, with secrets in the environment and among the arguments."""
    planted = {"WANDB_API_KEY": TOKENS["wandb"], "HF_TOKEN": TOKENS["hugging face"], "MY_VARIABLE": "planted-variable"}
    run = tmp_path / "align-123"
    run.mkdir()
    for command in (
        "init -q",
        "-c user.name=n -c user.email=planted@example.org commit -q --allow-empty -m planted-message",
        f"remote add origin https://{TOKENS['github']}@example.org/planted-repository.git",
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True, capture_output=True)
    (tmp_path / "script.py").write_text(f"# planted-code\n{TRACKED}")
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(run), "--argument=planted-argument"],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PYTHONPATH": paths,
            "WANDB_MODE": "offline",
            **planted,
        },
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    _, _, addresses = done.stdout.partition("listening:")
    assert set(addresses.split()) <= LOCAL
    files = [file for file in run.rglob("*") if file.is_file()]
    forbidden = ["planted", "text on the terminal", *planted.values(), TOKENS["github"]]
    for file in files:
        content = file.read_bytes()
        assert not [text for text in forbidden if text.encode() in content], file
    names = {file.name for file in files}
    assert not names & {"wandb-metadata.json", "requirements.txt", "output.log", "script.py", "diff.patch"}
    assert hosts(*(file for file in files if file.suffix == ".wandb")) == [""]


def hosts(file: Path) -> list[str]:
    """The names of the machine in a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for data in wandb_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            found.append(record.run.host)
    return found


@needs_proc
def test_a_training_run_opens_no_port(tmp_path, monkeypatch):
    before, during = set(listeners()), []
    log = Tracker.log

    def look(tracker: Tracker, step: int, values: dict[str, Any]) -> None:
        during.append(set(listeners()) - before)
        log(tracker, step, values)

    monkeypatch.setattr(Tracker, "log", look)
    base_policy(tiny_run(tmp_path, "sft.max_steps=2"))
    assert during == [set(), set()]


# ---------------------------------------------------------------------------------------------------------------------
# Texts that would act
# ---------------------------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>", "</script>", "\x1b]0;title\x07", "\x1b[2J", "=cmd|' /C calc'!A0", "| pipe `tick`",
    "\u202eevil", "\u200bnothing", "\x00", "\x9b31m", "\u2066isolate", "<!-- x --> -->", "]]>", "![x](http://x)",
    "{{ 7 * 7 }}", "\x7f", "\u2028",
]  # fmt: skip


def hidden(text: str) -> set[str]:
    """The characters of a text that a terminal would act upon or that nobody sees."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Grüße, 漢字, 👍", "plain, Grüße, 漢字, 👍"),
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x00\x07\x7f\x9b\r", "\\x00\\x07\\x7f\\x9b\\r"),
        ("\u202eevil\u2069\u200b\ufeff", "\\u202eevil\\u2069\\u200b\\ufeff"),
        ("\U000e0041\ud800", "\\U000e0041\\ud800"),
    ],
)
def test_what_would_act_or_cannot_be_seen_is_shown_as_an_escape(text, shown):
    assert printable(text) == shown
    assert hidden(printable(text)) == set()
    assert printable("a\tb\nc", keep="") == "a\\tb\\nc"


def test_the_terminal_shows_a_hostile_judge_as_text():
    estimate = {"value": 1.0, "low": None, "high": None, "count": 1}
    text = describe({"length": estimate, "rewards": {" ".join(HOSTILE): estimate}})
    assert "evil" in text
    assert hidden(text) == set()
