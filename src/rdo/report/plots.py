"""Drawing: matplotlib figures as SVG text to be put inside a page, the same bytes for the same data."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rdo.files import replace_file
from rdo.report.aggregate import Summary, aggregate
from rdo.report.findings import primary_judge

# Okabe and Ito's colours without the yellow ones, which are too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#B0568A", "#3A3A3A", "#8C6D1F")
GROUP_COLOURS = {"base": "#3A3A3A", "dpo": "#0072B2", "rrhf": "#D55E00", "kto": "#009E73"}
OTHER_COLOUR = "#B0568A"
RC_MARKERS = {"none": "o", "reward": "s", "diff": "^", "oracle": "D"}
LINE_MARKERS = ("o", "s", "^", "D", "v", "P")

SMALLEST = 0.75  # of a figure's natural width

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "rdo",  # otherwise the ids inside the file are new every time
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud, and takes the page's font
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


def style() -> AbstractContextManager[None]:
    """The settings that every figure is drawn under; nothing outside is changed."""
    return matplotlib.rc_context(STYLE)


def to_svg(figure: Figure | None, name: str, description: str) -> str | None:
    """The figure, if there is one, as an <svg> element whose ids start with `name`, so that several fit into one
    page."""
    if figure is None:
        return None
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Text cannot hold a bare "<", so this touches the tags alone.
    text = re.sub(r"<[^>]*>", lambda tag: _own_ids(tag.group(0), name), text)
    # On a narrow screen it shrinks to a size at which its text can still be read, and scrolls from there.
    least = f"min-width: {figure.get_figwidth() * 96 * SMALLEST:.0f}px"
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}" style="{least}"', 1)


def to_png(figure: Figure, dots_per_inch: int = 150) -> bytes:
    """The figure as a picture on its own."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", dpi=dots_per_inch, metadata={"Software": None})
    return buffer.getvalue()


def _own_ids(tag: str, name: str) -> str:
    return re.sub(r'(\bid="|url\(#|href="#)', lambda found: f"{found.group(1)}{name}-", tag)


def label(text: object) -> str:
    """A name as a legend entry; matplotlib would hide one that starts with an underscore."""
    name = str(text)
    return " " + name if name.startswith("_") else name


def colour_of(position: int) -> str:
    return COLOURS[position % len(COLOURS)]


def line_style_of(position: int) -> str:
    """Solid until the colours are used up, then dashed and dotted."""
    return ("-", "--", ":")[position // len(COLOURS) % 3]


def error_of(summary: Summary) -> tuple[float, float]:
    """Lengths of the error bar below and above: standard deviation over seeds, or the one run's interval."""
    mean = summary["mean"]
    if mean is None:
        return 0.0, 0.0
    if summary["sd"] is not None:
        return summary["sd"], summary["sd"]
    if summary["low"] is None or summary["high"] is None:
        return 0.0, 0.0
    return max(0.0, mean - summary["low"]), max(0.0, summary["high"] - mean)


def has_confidence(world: Mapping[str, Any]) -> bool:
    return any(_confidence(row) for row in world["scorers"])


def _confidence(row: Mapping[str, Any]) -> list[Summary]:
    """Accuracy by quartile: by the oracle where there is one, else by the labels."""
    for key in ("oracle_accuracy", "label_accuracy"):
        parts = [part[key] for part in row["by_confidence"]]
        if any(part["mean"] is not None for part in parts):
            return parts
    return []


def draw_confidence(axes: Axes, world: Mapping[str, Any]) -> None:
    """Accuracy in the four quartiles of |R|, one line a scorer."""
    drawn = [(row, _confidence(row)) for row in world["scorers"]]
    drawn = [(row, parts) for row, parts in drawn if parts]
    for position, (row, parts) in enumerate(drawn):
        kept = [(quartile, part) for quartile, part in enumerate(parts, start=1) if part["mean"] is not None]
        # Side by side: error bars on the same spot would hide one another.
        shift = 0.05 * (position - (len(drawn) - 1) / 2)
        errors = [error_of(part) for _, part in kept]
        axes.errorbar(
            [quartile + shift for quartile, _ in kept],
            [part["mean"] or 0.0 for _, part in kept],
            yerr=[[low for low, _ in errors], [high for _, high in errors]],
            color=colour_of(position),
            linestyle=line_style_of(position),
            marker=LINE_MARKERS[position % len(LINE_MARKERS)],
            markersize=5,
            capsize=2.5,
            elinewidth=1,
            label=label(row["name"]),
        )
    oracle = any(part["oracle_accuracy"]["mean"] is not None for row, _ in drawn for part in row["by_confidence"])
    axes.axhline(0.5, color="#888888", linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set_xticks([1, 2, 3, 4], ["least sure", "2", "3", "surest"])
    axes.set_xlim(0.7, 4.3)
    axes.set_xlabel("quartile of |R|")
    axes.set_ylabel("accuracy against the true reward" if oracle else "accuracy against the labels")
    axes.legend(loc="best", fontsize=8.5)


def plotted_policies(world: Mapping[str, Any]) -> list[tuple[int, Mapping[str, Any], Summary]]:
    """Policies that have both a reward and a KL: their number in the table, the row, the reward."""
    judge = primary_judge(world)
    found = []
    for position, row in enumerate(world["policies"], start=1):
        reward = row["rewards"].get(judge)
        if reward is not None and reward["mean"] is not None and row["kl"]["mean"] is not None:
            found.append((position, row, reward))
    return found


def draw_reward_kl(axes: Axes, world: Mapping[str, Any]) -> None:
    """Reward against KL, one numbered point a policy; controls are hollow."""
    points = plotted_policies(world)
    for position, row, reward in points:
        colour = GROUP_COLOURS.get(str(row["group"]), OTHER_COLOUR)
        axes.errorbar(
            [row["kl"]["mean"]],
            [reward["mean"] or 0.0],
            xerr=[[length] for length in error_of(row["kl"])],
            yerr=[[length] for length in error_of(reward)],
            color=colour,
            marker=RC_MARKERS.get(str(row["rc"] or "none"), "o"),
            markersize=6.5,
            markerfacecolor="white" if row["control"] else colour,
            elinewidth=0.8,
            linestyle="none",
            label=f"{position}  {row['name']}" + ("  (control)" if row["control"] else ""),
        )
    axes.margins(0.08)
    _number_points(axes, [(row["kl"]["mean"], reward["mean"] or 0.0, str(at)) for at, row, reward in points])
    axes.set_xlabel("KL to the base policy")
    axes.set_ylabel(f"reward by “{primary_judge(world)}”")
    columns = 1 if len(points) <= 24 else 2
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), fontsize=8.5, ncols=columns, labelspacing=0.45)


