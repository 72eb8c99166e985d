"""The figure of a sweep: alpha and the betas against what they lead to, one line for each loss and coefficient."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rdo.files import replace_file
from rdo.report.aggregate import Summary, aggregate
from rdo.report.findings import primary_judge
from rdo.report.plots import LINE_MARKERS, colour_of, error_of, label, line_style_of, style, to_png, to_svg

# The settings that are swept, as the axes name them.
POLICY_AXES = {
    "rc.alpha": "alpha, the exponent in the coefficient R^alpha (rc.alpha)",
    "loss.beta": "beta of the loss (loss.beta)",
    "diffmodel.beta0": "beta0, weight of f(y, y)² (diffmodel.beta0)",
    "diffmodel.beta1": "beta1, weight of (f(a, b) + f(b, a))² (diffmodel.beta1)",
}
SCORER_AXES = {name: POLICY_AXES[name] for name in ("diffmodel.beta0", "diffmodel.beta1")}
# Lines are drawn side by side, so that their error bars do not hide one another: the distance of two, as a share of the
# axis, and as a factor where that is logarithmic.
SHARE, FACTOR = 0.006, 1.02
# An axis is logarithmic where the largest gap between two values is so many times the smallest.
UNEVEN = 5.0

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """Rows that differ in one setting alone, by its values; `fixed` is what other lines may have otherwise."""

    name: str
    fixed: Mapping[str, Any]
    points: list[tuple[float, Row]]


@dataclass(frozen=True)
class Panel:
    """One quantity against one setting. `level`: what a row without the setting has, drawn as a horizontal line."""

    axis: str
    quantity: str
    lines: list[Line]
    value: Callable[[Row], Summary | None]


def lines_over(rows: Sequence[Row], parameter: str) -> list[Line]:
    """The lines along a setting, of two points or more. A row says in `sweep` which values it has of the settings that
    are swept, and what else it was made with."""
    groups: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        sweep = row.get("sweep") or {}
        value = sweep.get("values", {}).get(parameter)
        if value is not None:
            key = json.dumps([row.get("group"), row.get("rc"), row.get("control"), fixed_of(row, parameter)])
            groups.setdefault(key, []).append((float(value), row))
    found = []
    for points in groups.values():
        if len({value for value, _ in points}) > 1:
            first = points[0][1]
            points.sort(key=lambda point: point[0])
            found.append(Line(line_name(first), fixed_of(first, parameter), points))
    return with_differences(found)


def fixed_of(row: Row, parameter: str) -> dict[str, Any]:
    """What a row was made with, without the setting along which the line runs."""
    sweep = row["sweep"]
    settings = {**sweep.get("others", {}), **sweep["values"]}
    return {name: settings[name] for name in sorted(settings) if name != parameter}


def line_name(row: Row) -> str:
    """Loss and coefficients of a policy; the form of a scorer."""
    if "group" not in row:
        return f"difference model, form {row['form']}" if row.get("form") else str(row["name"])
    rc = "no coefficient" if row.get("rc") in (None, "none") else f"rc {row['rc']}"
    return f"{row['group']}, {rc}" + (f" ({row['control']})" if row.get("control") else "")


def with_differences(lines: list[Line]) -> list[Line]:
    """The lines, with those settings in their names that tell lines of one name apart."""
    told = []
    for line in lines:
        alike = [other.fixed for other in lines if other.name == line.name]
        names = sorted({name for fixed in alike for name in fixed})
        differing = [name for name in names if len({json.dumps(fixed.get(name)) for fixed in alike}) > 1]
        parts = [f"{name.split('.')[-1]} {line.fixed.get(name)}" for name in differing]
        told.append(Line(", ".join([line.name, *parts]), line.fixed, line.points))
    return told


def panels(world: Mapping[str, Any]) -> list[list[Panel]]:
    """Rows of panels: of each swept setting the reward and the KL of policies, the accuracy and the gap of scorers."""
    judge = primary_judge(world)
    accuracy = "oracle_accuracy"
    if all(row["metrics"][accuracy]["mean"] is None for row in world["scorers"]):
        accuracy = "label_accuracy"
    against = "the true reward" if accuracy == "oracle_accuracy" else "the labels"
    found = []
    for parameter, axis in POLICY_AXES.items():
        if judge and (lines := lines_over(world["policies"], parameter)):
            reward = Panel(axis, f"mean reward by “{judge}”", lines, lambda row: row["rewards"].get(judge))
            found.append([reward, Panel(axis, "KL to the base policy, nats", lines, lambda row: row["kl"])])
    for parameter, axis in SCORER_AXES.items():
        if lines := lines_over(world["scorers"], parameter):
            right = Panel(axis, f"accuracy against {against}", lines, lambda row: row["metrics"][accuracy])
            gap = "antisymmetry gap, mean |f(a, b) + f(b, a)|"
            found.append([right, Panel(axis, gap, lines, lambda row: row["metrics"]["antisymmetry_gap"])])
    return [[panel for panel in row if drawn_points(panel)] for row in found]


def drawn_points(panel: Panel) -> list[list[tuple[float, Row, Summary]]]:
    """Of each line the points that have a value; empty if none has any (a KL is known of sampled responses alone)."""
    lines = [
        [(at, row, value) for at, row in line.points if (value := panel.value(row)) and value["mean"] is not None]
        for line in panel.lines
    ]
    return lines if any(lines) else []


def draw_panel(axes: Axes, panel: Panel, policies: Mapping[str, Row]) -> None:
    """One line a loss and coefficient, with intervals; dashed what the same loss reaches without a coefficient."""
    lines = drawn_points(panel)
    levels: dict[str, tuple[float, str]] = {}  # by the row's name: the height, and what the row is
    tried = sorted({at for points in lines for at, _, _ in points})
    scale(axes, tried)
    for position, (line, points) in enumerate(zip(panel.lines, lines, strict=True)):
        errors = [error_of(value) for _, _, value in points]
        axes.errorbar(
            [beside(at, tried, position - (len(lines) - 1) / 2) for at, _, _ in points],
            [value["mean"] or 0.0 for _, _, value in points],
            yerr=[[low for low, _ in errors], [high for _, high in errors]],
            color=colour_of(position),
            linestyle=line_style_of(position),
            marker=LINE_MARKERS[position % len(LINE_MARKERS)],
            markersize=5,
            capsize=2.5,
            elinewidth=1,
            label=label(line.name),
        )
        plain = policies.get(str(points[0][1].get("compared_with"))) if points else None
        level = panel.value(plain) if plain is not None else None
        if plain is not None and level is not None and level["mean"] is not None:
            levels.setdefault(plain["name"], (level["mean"], line_name(plain)))
    for height, name in levels.values():
        axes.axhline(height, color="#555555", linewidth=1, linestyle=(0, (4, 3)), zorder=1, label=label(name))
    axes.set_xlabel(panel.axis)
    axes.set_ylabel(panel.quantity)


def logarithmic(tried: Sequence[float]) -> bool:
    """Whether the values that were tried, in rising order, lie as far apart as those of a sweep over magnitudes."""
    gaps = [high - low for low, high in pairwise(tried)]
    return len(gaps) > 1 and max(gaps) >= UNEVEN * min(gaps)


def beside(value: float, tried: Sequence[float], steps: float) -> float:
    """A place on the axis so many steps beside a value."""
    if not logarithmic(tried):
        return value + SHARE * steps * (tried[-1] - tried[0])
    if value > 0:
        return value * FACTOR**steps
    return (FACTOR - 1) * steps * min(other for other in tried if other > 0)


def scale(axes: Axes, tried: Sequence[float]) -> None:
    """Marks the values that were tried; on a logarithmic axis, linear around zero, where that fits them."""
    if logarithmic(tried):
        axes.set_xscale("symlog", linthresh=min(value for value in tried if value > 0))
        axes.minorticks_off()
    if len(tried) <= 12:
        axes.set_xticks(tried, [f"{value:g}" for value in tried])


def sweep_figure(world: Mapping[str, Any]) -> Figure | None:
    """Reward and KL by alpha and the betas of policies, accuracy and antisymmetry by the betas of scorers; None where
    no setting was swept."""
    rows = panels(world)
    if not rows:
        return None
    policies = {str(row["name"]): row for row in world["policies"]}
    seeds = max(len(row["seeds"]) for row in [*world["policies"], *world["scorers"]])
    bars = "standard deviation over seeds" if seeds > 1 else "95 % intervals of the one seed, over prompts or pairs"
    with style():
        figure = Figure(figsize=(11, 3.9 * len(rows)), layout="constrained")
        for part, row in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
            drawn = part.subplots(1, len(row), squeeze=False)[0]
            for axes, panel in zip(drawn, row, strict=True):
                draw_panel(axes, panel, policies)
            entries = drawn[0].get_legend_handles_labels()
            part.legend(*entries, loc="outside lower center", ncols=min(3, len(entries[1])), fontsize=8.5)
        world_name = f"World: {world['world']}. " if world["world"] else ""
        figure.suptitle(f"{world_name}Error bars: {bars}", x=0.01, ha="left", fontsize=9)
        return figure


def sweep_svg(world: Mapping[str, Any], name: str) -> str | None:
    """Figure: what the swept settings lead to; None where no setting was swept."""
    return to_svg(sweep_figure(world), name, "Reward and KL by alpha and beta, one line for each loss and coefficient")


def draw_sweep(data: Mapping[str, Any], path: Path) -> bool:
    """PNG of the first world that holds a sweep; the report itself shows every world. Whether there was one."""
    figures = (sweep_figure(world) for world in aggregate(data))
    figure = next((figure for figure in figures if figure is not None), None)
    if figure is None:
        return False
    with replace_file(path) as temporary:
        temporary.write_bytes(to_png(figure))
    return True
