"""Stage eval: a scorer against labels (and the gold), or a policy's own responses to test prompts.

Leaves evaluation.json, and for a policy generations.jsonl: one line a prompt with the response and its judgements.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rdo.data import toy
from rdo.data.encoding import EncodedRecord, encode
from rdo.data.records import Record, query_key
from rdo.data.table import Records
from rdo.evaluation import EVALUATION, GENERATIONS
from rdo.evaluation.scorers import evaluate_scorer
from rdo.models.generation import Generation, generate
from rdo.models.scorers import ComparisonTemplate, Reading, add_difference, add_reward, check_form, read_under
from rdo.objectives.intervals import empty_estimate, mean_interval, win_tie_lose
from rdo.runtime.errors import UserError
from rdo.runtime.files import read_json_lines, replace_file, write_json
from rdo.runtime.processes import is_rank0
from rdo.runtime.store import Artifact, produce, stable_seed
from rdo.settings import EvalConfig, TrainingConfig
from rdo.stages.align import aligned_policy
from rdo.stages.reference import log_probabilities
from rdo.stages.run import Run, select
from rdo.stages.score import read_scores, scores
from rdo.stages.scorer import check_labels, load_kind, scorer
from rdo.stages.sft import base_policy
from rdo.stages.shown import show_evaluation


def evaluate_scorers(run: Run, kind: str) -> Artifact:
    """Accuracy of a scorer on the labelled pairs of eval.split, shown in random order."""
    scored = scores(run, kind, run.config.eval.split, both_orders=True, selection=None)
    model = scorer(run, kind)
    settings = {"data": run.data_settings(run.config.eval.split), "seed": run.config.seed}
    made: list[Path] = []

    def make(folder: Path) -> dict[str, Any]:
        made.append(folder)
        read = read_scores(scored)
        forward, backward, labels, gold = [], [], [], []
        # By id, so that the coins which show a pair first or second do not depend on the order of the file.
        records = run.records(run.config.eval.split)
        ids = records.ids()
        for record in records.only(np.array(sorted(range(len(ids)), key=ids.__getitem__), int)):
            for preference in record.preferences:
                chosen, rejected = preference.chosen, preference.rejected
                forward.append(read.output(record.id, chosen, rejected))
                backward.append(read.output(record.id, rejected, chosen))
                labels.append(0.5 if preference.tie else 1.0)
                gold.append(record.scores[chosen] - record.scores[rejected] if record.scores else None)
        if not labels:
            raise UserError(f"dataset={run.config.dataset.name}: no labelled pair in the split {run.config.eval.split}")
        # Only the toy world's scores are the truth; a data set's own scores are another model's opinion.
        truth = gold if run.config.dataset.source == "toy" else None
        evaluation = evaluate_scorer(forward, backward, labels, truth, seed=stable_seed(run.config.seed, "order"))
        if is_rank0():
            write_json(folder / EVALUATION, evaluation)
        return {"metric": evaluation["label_accuracy"]["value"]}

    inputs = {"scores": scored, "scorer": model}
    artifact = produce(run.provenance, "eval", f"scorer-{kind}", settings, inputs, make, run.requested == "eval")
    if made:
        show_evaluation(run, artifact)
    return artifact


def evaluate_policy(run: Run, subject: str) -> Artifact:
    """Responses of the base or the aligned policy to eval.split's prompts, judged and compared with the base's."""
    judges = list(run.config.eval.judges)
    if run.config.dataset.source != "toy":
        judges = [judge for judge in judges if judge != "gold"]
    if subject == "base":
        judges = [judge for judge in judges if judge != "diff"]  # which compares with the base policy
    for judge in judges:
        if judge != "gold":
            check_labels(run, judge)  # before anything is trained
    policy = base_policy(run) if subject == "base" else aligned_policy(run)
    base = base_policy(run)
    inputs = {"policy": policy}
    if subject != "base":
        inputs |= {"base": base, "against": evaluate_policy(run, "base")}
    inputs |= {judge: scorer(run, judge) for judge in judges if judge != "gold"}
    unread = {"subject", "judges", "samples"} | ({"temperature"} if run.config.eval.decoding == "greedy" else set())
    settings = {
        "eval": {key: value for key, value in asdict(run.config.eval).items() if key not in unread},
        "difference_template": list(run.config.model.difference_template) if "diff" in judges else None,
        "judges": judges,
        "data": run.data_settings(run.config.eval.split),
        "dtype": run.dtype(),
        "seed": run.config.seed,
    }

    made: list[Path] = []

    def make(folder: Path) -> dict[str, Any]:
        made.append(folder)
        return write_evaluation(run, inputs, judges, folder)

    label = "base" if subject == "base" else policy.folder.name.rsplit("-", 1)[0]
    artifact = produce(run.provenance, "eval", label, settings, inputs, make, run.requested == "eval")
    if made:
        show_evaluation(run, artifact)
    return artifact


def write_evaluation(run: Run, inputs: dict[str, Artifact], judges: Sequence[str], folder: Path) -> dict[str, Any]:
    """Generates, judges, compares, and writes the two files. Raises as `Shards.make` does."""
    config = run.config
    records = run.records(config.eval.split)
    places = choose_prompts(records, config.eval)
    chosen = [records[n] for n in places]
    model, tokenizer = run.policy(inputs["policy"])
    encoded = run.encoded(config.eval.split, tokenizer)
    prompts = [encoded[n].prompt for n in places]
    responses = generate(model, tokenizer, prompts, config.eval, config.seed, folder, f"generate {folder.name}")
    against = read_json_lines(inputs["against"].folder / GENERATIONS) if "against" in inputs else None
    judged, compared = judge_responses(run, inputs, judges, chosen, responses, against)
    ratios = mean_interval(log_ratios(run, model, inputs.get("base"), prompts, responses))
    unbiased = config.eval.decoding == "sample" and config.eval.temperature == 1.0
    mean_rewards = {judge: mean_interval(values) for judge, values in judged.items()}
    evaluation = {
        "prompts": len(chosen),
        "queries": len({query_key(record.query) for record in chosen}),
        "rewards": mean_rewards,
        "length": mean_interval([len(response.ids) for response in responses]),
        "stopped": mean_interval([float(response.stopped) for response in responses]),
        # Only samples of the policy itself estimate its KL; of any other responses this is a mere log-ratio.
        "kl": ratios if unbiased else empty_estimate(),
        "log_ratio": ratios,
        "against_base": {judge: win_tie_lose(values) for judge, values in compared.items()} or None,
        "mean_difference_to_base": {judge: mean_interval(values) for judge, values in compared.items()},
    }
    if is_rank0():
        write_generations(folder / GENERATIONS, chosen, responses, judged)
        write_json(folder / EVALUATION, evaluation)
    return {"metric": next((estimate["value"] for estimate in mean_rewards.values()), None)}


def judge_responses(
    run: Run,
    inputs: dict[str, Artifact],
    judges: Sequence[str],
    chosen: list[Record],
    responses: list[Generation],
    against: list[dict[str, Any]] | None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By judge: the responses' rewards, and how much better each is than the base policy's (`against`)."""
    judged: dict[str, list[float]] = {}
    compared: dict[str, list[float]] = {}
    for judge in judges:
        if judge == "diff":
            # A difference model has no reward of its own: it compares, with the base policy's response.
            if against is not None:
                compared[judge] = compare(run, inputs[judge], chosen, responses, against)
            continue
        judged[judge] = rewards(run, inputs.get(judge), chosen, responses)
        if against is not None:
            compared[judge] = [a - b["rewards"][judge] for a, b in zip(judged[judge], against, strict=True)]
    for values in compared.values():
        # The same response twice is a tie, which rounding in different micro-batches must not decide.
        for n, (response, other) in enumerate(zip(responses, against or [], strict=True)):
            if response.text == other["response"] and response.stopped == other["stopped"]:
                values[n] = 0.0
    return judged, compared