OFFSETS = ((9, 6), (9, -12), (-14, 6), (-14, -12), (-2, 11), (-2, -18), (16, -3), (-22, -3))


def _number_points(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each number beside its point, in the direction where it is farthest from points and earlier numbers."""
    axes.figure.canvas.draw()  # the limits must be final before data can be turned into places on the canvas
    dots = [tuple(axes.transData.transform((x, y))) for x, y, _ in points]
    taken: list[tuple[float, float]] = [(float(x), float(y)) for x, y in dots]
    scale = axes.figure.dpi / 72
    for (x, y, text), dot in zip(points, dots, strict=True):
        others = [spot for spot in taken if spot != (float(dot[0]), float(dot[1]))]

        def room(offset: tuple[int, int], dot: Any = dot, others: list[tuple[float, float]] = others) -> float:
            place = (dot[0] + (offset[0] + 3) * scale, dot[1] + (offset[1] + 3) * scale)
            return min((abs(place[0] - a) + abs(place[1] - b) for a, b in others), default=1e9)

        # Free enough is good enough: then the first, usual place wins and the picture stays calm.
        offset = next((o for o in OFFSETS if room(o) > 18 * scale), max(OFFSETS, key=room))
        axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", fontsize=8.5, color="#222222")
        taken.append((dot[0] + (offset[0] + 3) * scale, dot[1] + (offset[1] + 3) * scale))


def confidence_figure(world: Mapping[str, Any]) -> Figure | None:
    """Accuracy by quartile of |R|; None when no scorer has it."""
    if not has_confidence(world):
        return None
    with style():
        figure = Figure(figsize=(6.6, 3.7), layout="constrained")
        draw_confidence(figure.add_subplot(), world)
        return figure


def confidence_svg(world: Mapping[str, Any], name: str) -> str | None:
    """Figure: accuracy by quartile of |R|; None when no scorer has it."""
    description = "Accuracy of each scorer by quartile of the size of its reward difference"
    return to_svg(confidence_figure(world), name, description)


def reward_kl_figure(world: Mapping[str, Any]) -> Figure | None:
    """Reward against KL; None when no policy has both."""
    points = plotted_policies(world)
    if not points:
        return None
    with style():
        lines = len(points) if len(points) <= 24 else (len(points) + 1) // 2
        figure = Figure(figsize=(9.2, max(4.2, 0.23 * lines + 0.8)), layout="constrained")
        draw_reward_kl(figure.add_subplot(), world)
        return figure


def reward_kl_svg(world: Mapping[str, Any], name: str) -> str | None:
    """Figure: reward against KL; None when no policy has both."""
    return to_svg(reward_kl_figure(world), name, "Reward of each policy against its KL divergence from the base policy")


def draw_overview(data: Mapping[str, Any], path: Path) -> bool:
    """PNG of 1200 x 500 points for the README: accuracy by confidence and reward against KL.

    The first world that has both is drawn, and named in the title; the report itself shows every world. Returns
    whether there was one: a KL is known of sampled responses alone.
    """
    worlds = [world for world in aggregate(data) if has_confidence(world) and plotted_policies(world)]
    if not worlds:
        return False
    world = worlds[0]
    with style():
        figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.25])
        draw_confidence(left, world)
        left.set_title("Is a large reward difference reliable?")
        draw_reward_kl(right, world)
        right.set_title("What each policy gains, and how far it moves")
        figure.suptitle(f"World: {world['world']}" if world["world"] else "", x=0.01, ha="left", fontsize=9)
        with replace_file(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
    return True
