"""Numbers as people read them: the report's tables, and the lines that a terminal shows of an evaluation."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import TYPE_CHECKING, Any, NamedTuple

from rdo.runtime.errors import printable

if TYPE_CHECKING:  # which imports pandas
    from rdo.report.results import Row

Cell = tuple[str, str]  # what is shown, and smaller below it
NOTHING: Cell = ("–", "")


class Number(NamedTuple):
    """A quantity and its 95 % interval, whose ends are NaN where it has none."""

    value: float
    low: float = nan
    high: float = nan

    @property
    def verdict(self) -> str:
        """Whether a difference can be told from zero."""
        if isnan(self.low):
            return "without an interval"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "indistinguishable"


def as_number(estimate: Mapping[str, Any] | None) -> Number | None:
    """An estimate of an evaluation; None where there is none, or it has no value."""
    if not estimate or estimate["value"] is None:
        return None
    low, high = (nan if estimate.get(end) is None else estimate[end] for end in ("low", "high"))
    return Number(estimate["value"], low, high)


@dataclass(frozen=True)
class Table:
    """Columns by title; ablations are the rows that are set off."""

    columns: list[str]
    rows: list[list[Cell]]
    ablations: frozenset[int] = frozenset()


def number(value: float | None, digits: int = 2, signed: bool = False) -> str:
    """A number with a real minus sign; one that rounds to nothing has none."""
    if value is None or isnan(value):
        return "–"
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("+-")


def ends(estimate: Number, digits: int = 2, signed: bool = False) -> str:
    """An interval in brackets; nothing where there is none."""
    low, high = (number(end, digits, signed) for end in (estimate.low, estimate.high))
    return "" if isnan(estimate.low) else f"[{low}, {high}]"


def interval(estimate: Number | None, digits: int = 3, signed: bool = False) -> str:
    """A value with its interval on one line."""
    if estimate is None:
        return "–"
    return f"{number(estimate.value, digits, signed)} {ends(estimate, digits, signed)}".strip()


def of(key: str, digits: int = 2, signed: bool = False) -> Callable[[Row], Cell]:
    """The cell of a quantity."""

    def cell(row: Row) -> Cell:
        found = row.number(key)
        return (number(found.value, digits, signed), ends(found, digits, signed)) if found else NOTHING

    return cell


def shares(*keys: str) -> Callable[[Row], Cell]:
    """The cell of several shares, in per cent."""

    def cell(row: Row) -> Cell:
        found = [row.number(key) for key in keys]
        return (" / ".join(number(100 * e.value, 0) if e else "–" for e in found), "") if any(found) else NOTHING

    return cell


def named(row: Row) -> Cell:
    """A row's name, and below it what it is compared with or without."""
    parts = [f"ablation: {row.ablation_in_words}"] if row.ablation_in_words else []
    return row.name, "; ".join([*parts, *([f"against {row.baseline.name}"] if row.baseline else [])])


def build(rows: Sequence[Row], columns: Iterable[tuple[str, Callable[[Row], Cell]]]) -> Table:
    """A table of those columns that have anything in them."""
    filled = [(title, [cell(row) for row in rows]) for title, cell in columns]
    kept = [(title, cells) for title, cells in filled if any(re.search(r"\w", cell[0]) for cell in cells)]
    body = [list(line) for line in zip(*(cells for _, cells in kept), strict=True)]
    return Table(
        [title for title, _ in kept], body, frozenset(n for n, row in enumerate(rows) if row.ablation_in_words)
    )


def seeds(row: Row) -> Cell:
    return str(len(row.runs)), ""


def scorer_table(rows: Sequence[Row]) -> Table:
    """A row a scorer; what the labels are worth stands beside what it reaches."""
    both = ("label_accuracy_both_orders", "gold_accuracy_both_orders")
    return build(
        rows,
        [
            ("Scorer", named),
            ("Seeds", seeds),
            ("Label accuracy", of("label_accuracy", 3)),
            ("Accuracy against the true reward", of("gold_accuracy", 3)),
            ("Labels that are right", of("labels_gold_accuracy", 3)),
            ("In both orders: labels / truth, %", shares(*both)),
            ("Preferred shown first / second, %", shares("accuracy_chosen_first", "accuracy_chosen_second")),
            ("First preferred, %", shares("first_preferred_share")),
            ("Antisymmetry gap", of("antisymmetry_gap", 3)),
            ("R < 0, %", shares("negative_share")),
            (
                "Mislabelled where R < 0 / elsewhere, %",
                shares("mislabelled_share_where_contradicted", "mislabelled_share_elsewhere"),
            ),
        ],
    )


