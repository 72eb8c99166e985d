"""What stages leave behind: made once, found again, made anew when anything changed, never half-finished."""

import hashlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rdo.artifacts import ARTIFACT_VERSION, Artifact, MissingInput, Provenance, fingerprint, given, is_finished, produce
from rdo.errors import UserError
from rdo.files import append_json_line, read_json_lines, replace_file, replace_folder, write_json
from rdo.stages.eval import evaluate_policy
from rdo.stages.reference import read_reference
from rdo.stages.score import read_scores, scores
from tiny import tiny_run

SETTINGS = {"learning_rate": 0.1, "data": {"split": "train", "records": "abc"}}


class Maker:
    """Counts its calls, fails on the first `failures` of them, and keeps a part-way state in the folder."""

    def __init__(self, failures: int = 0):
        self.failures = failures
        self.calls: list[tuple[Path, int]] = []

    def __call__(self, folder: Path) -> dict[str, Any]:
        state = folder / "state"
        found = int(state.read_text()) if state.exists() else 0
        self.calls.append((folder, found))
        state.write_text(str(found + 1))
        if len(self.calls) <= self.failures:
            raise RuntimeError("stopped half-way")
        return {"accuracy": 0.5}


def provenance(folder: Path, **changes: Any) -> Provenance:
    return Provenance(folder, "python train.py stage=rm", {"seed": 0}, **changes)


def made(folder: Path, maker: Maker, settings: Any = SETTINGS, inputs: Any = None, stage: str = "rm") -> Artifact:
    return produce(provenance(folder), stage, "pointwise", settings, inputs or {}, maker)


def test_an_artifact_is_made_once_and_found_again(tmp_path, capsys):
    maker = Maker()
    first = made(tmp_path, maker)
    assert made(tmp_path, maker) == first
    assert len(maker.calls) == 1
    assert "done already" in capsys.readouterr().out
    assert first.folder == tmp_path / "rm" / f"pointwise-{first.key[:10]}"


def test_the_key_of_an_artifact_covers_settings_inputs_and_stage(tmp_path):
    inputs = {"base": Artifact(tmp_path / "base", "key of base")}
    settings = [SETTINGS, {**SETTINGS, "learning_rate": 0.2}, {**SETTINGS, "data": {"split": "test", "records": "abc"}}]
    folders = {made(tmp_path, Maker(), s, inputs).folder for s in settings}
    folders.add(made(tmp_path, Maker(), SETTINGS, {"base": Artifact(tmp_path / "base", "other key")}).folder)
    folders.add(made(tmp_path, Maker(), SETTINGS, {"reward": inputs["base"]}).folder)
    folders.add(made(tmp_path, Maker(), SETTINGS, {}).folder)
    folders.add(made(tmp_path, Maker(), SETTINGS, inputs, stage="diffmodel").folder)
    assert len(folders) == 7


def test_the_key_of_an_artifact_covers_nothing_else(tmp_path):
    """Neither where the inputs lie, nor the order of settings, nor the command line."""
    maker = Maker()
    first = made(tmp_path, maker, SETTINGS, {"a": Artifact(Path("here"), "1"), "b": Artifact(Path("here"), "2")})
    turned = dict(reversed(SETTINGS.items()))
    inputs = {"b": Artifact(Path("there"), "2"), "a": Artifact(Path("there"), "1")}
    other = replace(provenance(tmp_path), command="python train.py seed=0", config={"engine": 1})
    assert produce(other, "rm", "pointwise", turned, inputs, maker) == first
    assert len(maker.calls) == 1


def test_a_failure_leaves_no_manifest_and_the_next_call_goes_on(tmp_path):
    maker = Maker(failures=2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="half-way"):
            made(tmp_path, maker)
        assert not is_finished(maker.calls[0][0])
    artifact = made(tmp_path, maker)
    assert maker.calls == [(artifact.folder, 0), (artifact.folder, 1), (artifact.folder, 2)]
    assert is_finished(artifact.folder)


def test_a_manifest_says_where_the_artifact_comes_from(tmp_path):
    base = made(tmp_path, Maker(), stage="sft")
    artifact = made(tmp_path, Maker(), inputs={"base": base})
    manifest = artifact.manifest()
    assert manifest["settings"] == SETTINGS
    assert manifest["inputs"] == {"base": {"folder": f"sft/{base.folder.name}", "key": base.key}}
    assert manifest["command"] == "python train.py stage=rm"
    assert manifest["config"] == {"seed": 0}
    assert manifest["results"] == {"accuracy": 0.5}
    assert manifest["key"] == artifact.key
    assert manifest["stage"] == "rm"
    assert manifest["code_revision"]
    assert {"python", "torch", "transformers"} <= manifest["versions"].keys()


