"""Stage eval: a scorer against labels (and the gold), or a policy's own responses to test prompts.

Leaves evaluation.json, and for a policy generations.jsonl: one line a prompt with the response and its judgements.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rdo.data import toy
from rdo.data.encoding import encode
from rdo.data.records import Record, query_key
from rdo.evaluation import EVALUATION, GENERATIONS
from rdo.evaluation.scorers import evaluate_scorer
from rdo.models.generation import Generation
from rdo.models.pretrained import load_tokenizer
from rdo.objectives.intervals import empty_estimate, mean_interval, share_interval, win_tie_lose
from rdo.runtime.errors import UserError
from rdo.runtime.files import read_json_lines, replace_file, write_json
from rdo.runtime.processes import is_rank0
from rdo.runtime.store import Artifact, stable_seed
from rdo.sequences.forward import Reads
from rdo.stages.align import aligned_policy
from rdo.stages.generate import asked, chosen_records, generate, generation_settings, read_responses
from rdo.stages.run import Run, model_path
from rdo.stages.score import read_scores, scores
from rdo.stages.scorer import check_labels, load_kind, scorer
from rdo.stages.sft import base_policy
from rdo.stages.shown import show_evaluation


def evaluate_scorers(run: Run, kind: str) -> Artifact:
    """Accuracy of a scorer on the labelled pairs of eval.split, shown in random order."""
    scored = scores(run, kind, run.config.eval.split, both_orders=True, selection=None)
    model = scorer(run, kind)
    settings = run.settings(run.config.eval.split, seed=run.config.seed)

    def make(folder: Path) -> dict[str, Any]:
        read = read_scores(scored)
        forward, backward, labels, gold, queries, alike = [], [], [], [], [], 0
        # By id, so that the coins which show a pair first or second do not depend on the order of the file.
        records = run.records(run.config.eval.split)
        encoded = run.encoded(run.config.eval.split, load_tokenizer(model_path(model), run.config.model))
        ids = records.ids()
        places = sorted(range(len(ids)), key=ids.__getitem__)
        for place, record in zip(places, records.only(np.array(places, int)), strict=True):
            seen = encoded[place].responses
            for preference in record.preferences:
                chosen, rejected = preference.chosen, preference.rejected
                if seen[chosen] == seen[rejected] and not preference.tie:
                    alike += 1  # cut where they differ: there is nothing to be right about
                    continue
                forward.append(read.output(record.id, chosen, rejected))
                backward.append(read.output(record.id, rejected, chosen))
                labels.append(0.5 if preference.tie else 1.0)
                queries.append(query_key(record.query))
                gold.append(record.scores[chosen] - record.scores[rejected] if record.scores else None)
        if not labels:
            raise UserError(f"dataset={run.config.dataset.name}: no labelled pair in the split {run.config.eval.split}")
        # Only the toy world's scores are the truth; a data set's own scores are another model's opinion.
        truth = gold if run.config.dataset.source == "toy" else None
        seed = stable_seed(run.config.seed, "order")
        evaluation = evaluate_scorer(forward, backward, labels, truth, seed, queries) | {"pairs_alike": alike}
        if is_rank0():
            write_json(folder / EVALUATION, evaluation)
        return {"metric": evaluation["label_accuracy"]["value"]}

    return shown_when_made(run, f"scorer-{kind}", settings, {"scores": scored, "scorer": model}, make)


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
    label = "base" if subject == "base" else policy.folder.name.rsplit("-", 1)[0]
    inputs["responses"] = generate(run, policy, label)
    settings = run.settings(
        run.config.eval.split,
        eval=generation_settings(run.config.eval),
        difference_template=list(run.config.model.difference_template) if "diff" in judges else None,
        judges=judges,
        seed=run.config.seed,
    )
    return shown_when_made(run, label, settings, inputs, partial(write_evaluation, run, inputs, judges))


def shown_when_made(
    run: Run,
    label: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    make: Callable[[Path], dict[str, Any]],
) -> Artifact:
    """The artifact of an evaluation, which is shown in wandb when it is made."""
    made: list[Path] = []

    def noted(folder: Path) -> dict[str, Any]:
        made.append(folder)
        return make(folder)

    artifact = run.produce("eval", label, settings, inputs, noted)
    if made:
        show_evaluation(run, artifact)
    return artifact


def write_evaluation(run: Run, inputs: dict[str, Artifact], judges: Sequence[str], folder: Path) -> dict[str, Any]:
    """Judges and compares the responses, and writes the two files."""
    config = run.config
    chosen = chosen_records(run)
    responses = read_responses(inputs["responses"])
    against = read_json_lines(inputs["against"].folder / GENERATIONS) if "against" in inputs else None
    judged, compared = judge_responses(run, inputs, judges, chosen, responses, against)
    queries = [query_key(record.query) for record in chosen]
    ratios = mean_interval(log_ratios(run, inputs, responses), queries)
    unbiased = config.eval.decoding == "sample" and config.eval.temperature == 1.0
    mean_rewards = {judge: mean_interval(values, queries) for judge, values in judged.items()}
    evaluation = {
        "prompts": len(chosen),
        "queries": len(set(queries)),
        "rewards": mean_rewards,
        "length": mean_interval([len(response.ids) for response in responses], queries),
        "stopped": share_interval([response.stopped for response in responses], queries),
        # Only samples of the policy itself estimate its KL; of any other responses this is a mere log-ratio.
        "kl": ratios if unbiased else empty_estimate(),
        "log_ratio": ratios,
        "against_base": {judge: win_tie_lose(values, queries) for judge, values in compared.items()} or None,
        "mean_difference_to_base": {judge: mean_interval(values, queries) for judge, values in compared.items()},
    }
    if is_rank0():
        tokenizer = load_tokenizer(model_path(inputs["policy"]), config.model)
        seen = [query for query, _ in asked(run, tokenizer)]
        write_generations(folder / GENERATIONS, chosen, seen, responses, judged)
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
    path: Path,
    chosen: list[Record],
    queries: list[str],
    responses: list[Generation],
    judged: dict[str, list[float]],
) -> None:
    """One line a prompt, with the query as the policy saw it, the response and its rewards. Raises as `replace_file`
    does."""
    lines = [
        {
            "id": record.id,
            "query": query,
            "response": response.text,
            "stopped": response.stopped,
            "rewards": {judge: judged[judge][n] for judge in judged},
        }
        for n, (record, query, response) in enumerate(zip(chosen, queries, responses, strict=True))
    ]
    with replace_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rewards(run: Run, judge: Artifact | None, records: list[Record], responses: list[Generation]) -> list[float]:
    """Reward of each response: the toy world's own without a judge, else the pointwise model's."""
    if judge is None:
        pairs = zip(records, responses, strict=True)
        return [toy.reward(record.query, response.text, stopped=response.stopped) for record, response in pairs]
    texts = [(response.text,) for response in responses]
    return [values[0] for values in judged_by(run, judge, "reward", records, texts, [(0,)])]


def compare(
    run: Run, judge: Artifact, records: list[Record], responses: list[Generation], against: list[dict[str, Any]]
) -> list[float]:
    """[f(response, other) - f(other, response)] / 2 of each response and the base policy's: no order to gain from."""
    texts = [(own.text, other["response"]) for own, other in zip(responses, against, strict=True)]
    both = judged_by(run, judge, "diff", records, texts, [(0, 1), (1, 0)])
    return [(forward - backward) / 2 for forward, backward in both]


