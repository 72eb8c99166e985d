"""The report: what the rows say in sentences computed from them, report.html, report.md, and what a terminal shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rdo.evaluation import GENERATIONS
from rdo.report import figures, tables
from rdo.report.results import Row, at_equal_kl, difference, sweeps
from rdo.report.tables import interval, number
from rdo.runtime.errors import printable
from rdo.runtime.files import read_json_lines

RULES = (
    "Over several seeds a number is their mean with its 95 % t interval; with one seed its own 95 % interval, over "
    "pairs or prompts, which says nothing about how another training run would fall out.",
    "The baseline of a row is the same loss with the same settings, data and seed, without coefficients. Differences "
    "are taken seed by seed, with one seed prompt by prompt, and distinguishable where the interval excludes zero.",
    "Every comparison is judged on its own: among twenty comparisons of equal rows about one differs by chance.",
    "A judge that was the scorer in training favours the rows trained on it. Rewards are worth comparing at equal KL.",
    "Every scorer is shown the two responses in random order. A pair whose label is a tie is in no accuracy. Gold: "
    "the true reward, which only a made-up world knows.",
)


def view_of(
    title: str, facts: Mapping[str, str], rows: Sequence[Row], failed: Mapping[str, str], samples: int
) -> dict[str, Any]:
    """All that the page shows. failed: why rows are not there, by name; samples: how many responses of a row."""
    names = list(dict.fromkeys(row.data for row in rows))
    parts = [section(n, name, [row for row in rows if row.data == name], samples) for n, name in enumerate(names)]
    commands = [(row.name, str(row.runs["command"].iloc[0])) for row in rows]
    return {"title": title, "facts": facts, "failed": failed, "sections": parts, "commands": commands, "rules": RULES}


def section(place: int, name: str, rows: Sequence[Row], samples: int) -> dict[str, Any]:
    """What there is to say and to show of the rows on one data set."""
    policies, scorers = ([row for row in rows if (row.kind in ("policy", "base")) == kind] for kind in (True, False))
    judges = sorted(
        {judge for row in policies for judge in row.judges}, key=lambda judge: (judge != "gold", judge != "reward")
    )
    judge = judges[0] if judges else "gold"
    metric = "gold_accuracy" if any(row.number("gold_accuracy") for row in scorers) else "label_accuracy"
    drawn = {
        "overview": figures.overview(policies, judge, prefix=f"{place}"),
        "confidence": figures.confidence(scorers, prefix=f"{place}"),
        "frontier": figures.frontier(policies, judge, prefix=f"{place}"),
        "swept": figures.swept(rows, (f"rewards.{judge}", "kl", metric), prefix=f"{place}"),
        "training": figures.training(rows, prefix=f"{place}"),
    }
    return {
        "name": name,
        "answer": [*effects(policies, judge), *equal_kl(policies, judge), *accuracies(scorers, metric)],
        "conclusions": [
            *best_values(policies, f"rewards.{judge}"),
            *best_values(scorers, metric),
        ],
        "tables": {
            "Policies": tables.policy_table(policies, judge),
            "What the other judges say": tables.judge_table(policies, judges[1:]),
            "Scorers": tables.scorer_table(scorers),
            "Data": data_table(rows),
        },
        "figures": drawn,
        "samples": [side_by_side(row, samples) for row in policies if row.baseline],
    }


def effects(policies: Sequence[Row], judge: str) -> Iterator[str]:
    """Whether coefficients help, by how much, and at which KL."""
    found = [(row, n, row.baseline) for row in policies if (n := row.number(f"difference.{judge}")) and row.baseline]
    ordinary = [entry for entry in found if not entry[0].ablation_in_words]
    if not ordinary:
        yield "No row with a coefficient is finished together with its baseline: whether coefficients help is open."
    else:
        counts = Counter(change.verdict for _, change, _ in ordinary)
        seeds = max(len(row.runs) for row, _, _ in ordinary)
        over = f"{seeds} seeds" if seeds > 1 else "the prompts of one seed"
        yield (
            f"By the judge “{judge}” the coefficient helps in {counts['higher']} of {len(ordinary)} rows, harms in "
            f"{counts['lower']}, and cannot be told from none in {counts['indistinguishable']} (over {over})."
        )
        row, change, base = max(ordinary, key=lambda entry: entry[1].value)
        kl = [interval(one.number("kl"), 2) for one in (row, base)]
        said = f"{row.name} over {base.name}, {interval(change, 2, signed=True)} ({change.verdict})"
        yield f"Largest difference: {said}, at KL {kl[0]} against {kl[1]} nats."
    ablations = [f"{row.name} {interval(change, 2, signed=True)}" for row, change, _ in found if row.ablation_in_words]
    if ablations:
        yield f"Ablations: {'; '.join(ablations)}."


def accuracies(scorers: Sequence[Row], metric: str) -> Iterator[str]:
    """How often scorers and labels are right."""
    known = [(row.name, accuracy) for row in scorers if (accuracy := row.number(metric))]
    if known:
        labels = scorers[0].number("labels_gold_accuracy")
        kind = "true reward" if metric == "gold_accuracy" else "held-out labels"
        beside = f" (the labels themselves in {number(labels.value, 3)})" if labels else ""
        yield f"Scorers agree with the {kind}{beside}: {'; '.join(f'{name} in {interval(n)}' for name, n in known)}."


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
            known = [(row, reached) for row in line if (reached := row.number(metric))]
            if len(known) < 2:
                continue
            best, reached = max(known, key=lambda entry: entry[1].value)
            told: dict[str, list[str]] = {}
            for row, _ in known:
                if row is not best:
                    change = difference(best, row, metric)
                    apart = "distinguishable from" if change and change.verdict == "higher" else "not from"
                    told.setdefault(apart, []).append(f"{row.settings[name]:g}")
            said = ", ".join(f"{words} {', '.join(values)}" for words, values in told.items())
            yield f"{name}, by {metric}: {best.settings[name]:g} is best ({best.name}: {interval(reached)}), {said}."


def data_table(rows: Sequence[Row]) -> tables.Table:
    """What these rows were trained and evaluated on."""

    def text(key: str) -> Any:
        return lambda row: (", ".join(dict.fromkeys(map(str, row.runs[key].dropna()))) if key in row.runs else "", "")

    columns: list[Any] = [("Source", text("source")), ("Template", text("template"))]
    columns += [("Longest, tokens", text("max_length")), ("Records trained on", tables.of("records", 0))]
    columns += [("Evaluated on", text("split")), ("Prompts", tables.of("prompts", 0)), ("Pairs", tables.of("pairs", 0))]
    table = tables.build(rows, columns)
    named: dict[Any, list[str]] = {}
    for row, cells in zip(rows, table.rows, strict=True):
        named.setdefault(tuple(cells), []).append(row.name)
    return tables.Table(["Rows", *table.columns], [[(", ".join(who), ""), *cells] for cells, who in named.items()])


def side_by_side(row: Row, count: int) -> dict[str, Any]:
    """The first responses of a row beside its baseline's, with what the judges said."""
    assert row.baseline is not None
    seed = next(seed for seed in row.runs.index if seed in row.baseline.runs.index)
    own, base = (read_json_lines(Path(str(one.runs.at[seed, "folder"])) / GENERATIONS) for one in (row, row.baseline))
    others = {line["id"]: line for line in base}
    pairs = ((others[line["id"]], line) for line in own if line["id"] in others)
    answers = [
        {"query": line["query"], "answers": [(one["response"], judged(one["rewards"])) for one in (other, line)]}
        for other, line in islice(pairs, count)
    ]
    return {"row": row.name, "baseline": row.baseline.name, "queries": answers}


