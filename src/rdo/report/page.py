"""The report: what the rows say in sentences computed from them, as report.html, as Markdown, and in short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rdo.evaluation import GENERATIONS
from rdo.evaluation.numbers import interval, number, shortened
from rdo.report import figures, tables
from rdo.report.results import Row, at_equal_kl, difference, sweeps
from rdo.report.tables import inline
from rdo.runtime.errors import printable
from rdo.runtime.files import read_json_lines

RULES = (
    "Over several seeds a number is their mean with its 95 % t interval; with one seed its own 95 % interval, over "
    "queries, which says nothing about how another training run would fall out.",
    "The baseline of a row is the same loss with the same settings, data and seed, without coefficients. Differences "
    "are taken seed by seed, with one seed prompt by prompt, and distinguishable where the interval excludes zero.",
    "Every comparison is judged on its own: among twenty comparisons of equal rows about one differs by chance.",
    "A judge that was the scorer in training favours the rows trained on it. Rewards are worth comparing at equal KL.",
    "Every scorer is shown the two responses in random order. A pair whose label is a tie is in no accuracy. Gold: "
    "the true reward, which only a made-up world knows.",
)
IN_SHORT = {"Policies": 5, "Scorers": 4}  # the tables that a terminal shows, and how many of their columns


def view_of(
    title: str, facts: Mapping[str, str], rows: Sequence[Row], failed: Mapping[str, str], samples: int
) -> dict[str, Any]:
    """All that the page shows. failed: why rows are not there, by name; samples: how many responses of a row."""
    names = dict.fromkeys(row.data for row in rows)
    return {
        "title": title,
        "facts": facts,
        "failed": failed,
        "sections": [section(name, [row for row in rows if row.data == name], samples) for name in names],
        "commands": [(row.name, next(iter(row.runs.values()))["command"]) for row in rows],
        "rules": RULES,
    }


def section(name: str, rows: Sequence[Row], samples: int) -> dict[str, Any]:
    """What there is to say and to show of the rows on one data set."""
    policies, scorers = ([row for row in rows if (row.kind in ("policy", "base")) == kind] for kind in (True, False))
    judges = [judge for judge in ("gold", "reward", "diff") if any(judged(row, judge) for row in policies)]
    judge = next(iter(judges), "gold")
    metric = "gold_accuracy" if any(row.number("gold_accuracy") for row in scorers) else "label_accuracy"
    found = {
        "Policies": tables.policy_table(policies, judge),
        "What the other judges say": tables.judge_table(policies, judges[1:]),
        "Scorers": tables.scorer_table(scorers),
        "Data": tables.data_table(rows),
    }
    return {
        "name": name,
        "answer": [
            *effects(policies, judge),
            *equal_kl(policies, judge),
            *best_values(policies, f"rewards.{judge}"),
            *best_values(scorers, metric),
        ],
        "tables": {title: table for title, table in found.items() if len(table.columns) > 1},
        "figures": {
            "overview": figures.overview(policies, judge),
            "confidence": figures.confidence(scorers, metric),
            "frontier": figures.frontier(policies, judge),
            "swept": figures.swept(rows, (f"rewards.{judge}", "kl", metric)),
            "training": figures.training(rows),
        },
        "samples": [side_by_side(row, row.baseline, samples) for row in policies if row.baseline],
    }


def judged(row: Row, judge: str) -> bool:
    """Whether a judge has said anything of a policy; a difference model only compares."""
    return bool(row.number(f"rewards.{judge}") or row.number(f"against_base.{judge}.win"))


def effects(policies: Sequence[Row], judge: str) -> Iterator[str]:
    """Whether coefficients help, by how much, and at which KL."""
    ordinary = [(row, row.baseline) for row in policies if row.baseline and not row.ablation_in_words]
    found = [(row, base, change) for row, base in ordinary if (change := row.number(f"difference.{judge}"))]
    if not found:
        yield "No row with a coefficient is finished together with its baseline: whether coefficients help is open."
        return
    counts = Counter(change.verdict for _, _, change in found)
    seeds = max(len(row.runs) for row, _, _ in found)
    yield (
        f"By the judge “{judge}” the coefficient helps in {counts['higher']} of {len(found)} rows, harms in "
        f"{counts['lower']}, and cannot be told from none in {counts['indistinguishable']} "
        f"(over {f'{seeds} seeds' if seeds > 1 else 'the prompts of one seed'})."
    )
    row, base, change = max(found, key=lambda entry: entry[2].value)
    kl, other = row.number("kl"), base.number("kl")  # which nothing but samples at temperature 1 tells
    at_kl = f", at KL {interval(kl)} against {interval(other)} nats" if kl and other else ""
    yield f"Largest difference: {row.name} over {base.name}, {interval(change, signed=True)} ({change.verdict}){at_kl}."


def equal_kl(policies: Sequence[Row], judge: str) -> Iterator[str]:
    """What methods reach at the KL of their baselines."""
    for line in (line for lines in sweeps(policies).values() for line in lines):
        if line[0].rc != "none" and (found := at_equal_kl(line, judge)):
            gain, low, high = found
            yield (
                f"At equal KL ({number(low)} to {number(high)} nats) {line[0].name} … {line[-1].name} lies "
                f"{number(abs(gain))} {'above' if gain > 0 else 'below'} its baselines (interpolated, no interval)."
            )


def best_values(rows: Sequence[Row], metric: str) -> Iterator[str]:
    """The best value of each swept setting, and from which others it can be told."""
    for name, lines in sweeps(rows).items():
        for line in lines:
            known = [(reached.value, row.settings[name], row) for row in line if (reached := row.number(metric))]
            if len(known) < 2:
                continue
            _, value, best = max(known, key=lambda entry: entry[0])
            told: dict[str, list[str]] = {"": [], "not ": []}
            for _, other, row in known:
                if row is not best:
                    change = difference(best, row, metric)
                    apart = change is not None and change.verdict == "higher"
                    told["" if apart else "not "].append(f"{other:g}")
            said = ", ".join(f"{no}distinguishable from {', '.join(values)}" for no, values in told.items() if values)
            at_best = interval(best.number(metric), 3)
            yield f"{name}, by {metric}: {value:g} is best ({best.name}: {at_best}), {said}."


def side_by_side(row: Row, baseline: Row, count: int) -> dict[str, Any]:
    """The first responses of a row beside its baseline's, with what the judges said."""
    seed = next(seed for seed in row.runs if seed in baseline.runs)
    own, base = (read_json_lines(Path(one.runs[seed]["folder"]) / GENERATIONS) for one in (row, baseline))
    others = {line["id"]: line for line in base}
    pairs = ((others[line["id"]], line) for line in own if line["id"] in others)
    lines = [(line["query"], sample(other), sample(line)) for other, line in islice(pairs, count)]
    return {"row": row.name, "baseline": baseline.name, "lines": lines}