def test_build_inputs_false_refuses_to_make_an_input_and_names_the_command(tmp_path):
    without = provenance(tmp_path, build_inputs=False)
    maker = Maker()
    with pytest.raises(MissingInput, match=r"the input rm \(pointwise\) is not there; make it: python train\.py"):
        produce(without, "rm", "pointwise", SETTINGS, {}, maker, requested=False)
    assert not maker.calls
    assert not (tmp_path / "rm").exists()
    # What was asked for is made all the same, and is then found as an input.
    requested = produce(without, "rm", "pointwise", SETTINGS, {}, maker)
    assert produce(without, "rm", "pointwise", SETTINGS, {}, maker, requested=False) == requested
    assert len(maker.calls) == 1


def make_slowly(folder: Path) -> dict[str, Any]:
    append_json_line(folder / "made.jsonl", {"process": os.getpid()})
    time.sleep(0.5)
    return {}


def produce_slowly(run_dir: Path, start: Any) -> None:
    start.wait()
    produce(provenance(run_dir), "rm", "pointwise", SETTINGS, {}, make_slowly)


def test_two_processes_at_once_make_an_artifact_once(tmp_path):
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


def test_the_second_of_two_runs_says_who_holds_the_folder(tmp_path, capfd):
    context = multiprocessing.get_context("fork")
    first = context.Process(target=produce_slowly, args=(tmp_path, context.Barrier(1)))
    first.start()
    while not list(tmp_path.glob("rm/*/.holder.json")):
        time.sleep(0.01)
    artifact = produce(provenance(tmp_path), "rm", "pointwise", SETTINGS, {}, make_slowly)
    first.join()
    said = capfd.readouterr().out
    since = r"\d{4}-\d\d-\d\d \d\d:\d\d"
    holder = rf"process {first.pid} on {platform.node()} since {since} \(python train\.py stage=rm\)"
    assert re.search(rf"{artifact.folder} is being made by {holder}; waiting for it\n", said)
    assert len(read_json_lines(artifact.folder / "made.jsonl")) == 1
    assert not (artifact.folder / ".holder.json").exists()


@pytest.mark.parametrize("note", ['{"process": 1, "host": "x", "since": "y", "command": "z"}', "", "{half", "[]"])
def test_the_note_of_a_killed_holder_is_in_nobodys_way(tmp_path, note):
    artifact = made(tmp_path, Maker())
    (artifact.folder / "manifest.json").unlink()
    (artifact.folder / ".holder.json").write_text(note)
    maker = Maker()
    made(tmp_path, maker)
    assert len(maker.calls) == 1
    assert not (artifact.folder / ".holder.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Finished folders that are no longer what they were
# ---------------------------------------------------------------------------------------------------------------------


def make_files(folder: Path) -> dict[str, Any]:
    """Results, and what is none: temporary files, a part-way state, wandb's own."""
    for name in ("scores.parquet", "model/weights", ".scores.1.part", "checkpoints/step_1.pt", "shards/1", "wandb/run"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"content of {name}")
    return {}


def produced(run_dir: Path) -> Artifact:
    return produce(provenance(run_dir), "rm", "pointwise", SETTINGS, {}, make_files, requested=False)


def test_a_manifest_lists_every_result_and_nothing_else(tmp_path):
    artifact = produced(tmp_path)
    listed = artifact.manifest()["files"]
    assert sorted(listed) == ["model/weights", "scores.parquet"]
    data = b"content of scores.parquet"
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    assert listed["scores.parquet"] == {"bytes": len(data), "blake2b": digest}
    # What a run goes on from is gone when there is nothing left to do.
    assert not (artifact.folder / "checkpoints").exists()
    assert not (artifact.folder / "shards").exists()
    assert (artifact.folder / "wandb" / "run").exists()


def test_large_files_are_listed_with_their_size_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("rdo.artifacts.HASHED_BYTES", 24)
    artifact = produced(tmp_path)
    listed = artifact.manifest()["files"]
    assert listed["scores.parquet"] == {"bytes": 25}
    assert "blake2b" in listed["model/weights"]
    assert artifact.file("scores.parquet").read_text() == "content of scores.parquet"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("model/weights", None, "is missing"),
        ("model/weights", "content of", r"has 10 bytes, and had 24 when it was made"),
        ("scores.parquet", "", "has 0 bytes, and had 25 when it was made"),
        ("manifest.json", "", r"cannot be read \(JSONDecodeError\)"),
        ("manifest.json", '{"version": 2', r"cannot be read \(JSONDecodeError\)"),
        ("manifest.json", "[1]", "is no manifest"),
        ("manifest.json", "{}", "is no manifest"),
        ("manifest.json", '{"version": 1, "files": {}}', "was made by another version of rdo"),
        ("manifest.json", f'{{"version": {ARTIFACT_VERSION}}}', "lists no files"),
    ],
)
def test_a_damaged_folder_names_the_file_and_the_way_out(tmp_path, name, content, reason):
    folder = produced(tmp_path).folder
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    message = (
        f"{re.escape(str(folder / name))} {reason}; delete {re.escape(str(folder))}: the same command makes it again"
    )
    with pytest.raises(UserError, match=message):
        produced(tmp_path)
    if name == "manifest.json":
        assert not is_finished(folder)
    else:
        with pytest.raises(UserError, match=message):
            is_finished(folder)
    shutil.rmtree(folder)
    assert produced(tmp_path).file("scores.parquet").exists()


