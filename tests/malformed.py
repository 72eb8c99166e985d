"""Inputs that are wrong in every way we could think of, and what the one line of error must say."""

from __future__ import annotations

import errno
import gzip
import json
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import TINY, tiny_run

ASK = "\n\nHuman: Which bread?\n\nAssistant:"
TRL = {"prompt": "Which bread?", "chosen": " Rye.", "rejected": " No idea."}
HH = {"chosen": f"{ASK} Rye.", "rejected": f"{ASK} No idea."}
UNPAIRED = {"prompt": "Which bread?", "completion": " Rye.", "label": True}

Make = Callable[[Path, pytest.MonkeyPatch], list[str]]


@dataclass(frozen=True)
class Case:
    """make(folder, monkeypatch) prepares the input and returns the overrides; `message` is a regular expression."""

    area: str
    name: str
    message: str
    make: Make


CASES: list[Case] = []


def case(area: str, name: str, message: str, make: Make) -> None:
    CASES.append(Case(area, name, message, make))


def reading(file: Path | str, *more: str) -> list[str]:
    return ["stage=rm", "model=small", "dataset=file", f"dataset.path={file}", *more]


def lines(*rows: object) -> bytes:
    """Rows as JSON lines; bytes are taken as they are."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def content(name: str, data: bytes, *more: str) -> Make:
    """An input that is one file of these bytes."""

    def make(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
        (folder / name).write_bytes(data)
        return reading(folder / name, *more)

    return make


# Rows and files: that each is one line for the user; what the line says is the matter of test_rows, test_readers and
# test_files.


def bad_row(bad: object, *more: str) -> Make:
    return content("data.jsonl", lines(TRL, bad, TRL), *more)


TOO_MANY = r"line 2.*first of 1 invalid rows of 3.*max_invalid_share.*invalid\.jsonl"
case("row", "not JSON", r"data\.jsonl, line 2: is not JSON.*on_invalid=skip", bad_row(b'{"prompt": "p",'))
case("row", "wrong type", r"data\.jsonl, line 2, field 'chosen': must be text.*found 3", bad_row(TRL | {"chosen": 3}))
case("row", "too many invalid rows", TOO_MANY, bad_row(b"{", "dataset.on_invalid=skip"))
case("row", "a format of no reader", "dataset.format=xml is not known", bad_row(TRL, "dataset.format=xml"))
case("file", "missing", r"gone\.jsonl.*no such file", lambda folder, patch: reading(folder / "gone.jsonl"))
case("file", "truncated gzip", r"data\.jsonl\.gz", content("data.jsonl.gz", gzip.compress(lines(TRL) * 50)[:-20]))
case("file", "a pickle", "line 1: is not JSON", content("data.jsonl", pickle.dumps([TRL])))


def two_formats(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    (folder / "a.jsonl").write_bytes(lines(TRL, TRL))
    (folder / "b.jsonl").write_bytes(lines(HH, HH))
    return reading(f"'{folder}/*.jsonl'")


case("file", "two formats", r"b\.jsonl, line 1: looks like format 'hh', and the rows before are 'trl'", two_formats)

# A stage whose input is not there, and data that the work cannot use


def breads(folder: Path, rows: Sequence[object] = ()) -> list[str]:
    """Training data of these rows, or of eight good ones."""
    (folder / "data.jsonl").write_bytes(lines(*rows or [TRL | {"prompt": f"Which bread {n}?"} for n in range(8)]))
    shares = ["dataset.test_share=0", "dataset.validation_share=0", "engine.device=cpu"]
    return ["dataset=file", f"dataset.path={folder / 'data.jsonl'}", *shares]


def on_file(*more: str, rows: Sequence[object] = ()) -> Make:
    return lambda folder, patch: [*breads(folder, rows), "model=small", *SMALL, *more]


SMALL = [
    "model.hidden_size=32", "model.intermediate_size=32", "model.layers=1", "model.heads=2", "model.key_value_heads=1",
    "model.vocabulary_size=300", "sft.max_steps=1", "rm.max_steps=1", "align.max_steps=1",
]  # fmt: skip
TOY = [
    "dataset.toy.pairs=64", "dataset.toy.test_pairs=64", "dataset.toy.demonstrations=128",
    "dataset.toy.candidate_queries=8", "sft.max_steps=1", "rm.max_steps=1", "align.max_steps=2", "eval.prompts=4",
    "engine.device=cpu",
]  # fmt: skip
UNPAIRED_ROWS = [UNPAIRED | {"prompt": f"Which bread {n}?", "label": n % 2 == 0} for n in range(8)]
MISSING = ["stage=align", "build_inputs=false", *TOY]
case("data", "a stage whose input is not there", r"stage=sft", lambda folder, patch: MISSING)
case(
    "data",
    "a loss over pairs without pairs",
    r"loss=dpo.*loss=kto",
    on_file("stage=align", "loss=dpo", rows=UNPAIRED_ROWS),
)
BY_SCORES = ("stage=align", "loss=rrhf", "loss.ranking=scores")
case("data", "a ranking by scores without scores", r"loss\.ranking=scores.*line 1", on_file(*BY_SCORES))
TOO_SHORT = r"dataset\.max_length=3.*max_truncated_share"
case("data", "records that are too long", TOO_SHORT, on_file("stage=sft", "dataset.max_length=3"))
CLOSED = "{{ messages[0]['content'] }}"
NO_ANSWER = r"leaves out what the assistant says.*dataset\.template"
case("data", "a template without an answer", NO_ANSWER, lambda folder, patch: chat(folder, CLOSED))
case("data", "a template that is not there", r"no chat template", lambda folder, patch: chat(folder, None))


def chat(folder: Path, template: str | None) -> list[str]:
    """Training with dataset.template=chat, from a model whose tokenizer has this template."""
    model = saved_model(folder)
    if template is not None:
        (model / "chat_template.jinja").write_text(template)
    return ["stage=sft", *breads(folder), "dataset.template=chat", "model=hub", f"model.path={model}"]


# Models


def saved_model(folder: Path) -> Path:
    """A tiny policy with its tokenizer."""
    import helpers

    path = folder / "model"
    helpers.policy().save_pretrained(path)
    helpers.tokenizer().save_pretrained(path)
    return path


def model_case(name: str, message: str, spoil: Callable[[Path], None], *more: str) -> None:
    """A policy's folder that `spoil` has made unusable."""

    def make(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
        model = saved_model(folder)
        spoil(model)
        stage = [text.format(model) for text in more or ("stage=align",)]
        return [*breads(folder), "model=hub", f"model.path={model}", "sft.enabled=false", *stage]

    case("model", name, message, make)


def remove(*names: str) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return spoil


def no_end(model: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model / name).exists():
            settings = json.loads((model / name).read_text())
            (model / name).write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))


