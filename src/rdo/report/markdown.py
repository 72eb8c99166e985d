"""The report as Markdown, for places that show no HTML: the same sentences and tables, without the figures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rdo.errors import printable
from rdo.report.tables import Table


def inline(text: object) -> str:
    """Text of unknown origin on one line, with everything escaped that Markdown or HTML would act upon."""
    flat = printable(" ".join(str(text).split()))
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", flat)


def code(text: object) -> str:
    """Text as inline code inside a table, fenced by more backticks than it contains in a row."""
    flat = printable(" ".join(str(text).replace("\\\n", " ").split()))  # a command over several lines becomes one
    longest = max((len(run) for run in re.findall(r"`+", flat)), default=0)
    fence = "`" * (longest + 1)
    gap = " " if longest else ""
    return f"{fence}{gap}{flat}{gap}{fence}".replace("|", "\\|")


def table_lines(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table; the cells must be escaped already. Columns of numbers are aligned to the right."""
    titles = list(columns)
    body = [list(row) for row in rows]
    numeric = [all(re.match(r"[+−–]?\d|–$", line[position]) for line in body) for position in range(len(titles))]
    rule = ["---:" if right else "---" for right in numeric]
    return [f"| {' | '.join(line)} |" for line in (titles, rule, *body)]


def _table(table: Table) -> list[str]:
    return [*table_lines(map(inline, table.columns), ([inline(c.text) for c in row] for row in table.rows)), ""]


def _items(lines: Iterable[str]) -> list[str]:
    found = [f"- {inline(line)}" for line in lines]
    return [*found, ""] if found else []


def render_markdown(view: Mapping[str, Any]) -> str:
    """The whole report as Markdown text."""
    lines = [f"# {inline(view['title'])}", ""]
    if view["facts"]:
        lines += [" · ".join(f"{name}: {inline(value)}" for name, value in view["facts"]), ""]
    lines += [inline(view["run"]), ""]
    several = len(view["worlds"]) > 1
    shown = [world for world in view["worlds"] if world["headline"]]
    lines += _items(f"{world['name']}. {world['headline']}" if several else world["headline"] for world in shown)
    for world in view["worlds"]:
        lines += _world(world)
    if view["counts"] or view["truncation"]:
        lines += ["## Data", "", *table_lines(["Count", "Value"], _escaped(view["counts"] + view["truncation"])), ""]
    if view["commands"]:
        rows = ([inline(name), code(command)] for name, command in view["commands"])
        lines += ["## Commands", "", *table_lines(["Row", "Command"], rows), ""]
    if view["settings"]:
        rows = ([inline(name), code(settings)] for name, settings in view["settings"])
        lines += ["## Settings", "", *table_lines(["Row", "Settings"], rows), ""]
    lines += ["## Notes", ""]
    if view["missing"]:
        lines += [f"**Not finished:** {', '.join(inline(name) for name in view['missing'])}.", ""]
    lines += _items(view["rules"])
    return "\n".join(lines).rstrip() + "\n"


def _escaped(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    return [[inline(name), inline(value)] for name, value in pairs]


def _world(world: Mapping[str, Any]) -> list[str]:
    lines = [f"## {inline(world['name'])}", ""]
    if world["scorers"].rows:
        lines += ["### Scorers", "", *_items(world["scorer_sentences"]), *_table(world["scorers"])]
    if world["policies"].rows:
        lines += ["### Policies", "", *_items(world["policy_sentences"]), *_table(world["policies"])]
    if world["samples"]:
        lines += ["### Samples", ""]
    for sample in world["samples"]:
        lines += [f"**{inline(sample['query'])}**", ""]
        rows = (
            [
                inline(answer["policy"]),
                ", ".join(f"{inline(judge)} {value}" for judge, value in answer["rewards"]),
                inline(answer["response"]),
            ]
            for answer in sample["answers"]
        )
        lines += [*table_lines(["Policy", "Reward", "Response"], rows), ""]
    return lines