def sample(line: Mapping[str, Any]) -> tuple[str, str]:
    """A response, and the rewards that it got."""
    return line["response"], " · ".join(f"{judge} {number(value)}" for judge, value in line["rewards"].items())


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def html(view: Mapping[str, Any]) -> str:
    """One page without scripts or network, of which nothing turns round or hides what stands there."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return printable(environment.get_template("report.html.j2").render(view))


def markdown(view: Mapping[str, Any]) -> str:
    """The same sentences and tables, for places that show no HTML."""
    lines = [f"# {inline(view['title'])}", "", *(f"- {name}: {inline(said)}" for name, said in view["facts"].items())]
    lines += ["", *(f"- not finished: {inline(name)}: {inline(why)}" for name, why in view["failed"].items()), ""]
    for part in view["sections"]:
        lines += [f"## {inline(part['name'])}", ""]
        lines += [*(f"- {inline(said)}" for said in part["answer"]), ""]
        for title, table in part["tables"].items():
            lines += [f"### {title}", "", *tables.markdown(table)]
    lines += ["## Commands", "", *(f"- {inline(name)}: {inline(command)}" for name, command in view["commands"])]
    lines += ["", "## How to read this", "", *(f"- {rule}" for rule in view["rules"]), ""]
    return printable("\n".join(lines))


def in_short(view: Mapping[str, Any]) -> str:
    """What a terminal shows: the sentences and the main tables, narrow."""
    lines: list[str] = []
    for part in view["sections"]:
        lines += ["", f"{part['name']}: {part['answer'][0]}", *part["answer"][1:]]
        for title, width in IN_SHORT.items():
            if title in part["tables"]:
                table = part["tables"][title].iloc[:, :width]
                named = table.iloc[:, 0].str.partition("\n")[0].map(shortened)
                table = table.assign(**{table.columns[0]: named}).replace("\n", " ", regex=True)
                lines += ["", *table.to_string(index=False).splitlines()]
    lines += ["", *(f"not finished: {name}: {why}" for name, why in view["failed"].items())]
    return "\n".join(printable(line, keep="") for line in lines)
