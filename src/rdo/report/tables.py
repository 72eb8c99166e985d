"""The report's tables as plain cells, so that the HTML page and the Markdown file cannot differ in a number."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rdo.report.aggregate import Difference, Summary

NOTHING = "–"
MINUS = "−"


@dataclass(frozen=True)
class Cell:
    """A number or a name, and in smaller type what belongs to it: an interval, a remark."""

    main: str
    detail: str = ""

    @property
    def text(self) -> str:
        return f"{self.main} {self.detail}".strip()


@dataclass(frozen=True)
class Table:
    """Columns, then rows of as many cells. `control_rows`: positions of the rows that are controls."""

    columns: list[str]
    rows: list[list[Cell]]
    control_rows: frozenset[int] = frozenset()


EMPTY = Cell(NOTHING)


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """A number with a proper minus sign, or a dash where there is none."""
    if value is None:
        return NOTHING
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")  # "-0.00" would claim a direction that the digits do not show
    return text.replace("-", MINUS)


def summary_cell(summary: Summary | None, digits: int = 2) -> Cell:
    """Mean and spread over seeds, or the one value with its interval."""
    if summary is None or summary["mean"] is None:
        return EMPTY
    main = number(summary["mean"], digits)
    if summary["sd"] is not None:
        return Cell(main, f"± {number(summary['sd'], digits)}")
    if summary["low"] is not None and summary["high"] is not None:
        return Cell(main, f"[{number(summary['low'], digits)}, {number(summary['high'], digits)}]")
    return Cell(main)


def difference_cell(difference: Difference | None, digits: int = 2) -> Cell:
    """A difference with its spread over seeds and whether it can be told from zero."""
    if difference is None:
        return EMPTY
    spread = "" if difference["sd"] is None else f" ± {number(difference['sd'], digits)}"
    verdict = difference["verdict"] if difference["verdict"] != "unknown" else "no interval"
    return Cell(number(difference["value"], digits, signed=True) + spread, verdict)


def _pair_cell(first: Summary, second: Summary, digits: int = 3) -> Cell:
    if first["mean"] is None and second["mean"] is None:
        return EMPTY
    return Cell(f"{number(first['mean'], digits)} / {number(second['mean'], digits)}")


def _percent_cell(parts: Mapping[str, Summary] | None) -> Cell:
    means = [None if parts is None else parts[key]["mean"] for key in ("win", "tie", "lose")]
    if all(mean is None for mean in means):
        return EMPTY
    return Cell(" / ".join(NOTHING if mean is None else f"{100 * mean:.0f}" for mean in means))


def _size_cell(summary: Summary) -> Cell:
    """An effective sample size: a count of pairs, or a share when it is given as one."""
    mean = summary["mean"]
    return summary_cell(summary, 2 if mean is not None and mean <= 1 else 0)


Getter = Callable[[Mapping[str, Any]], Cell]


def build(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, Getter]]) -> Table:
    """Table of the columns that at least one row fills: without an oracle its columns vanish."""
    cells = [[getter(row) for _, getter in columns] for row in rows]
    kept = [i for i in range(len(columns)) if any(line[i] != EMPTY for line in cells)]
    controls = frozenset(position for position, row in enumerate(rows) if row.get("control"))
    return Table([columns[i][0] for i in kept], [[line[i] for i in kept] for line in cells], controls)


def _metric(key: str, digits: int = 3) -> Getter:
    return lambda row: summary_cell(row["metrics"][key], digits)


def _metric_pair(first: str, second: str) -> Getter:
    return lambda row: _pair_cell(row["metrics"][first], row["metrics"][second])


def _seeds(row: Mapping[str, Any]) -> Cell:
    return Cell(str(len(row["seeds"])))


def scorer_table(world: Mapping[str, Any]) -> Table:
    """One row a scorer. What the labels themselves are worth stands beside what the scorer reaches."""
    return build(
        world["scorers"],
        [
            ("Scorer", lambda row: Cell(row["name"], "" if row["form"] is None else f"({row['form']})")),
            ("Seeds", _seeds),
            ("Label accuracy, random order", _metric("label_accuracy")),
            ("Oracle accuracy, random order", _metric("oracle_accuracy")),
            ("Labels that are right", _metric("labels_oracle_accuracy")),
            ("Scorer against labels", lambda row: difference_cell(row["against_labels"], 3)),
            ("Label accuracy, both orders", _metric("label_accuracy_both_orders")),
            ("Oracle accuracy, both orders", _metric("oracle_accuracy_both_orders")),
            ("Label accuracy, preferred shown first / second", _metric_pair(*FIRST_SECOND)),
            ("First response preferred", _metric("first_preferred_share")),
            ("Antisymmetry gap", _metric("antisymmetry_gap")),
            ("Share R < 0", _metric("negative_share")),
            ("Mislabelled where R < 0 / elsewhere", _metric_pair(*MISLABELLED)),
        ],
    )


FIRST_SECOND = ("accuracy_chosen_first", "accuracy_chosen_second")
MISLABELLED = ("mislabelled_share_where_contradicted", "mislabelled_share_elsewhere")


def judges_of(world: Mapping[str, Any], key: str = "rewards") -> list[str]:
    """The judges of a world's policies, the oracle first."""
    names = dict.fromkeys(judge for row in world["policies"] for judge in row[key])
    return sorted(names, key=lambda judge: judge != "oracle")


def policy_table(world: Mapping[str, Any]) -> Table:
    """One row a policy, numbered as in the plot of reward against KL; controls say that they are controls."""
    columns: list[tuple[str, Getter]] = [
        ("No.", lambda row: Cell(str(world["policies"].index(row) + 1))),
        ("Policy", lambda row: Cell(row["name"], f"(control: {row['control']})" if row["control"] else "")),
        ("Seeds", _seeds),
    ]
    for judge in judges_of(world):
        columns.append((f"Reward by “{judge}”", _of(judge, "rewards", summary_cell)))
        columns.append((f"Difference to rc none, “{judge}”", _of(judge, "difference", difference_cell)))
    columns.append(("KL to base", lambda row: summary_cell(row["kl"])))
    columns.append(("Length", lambda row: summary_cell(row["length"], 1)))
    for judge in judges_of(world, "against_base"):
        columns.append((f"Win / tie / lose against base, “{judge}”, %", _of(judge, "against_base", _percent_cell)))
    columns.append(("Effective sample size", lambda row: _size_cell(row["effective_sample_size"])))
    columns.append(("Share R < 0", lambda row: summary_cell(row["negative_share"], 3)))
    return build(world["policies"], columns)


def _of(judge: str, key: str, show: Callable[[Any], Cell]) -> Getter:
    return lambda row: show(row[key].get(judge))
