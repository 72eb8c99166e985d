"""Stage score: what a scorer says of a split, once, for every run of a sweep to read.

Written to scores.parquet: a pointwise reward model one row (record_id, response, reward) a response, a difference
model one row (record_id, first, second, forward, difference) an ordered pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rdo.artifacts import Artifact, produce
from rdo.data.records import Record
from rdo.errors import UserError
from rdo.files import replace_file
from rdo.models import set_layout
from rdo.run import Run, select
from rdo.schema import TrainingConfig
from rdo.scorers import ComparisonTemplate, Reading, add_difference, add_reward, check_form, read_all
from rdo.stages.scorer import load_kind, scorer

SCORES = "scores.parquet"


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
    model = scorer(run, kind)
    both_orders = both_orders and kind == "diff"
    settings: dict[str, Any] = {
        "data": run.data_settings(split),
        "both_orders": both_orders,
        "dtype": run.config.model.dtype,
        "selection": [selection.min_responses, selection.max_records] if selection else None,
        "difference_template": list(run.config.model.difference_template) if kind == "diff" else None,
    }

    def make(folder: Path) -> dict[str, Any]:
        return write_scores(run, kind, model, split, both_orders, selection, folder)

    label = f"{kind}-{split}"
    return produce(run.provenance, "score", label, settings, {"scorer": model}, make, run.requested == "score")


def write_scores(
    run: Run,
    kind: str,
    artifact: Artifact,
    split: str,
    both_orders: bool,
    selection: TrainingConfig | None,
    folder: Path,
) -> dict[str, Any]:
    """Scores the records and writes the Parquet file."""
    model, tokenizer = load_kind(run, artifact, kind)
    form = check_form(model)
    layout = set_layout(model, run.config.engine.layout)
    records, encoded = run.records(split), run.encoded(split, tokenizer)
    chosen = select(records, selection) if selection else list(range(len(records)))
    if not chosen:
        raise UserError("no record to score: see align.min_responses")
    template = ComparisonTemplate(run.config.model.difference_template, tokenizer)
    readings: list[Reading] = []
    rows: list[tuple[str | int, ...]] = []
    for n in chosen:
        reading = Reading()
        if form == "pointwise":
            for response in range(len(records[n].responses)):
                add_reward(reading, encoded[n], response)
                rows.append((records[n].id, response))
        else:
            forward = pairs_to_score(records[n], False)
            for first, second in pairs_to_score(records[n], both_orders):
                add_difference(reading, form, template, encoded[n], first, second)
                rows.append((records[n].id, first, second, (first, second) in forward))
        readings.append(reading)
    outputs = read_all(model, layout, readings, run.config.engine.tokens_per_micro_batch, f"score {form} {split}")
    columns = ["response", "reward"] if form == "pointwise" else ["first", "second", "forward", "difference"]
    numbers = [number for output in outputs for number in output]
    write_table(
        folder / SCORES, ["record_id", *columns], [(*row, number) for row, number in zip(rows, numbers, strict=True)]
    )
    return {"form": form, "records": len(chosen), "values": len(numbers)}


def write_table(path: Path, names: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    """A Parquet file of these columns, written whole or not at all."""
    columns = list(zip(*rows, strict=True))
    with replace_file(path) as temporary:
        pq.write_table(pa.table({name: list(column) for name, column in zip(names, columns, strict=True)}), temporary)


def read_scores(artifact: Artifact) -> Scores:
    """The scores that `scores` wrote."""
    table = pq.read_table(artifact.folder / SCORES).to_pydict()
    if "reward" in table:
        keys = zip(table["record_id"], table["response"], strict=True)
        return Scores(dict(zip(keys, table["reward"], strict=True)), {})
    ordered = list(zip(table["record_id"], table["first"], table["second"], strict=True))
    forward = frozenset(pair for pair, is_forward in zip(ordered, table["forward"], strict=True) if is_forward)
    return Scores({}, dict(zip(ordered, table["difference"], strict=True)), forward)
