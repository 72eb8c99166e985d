"""Stage score: what a scorer says of a split, once, for every run of a sweep to read.

Written to scores.parquet: a pointwise reward model one row (record_id, response, reward) a response, a difference
model one row (record_id, first, second, forward, difference) an ordered pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from rdo.data.records import Record
from rdo.models.scorers import ComparisonTemplate, Reading, add_difference, add_reward, check_form, read_under
from rdo.runtime.errors import UserError
from rdo.runtime.parts import Shards
from rdo.runtime.store import Artifact, found, produce
from rdo.sequences.preparation import set_layout
from rdo.settings import TrainingConfig
from rdo.stages.run import Run, select
from rdo.stages.scorer import load_kind, scorer

SCORES = "scores.parquet"
REWARDS = pa.schema({"record_id": pa.string(), "response": pa.int64(), "reward": pa.float64()})
DIFFERENCES = pa.schema(
    {
        "record_id": pa.string(),
        "first": pa.int64(),
        "second": pa.int64(),
        "forward": pa.bool_(),
        "difference": pa.float64(),
    }
)


@dataclass(frozen=True)
class Scores:
    """Scores of records by id: rewards of responses, or outputs f of ordered pairs; one of the two is empty.

    forward: the pairs in the one order that R is read from (see `pairs_to_score`); the other order may be there too.
    """

    rewards: dict[tuple[str, int], float]
    differences: dict[tuple[str, int, int], float]
    forward: frozenset[tuple[str, int, int]] = frozenset()

    def output(self, record_id: str, first: int, second: int) -> float:
        """f(first, second) as the scorer said it: r(first) - r(second) of a pointwise one. KeyError if not scored."""
        if self.rewards:
            return self.rewards[record_id, first] - self.rewards[record_id, second]
        return self.differences[record_id, first, second]

    def difference(self, record_id: str, first: int, second: int, order: str = "forward") -> float:
        """R(first, second): f in the pair's forward order, R(j, i) = -R(i, j), whatever else was scored; or, for
        order=antisymmetric, [f(first, second) - f(second, first)] / 2. KeyError where the pair was not scored."""
        if order == "antisymmetric":
            return (self.output(record_id, first, second) - self.output(record_id, second, first)) / 2
        if self.rewards or (record_id, first, second) in self.forward:
            return self.output(record_id, first, second)
        return -self.output(record_id, second, first)

    def ranking(self, record: Record, baseline: bool = False) -> list[float]:
        """One number a response to rank by: its reward; its mean antisymmetric f against the others; or, with
        `baseline`, its antisymmetric f against the first response."""
        count = len(record.responses)
        if self.rewards:
            return [self.rewards[record.id, response] for response in range(count)]
        ranks = []
        for one in range(count):
            others = [0] if baseline else range(count)
            outputs = [self.difference(record.id, one, other, "antisymmetric") for other in others if other != one]
            ranks.append(sum(outputs) / max(1, len(outputs)))
        return ranks


def pairs_to_score(record: Record, both_orders: bool) -> list[tuple[int, int]]:
    """Every pair of a record's responses in its forward order: chosen first where it is labelled (f(y_w, y_l) is what
    R is read from), else i < j; then, if asked for, all pairs the other way round."""
    count = len(record.responses)
    labelled = {(p.chosen, p.rejected) for p in record.preferences}
    pairs = [
        (j, i) if (j, i) in labelled and (i, j) not in labelled else (i, j)
        for i in range(count)
        for j in range(i + 1, count)
    ]
    return pairs + [(j, i) for i, j in pairs] if both_orders else pairs


def scores(run: Run, kind: str, split: str, both_orders: bool, selection: TrainingConfig | None) -> Artifact:
    """The scores of a split's records (all, or the ones that a stage selects) by the scorer of a kind."""
    settings = score_settings(run, kind, split, both_orders, selection)
    if selection and run.config.rc.scores and run.config.rc.name == kind:
        return given_scores(run.config.rc.scores, kind, settings)
    model = scorer(run, kind)

    def make(folder: Path) -> dict[str, Any]:
        return write_scores(run, kind, model, split, settings["both_orders"], selection, folder)

    label = f"{kind}-{split}"
    return produce(run.provenance, "score", label, settings, {"scorer": model}, make, run.requested == "score")


def score_settings(
    run: Run, kind: str, split: str, both_orders: bool, selection: TrainingConfig | None
) -> dict[str, Any]:
    """What, beside the scorer, determines scores."""
    return {
        "data": run.data_settings(split),
        "both_orders": both_orders and kind == "diff",
        "dtype": run.dtype(),
        "selection": [selection.min_responses, selection.max_records] if selection else None,
        "difference_template": list(run.config.model.difference_template) if kind == "diff" else None,
    }


