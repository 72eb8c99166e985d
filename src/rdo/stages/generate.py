"""A policy's own responses to eval.split's prompts, made once, whoever judges them.

Written to generate.parquet: one row (record_id, text, ids, stopped) a response, in the order of `choose_prompts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import transformers
from tqdm import tqdm

from rdo.data.encoding import encode_prompts, find_ending
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
        ids = [record.id for record in chosen_records(run)]
        prompts = [prompt for _, prompt in asked(run, tokenizer)]
        longest = max(map(len, prompts)) + config.max_new_tokens
        check_positions(model, longest, "lower dataset.max_length or eval.max_new_tokens")
        dataset = run.config.dataset
        ending = find_ending(dataset.template, tokenizer, dataset.template_date)
        stops = find_stops(model, tokenizer, ending, config.stop)

        def rows(part: range, bar: tqdm) -> list[tuple[Any, ...]]:
            batch = slice(part.start, part.stop)
            seed = stable_seed(run.config.seed, "generate", part.start)
            made = generate_batch(model, tokenizer, prompts[batch], config, seed, stops)
            bar.update(len(made))
            return [(name, one.text, one.ids, one.stopped) for name, one in zip(ids[batch], made, strict=True)]

        return Body(f"generate {label}", ids, rows, config.batch_size)

    return table(run, "generate", label, settings, {"policy": policy}, TABLE, begin)


def chosen_records(run: Run) -> list[Record]:
    """The records of eval.split whose queries are answered."""
    records = run.records(run.config.eval.split)
    return [records[n] for n in choose_prompts(records, run.config.eval)]


def asked(run: Run, tokenizer: transformers.PreTrainedTokenizerBase) -> list[tuple[str, tuple[int, ...]]]:
    """What a policy with this tokenizer is asked by `chosen_records`: each query as far as there is room for it beside
    eval.max_new_tokens, and the prompt."""
    dataset, new = run.config.dataset, run.config.eval.max_new_tokens
    room, setting = dataset.max_length - new, f"dataset.max_length={dataset.max_length} less eval.max_new_tokens={new}"
    return encode_prompts(chosen_records(run), tokenizer, dataset.template, dataset.template_date, room, setting)


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
