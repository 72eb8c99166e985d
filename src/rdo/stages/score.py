"""Stage score: what a scorer says of a split, once, for every run of a sweep to read.

Written to score.parquet: a pointwise reward model one row (record_id, response, reward) a response, a difference
model one row (record_id, first, second, forward, difference) an ordered pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rdo.data.records import Record
from rdo.runtime.store import Artifact
from rdo.sequences.forward import Reads
from rdo.settings import TrainingConfig
from rdo.stages.run import Run, select
from rdo.stages.scorer import load_kind, scorer
from rdo.stages.tables import Body, read_table, reading, table

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
    model, both_orders = scorer(run, kind), both_orders and kind == "diff"
    settings = run.settings(
        split,
        both_orders=both_orders,
        selection=selection and [selection.min_responses, selection.max_records],
        difference_template=list(run.config.model.difference_template) if kind == "diff" else None,
    )

    def begin() -> Body:
        loaded, records = load_kind(run, model, kind), run.records(split)
        encoded = run.encoded(split, loaded.tokenizer)
        chosen = np.array(select(records, selection), int) if selection else np.arange(len(records))

        def listed(part: range) -> Iterator[tuple[Reads, list[tuple[Any, ...]]]]:
            places = chosen[part.start : part.stop]
            for record, place in zip(records.only(places), places.tolist(), strict=True):
                if kind == "reward":
                    responses = range(len(record.responses))
                    yield loaded.reads(encoded[place], [(n,) for n in responses]), [(record.id, n) for n in responses]
                    continue
                forward, pairs = pairs_to_score(record, False), pairs_to_score(record, both_orders)
                yield loaded.reads(encoded[place], pairs), [(record.id, *pair, pair in forward) for pair in pairs]

        title = f"score {loaded.form} {split}"
        return reading(run, loaded.model, title, records.only(chosen).ids(), listed)

    schema = REWARDS if kind == "reward" else DIFFERENCES
    return table(run, "score", f"{kind}-{split}", settings, {"scorer": model}, schema, begin)


def read_scores(artifact: Artifact) -> Scores:
    """The scores that `scores` wrote. Raises UserError where they are damaged."""
    columns = read_table(artifact)
    if "reward" in columns:
        keys = zip(columns["record_id"], columns["response"], strict=True)
        return Scores(dict(zip(keys, columns["reward"], strict=True)), {})
    ordered = list(zip(columns["record_id"], columns["first"], columns["second"], strict=True))
    forward = frozenset(pair for pair, is_forward in zip(ordered, columns["forward"], strict=True) if is_forward)
    return Scores({}, dict(zip(ordered, columns["difference"], strict=True)), forward)
