"""Ready-made sweeps: experiments that bring hydra.sweeper.params."""

from __future__ import annotations

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from rdo.checks import compose_config, sweep_points
from rdo.errors import UserError
from rdo.main import fail


class ReadyMade(Callback):
    """Lets the command line change a ready-made sweep, and refuses what would run another one than was meant."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Without -m an experiment that is a sweep would run one point of it, with values that nobody chose."""
        chosen = given(config)
        if free := [key for key in parameters(config) if key not in chosen]:
            fail(UserError(f"the experiment is a sweep over {', '.join(free)}: run it with -m, or give each a value"))

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """A value on the command line takes the place of the experiment's; every point is checked before any runs."""
        chosen, swept = given(config), parameters(config)
        if not swept:
            return
        kept = {key: value for key, value in swept.items() if key not in chosen}
        with read_write(config), open_dict(config):
            config.hydra.sweeper.params = kept
        try:
            swept_over = [f"{key}={value}" for key, value in kept.items()]
            for point in sweep_points([*swept_over, *config.hydra.overrides.task]):
                compose_config(point)
        except UserError as error:
            fail(error)


def parameters(config: DictConfig) -> dict[str, Any]:
    """What the composed experiment sweeps over, by setting."""
    return dict(config.hydra.sweeper.get("params") or {})


def given(config: DictConfig) -> set[str]:
    """The settings that the command line gives values."""
    return {override.partition("=")[0].lstrip("+~") for override in config.hydra.overrides.task}