def write_generations(
    path: Path, chosen: list[Record], responses: list[Generation], judged: dict[str, list[float]]
) -> None:
    """One line a prompt, with the response and its rewards. Raises as `replace_file` does."""
    lines = [
        {
            "id": record.id,
            "query": record.query,
            "response": response.text,
            "stopped": response.stopped,
            "rewards": {judge: judged[judge][n] for judge in judged},
        }
        for n, (record, response) in enumerate(zip(chosen, responses, strict=True))
    ]
    with replace_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def choose_prompts(records: Sequence[Record], config: EvalConfig) -> list[int]:
    """Places of the records whose queries are answered: as many different queries as there are, in the hash order of
    `select`, and only where sampling gives another response each time further records of the same query."""
    records = records if isinstance(records, Records) else Records.in_memory(records)
    ordered = select(records, TrainingConfig())
    seen: Counter[int] = Counter()
    turns = []
    for query in records.query_keys()[ordered].tolist():
        turns.append(seen[query])
        seen[query] += 1
    by_turn = sorted(range(len(ordered)), key=lambda n: turns[n])
    usable = [n for n in by_turn if turns[n] == 0 or config.decoding == "sample"]
    return [ordered[n] for n in usable[: config.prompts]]


def rewards(run: Run, judge: Artifact | None, records: list[Record], responses: list[Generation]) -> list[float]:
    """Reward of each response: the toy world's own without a judge, else the pointwise model's."""
    if judge is None:
        pairs = zip(records, responses, strict=True)
        return [toy.reward(record.query, response.text, stopped=response.stopped) for record, response in pairs]
    model, tokenizer = load_kind(run, judge, "reward")
    texts = [(record, [response.text]) for record, response in zip(records, responses, strict=True)]
    readings = []
    for encoded in encode_texts(run, tokenizer, texts):
        reading = Reading()
        add_reward(reading, encoded, 0)
        readings.append(reading)
    return [values[0] for values in judge_all(run, model, readings, "judge reward")]


