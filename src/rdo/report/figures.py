"""The five figures of the report, as SVG in the address of an image: the same bytes for the same data."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Callable, Sequence
from functools import wraps
from math import nan
from textwrap import wrap
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rdo.evaluation.numbers import Number, number, shortened
from rdo.report.results import Row, sweeps, training_curves
from rdo.runtime.errors import printable

# Okabe and Ito's colours without the yellow ones, which are too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B0568A", "#3A3A3A", "#8C6D1F")
MARKERS = {"none": "o", "reward": "s", "diff": "^", "gold": "D"}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "rdo",  # otherwise the ids inside the file are new every time
    "svg.fonttype": "none",  # text stays text, in a font of the reader's
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.size": 9.5,
    "font.sans-serif": ["DejaVu Sans", "Segoe UI", "Roboto", "Arial"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 5.5,
    "errorbar.capsize": 2,
}


def svg(draw: Callable[..., Figure | None]) -> Callable[..., str | None]:
    """A function that draws, as one that returns the address of an image. In an <img> a drawing can neither fetch nor
    run anything, and its ids are its own."""

    @wraps(draw)
    def drawn(*arguments: Any) -> str | None:
        with matplotlib.rc_context(STYLE):
            figure, buffer = draw(*arguments), io.StringIO()
            if figure is None:
                return None
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        return f"data:image/svg+xml;base64,{b64encode(printable(buffer.getvalue()).encode()).decode()}"

    return drawn


def panels(names: Sequence[Sequence[str]], width: float = 8.6) -> tuple[Figure, list[Axes]]:
    """A figure of panels, two in a line, with room for a legend of these names each; width in inches."""
    count, lines = len(names), (len(names) + 1) // 2
    figure = Figure(figsize=(width, lines * max(2.9, *map(legend_height, names))), layout="constrained")
    return figure, [figure.add_subplot(lines, 2, place + 1) for place in range(count)]


def label(name: str) -> str:
    """A name in lines that leave room for what is drawn."""
    return "\n".join(wrap(shortened(name, 64), 34))


def legend_height(names: Sequence[str]) -> float:
    """Inches that a legend of these names takes."""
    return 0.6 + sum(0.05 + 0.15 * len(label(name).splitlines()) for name in names)


def colour(position: int) -> dict[str, Any]:
    """A line's colour, and once these are used up its dashes, too."""
    return {"color": COLOURS[position % len(COLOURS)], "linestyle": ("-", "--", ":")[position // len(COLOURS) % 3]}


def bars(numbers: Sequence[Number]) -> list[list[float]]:
    """Lengths of the error bars below and above; NaN, and not drawn, where there is no interval."""
    return [[max(one.value - one.low, 0) for one in numbers], [max(one.high - one.value, 0) for one in numbers]]


def points(axes: Axes, x: Sequence[float], y: Sequence[Number], x_bars: Any = None, **given: Any) -> None:
    """A line or points with their intervals."""
    axes.errorbar(x, [one.value for one in y], bars(y), x_bars, elinewidth=0.8, **given)


@svg
def overview(rows: Sequence[Row], judge: str) -> Figure | None:
    """What coefficients change: each row's reward minus its baseline's, with the 95 % interval, and both KLs."""
    shown = [
        (row, row.baseline, change) for row in rows if row.baseline and (change := row.number(f"difference.{judge}"))
    ]
    if not shown:
        return None
    named = [label(f"{row.name} − {base.name}") for row, base, _ in shown]
    height = sum(0.1 + 0.15 * len(name.splitlines()) for name in named)
    figure = Figure(figsize=(6.4, 0.9 + height), layout="constrained")
    axes = figure.add_subplot()
    beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8.5}
    axes.annotate("KL / baseline's", (1.01, -1), **beside)
    for place, (row, base, change) in enumerate(shown):
        shade = {"higher": COLOURS[0], "lower": COLOURS[1]}.get(change.verdict, "#8A8A8A")
        face = "white" if row.ablation_in_words else shade
        axes.errorbar([change.value], [place], xerr=bars([change]), color=shade, marker="o", mfc=face, capsize=2.5)
        kl = [one.number("kl") for one in (row, base)]
        axes.annotate(" / ".join(number(one.value) for one in kl if one), (1.01, place), **beside)
    axes.axvline(0, color="#555555", linewidth=1)
    axes.locator_params(axis="x", nbins=6)
    axes.set_yticks(range(len(shown)), named)
    axes.set_ylim(len(shown) - 0.4, -1.2)
    axes.set_xlabel(f"reward by “{judge}”: row − baseline")
    return figure


@svg
def confidence(rows: Sequence[Row], metric: str) -> Figure | None:
    """Accuracy of each scorer by quartile of the size of its reward difference."""
    quarters = range(1, 5)
    wanted = [(row.name, [row.number(f"by_confidence.{n}.{metric}") for n in quarters]) for row in rows]
    drawn = [(name, [one or Number(nan) for one in found]) for name, found in wanted if any(found)]
    if not drawn:
        return None
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for place, (name, found) in enumerate(drawn):
        points(axes, [n + 0.04 * place for n in quarters], found, label=label(name), marker="o", **colour(place))
    axes.axhline(0.5, color="#888888", linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xticks(quarters, ["least sure", "2", "3", "surest"])
    axes.set_xlabel("quartile of |R|")
    axes.set_ylabel(f"accuracy against the {'true reward' if metric == 'gold_accuracy' else 'labels'}")
    axes.legend()
    return figure


@svg
def frontier(rows: Sequence[Row], judge: str) -> Figure | None:
    """Reward against KL: each method a curve over its swept setting, or a point."""
    known = [row for row in rows if row.number("kl") and row.number(f"rewards.{judge}")]
    if not known:
        return None
    curves = [line for lines in sweeps(known).values() for line in lines]
    curves += [[row] for row in known if not any(row in line for line in curves)]
    names = [line[0].name if len(line) == 1 else f"{line[0].name} … {line[-1].name}" for line in curves]
    figure = Figure(figsize=(8.6, max(3.8, legend_height(names))), layout="constrained")
    axes = figure.add_subplot()
    losses = sorted({row.loss for row in known})
    for line, name in zip(curves, names, strict=True):
        first = line[0]
        kl, reward = ([n for row in line if (n := row.number(key))] for key in ("kl", f"rewards.{judge}"))
        shade = COLOURS[losses.index(first.loss) % len(COLOURS)] if first.kind == "policy" else "#3A3A3A"
        points(
            axes,
            [one.value for one in kl],
            reward,
            bars(kl),
            color=shade,
            marker=MARKERS.get(first.rc, "o"),
            mfc="white" if first.ablation_in_words else shade,
            linestyle="-" if first.rc != "none" else "--",
            label=label(name),
        )
    axes.set_xlabel("KL to the base policy, nats")
    axes.set_ylabel(f"reward by “{judge}”")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), labelspacing=0.4)
    return figure


