"""A policy's own responses to eval.split's prompts, made once, whoever judges them.

Written to generate.parquet: one row (record_id, text, ids, stopped) a response, in the order of `choose_prompts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from rdo.data.encoding import find_ending
from rdo.data.records import Record, Records
from rdo.models.generation import Generation, find_stops, generate_batch
from rdo.runtime.store import Artifact, stable_seed
from rdo.sequences.forward import check_positions
from rdo.settings import EvalConfig, TrainingConfig
from rdo.stages.run import Run, select
from rdo.stages.tables import Body, read_table, table

TABLE = pa.schema({"record_id": pa.string(), "text": pa.string(), "ids": pa.list_(pa.int64()), "stopped": pa.bool_()})


def generate(run: Run, policy: Artifact, label: str) -> Artifact:
    """One response a prompt. Each batch seeds its own random numbers, so the same config repeats exactly."""
    config = run.config.eval
    settings = run.settings(config.split, eval=generation_settings(config), seed=run.config.seed)

    def begin() -> Body:
        model, tokenizer = run.policy(policy)
        places = choose_prompts(run.records(config.split), config)
        encoded = run.encoded(config.split, tokenizer)
        records = [encoded[n] for n in places]
        longest = max(len(record.prompt) for record in records) + config.max_new_tokens
        check_positions(model, longest, "lower dataset.max_length or eval.max_new_tokens")
        dataset = run.config.dataset
        stops = find_stops(
            model, tokenizer, find_ending(dataset.template, tokenizer, dataset.template_date), config.stop
        )

        def rows(part: range, bar: tqdm) -> list[tuple[Any, ...]]:
            batch = records[part.start : part.stop]
            seed = stable_seed(run.config.seed, "generate", part.start)
            made = generate_batch(model, tokenizer, [record.prompt for record in batch], config, seed, stops)
            bar.update(len(batch))
            return [(record.id, one.text, one.ids, one.stopped) for record, one in zip(batch, made, strict=True)]

        return Body(f"generate {label}", [record.id for record in records], rows, config.batch_size)

    return table(run, "generate", label, settings, {"policy": policy}, TABLE, begin)


def read_responses(artifact: Artifact) -> list[Generation]:
    """The responses that `generate` wrote, in the order of `choose_prompts`."""
    columns = read_table(artifact)
    rows = zip(columns["text"], columns["ids"], columns["stopped"], strict=True)
    return [Generation(text, tuple(ids), stopped) for text, ids, stopped in rows]


def generation_settings(config: EvalConfig) -> dict[str, Any]:
    """Those of eval.* that responses depend on."""
    unread = {"subject", "judges", "samples"} | ({"temperature"} if config.decoding == "greedy" else set())
    return {key: value for key, value in asdict(config).items() if key not in unread}


def choose_prompts(records: Sequence[Record], config: EvalConfig) -> list[int]:
    """Places of the records whose queries are answered: as many different queries as there are, in the hash order of
    `select`, and only where sampling gives another response each time further records of the same query."""
    records = records if isinstance(records, Records) else Records.in_memory(records)
    ordered = select(records, TrainingConfig())
    seen: Counter[int] = Counter()
    turns = []
    for query in records.known("query_key")[ordered].tolist():
        turns.append(seen[query])
        seen[query] += 1
    by_turn = sorted(range(len(ordered)), key=lambda n: turns[n])
    usable = [n for n in by_turn if turns[n] == 0 or config.decoding == "sample"]
    return [ordered[n] for n in usable[: config.prompts]]
