"""What the numbers say, in sentences computed from them: no row is praised that cannot be told from its neighbour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rdo.report.tables import judges_of, number

World = Mapping[str, Any]

RULES = (
    "Over several seeds a number is the mean ± the standard deviation between seeds; with one seed it is followed by "
    "its own 95 % interval, over pairs or prompts.",
    "Two rows with several seeds in common differ when the 95 % t interval of their seed-by-seed differences excludes "
    "zero; with one seed, when their intervals do not overlap. Otherwise they are called indistinguishable. One seed "
    "says nothing about how the next one would fall out.",
    "Every comparison is judged on its own: among twenty comparisons of equal rows about one differs by chance.",
    "Every scorer is shown the two responses in random order. A pair whose label is a tie is in no accuracy.",
    "A judge that was also the scorer in training favours the rows trained on it. A reward is worth comparing at "
    "similar KL.",
)

ORACLE_RULE = (
    "Oracle: the true reward, which only a made-up world knows. Pairs with equal true rewards are left out of the "
    "accuracies against it."
)


def rules(worlds: Sequence[World]) -> list[str]:
    """How to read the page; without an oracle there is no word about one."""
    scorers = any(row["metrics"]["oracle_accuracy"]["mean"] is not None for world in worlds for row in world["scorers"])
    policies = any("oracle" in row["rewards"] for world in worlds for row in world["policies"])
    return [*RULES, ORACLE_RULE] if scorers or policies else list(RULES)


def run_sentence(data: Mapping[str, Any], worlds: Sequence[World]) -> str:
    """What was run: how many rows, on which data, over how many seeds."""
    rows = [*(data.get("scorers") or []), *(data.get("policies") or [])]
    if not rows:
        return "No row has finished: there is nothing to report yet."
    scorers = sum(len(world["scorers"]) for world in worlds)
    policies = sum(len(world["policies"]) for world in worlds)
    seeds = len({int(row.get("seed") or 0) for row in rows})
    parts = []
    if scorers:
        parts.append(_count(scorers, "scorer"))
    if policies:
        parts.append(_count(policies, "policy", "policies"))
    name = (data.get("dataset") or {}).get("name")
    text = f"{' and '.join(parts)} over {_count(seeds, 'seed')}"
    if name:
        text += f" on {name}"
    if len(worlds) > 1:
        text += f", in {len(worlds)} worlds ({', '.join(world['world'] for world in worlds)})"
    return text + "."


def _count(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def headline(world: World) -> str:
    """The one line on a world for the top of the page: labels against scorers, and the count of differences."""
    return " ".join([*scorer_sentences(world)[:1], *policy_sentences(world)[:1]])


def scorer_sentences(world: World) -> list[str]:
    """How the scorers compare with the labels, with each other, and whether they lean on the order."""
    found = []
    judged = [row for row in world["scorers"] if row["metrics"]["oracle_accuracy"]["mean"] is not None]
    if judged:
        found.append(_against_labels(judged))
    best = world["best_scorer"]
    if best is not None:
        kind = "the true reward" if best["metric"] == "oracle_accuracy" else "the held-out labels"
        rest = _by_verdict(best["others"], {"lower": "less", "indistinguishable": "indistinguishable from it"})
        found.append(f"Among the scorers {_quoted(best['name'])} agrees most often with {kind}; {rest}.")
    for row in world["scorers"]:
        bias = row["order_bias"]
        if bias is not None and bias["verdict"] in ("higher", "lower"):
            first = number(row["metrics"]["accuracy_chosen_first"]["mean"], 3)
            second = number(row["metrics"]["accuracy_chosen_second"]["mean"], 3)
            found.append(
                f"{_quoted(row['name'])} leans on the order: it agrees with {first} of the labels when the preferred "
                f"response is shown first, with {second} when it is shown second."
            )
    return found


def _quoted(name: str) -> str:
    """A row's name set off from the sentence: a scorer may well be called "reward"."""
    return f"“{name}”"


def _against_labels(rows: Sequence[Mapping[str, Any]]) -> str:
    words = {
        "higher": "more often than the labels",
        "lower": "less often than the labels",
        "indistinguishable": "indistinguishable from the labels",
        "unknown": "no interval to judge by",
    }
    parts = []
    for row in rows:
        difference = row["against_labels"]
        remark = f" ({words[difference['verdict']]})" if difference else ""
        parts.append(f"{_quoted(row['name'])} in {number(row['metrics']['oracle_accuracy']['mean'], 3)}{remark}")
    labels = next((row["metrics"]["labels_oracle_accuracy"]["mean"] for row in rows), None)
    opening = "" if labels is None else f"The labels agree with the true reward in {number(labels, 3)} of the pairs; "
    text = opening + ", ".join(parts)
    return text[0].upper() + text[1:] + "."


def _by_verdict(differences: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """Names grouped by verdict: "less: a (-0.10), b (-0.02); indistinguishable from it: c"."""
    groups: dict[str, list[str]] = {}
    for name, difference in differences.items():
        verdict = "unknown" if difference is None else difference["verdict"]
        value = "" if difference is None else f" ({number(difference['value'], 3, signed=True)})"
        groups.setdefault(words.get(verdict, "not comparable with it"), []).append(_quoted(name) + value)
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in groups.items())


def primary_judge(world: World) -> str | None:
    """The judge that the sentences and the plot go by: the oracle, or the first one given."""
    judges = judges_of(world)
    return judges[0] if judges else None


def policy_sentences(world: World) -> list[str]:
    """What the coefficient did to each loss, and the same for the controls."""
    judge = primary_judge(world)
    compared = [row for row in world["policies"] if row["difference"].get(judge)]
    if judge is None or not compared:
        return []
    found = []
    ordinary = [row for row in compared if not row["control"]]
    if ordinary:
        verdicts = [row["difference"][judge]["verdict"] for row in ordinary]
        counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("higher", "lower", "indistinguishable"))
        unjudged = f", {verdicts.count('unknown')} without an interval" if "unknown" in verdicts else ""
        found.append(
            f"Of {_count(len(ordinary), 'row')} compared with the same loss without a coefficient, by the judge "
            f"{_quoted(judge)}: {counts}{unjudged}."
        )
        found.extend(_listed("", ordinary, judge))
    found.extend(_listed("Controls, ", [row for row in compared if row["control"]], judge))
    return found


def _listed(opening: str, rows: Sequence[Mapping[str, Any]], judge: str) -> list[str]:
    words = {"higher": "higher", "lower": "lower", "indistinguishable": "indistinguishable", "unknown": "no interval"}
    lines = []
    for verdict, word in words.items():
        here = [row for row in rows if row["difference"][judge]["verdict"] == verdict]
        if here:
            text = f"{opening}{word}: {'; '.join(_with_kl(row, judge) for row in here)}."
            lines.append(text[0].upper() + text[1:])
    return lines


def _with_kl(row: Mapping[str, Any], judge: str) -> str:
    """A row's difference in reward, and whether it was bought with KL."""
    difference, kl = row["difference"][judge], row["kl_difference"]
    remark = ""
    if kl is not None and kl["verdict"] != "unknown":
        words = {"higher": "at a higher KL", "lower": "at a lower KL", "indistinguishable": "KL indistinguishable"}
        remark = f", {words[kl['verdict']]}"
    return f"{_quoted(row['name'])} ({number(difference['value'], 2, signed=True)}{remark})"
