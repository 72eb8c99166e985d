"""The report of a run: report.html, report.md and report.json, all from the same tables and sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rdo.errors import printable
from rdo.files import replace_file
from rdo.report import curves, findings, plots, sweep, tables
from rdo.report.aggregate import aggregate
from rdo.report.markdown import render_markdown

SAMPLE_QUERIES = 6  # on the page; report.json holds them all


def write_report(data: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Write report.html, report.md and report.json into `folder`; each appears whole or not at all.

    Any optional part of `data` may be absent or None. Returns the paths under "html", "markdown" and "json".
    """
    folder.mkdir(parents=True, exist_ok=True)
    worlds = aggregate(data)
    view = build_view(data, worlds)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    everything = json.dumps(_plain({**data, "aggregates": worlds}), ensure_ascii=False, allow_nan=False)
    content = {
        "html": ("report.html", environment.get_template("report.html.j2").render(view)),
        "markdown": ("report.md", render_markdown(view)),
        "json": ("report.json", everything + "\n"),
    }
    for name, body in content.values():
        with replace_file(folder / name) as temporary:
            temporary.write_text(body, encoding="utf-8")
    return {kind: folder / name for kind, (name, _) in content.items()}


def visible(value: Any) -> Any:
    """What the page shows of a value: of a text nothing that turns it round or cannot be seen."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return printable(value.replace("\r\n", "\n"))


def _plain(value: Any) -> Any:
    """JSON's own types only: numpy numbers become Python's, and what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def build_view(data: Mapping[str, Any], worlds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the page shows, in the order in which it shows it."""
    dataset = data.get("dataset") or {}
    return {
        "title": str(data.get("title") or "Report"),
        "facts": _facts(data),
        "run": findings.run_sentence(data, worlds),
        "rules": findings.rules(worlds),
        "counts": _flat(dataset.get("counts") or {}),
        "truncation": _flat(dataset.get("truncation") or {}),
        "worlds": [_world(data, world, position) for position, world in enumerate(worlds, start=1)],
        "commands": [(str(name), str(command)) for name, command in (data.get("commands") or {}).items()],
        "settings": _settings(data),
        "missing": [printable(name) for name in data.get("missing") or []],
    }


def _facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The line under the title: what this page belongs to."""
    seconds = data.get("seconds")
    facts = [
        ("Made", data.get("created")),
        ("Code", data.get("code_revision")),
        ("Data", (data.get("dataset") or {}).get("name")),
        ("Duration", None if seconds is None else duration(float(seconds))),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines "a.b", "value"; what is None is left out."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            lines.extend(_flat(value, f"{name}."))
        elif value is not None:
            lines.append((name, _readable(value)))
    return lines


def _readable(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _settings(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Per row that states its settings, once for all seeds and worlds that agree on them."""
    lines: dict[tuple[str, str], None] = {}
    for row in [*(data.get("scorers") or []), *(data.get("policies") or [])]:
        flat = [(name, value) for name, value in _flat(row.get("settings") or {}) if name.split(".")[-1] != "seed"]
        if flat:
            lines[(str(row.get("name")), ", ".join(f"{name}={value}" for name, value in flat))] = None
    return list(lines)


def _world(data: Mapping[str, Any], world: Mapping[str, Any], position: int) -> dict[str, Any]:
    name = world["world"]
    scorers = [row for row in data.get("scorers") or [] if str(row.get("world") or "") == name]
    policies = [row for row in data.get("policies") or [] if str(row.get("world") or "") == name]
    samples = _samples(policies)
    return {
        "name": name or "Results",
        "anchor": f"world-{position}",
        "headline": findings.headline(world),
        "scorer_sentences": findings.scorer_sentences(world),
        "policy_sentences": findings.policy_sentences(world),
        "scorers": tables.scorer_table(world),
        "policies": tables.policy_table(world),
        "confidence": _figure(plots.confidence_svg(world, f"w{position}-confidence")),
        "reward_kl": _figure(plots.reward_kl_svg(world, f"w{position}-kl")),
        "sweep": _figure(sweep.sweep_svg(world, f"w{position}-sweep")),
        "distributions": _figure(curves.distributions_svg(scorers, f"w{position}-differences")),
        "scorer_curves": _figure(curves.curves_svg(scorers, f"w{position}-scorers", "Learning curves of the scorers")),
        "policy_curves": _figure(
            curves.curves_svg(policies, f"w{position}-policies", "Learning curves of the policies")
        ),
        "samples": samples[:SAMPLE_QUERIES],
        "more_samples": max(0, len(samples) - SAMPLE_QUERIES),
    }


def _figure(svg: str | None) -> Markup | None:
    """Matplotlib has escaped every name that it wrote into the figure."""
    return None if svg is None else Markup(printable(svg))


def _samples(policies: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per query the responses of the policies, from the first seed of each policy that brought samples."""
    first: dict[str, Mapping[str, Any]] = {}
    for row in policies:
        if (row.get("evaluation") or {}).get("samples"):
            first.setdefault(str(row.get("name")), row)
    queries: dict[str, list[dict[str, Any]]] = {}
    for name, row in first.items():
        seen: set[str] = set()
        for sample in row["evaluation"]["samples"]:
            query = str(sample.get("query"))
            if query in seen:  # several responses to one query: the first stands for them
                continue
            seen.add(query)
            rewards = [(str(judge), tables.number(value)) for judge, value in (sample.get("rewards") or {}).items()]
            answer = {"policy": name, "response": str(sample.get("response")), "rewards": rewards}
            queries.setdefault(query, []).append(answer)
    return [{"query": query, "answers": answers} for query, answers in queries.items()]
