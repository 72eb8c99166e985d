"""What stages leave behind: made once, found again, made anew when anything changes, never half-finished."""

import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rdo.models.given import given
from rdo.runtime.errors import UserError
from rdo.runtime.files import read_json_lines, replace_file, replace_folder
from rdo.runtime.store import ARTIFACT_VERSION, Artifact, Provenance, produce
from tiny import append_json_line, is_finished

SETTINGS = {"learning_rate": 0.1, "data": {"split": "train", "records": "abc"}}
BASE, OTHER = Artifact(Path("here"), "key of base"), Artifact(Path("here"), "other key")


class Maker:
    """Fails on the first so many calls, and keeps a part-way state in the folder; `found` is what each call found."""

    def __init__(self, failures: int = 0):
        self.failures = failures
        self.found: list[int] = []

    def __call__(self, folder: Path) -> dict[str, Any]:
        state = folder / "checkpoints" / "state"
        state.parent.mkdir(exist_ok=True)
        self.found.append(int(state.read_text()) if state.exists() else 0)
        state.write_text(str(self.found[-1] + 1))
        if len(self.found) <= self.failures:
            raise RuntimeError("stopped half-way")
        return {"accuracy": 0.5}


def provenance(folder: Path, **changes: Any) -> Provenance:
    return Provenance(folder, "python train.py stage=rm", {"seed": 0}, **changes)


def made(folder: Path, maker: Any, settings: Any = SETTINGS, inputs: Any = None, stage: str = "rm") -> Artifact:
    return produce(provenance(folder), stage, "pointwise", settings, inputs or {}, maker)


def test_an_artifact_is_made_once_and_found_again(tmp_path, capsys):
    maker = Maker()
    first = made(tmp_path, maker)
    assert made(tmp_path, maker) == first
    assert maker.found == [0]
    assert "done already" in capsys.readouterr().out
    assert first.folder == tmp_path / "rm" / f"pointwise-{first.key[:10]}"


@pytest.mark.parametrize(
    ("settings", "inputs", "stage"),
    [
        ({**SETTINGS, "learning_rate": 0.2}, {"base": BASE}, "rm"),
        ({**SETTINGS, "data": {"split": "test", "records": "abc"}}, {"base": BASE}, "rm"),
        (SETTINGS, {"base": OTHER}, "rm"),
        (SETTINGS, {"reward": BASE}, "rm"),
        (SETTINGS, {}, "rm"),
        (SETTINGS, {"base": BASE}, "diffmodel"),
    ],
)
def test_the_key_of_an_artifact_covers_settings_inputs_and_stage(settings, inputs, stage, tmp_path):
    assert made(tmp_path, Maker(), settings, inputs, stage).key != made(tmp_path, Maker(), inputs={"base": BASE}).key


def test_the_key_of_an_artifact_covers_nothing_else(tmp_path):
    """Neither where the inputs lie, nor the order of settings, nor the command line."""
    maker = Maker()
    first = made(tmp_path, maker, inputs={"a": BASE, "b": OTHER})
    inputs = {"b": replace(OTHER, folder=Path("there")), "a": BASE}
    other = replace(provenance(tmp_path), command="python train.py seed=0", config={"engine": 1})
    assert produce(other, "rm", "pointwise", dict(reversed(SETTINGS.items())), inputs, maker) == first
    assert len(maker.found) == 1


def test_a_failure_leaves_no_manifest_and_the_next_call_goes_on(tmp_path):
    maker = Maker(failures=2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="half-way"):
            made(tmp_path, maker)
        assert not is_finished(next((tmp_path / "rm").iterdir()))
    artifact = made(tmp_path, maker)
    assert maker.found == [0, 1, 2]
    assert is_finished(artifact.folder)


def test_a_manifest_says_where_the_artifact_comes_from_and_what_it_is(tmp_path):
    base = made(tmp_path, Maker(), stage="sft")
    artifact = made(tmp_path, Maker(), inputs={"base": base})
    manifest = artifact.manifest()
    assert {"python", "torch", "transformers"} <= manifest.pop("versions").keys()
    assert manifest.pop("finished") and manifest.pop("code_revision") and manifest.pop("seconds") >= 0  # noqa: PT018
    assert manifest == {
        "version": ARTIFACT_VERSION, "stage": "rm", "label": "pointwise", "key": artifact.key, "settings": SETTINGS,
        "inputs": {"base": {"folder": f"sft/{base.folder.name}", "key": base.key}}, "results": {"accuracy": 0.5},
        "command": "python train.py stage=rm", "config": {"seed": 0},
    }  # fmt: skip
    # What a run goes on from is gone when there is nothing left to do.
    assert {path.name for path in artifact.folder.iterdir()} == {"manifest.json", ".lock"}


