"""Comparisons and sweeps, hydra's multiruns: every point is checked before the first one runs; the report follows."""

from __future__ import annotations

import os
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from rdo.checks import compose_config, sweep_points
from rdo.runtime.failing import FAILED, fail
from rdo.runtime.processes import found_world
from rdo.stages.report import make_report


class Comparison(Callback):
    """What happens around the points of a sweep, whoever runs them."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """A value on the command line takes the place of the experiment's; every point is checked before any runs."""
        FAILED.clear()
        given = list(config.hydra.overrides.task)
        chosen = {override.partition("=")[0].lstrip("+~") for override in given}
        params = config.hydra.sweeper.get("params")
        swept = {} if params is None else dict(OmegaConf.to_container(params, resolve=True))  # type: ignore[arg-type]
        swept = {key: value for key, value in swept.items() if key not in chosen}
        with read_write(config), open_dict(config):
            config.hydra.sweeper.params = swept
        try:
            points = sweep_points([*(f"{key}={value}" for key, value in swept.items()), *given])
            self.evaluated = [point for point in map(compose_config, points) if point.stage.name == "eval"]
        except Exception as error:
            fail(error)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Reports what is evaluated in the run folder. Exits with 1 where a point could not run."""
        if not found_world(os.environ).first:
            return
        common = set(config.hydra.overrides.task)
        failed = {" ".join(text for text in point if text not in common): said for point, said in FAILED}
        try:
            for own in {point.run_dir: point for point in self.evaluated}.values():
                make_report(own, failed, anew=False)
        except Exception as error:
            fail(error)
        if failed:
            print(f"error: these points could not run: {'; '.join(failed)}", file=sys.stderr, flush=True)
            sys.exit(1)