def judged(rewards: Mapping[str, float]) -> str:
    return " · ".join(f"{judge} {number(value)}" for judge, value in rewards.items())


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def visible(value: Any) -> Any:
    """What the page shows of a value: of a text nothing that turns it round or cannot be seen."""
    return value if not isinstance(value, str) or isinstance(value, Markup) else printable(value)


def html(view: Mapping[str, Any]) -> str:
    """One page without scripts or network."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(view)


def markdown(view: Mapping[str, Any]) -> str:
    """The same sentences and tables, for places that show no HTML."""
    facts = " · ".join(f"{name}: {tables.inline(value)}" for name, value in view["facts"].items())
    lines = [f"# {tables.inline(view['title'])}", "", facts, ""]
    if view["failed"]:
        lines += [*tables.markdown(["Not finished", "Why"], view["failed"].items())]
    for part in view["sections"]:
        lines += [f"## {tables.inline(part['name'])}", ""]
        lines += [*(f"- {tables.inline(text)}" for text in [*part["answer"], *part["conclusions"]]), ""]
        for name, table in part["tables"].items():
            if table.rows:
                cells = ([" ".join(filter(None, cell)) for cell in row] for row in table.rows)
                lines += [f"### {name}", "", *tables.markdown(table.columns, cells)]
        for sample in part["samples"]:
            rows = [[q["query"], *(f"{text} ({said})" for text, said in q["answers"])] for q in sample["queries"]]
            lines += [f"### Samples: {tables.inline(sample['row'])}", ""]
            lines += tables.markdown(["Query", sample["baseline"], sample["row"]], rows)
    lines += ["## Commands", "", *tables.markdown(["Row", "Command"], view["commands"])]
    return "\n".join([*lines, "## How to read this", "", *(f"- {rule}" for rule in view["rules"])]) + "\n"


def text(view: Mapping[str, Any]) -> str:
    """What a terminal shows: the sentences and the main tables, narrow."""
    lines: list[str] = []
    for part in view["sections"]:
        lines += ["", f"{part['name']}: {' '.join(part['answer'])}", *part["conclusions"]]
        for name, columns in (("Scorers", 4), ("Policies", 5)):
            if part["tables"][name].rows:
                lines += ["", *tables.terminal(part["tables"][name], columns)]
    lines += ["", *(f"not finished: {name}: {why}" for name, why in view["failed"].items())]
    return tables.shown(lines)
