"""The house has rooms, each of which imports only those below it; reading data loads no dashboards."""

import subprocess
import sys

from launch.size import SRC, imports, modules, room

# From the ground up.
ROOMS = (
    "runtime", "settings", "objectives", "checks", "sequences", "data", "models", "tracking", "evaluation", "report",
    "training", "stages", "main",
)  # fmt: skip
FLAT = {"settings", "checks", "tracking", "main"}


def test_a_room_imports_only_rooms_below_it():
    for module in (name for name in modules() if name.startswith("rdo.")):
        assert room(module) in ROOMS, module
        above = [name for name in imports(module) if ROOMS.index(room(name)) > ROOMS.index(room(module))]
        assert not above, module
        assert module.count(".") > 1 or room(module) in FLAT or modules()[module].name == "__init__.py", module


def test_nothing_waits_for_libraries_that_it_does_not_need():
    """Reading data needs no model, training no report, and only an adapter needs peft."""
    code = """if True:
        import sys
        import rdo.data.loading
        print(sys.modules.keys() & {"wandb", "matplotlib", "transformers", "deepspeed"})
        import rdo.main, rdo.stages.comparison
        print(sys.modules.keys() & {"wandb", "matplotlib", "pandas", "deepspeed", "peft"})
    """
    ran = subprocess.run([sys.executable, "-c", code], cwd=SRC, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["set()", "set()"]