def test_build_inputs_false_refuses_to_make_an_input_and_names_the_command(tmp_path):
    without = provenance(tmp_path, build_inputs=False)
    maker = Maker()
    with pytest.raises(UserError, match=r"the input rm \(pointwise\) is not there; make it: python train\.py stage=rm"):
        produce(without, "rm", "pointwise", SETTINGS, {}, maker, requested=False)
    assert not (tmp_path / "rm").exists()
    # What was asked for is made all the same, and is then found as an input.
    requested = produce(without, "rm", "pointwise", SETTINGS, {}, maker)
    assert produce(without, "rm", "pointwise", SETTINGS, {}, maker, requested=False) == requested
    assert len(maker.found) == 1


def produce_slowly(run_dir: Path, start: Any) -> None:
    def make(folder: Path) -> dict[str, Any]:
        append_json_line(folder / "made.jsonl", {"process": os.getpid()})
        time.sleep(0.5)
        return {}

    start.wait()
    made(run_dir, make)


def test_of_two_runs_that_want_one_folder_the_second_waits_and_finds_the_result(tmp_path, capfd):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    processes = [context.Process(target=produce_slowly, args=(tmp_path, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0, 0]
    (folder,) = (tmp_path / "rm").iterdir()
    assert len(read_json_lines(folder / "made.jsonl")) == 1
    assert is_finished(folder)
    assert capfd.readouterr().out.count(f"{folder} is being made by another run; waiting for it") == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", r"cannot be read \(JSONDecodeError\)"),
        ("[1]", r"cannot be read \(TypeError\)"),
        ("{}", r"cannot be read \(KeyError\)"),
        ('{"version": 1, "files": {}}', "was made by another version of rdo"),
    ],
)
def test_a_manifest_that_is_none_of_ours_is_refused_in_a_stage_and_ignored_in_a_given_model(tmp_path, content, reason):
    folder = made(tmp_path, Maker()).folder
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=rf"manifest\.json {reason}; delete {folder}, and run again"):
        made(tmp_path, Maker())
    assert not is_finished(folder)
    assert given(str(folder)).key


def test_what_a_killed_process_left_is_removed(tmp_path):
    artifact = made(tmp_path, Maker())
    (artifact.folder / "manifest.json").unlink()
    left = [".model.17.part/weights", ".model.17.old/weights", "data/.x.arrow.17.part"]
    for name in left:
        (artifact.folder / name).parent.mkdir(exist_ok=True)
        (artifact.folder / name).touch()
    made(tmp_path, Maker())
    assert not any((artifact.folder / name).exists() for name in left)
    (artifact.folder / "shards").mkdir()  # the process was killed when the manifest was written
    made(tmp_path, Maker())
    assert not (artifact.folder / "shards").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["", "model"])
def test_the_key_of_a_given_model_is_its_content_wherever_it_lies(inner, tmp_path):
    """Of a result of ours the model alone counts."""
    for name in ("one", "two"):
        (tmp_path / name / inner).mkdir(parents=True)
        (tmp_path / name / inner / "config.json").write_text("{}")
        (tmp_path / name / inner / "model.safetensors").write_bytes(b"weights 0")
        if inner:
            (tmp_path / name / "manifest.json").write_text(f"{{{name}}}")
    first = given(str(tmp_path / "one"))
    assert first.folder == tmp_path / "one"
    assert given(str(tmp_path / "two")).key == first.key
    (tmp_path / "two" / inner / "model.safetensors").write_bytes(b"weights 1")
    assert given(str(tmp_path / "two")).key != first.key
    (tmp_path / "one" / inner / "config.json").rename(tmp_path / "one" / inner / "other.json")
    assert given(str(tmp_path / "one")).key != first.key


def test_the_key_of_a_model_on_the_hub_is_its_name_and_revision():
    assert len({given("someone/model").key, given("someone/model", "v2").key, given("someone/other").key}) == 3
    assert given("someone/model", "v2") == given("someone/model", "v2")
    with pytest.raises(UserError, match=r"rm\.path=\./nowhere: there is no such folder"):
        given("./nowhere", setting="rm.path")


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders that are whole or not there
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize(("replaced", "inner"), [(replace_file, ""), (replace_folder, "weights")])
def test_what_fails_half_way_is_never_seen(replaced, inner, old, tmp_path):
    """Nor is what a killed process of the same number left in anybody's way: in a container all may have one."""
    path = tmp_path / "deep" / "thing"

    def content() -> str | None:
        return (path / inner).read_text() if path.exists() else None

    if old:
        with replaced(path) as temporary:
            (temporary / inner).write_text(old)
    with pytest.raises(ZeroDivisionError), replaced(path) as temporary:
        (temporary / inner).write_text("ne") / 0
    assert content() == old
    assert [other for other in path.parent.iterdir() if other != path] == []
    if inner:
        (path.parent / f".thing.{os.getpid()}.part").mkdir()
    with replaced(path) as temporary:
        (temporary / inner).write_text("new")
        assert content() == old
    assert content() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_files_of_a_folder_have_the_mode_that_the_umask_grants(tmp_path):
    before = os.umask(0o027)
    try:
        with replace_folder(tmp_path / "model") as folder:
            (folder / "model.safetensors").touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o640