def compare(
    run: Run, judge: Artifact, records: list[Record], responses: list[Generation], against: list[dict[str, Any]]
) -> list[float]:
    """[f(response, other) - f(other, response)] / 2 of each response and the base policy's: no order to gain from."""
    model, tokenizer = load_kind(run, judge, "diff")
    form = check_form(model)
    template = ComparisonTemplate(run.config.model.difference_template, tokenizer)
    texts = [(r, [own.text, other["response"]]) for r, own, other in zip(records, responses, against, strict=True)]
    readings = []
    for encoded in encode_texts(run, tokenizer, texts):
        reading = Reading()
        add_difference(reading, form, template, encoded, 0, 1)
        add_difference(reading, form, template, encoded, 1, 0)
        readings.append(reading)
    return [(forward - backward) / 2 for forward, backward in judge_all(run, model, readings, "judge diff")]


def encode_texts(
    run: Run, tokenizer: PreTrainedTokenizerBase, texts: list[tuple[Record, list[str]]]
) -> list[EncodedRecord]:
    """Generated responses as the scorer's own tokenizer reads them."""
    records = [Record(record.id, record.query, tuple(responses)) for record, responses in texts]
    dataset = run.config.dataset
    return encode(records, tokenizer, dataset.template, dataset.max_length)[0]


def judge_all(run: Run, model: PreTrainedModel, readings: list[Reading], title: str) -> list[list[float]]:
    """A judge's values of all readings, in the layout that it can run."""
    return run.read_all(model, readings, title, read_under)


def log_ratios(
    run: Run, model: PreTrainedModel, base: Artifact | None, prompts: list[tuple[int, ...]], responses: list[Generation]
) -> list[float]:
    """log pi(y) - log pi_base(y) of the policy's own responses, whose mean estimates KL(policy || base), in nats."""
    items = [(prompt, [response.ids]) for prompt, response in zip(prompts, responses, strict=True)]
    if base is None:
        return [0.0] * len(items)
    own = log_probabilities(run, model, items, "log-probabilities policy")
    reference = log_probabilities(run, run.policy(base)[0], items, "log-probabilities base")
    return [a[0] - b[0] for a, b in zip(own, reference, strict=True)]
