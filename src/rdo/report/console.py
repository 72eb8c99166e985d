"""What a terminal shows of results: a few narrow lines; the page, report.md and the JSON files hold the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rdo.errors import printable
from rdo.report.aggregate import aggregate
from rdo.report.findings import policy_sentences, primary_judge, scorer_sentences


def shown(lines: Iterable[str]) -> str:
    """Lines for a terminal, which acts upon nothing that stands in them."""
    return "\n".join(printable(line, keep="") for line in lines)


def interval(estimate: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A value with its interval, or with its spread over seeds."""
    value = None if estimate is None else estimate.get("value", estimate.get("mean"))
    if estimate is None or value is None:
        return "-"
    if estimate.get("sd") is not None:
        return f"{value:.{digits}f} ± {estimate['sd']:.{digits}f}"
    low, high = estimate.get("low"), estimate.get("high")
    return f"{value:.{digits}f}" if low is None else f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def describe_scorer(evaluation: Mapping[str, Any]) -> str:
    """A scorer's evaluation.json in lines."""
    lines = [f"label accuracy {interval(evaluation['label_accuracy'])}, {evaluation['pairs']} pairs in random order"]
    if evaluation.get("oracle_accuracy"):
        lines.append(
            f"oracle accuracy {interval(evaluation['oracle_accuracy'])}; "
            f"the labels themselves {interval(evaluation['labels_oracle_accuracy'])}"
        )
    quartiles = " ".join(interval({"value": q["label_accuracy"]["value"]}) for q in evaluation["by_confidence"])
    lines.append(f"by quartile of |R|, least sure first: {quartiles}")
    first, second = evaluation["accuracy_chosen_first"], evaluation["accuracy_chosen_second"]
    lines.append(
        f"preferred response shown first {interval({'value': first['value']})}, "
        f"second {interval({'value': second['value']})}; R < 0 in {evaluation['negative_share']:.1%}"
    )
    return shown(f"  {line}" for line in lines)


def describe_policy(evaluation: Mapping[str, Any]) -> str:
    """A policy's evaluation.json in lines."""
    lines = [f"{evaluation['prompts']} prompts; length {interval(evaluation['length'], 1)} tokens"]
    lines += [f"mean reward by {judge} {interval(value)}" for judge, value in evaluation["rewards"].items()]
    lines.append(f"KL to the base policy {interval(evaluation['kl'])} nats")
    for judge, parts in (evaluation.get("against_base") or {}).items():
        shares = " / ".join(f"{100 * parts[part]['value']:.0f}" for part in ("win", "tie", "lose"))
        lines.append(f"win / tie / lose against the base policy by {judge}: {shares} %")
    return shown(f"  {line}" for line in lines)


def describe_comparison(data: Mapping[str, Any]) -> str:
    """The report's findings and its two main tables, narrow."""
    lines: list[str] = []
    for world in aggregate(data):
        if world["world"]:
            lines += ["", f"World: {world['world']}"]
        lines += [*(f"- {text}" for text in [*scorer_sentences(world), *policy_sentences(world)]), ""]
        if world["scorers"]:
            lines.append(f"{'scorer':<36}{'label accuracy':<24}{'oracle accuracy':<24}")
        for row in world["scorers"]:
            label, oracle = row["metrics"]["label_accuracy"], row["metrics"]["oracle_accuracy"]
            lines.append(f"{row['name']:<36}{interval(label):<24}{interval(oracle):<24}".rstrip())
        judge = primary_judge(world)
        if judge is not None:
            lines += ["", f"{'policy':<36}{'reward by ' + judge:<24}{'KL to base':<24}"]
        for row in world["policies"]:
            name = f"{row['name']} (control)" if row["control"] else row["name"]
            reward, kl = row["rewards"].get(judge), row["kl"]
            lines.append(f"{name:<36}{interval(reward, 2):<24}{interval(kl, 2):<24}".rstrip())
    if data.get("missing"):
        lines += ["", f"not finished: {'; '.join(data['missing'])}"]
    return shown(lines)
