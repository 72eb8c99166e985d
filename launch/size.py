"""How large the house is (make size): lines of src by room, the longest file, and what a training stage reaches.

Imports are read from the text of the modules, those within functions included; nothing of the project is run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"


@cache
def modules() -> dict[str, Path]:
    """Every module of src by its dotted name; a package is its __init__.py."""
    found = {}
    for file in sorted(SRC.rglob("*.py")):
        parts = file.relative_to(SRC).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of this project that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules().keys() or {node.module}
    return frozenset(found & modules().keys() - {module})


def reached(module: str) -> set[str]:
    """A module and all that it imports, directly or not."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imports(name)
    return found


def room(module: str) -> str:
    """The folder below src/rdo that a module lies in; its own name where it lies in none."""
    return ".".join(module.split(".")[1:2]) or module


def lines(files: Iterable[Path]) -> int:
    return sum(len(file.read_text().splitlines()) for file in files)


def main() -> None:
    for name in sorted({room(module) for module in modules()}):
        inside = [file for module, file in modules().items() if room(module) == name]
        print(f"{lines(inside):7,} {name} ({len(inside)} modules)")
    print(f"{lines(modules().values()):7,} src in all")
    longest = max(modules().values(), key=lambda file: lines([file]))
    print(f"{lines([longest]):7,} the longest file, {longest.relative_to(ROOT)}")
    align = reached("rdo.stages.align")
    print(f"{lines(modules()[name] for name in align):7,} that rdo.stages.align reaches, in {len(align)} modules")
    for folder in ("tests", "launch"):
        print(f"{lines((ROOT / folder).rglob('*.py')):7,} {folder}")


if __name__ == "__main__":
    main()