def policy_table(rows: Sequence[Row], judge: str) -> Table:
    """A row a policy, by the main judge."""
    against = [f"against_base.{judge}.{part}" for part in ("win", "tie", "lose")]
    return build(
        rows,
        [
            ("Policy", named),
            ("Seeds", seeds),
            (f"Reward by “{judge}”", of(f"rewards.{judge}")),
            ("Difference to baseline", of(f"difference.{judge}", signed=True)),
            ("KL to base, nats", of("kl")),
            ("Win / tie / lose against base, %", shares(*against)),
            ("Length, tokens", of("length", 1)),
            ("Effective sample size", of("coefficients.effective_sample_size", 0)),
            ("R < 0, %", shares("coefficients.negative_share")),
        ],
    )


def judge_table(rows: Sequence[Row], judges: Sequence[str]) -> Table:
    """What the other judges say."""
    columns: list[tuple[str, Callable[[Row], Cell]]] = [("Policy", named)]
    for judge in judges:
        against = [f"against_base.{judge}.{part}" for part in ("win", "tie", "lose")]
        columns += [
            (f"Reward by “{judge}”", of(f"rewards.{judge}")),
            (f"Difference, “{judge}”", of(f"difference.{judge}", signed=True)),
            (f"Win / tie / lose against base, “{judge}”, %", shares(*against)),
        ]
    return build(rows, columns)


# ---------------------------------------------------------------------------------------------------------------------
# Markdown
# ---------------------------------------------------------------------------------------------------------------------


def inline(text: object) -> str:
    """Text of unknown origin on one line, with everything escaped that Markdown or HTML would act upon."""
    flat = printable(" ".join(str(text).split()))
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", flat)


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table; every cell is escaped."""
    titles = list(map(inline, columns))
    body = [["---"] * len(titles), *([inline(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in [titles, *body]] + [""]


# ---------------------------------------------------------------------------------------------------------------------
# The terminal
# ---------------------------------------------------------------------------------------------------------------------


def shown(lines: Iterable[str]) -> str:
    """Lines for a terminal, which acts upon nothing that stands in them."""
    return "\n".join(printable(line, keep="") for line in lines)


def describe_scorer(evaluation: Mapping[str, Any]) -> str:
    """A scorer's evaluation.json in lines."""
    accuracy = interval(as_number(evaluation["label_accuracy"]))
    lines = [f"label accuracy {accuracy}, {evaluation['pairs']} pairs in random order"]
    if evaluation.get("gold_accuracy"):
        lines.append(
            f"gold accuracy {interval(as_number(evaluation['gold_accuracy']))}; "
            f"the labels themselves {interval(as_number(evaluation['labels_gold_accuracy']))}"
        )
    quartiles = " ".join(number(q["label_accuracy"]["value"], 3) for q in evaluation["by_confidence"])
    lines.append(f"by quartile of |R|, least sure first: {quartiles}")
    first, second = (number(evaluation[f"accuracy_chosen_{n}"]["value"], 3) for n in ("first", "second"))
    negative = number(100 * (evaluation["negative_share"] or 0), 1)
    lines.append(f"preferred response shown first {first}, second {second}; R < 0 in {negative} %")
    return shown(f"  {line}" for line in lines)


def describe_policy(evaluation: Mapping[str, Any]) -> str:
    """A policy's evaluation.json in lines."""
    lines = [f"{evaluation['prompts']} prompts; length {interval(as_number(evaluation['length']), 1)} tokens"]
    lines += [f"mean reward by {judge} {interval(as_number(value))}" for judge, value in evaluation["rewards"].items()]
    lines.append(f"KL to the base policy {interval(as_number(evaluation['kl']))} nats")
    for judge, parts in (evaluation.get("against_base") or {}).items():
        each = " / ".join(number(100 * parts[part]["value"], 0) for part in ("win", "tie", "lose"))
        lines.append(f"win / tie / lose against the base policy by {judge}: {each} %")
    return shown(f"  {line}" for line in lines)


def terminal(table: Table, columns: int) -> list[str]:
    """The first columns of a table, aligned."""
    texts = [
        [" ".join(filter(None, cell)) if n else cell[0] for n, cell in enumerate(row[:columns])] for row in table.rows
    ]
    lines = [table.columns[:columns], *texts]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