@svg
def swept(rows: Sequence[Row], keys: Sequence[str]) -> Figure | None:
    """What a swept setting leads to, by its value."""
    wanted = [
        (name, key, lines)
        for name, found in sweeps(rows).items()
        for key in keys
        if (lines := [line for line in found if all(row.number(key) for row in line)])
    ]
    if not wanted:
        return None
    figure, places = panels([[line[0].name for line in lines] for _, _, lines in wanted])
    for axes, (name, key, lines) in zip(places, wanted, strict=True):
        for shade, line in enumerate(lines):
            values = [row.settings[name] for row in line]
            title = line[0].name.split(",")[0] if line[0].name.endswith(f"={values[0]}") else f"{line[0].name} …"
            reached = [one for row in line if (one := row.number(key))]
            points(axes, values, reached, marker="o", label=label(title), **colour(shade))
        values = sorted({row.settings[name] for line in lines for row in line})
        if values[0] > 0 and values[-1] / values[0] >= 5:
            axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel(name)
        axes.set_ylabel(key)
        axes.legend()
    return figure


@svg
def training(rows: Sequence[Row]) -> Figure | None:
    """Training curves, the mean over seeds."""
    wanted: dict[str, list[tuple[Row, pd.Series[float]]]] = {}
    for row in rows:
        for name, values in training_curves(row).items():
            group = {"policy": row.loss, "base": "sft"}.get(row.kind, "scorers")
            wanted.setdefault(f"{group}: {str(name).replace('_', ' ')}", []).append((row, values))
    if not wanted:
        return None
    figure, places = panels([[row.name for row, _ in lines] for lines in wanted.values()], width=11.6)
    for axes, (name, lines) in zip(places, wanted.items(), strict=True):
        for shade, (row, values) in enumerate(lines):
            axes.plot(values.index, values, label=label(row.name), **{**colour(shade), "linewidth": 1.1})
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.02), labelspacing=0.3)
    return figure
