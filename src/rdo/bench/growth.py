"""How time and memory of a step grow: with records per step, responses per query, and the query's length."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from transformers import PreTrainedModel

from rdo.bench.data import QUERY, made_records
from rdo.bench.measure import take_turns, untimed, warm_up
from rdo.bench.suite import Setting, implementations, prepared
from rdo.bench.works import Work, alignment_work
from rdo.forest import count_unique

RECORDS, RESPONSES, QUERIES = (1, 2, 4, 8, 16), (2, 4, 8, 16), (64, 256, 1024, 4096)
ROUNDS = 3
HEAD = f"{'grows':<20} {'':>6}  {'unique tokens':>13} {'seconds':>8} {'ms a token':>10} {'MB':>7}"


def points(policy: PreTrainedModel, reference: PreTrainedModel, setting: Setting) -> Iterator[tuple[str, int, Work]]:
    """What grows, its value, and the step: DPO's but for the responses, which are RRHF's."""
    vocabulary = policy.config.vocab_size

    def step(loss: str, count: int, responses: int, query: int) -> Work:
        records = made_records(count, responses, vocabulary, query=query)
        return alignment_work(loss, policy, reference, records, setting.config)

    for count in RECORDS:
        yield "records per step", count, step("dpo", count, 2, QUERY)
    for count in RESPONSES:
        yield "responses per query", count, step("rrhf", 1, count, QUERY)
    longest = policy.config.max_position_embeddings
    for length in QUERIES:
        if length + 2 * QUERY <= longest:
            yield "query length", length, step("dpo", 1, 2, length)


def measure_growth(policy: PreTrainedModel, reference: PreTrainedModel, setting: Setting) -> list[dict[str, Any]]:
    """Rows of the growth table: ours alone, all records alike."""
    attention = implementations(policy, setting)
    rows = []
    for name, value, work in points(policy, reference, setting):
        ours = prepared(work, "forest", attention)
        warm_up(ours, setting.device)
        untimed(ours)
        take_turns([ours], ROUNDS, setting.device)
        row = {
            "grows": name,
            "value": value,
            "tokens_unique": count_unique(work.sequences),
            "seconds": median(ours.seconds),
            "memory": ours.bytes,
        }
        setting.say(line(row))
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as the terminal shows it."""
    return (
        f"{row['grows']:<20} {row['value']:>6}  {row['tokens_unique']:>13,} {row['seconds']:>8.3f} "
        f"{1e3 * row['seconds'] / row['tokens_unique']:>10.3f} {row['memory'] / 1e6:>7,.0f}"
    )