def test_a_file_that_is_read_is_compared_with_its_hash(tmp_path):
    artifact = produced(tmp_path)
    file = artifact.file("scores.parquet")
    file.write_text(file.read_text().replace("content", "CONTENT"))
    assert produced(tmp_path) == artifact  # as large as before: not read, not seen
    with pytest.raises(UserError, match=r"scores\.parquet has been changed since it was made; delete .*"):
        artifact.file("scores.parquet")
    with pytest.raises(UserError, match=r"other is not in the manifest"):
        artifact.file("other")


def test_a_model_that_the_user_brings_may_have_any_manifest(tmp_path):
    """One of another version of rdo, or of another tool: nothing is said of it."""
    for content in ('{"version": 1, "results": {}}', "[]", "{"):
        (tmp_path / "manifest.json").write_text(content)
        assert not is_finished(tmp_path)
        given(str(tmp_path))


def test_what_a_killed_process_left_is_removed(tmp_path):
    artifact = produced(tmp_path)
    (artifact.folder / "manifest.json").unlink()
    left = [".model.17.part/weights", ".model.17.old/weights", "data/.x.arrow.17.part", "tmpab3_x9zq"]
    for name in left:
        (artifact.folder / name).parent.mkdir(exist_ok=True)
        (artifact.folder / name).touch()
    produced(tmp_path)
    assert not any((artifact.folder / name).exists() for name in left)
    (artifact.folder / "shards").mkdir()  # the process was killed when the manifest was written
    produced(tmp_path)
    assert not (artifact.folder / "shards").exists()


def test_damaged_scores_and_generations_are_refused(tmp_path):
    run = tiny_run(
        tmp_path, "sft.max_steps=1", "rm.max_steps=1", "align.max_steps=1", "eval.judges=[oracle]", "loss=kto"
    )
    made = scores(run, "reward", "train", False, None)
    evaluate_policy(run, "policy")
    (known,) = (Artifact(folder, "") for folder in (tmp_path / "reference").iterdir())
    for artifact, name, read in ((made, "scores.parquet", read_scores), (known, "reference.parquet", read_reference)):
        path = artifact.folder / name
        data = path.read_bytes()
        path.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
        with pytest.raises(UserError, match=rf"{name} has been changed since it was made; delete"):
            read(artifact)
        path.write_bytes(data)
        assert read(artifact)
    (base,) = (tmp_path / "eval").glob("base-*")
    (evaluated,) = (folder for folder in (tmp_path / "eval").iterdir() if folder != base)
    shutil.rmtree(evaluated)
    lines = (base / "generations.jsonl").read_text()
    (base / "generations.jsonl").write_text(
        lines.replace('"stopped": true', '"stopped":1   ').replace("false", "0    ")
    )
    with pytest.raises(UserError, match=r"generations\.jsonl has been changed since it was made"):
        evaluate_policy(run, "policy")


