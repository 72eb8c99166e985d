"""The files that dataset.path names, and what their names say."""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdo.data.containers.problems import shown
from rdo.errors import DataError

SUFFIXES = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "JSON"),
    **dict.fromkeys((".csv", ".tsv"), "CSV"),
    ".parquet": "Parquet",
    **dict.fromkeys((".arrow", ".feather", ".ipc"), "Arrow"),
}


def resolve(path: Any) -> list[Path]:
    """The files that dataset.path names: a file, a glob ('data/*.parquet', '**' too), or a list of either.

    Sorted within a glob, no file twice, `~` is the home folder. Raises DataError where a file is missing or none.
    """
    entries = list(path) if isinstance(path, Sequence) and not isinstance(path, str | bytes) else [path]
    files: dict[str, Path] = {}
    for entry in entries or [None]:
        if entry is None or (isinstance(entry, str) and not entry.strip()):
            raise DataError("dataset.path: no file is given; name a file, a glob ('data/*.parquet'), or a list of them")
        if not isinstance(entry, str | Path):
            raise DataError(f"dataset.path: {shown(repr(entry))} is no text; write names of files in quotes")
        for file in _matches(os.path.expanduser(entry)):
            _check_file(file)
            files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def _matches(name: str) -> list[Path]:
    if url := re.match(r"\s*([a-zA-Z][a-zA-Z0-9+.-]+)://?(.*)", name):
        raise DataError(f"{shown(name, 200)}: is a URL; {_instead_of(url[1].lower(), url[2])}")
    if "\0" in name:
        raise DataError(f"dataset.path: '{shown(name)}' holds a NUL character; correct the name")
    found = [name]
    if any(character in name for character in "*?[") and not os.path.lexists(name):
        found = sorted(match for match in glob.glob(name, recursive=True) if not os.path.isdir(match))
    if not found:
        raise DataError(f"{name}: the pattern matches no file; correct it, seen from {os.getcwd()}")
    return [Path(match) for match in found]


def _instead_of(scheme: str, rest: str) -> str:
    """What to do where a URL was given."""
    if scheme == "file":
        return "write the path alone, without file://"
    on_hub = re.match(r"/?(?:huggingface\.co/)?datasets/([\w.-]+/[\w.-]+)", rest) if scheme in ("hf", "https") else None
    name = on_hub[1].partition("@")[0] if on_hub else "OWNER/NAME"
    return f"download the file and name it, or read a data set of the hub: dataset.source=hub dataset.hub_name={name}"


def _check_file(file: Path) -> None:
    if os.path.isdir(file):
        raise DataError(f"{file}: is a folder; {_name_files(file)}")
    if os.path.islink(file) and not os.path.exists(file):
        way_out = "run `git annex get` on it" if "annex/objects" in os.readlink(file) else "mend the link"
        raise DataError(f"{file}: is a link to a file that is not there; {way_out}")
    if not os.path.exists(file):
        try:
            near = difflib.get_close_matches(file.name, os.listdir(file.parent), n=1)
        except OSError:
            near = []
        way_out = f"did you mean {shown(near[0])}?" if near else "check dataset.path"
        missing = "such file" if os.path.isdir(file.parent) else f"folder {file.parent}"
        raise DataError(f"{file}: there is no {missing}; {way_out}")
    if not os.path.isfile(file):
        raise DataError(f"{file}: is a pipe or device, not a file; write the data to a file first")


def _name_files(folder: Path) -> str:
    """The advice to name the folder's files, by the suffix that most of them have."""
    for pattern in ("*", "**/*"):
        files = (file for file in itertools.islice(folder.glob(pattern), 10_000) if os.path.isfile(file))
        suffixes = Counter(file.name[len(stem_of(file)) :] for file in files if not file.name.startswith("."))
        if suffixes:
            best = max(suffixes, key=lambda suffix: (suffix_of(Path("x" + suffix)) in SUFFIXES, suffixes[suffix]))
            return f"name its files, '{folder}/{pattern}{best}'"
    return "there is no file in it, check dataset.path"


def stem_of(file: Path) -> str:
    """The file's name without .gz and the suffix before it."""
    return os.path.splitext(file.name[: -3 if file.suffix.lower() == ".gz" else None])[0]


def suffix_of(file: Path) -> str:
    """The file's suffix, the one before .gz, in small letters."""
    return os.path.splitext(file.name.lower().removesuffix(".gz"))[1]