class Runs:
    """What a pickle would do as it is loaded."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/rdo-malformed-pickle-ran"),))


def evil_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Runs()))


def cut(name: str) -> Callable[[Path], None]:
    """A file that loses its end."""

    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return spoil


def adapter_of(base: str, weights: bool) -> Callable[[Path], None]:
    """Makes the model an adapter of another one."""

    def make(model: Path) -> None:
        (model / "config.json").unlink()
        if weights:
            (model / "model.safetensors").rename(model / "adapter_model.safetensors")
        else:
            (model / "model.safetensors").unlink()
        (model / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))

    return make


def hub_code(model: Path) -> None:
    settings = json.loads((model / "config.json").read_text())
    settings |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (model / "config.json").write_text(json.dumps(settings))
    (model / "code.py").write_text("raise SystemExit('hub code ran')")


model_case("missing", r"gone.*no such folder", lambda model: None, "stage=align", "model.path={}/gone")
model_case("no tokenizer", "no tokenizer", remove("tokenizer.json", "tokenizer_config.json"))
model_case("no end-of-sequence token", "end-of-sequence", no_end)
model_case("no config", "config", remove("config.json"))
model_case("a damaged config", "config", lambda model: (model / "config.json").write_text('{"model_type": ') and None)
model_case("truncated weights", r"model", cut("model.safetensors"))
model_case("a pickle that would run code", "pickle", evil_pickle)
model_case("hub code without leave", r"model\.trust_remote_code=true", hub_code)
model_case("an adapter without its weights", r"no model can be loaded from .*model", adapter_of(".", False))
model_case("an adapter whose model is gone", r"/gone: there is no such folder", adapter_of("/gone", True))
model_case(
    "a scorer without head", r"lacks weights.*score", lambda model: None, "stage=align", "rc=reward", "rm.path={}"
)
LONG = [TRL | {"prompt": f"Which bread {n}? " + "crumb " * 400} for n in range(4)]
TOO_LONG = on_file("stage=sft", "model.max_positions=64", "dataset.max_length=2000", rows=LONG)
case("model", "too few positions", r"positions|takes 64; lower dataset\.max_length", TOO_LONG)


# Artifacts


def artifact_case(name: str, message: str, spoil: Callable[[Path], None]) -> None:
    """Alignment that reads finished scores, which `spoil` has changed."""

    def make(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
        from rdo.stages.score import scores

        run = tiny_run(folder / "runs", *TOY, "rc=reward")
        made = scores(run, "reward", "train", False, run.config.align)
        spoil(made.folder)
        return ["stage=align", *TINY, *TOY, "rc=reward"]

    case("artifact", name, message, make)


def flip(folder: Path) -> None:
    data = bytearray((folder / "score.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "score.parquet").write_bytes(bytes(data))


def older(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 0}))


artifact_case("a half-written file", r"score\.parquet.*delete", cut("score.parquet"))
artifact_case("a file with a changed bit", r"score\.parquet cannot be read.*delete", flip)
artifact_case("a missing file", r"score\.parquet.*delete", lambda folder: (folder / "score.parquet").unlink())
artifact_case("a half-written manifest", r"manifest\.json.*delete", cut("manifest.json"))
artifact_case("another version", r"version", older)

# The machine


def machine(name: str, message: str, spoil: Callable[[Path, pytest.MonkeyPatch], Any], *overrides: str) -> None:
    def make(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
        spoil(folder, patch)
        return [*TINY, *TOY, *overrides]

    case("machine", name, message, make)


def no_number(name: str, message: str, spoil: Callable[[pytest.MonkeyPatch], None], *overrides: str) -> None:
    def make(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
        spoil(patch)
        return [*TINY, *TOY, *breads(folder), "dataset.workers=2", "model=small", *SMALL, *overrides]

    case("machine", name, message, make)


def full(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A disk with no room for models."""

    def save(model: Any, path: Path, **_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    patch.setattr("transformers.PreTrainedModel.save_pretrained", save)


def read_only(folder: Path, patch: pytest.MonkeyPatch) -> None:
    real = Path.mkdir

    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        if "runs" in path.parts:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        real(path, *arguments, **options)

    patch.setattr(Path, "mkdir", mkdir)


def out_of_memory(folder: Path, patch: pytest.MonkeyPatch) -> None:
    def step(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    patch.setattr("rdo.training.loop.training_step", step)


def not_a_number(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("rdo.objectives.losses.sft", lambda policy, length, *, reduction: policy * float("nan"))


def no_score(patch: pytest.MonkeyPatch) -> None:
    from rdo.stages import run

    real = run.read_all
    patch.setattr(run, "read_all", lambda *given: [[value * math.inf for value in row] for row in real(*given)])


machine("a full disk", r"no space|No space|disk is full", full, "stage=sft")
machine("a read-only folder", r"Read-only file system: '.*runs", read_only, "stage=sft")
OCCUPIED = r"Not a directory: '.*runs"
machine("run_dir is a file", OCCUPIED, lambda folder, patch: (folder / "runs").write_text("x"), "stage=sft")
machine("out of memory", r"engine\.tokens_per_micro_batch", out_of_memory, "stage=sft")
NO_LOSS = r"step 1: loss nan.*records \w+ \(.*data\.jsonl, line \d\)"
no_number("a loss that is not a number", NO_LOSS, not_a_number, "stage=sft")
NO_SCORE = r"values are no finite number; records \w+ \(.*data\.jsonl, line \d\)"
no_number("a score that is not a number", NO_SCORE, no_score, "stage=score", "rc=reward")
machine(
    "no such device",
    r"engine\.device=cuda.*engine\.device=cpu",
    lambda folder, patch: patch.setattr("torch.cuda.is_available", lambda: False),
    "stage=sft",
    "engine.device=cuda",
)