def test_scores_too_large_for_a_hash_are_checked_page_by_page(tmp_path, monkeypatch):
    monkeypatch.setattr("rdo.artifacts.HASHED_BYTES", 0)
    run = tiny_run(tmp_path, "sft.max_steps=1", "rm.max_steps=1")
    made = scores(run, "reward", "train", False, None)
    path = made.folder / "scores.parquet"
    data = path.read_bytes()
    read_scores(made)
    path.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    with pytest.raises(UserError, match=r"scores\.parquet cannot be read \(.*; delete"):
        read_scores(made)


# ---------------------------------------------------------------------------------------------------------------------
# Models that the user brings
# ---------------------------------------------------------------------------------------------------------------------


def test_the_key_of_a_given_model_changes_with_a_byte_and_not_with_its_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights 0")
    first = given(str(tmp_path / "one"))
    assert first.folder == tmp_path / "one"
    assert given(str(tmp_path / "two")).key == first.key
    (tmp_path / "two" / "model.safetensors").write_bytes(b"weights 1")
    assert given(str(tmp_path / "two")).key != first.key
    (tmp_path / "one" / "config.json").rename(tmp_path / "one" / "other.json")
    assert given(str(tmp_path / "one")).key != first.key


def test_the_key_of_a_given_artifact_of_ours_is_that_of_its_model(tmp_path):
    """Its manifest may differ, and its weights must count."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights 0")
    (tmp_path / "manifest.json").write_text("{}")
    first = given(str(tmp_path)).key
    (tmp_path / "manifest.json").write_text("{ }")
    assert given(str(tmp_path)).key == first
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights 1")
    assert given(str(tmp_path)).key != first


def test_the_key_of_a_model_on_the_hub_is_its_name_and_revision():
    keys = {given("someone/model").key, given("someone/model", "v2").key, given("someone/other").key}
    assert len(keys) == 3
    assert given("someone/model", "v2").key in keys


def test_fingerprints_tell_values_apart():
    data = [{"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": None}, [1, 2], [2, 1]]
    assert len({fingerprint(d) for d in data}) == len(data)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


# ---------------------------------------------------------------------------------------------------------------------
# Files and folders that are whole or not there
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_that_fails_half_way_is_never_seen(tmp_path, old):
    path = tmp_path / "deep" / "file.txt"
    if old:
        path.parent.mkdir()
        path.write_text(old)
    with pytest.raises(IsADirectoryError), replace_file(path) as temporary:
        temporary.write_text("ne") and temporary.parent.read_text()
    assert (path.read_text() if path.exists() else None) == old
    assert [file for file in path.parent.iterdir() if file != path] == []
    with replace_file(path) as temporary:
        temporary.write_text("new")
        assert (path.read_text() if path.exists() else None) == old
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("old", [None, "old"])
def test_a_folder_that_fails_half_way_is_never_seen(tmp_path, old):
    folder = tmp_path / "deep" / "model"
    if old:
        folder.mkdir(parents=True)
        (folder / "weights").write_text(old)
        (folder / "of the old one").touch()
    with pytest.raises(IsADirectoryError), replace_folder(folder) as temporary:
        (temporary / "weights").write_text("ne") and temporary.read_text()
    assert folder.exists() == bool(old)
    assert not old or (folder / "weights").read_text() == old
    assert [other for other in folder.parent.iterdir() if other != folder] == []
    with replace_folder(folder) as temporary:
        (temporary / "weights").write_text("new")
        assert folder.exists() == bool(old)
    assert [file.name for file in folder.iterdir()] == ["weights"]
    assert (folder / "weights").read_text() == "new"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".part"):
            raise OSError("no space left")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no space"), replace_folder(folder) as temporary:
        (temporary / "weights").write_text("new")
    assert (folder / "weights").read_text() == "old"


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(tmp_path):
    """In a container every run may have the same process number."""
    folder = tmp_path / "model"
    for name in ("model", f".model.{os.getpid()}.part", f".model.{os.getpid()}.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("left over")
    with replace_folder(folder) as temporary:
        assert list(temporary.iterdir()) == []
        (temporary / "weights").write_text("new")
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "weights").read_text() == "new"


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "manifest.json"
    write_json(path, {"b": 1, "a": Path("x")})
    assert json.loads(path.read_text()) == {"a": "x", "b": 1}
    cyclic: dict[str, Any] = {}
    cyclic["self"] = cyclic
    with pytest.raises(ValueError, match="Circular"):
        write_json(path, cyclic)
    assert json.loads(path.read_text()) == {"a": "x", "b": 1}
