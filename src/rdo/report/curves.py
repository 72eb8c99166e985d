"""Figures made of many small panels: the distribution of R by scorer, and learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rdo.report.plots import colour_of, label, line_style_of, style, to_svg

BINS = 40
COLUMNS = 3
CURVE_POINTS = 50

Row = Mapping[str, Any]


def distributions_svg(scorers: Sequence[Row], name: str) -> str | None:
    """Figure: histogram of R = f(preferred, other), one panel a scorer, all seeds together, and where zero lies."""
    description = "Distribution of the reward difference R, one panel for each scorer"
    return to_svg(distributions_figure(scorers), name, description)


def distributions_figure(scorers: Sequence[Row]) -> Figure | None:
    """Histogram of R = f(preferred, other), one panel a scorer, all seeds together, and where zero lies."""
    pooled: dict[str, list[float]] = {}
    for row in scorers:
        values = (row.get("evaluation") or {}).get("differences") or []
        pooled.setdefault(str(row.get("name")), []).extend(float(v) for v in values if math.isfinite(v))
    pooled = {scorer: values for scorer, values in pooled.items() if values}
    if not pooled:
        return None
    with style():
        figure, panels = _grid(len(pooled), height=2.3)
        for position, (panel, (scorer, values)) in enumerate(zip(panels, pooled.items(), strict=True)):
            _histogram(panel, np.asarray(values), colour_of(position))
            panel.set_title(label(scorer))
        return figure


def _histogram(axes: Axes, values: np.ndarray[Any, Any], colour: str) -> None:
    # The outermost half per cent on each side would squeeze the rest: it goes into the first and the last bin.
    low, high = (float(bound) for bound in np.quantile(values, [0.005, 0.995]))
    if low == high:
        low, high = low - 0.5, high + 0.5
    shares = np.full(len(values), 1 / len(values))
    axes.hist(np.clip(values, low, high), bins=BINS, range=(low, high), weights=shares, color=colour, alpha=0.75)
    axes.axvline(0, color="#222222", linewidth=1)
    axes.set_xlabel("R")
    axes.set_ylabel("share of pairs")
    negative = float(np.mean(values < 0))
    axes.annotate(f"R < 0: {100 * negative:.0f} %", (0.02, 0.97), xycoords="axes fraction", va="top", fontsize=8.5)


def curves_svg(rows: Sequence[Row], name: str, description: str) -> str | None:
    """Figure: learning curves, one panel for every measure of every group, one line a row."""
    panels: dict[tuple[str, str], dict[str, list[list[tuple[float, float]]]]] = {}
    for row in rows:
        for measure, points in (row.get("curve") or {}).items():
            line = finite(points or [])
            if line:
                key = (str(row.get("group") or ""), str(measure))
                panels.setdefault(key, {}).setdefault(str(row.get("name")), []).append(line)
    if not panels:
        return None
    order = list(dict.fromkeys(group for group, _ in panels))
    keys = sorted(panels, key=lambda key: order.index(key[0]))
    with style():
        figure, axes = _grid(len(keys), height=2.9)
        for panel, key in zip(axes, keys, strict=True):
            _lines(panel, panels[key])
            panel.set_title(label(" · ".join(part.replace("_", " ") for part in key if part)))
        return to_svg(figure, name, description)


def _lines(axes: Axes, rows: Mapping[str, list[list[tuple[float, float]]]]) -> None:
    for position, (name, seeds) in enumerate(rows.items()):
        line = thin(over_seeds(seeds))
        axes.plot(
            [step for step, _ in line],
            [value for _, value in line],
            color=colour_of(position),
            linestyle=line_style_of(position),
            linewidth=1.2,
            label=label(name),
        )
    axes.set_xlabel("step")
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2, handlelength=1.6)


def over_seeds(lines: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Mean curve over the steps that every seed has; a seed that stopped early shortens it."""
    found = [dict(line) for line in lines]
    shared = [step for step in found[0] if all(step in other for other in found)]
    return [(step, sum(line[step] for line in found) / len(found)) for step in shared]


def finite(points: Sequence[Sequence[Any]]) -> list[tuple[float, float]]:
    """The points whose value is a finite number."""
    numbers = [(float(point[0]), float(point[1])) for point in points if point[1] is not None]
    return [(step, value) for step, value in numbers if math.isfinite(value)]


def thin(points: Sequence[tuple[float, float]], limit: int = CURVE_POINTS) -> list[tuple[float, float]]:
    """At most `limit` points, each the mean of an equal stretch of the curve."""
    size = math.ceil(len(points) / limit)  # the same for every stretch: unequal ones would look unequally noisy
    parts = [np.asarray(points[start : start + size]) for start in range(0, len(points), size or 1)]
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def _grid(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns = min(count, COLUMNS)
    rows = (count + columns - 1) // columns
    figure = Figure(figsize=(3.3 * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, position + 1) for position in range(count)]
