"""The report's tables, as frames of texts: in a cell what is shown, and on a second line what is shown smaller. The
index says of what sort a line is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape

import pandas as pd

from rdo.evaluation.numbers import interval, number
from rdo.report.results import Row

NOTHING = "–"
Columns = dict[str, Callable[[Row], str]]


def build(rows: Sequence[Row], columns: Columns) -> pd.DataFrame:
    """A line a row, of those columns that have anything in them."""
    cells = {title: [cell(row) for row in rows] for title, cell in columns.items()}
    table = pd.DataFrame(cells, index=["ablation" if row.ablation_in_words else "" for row in rows])
    return table.loc[:, table.isin([NOTHING, ""]).mean() < 1]


def of(key: str, digits: int = 2, signed: bool = False) -> Callable[[Row], str]:
    """The cell of a quantity."""
    return lambda row: interval(row.number(key), digits, signed, "\n")


def shares(*keys: str) -> Callable[[Row], str]:
    """The cell of several shares, in per cent."""

    def cell(row: Row) -> str:
        found = [row.number(key) for key in keys]
        return " / ".join(number(100 * one.value, 0) if one else NOTHING for one in found) if any(found) else NOTHING

    return cell


def texts(key: str) -> Callable[[Row], str]:
    """The cell of what a row's evaluations say of themselves."""
    return lambda row: ", ".join(dict.fromkeys(str(run[key]) for run in row.runs.values()))


def named(row: Row) -> str:
    """A row's name, and below it what it is compared with or without."""
    against = f"against {row.baseline.name}" if row.baseline else ""
    ablation = f"ablation: {row.ablation_in_words}" if row.ablation_in_words else ""
    return f"{row.name}\n{'; '.join(filter(None, (ablation, against)))}".strip()


def seeds(row: Row) -> str:
    return str(len(row.runs))


def rewards_by(judge: str) -> Columns:
    """A judge's rewards of a policy's responses."""
    return {
        f"Reward by “{judge}”": of(f"rewards.{judge}"),
        f"Difference to baseline, “{judge}”": of(f"difference.{judge}", signed=True),
    }


def wins_by(judge: str) -> Columns:
    """How often a judge prefers a policy's response to the base policy's."""
    keys = [f"against_base.{judge}.{part}" for part in ("win", "tie", "lose")]
    return {f"Win / tie / lose against base, “{judge}”, %": shares(*keys)}


def policy_table(rows: Sequence[Row], judge: str) -> pd.DataFrame:
    """A line a policy, by the main judge."""
    return build(
        rows,
        {
            "Policy": named,
            "Seeds": seeds,
            **rewards_by(judge),
            "KL to base, nats": of("kl"),
            **wins_by(judge),
            "Length, tokens": of("length", 1),
            "Effective sample size": of("coefficients.effective_sample_size", 0),
            "R < 0, %": shares("coefficients.negative_share"),
        },
    )


def judge_table(rows: Sequence[Row], judges: Sequence[str]) -> pd.DataFrame:
    """What the other judges say."""
    columns: Columns = {"Policy": named}
    for judge in judges:
        columns |= rewards_by(judge) | wins_by(judge)
    return build(rows, columns)


def scorer_table(rows: Sequence[Row]) -> pd.DataFrame:
    """A line a scorer; what the labels are worth stands beside what it reaches."""
    return build(
        rows,
        {
            "Scorer": named,
            "Seeds": seeds,
            "Label accuracy": of("label_accuracy", 3),
            "Accuracy against the true reward": of("gold_accuracy", 3),
            "Labels that are right": of("labels_gold_accuracy", 3),
            "In both orders: labels / truth, %": shares("label_accuracy_both_orders", "gold_accuracy_both_orders"),
            "Preferred shown first / second, %": shares("accuracy_chosen_first", "accuracy_chosen_second"),
            "First preferred, %": shares("first_preferred_share"),
            "Antisymmetry gap": of("antisymmetry_gap", 3),
            "R < 0, %": shares("negative_share"),
            "Mislabelled where R < 0 / elsewhere, %": shares(
                "mislabelled_share_where_contradicted", "mislabelled_share_elsewhere"
            ),
        },
    )


def data_table(rows: Sequence[Row]) -> pd.DataFrame:
    """What the rows were trained and evaluated on; those that share it are one line."""
    table = build(
        rows,
        {
            "Source": texts("source"),
            "Template": texts("template"),
            "Longest, tokens": texts("max_length"),
            "Records trained on": of("records", 0),
            "Evaluated on": texts("split"),
            "Prompts": of("prompts", 0),
            "Pairs": of("pairs", 0),
        },
    )
    table.insert(0, "Rows", [row.name for row in rows])
    return table.groupby(list(table.columns[1:]), sort=False)["Rows"].agg(", ".join).reset_index()[table.columns]


def inline(text: object) -> str:
    """Text of unknown origin on one line, with everything escaped that Markdown or HTML would act upon."""
    flat = escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*\[\]|#~$]|(?<!\w)_|_(?!\w))", r"\\\1", flat)


def markdown(table: pd.DataFrame) -> list[str]:
    """The lines of a table; every cell is escaped."""
    lines = [[inline(cell) for cell in line] for line in [table.columns, *table.to_numpy()]]
    lines.insert(1, ["---"] * len(table.columns))
    return [f"| {' | '.join(line)} |" for line in lines] + [""]
