"""The house has rooms, each of which imports only those below it; reading data loads no dashboards."""

import subprocess
import sys

import pytest
from launch.size import ROOT, floors, imports, modules, room, rooms

# From the ground up.
ROOMS = (
    "runtime", "settings", "objectives", "checks", "sequences", "data", "models", "tracking", "evaluation", "report",
    "training", "stages", "main",
)  # fmt: skip
FLAT = {"settings", "checks", "tracking", "main"}


@pytest.mark.parametrize("module", [name for name in modules() if name.startswith("rdo.")])
def test_a_room_imports_only_rooms_below_it(module):
    assert room(module) in ROOMS
    above = [name for name in imports(module) if ROOMS.index(room(name)) > ROOMS.index(room(module))]
    assert not above
    assert module.count(".") > 1 or room(module) in FLAT or modules()[module].name == "__init__.py"


def test_no_import_goes_in_a_circle_and_the_house_is_not_high():
    assert floors({name: imports(name) for name in modules()})
    assert floors(rooms()) <= 10


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("rdo.data.loading", ("wandb", "matplotlib", "transformers", "deepspeed")),
        ("rdo.stages.align", ("matplotlib", "peft")),
    ],
)
def test_a_module_loads_no_library_that_it_does_not_need(module, unwanted):
    code = f"import sys; import {module}; print([name for name in {unwanted} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