def judged_by(
    run: Run,
    judge: Artifact,
    kind: str,
    records: Sequence[Record],
    texts: Sequence[tuple[str, ...]],
    listed: Sequence[Sequence[int]],
) -> list[list[float]]:
    """A scorer's values of texts as responses to the records' queries, encoded by its own tokenizer."""
    scorer = load_kind(run, judge, kind)
    answered = [
        Record(record.id, record.query, responses, messages=record.messages)
        for record, responses in zip(records, texts, strict=True)
    ]
    encoded = encode(answered, scorer.tokenizer, **run.encoding())
    return run.read_all(scorer.model, [scorer.reads(record, listed) for record in encoded], f"judge {kind}")


def log_ratios(run: Run, inputs: Mapping[str, Artifact], responses: Sequence[Generation]) -> list[float]:
    """log pi(y) - log pi_base(y) of the policy's own responses, whose mean estimates KL(policy || base), in nats."""
    if "base" not in inputs:
        return [0.0] * len(responses)
    read = []
    for name in ("policy", "base"):
        model, tokenizer = run.policy(inputs[name])
        prompts = [prompt for _, prompt in asked(run, tokenizer)]
        items = [Reads.of(prompt, [one.ids]) for prompt, one in zip(prompts, responses, strict=True)]
        read.append(run.read_all(model, items, f"log-probabilities {name}"))
    return [own - base for (own,), (base,) in zip(*read, strict=True)]
