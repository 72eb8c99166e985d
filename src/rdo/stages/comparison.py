"""Comparisons and sweeps, hydra's multiruns: every point is checked before the first one runs; the report follows."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from rdo.checks import typed
from rdo.runtime.failing import FAILED, fail
from rdo.runtime.processes import found_world
from rdo.settings import Config
from rdo.stages.report import make_report


class Comparison(Callback):
    """What happens around a run, and around the points of a sweep, whoever runs them."""

    def __init__(self) -> None:
        self.composed: dict[tuple[str, ...], DictConfig] = {}
        self.evaluated: dict[str, Config] = {}  # the first point that is, by run_dir

    def __getstate__(self) -> dict[str, Any]:
        return vars(Comparison())  # a job of a cluster composes its own point

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Checks the config before hydra writes anything."""
        try:
            prepared(config)
        except Exception as error:  # which hydra would make a warning of
            fail(error)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Hydra composes every point before the first one runs, and again to run it: here once, and it is checked."""
        FAILED.clear()
        loader = GlobalHydra.instance().config_loader()
        loader.load_sweep_config = partial(self.load, loader)  # type: ignore[method-assign]

    def load(self, loader: ConfigLoader, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The config of a point. Raises UserError as `typed`."""
        point = tuple(sweep_overrides)
        if point in self.composed:
            return self.composed.pop(point)
        composed = type(loader).load_sweep_config(loader, master_config, sweep_overrides)
        config = prepared(composed)
        if config.stage.name == "eval":
            self.evaluated.setdefault(config.run_dir, config)
        return self.composed.setdefault(point, composed)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Reports what is evaluated in the run folder. Exits with 1 where a point could not run."""
        if found_world().rank:
            return
        common = set(config.hydra.overrides.task)
        failed = {" ".join(text for text in point if text not in common): said for point, said in FAILED}
        try:
            for own in self.evaluated.values():
                make_report(own, failed, anew=False)
        except Exception as error:
            fail(error)
        if failed:
            print(f"error: these points could not run: {'; '.join(failed)}", file=sys.stderr, flush=True)
            sys.exit(1)


def prepared(composed: DictConfig) -> Config:
    """Checks a config; of several processes the first alone writes hydra's files."""
    if found_world().rank:
        composed.hydra.output_subdir = None
    return typed(composed)