def given_scores(path: str, kind: str, wanted: dict[str, Any]) -> Artifact:
    """The finished folder of stage=score that rc.scores names. Raises UserError where there is none, or where it scores
    anything else than `wanted`, the settings of the scores that this run would make."""
    folder = Path(path)
    if not found(folder):
        raise UserError(f"rc.scores={path}: there is no finished folder of stage=score")
    artifact = Artifact(folder, "")
    manifest = artifact.manifest()
    if manifest["stage"] != "score":
        raise UserError(f"rc.scores={path}: is a folder of stage={manifest['stage']}, not of stage=score")
    if (manifest["results"]["form"] == "pointwise") != (kind == "reward"):
        raise UserError(f"rc.scores={path}: holds scores of the form {manifest['results']['form']}, not for rc={kind}")
    settings = flat_data(manifest["settings"])
    wanted = flat_data(wanted)
    for name, what in GIVEN.items():
        if settings[name] != wanted[name] and not (name == "both_orders" and settings[name]):
            both = "" if name == "data.records" else f": {settings[name]}, not {wanted[name]}"
            raise UserError(f"rc.scores={path}: was made {what}{both}; leave rc.scores out to have it made")
    return Artifact(folder, manifest["key"])


def flat_data(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of scores, those of the data beside the others, as data.NAME."""
    return {**settings, **{f"data.{name}": value for name, value in settings["data"].items()}}


# What given scores must have in common with the run, and how they differ where they have not.
GIVEN = {
    "data.split": "of another split",
    "data.records": "of other records (another data set, or other rows of it)",
    "data.template": "with another dataset.template",
    "data.max_length": "with another truncation, dataset.max_length",
    "selection": "of another selection (align.min_responses, align.max_records)",
    "both_orders": "in one order of each pair alone",
    "difference_template": "with another model.difference_template",
    "dtype": "with another model.dtype or engine.precision",
}


def write_scores(
    run: Run,
    kind: str,
    artifact: Artifact,
    split: str,
    both_orders: bool,
    selection: TrainingConfig | None,
    folder: Path,
) -> dict[str, Any]:
    """Scores the records, shard by shard, and joins them to the Parquet file. Raises as `Shards.make` does."""
    model, tokenizer = load_kind(run, artifact, kind)
    form, engine = check_form(model), run.config.engine
    layout = set_layout(model, engine.layout, engine.attention)
    records, encoded = run.records(split), run.encoded(split, tokenizer)
    chosen = np.array(select(records, selection), int) if selection else np.arange(len(records))
    if not len(chosen):
        raise UserError("no record to score: see align.min_responses")
    template = ComparisonTemplate(run.config.model.difference_template, tokenizer)

    def rows(part: range, bar: tqdm) -> list[tuple[Any, ...]]:
        places = chosen[part.start : part.stop]
        readings: list[Reading] = []
        keys: list[tuple[Any, ...]] = []
        for record, place in zip(records.only(places), places.tolist(), strict=True):
            reading, own = Reading(), encoded[place]
            if form == "pointwise":
                for response in range(len(record.responses)):
                    add_reward(reading, own, response)
                    keys.append((record.id, response))
            else:
                forward = pairs_to_score(record, False)
                for first, second in pairs_to_score(record, both_orders):
                    add_difference(reading, form, template, own, first, second)
                    keys.append((record.id, first, second, (first, second) in forward))
            readings.append(reading)
        outputs = read_under(bar, model, layout, readings, engine.tokens_per_micro_batch)
        numbers = [number for output in outputs for number in output]
        return [(*key, number) for key, number in zip(keys, numbers, strict=True)]

    schema = REWARDS if form == "pointwise" else DIFFERENCES
    shards = Shards(folder, schema, len(chosen), engine.records_per_shard)
    with run.locating(split):
        shards.make(f"score {form} {split}", lambda part: records.only(chosen[part.start : part.stop]).ids(), rows)
    return {"form": form, "records": len(chosen), "values": shards.join(folder / SCORES)}


def read_table(artifact: Artifact, name: str) -> dict[str, list[Any]]:
    """The columns of a Parquet file of ours. Raises UserError where it is not what was written."""
    path = artifact.folder / name
    try:
        return pq.read_table(path, page_checksum_verification=True).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({error}); delete {artifact.folder}, and run again") from error


def read_scores(artifact: Artifact) -> Scores:
    """The scores that `scores` wrote. Raises UserError where they are damaged."""
    table = read_table(artifact, SCORES)
    if "reward" in table:
        keys = zip(table["record_id"], table["response"], strict=True)
        return Scores(dict(zip(keys, table["reward"], strict=True)), {})
    ordered = list(zip(table["record_id"], table["first"], table["second"], strict=True))
    forward = frozenset(pair for pair, is_forward in zip(ordered, table["forward"], strict=True) if is_forward)
    return Scores({}, dict(zip(ordered, table["difference"], strict=True)), forward)
