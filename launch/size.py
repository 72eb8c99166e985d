"""How large the house is (make size): lines of src by room, the longest file, and what a training stage reaches.

Imports are read from the text of the modules, those within functions included; nothing of the project is run.
"""

from __future__ import annotations

import ast
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
    tree = ast.parse(modules()[module].read_text())
    for_types = {id(node) for test in ast.walk(tree) if is_for_types(test) for node in ast.walk(test)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in modules() else node.module)
    return frozenset(found & modules().keys() - {module})


def is_for_types(node: ast.AST) -> bool:
    """Whether this is `if TYPE_CHECKING`, whose imports nothing runs."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


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


def floors(names: dict[str, frozenset[str]]) -> int:
    """The longest chain of imports, of modules or of rooms, given what each imports. Raises ValueError where imports go
    in a circle."""
    left, count = set(names), 0
    while lowest := {name for name in left if not names[name] & left}:
        left, count = left - lowest, count + 1
    if left:
        raise ValueError(f"imports go in a circle among, or above, {', '.join(sorted(left))}")
    return count


def rooms() -> dict[str, frozenset[str]]:
    """What every room imports of other rooms."""
    found: dict[str, frozenset[str]] = {}
    for name in modules():
        others = frozenset(room(other) for other in imports(name)) - {room(name)}
        found[room(name)] = found.get(room(name), frozenset()) | others
    return found


def room(module: str) -> str:
    """The folder below src/rdo that a module lies in; its own name where it lies in none."""
    return ".".join(module.split(".")[1:2]) or module


def lines(names: set[str] | list[str]) -> int:
    """Lines of these modules."""
    return sum(len(modules()[name].read_text().splitlines()) for name in names)


def main() -> None:
    for name in sorted(rooms()):
        inside = [module for module in modules() if room(module) == name]
        print(f"{lines(inside):7,} {name} ({len(inside)} modules)")
    high, deep = floors(rooms()), floors({name: imports(name) for name in modules()})
    print(f"{lines(list(modules())):7,} src in all; rooms on {high} floors, the longest chain of imports {deep}")
    longest = max(modules(), key=lambda name: lines([name]))
    print(f"{lines([longest]):7,} the longest file, {modules()[longest].relative_to(ROOT)}")
    align = reached("rdo.stages.align")
    print(f"{lines(align):7,} that rdo.stages.align reaches, in {len(align)} modules")
    for folder in ("tests", "launch"):
        files = (ROOT / folder).rglob("*.py")
        print(f"{sum(len(file.read_text().splitlines()) for file in files):7,} {folder}")


if __name__ == "__main__":
    main()
