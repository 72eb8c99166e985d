"""hydra/launcher=slurm: the points of a sweep as jobs of a SLURM array, by submitit.

Hydra looks for launchers in packages of this name alone. Of hydra-submitit-launcher's own launcher we replace what it
does while jobs run: it says nothing, ends at the first job that failed, and without SLURM's accounting waits for ever
for a job whose process was killed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

from rdo.runtime.errors import UserError

SOURCE = Path(__file__).parents[1]


class RdoSlurmLauncher(SlurmLauncher):
    """Submits the points of a sweep, says where their logs are and what becomes of them, and waits for all."""

    def __call__(self, sweep_overrides: list[str], *others: Any) -> JobReturn:
        """What every process of a job runs; the first of them alone writes hydra's files."""
        from rdo.runtime.processes import found_world

        quiet = [] if found_world(os.environ).first else ["hydra.output_subdir=null"]
        returned = super().__call__([*sweep_overrides, *quiet], *others)
        _ = returned.return_value  # raises what was raised, so that SLURM sees a failure
        return returned

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submits one job a point, and waits for them.

        A point that failed costs the others nothing: it is noted for the report, and where a sweeper counts failures
        (hydra.sweeper.max_failure_rate), told to it. Where the cluster takes no job, and on Ctrl-C, which leaves the
        jobs alone, the process ends with one line.
        """
        from rdo.runtime.failing import FAILED, fail
        from rdo.runtime.slurm import Jobs

        assert self.config is not None
        try:
            outcomes = Jobs(self.submit(job_overrides, initial_job_idx), names(job_overrides), initial_job_idx).wait()
        except Exception as error:
            fail(error)
        counted = "max_failure_rate" in self.config.hydra.sweeper
        for number, (overrides, outcome) in enumerate(zip(job_overrides, outcomes, strict=True)):
            if isinstance(outcome, UserError):
                FAILED.append((list(overrides), str(outcome)))
                status = JobStatus.FAILED if counted else JobStatus.COMPLETED
                outcomes[number] = JobReturn(list(overrides), status=status)
                outcomes[number].return_value = outcome if counted else None
        return outcomes

    def submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        """The submitit jobs of the points. Raises UserError where there is no SLURM, or it refuses them."""
        from rdo.runtime.slurm import submitted

        settings = {key: value for key, value in self.params.items() if value is not None}
        settings["setup"] = [*settings.get("setup", ()), f"export PYTHONPATH={SOURCE}:$PYTHONPATH"]
        folder, timeouts = settings.pop("submitit_folder"), settings.pop("max_num_timeout")
        common = BaseQueueConf.__dataclass_fields__
        parameters = {name if name in common else f"slurm_{name}": value for name, value in settings.items()}
        state = Singleton.get_state()
        calls = [
            (list(overrides), "hydra.sweep.dir", number, f"job_id_for_{number}", state)
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        return submitted(self, calls, folder, timeouts, parameters)


def names(job_overrides: Sequence[Sequence[str]]) -> list[str]:
    """What tells each point of a sweep from the others; nothing of one alone."""
    common = set.intersection(*map(set, job_overrides))
    return [" ".join(override for override in overrides if override not in common) for overrides in job_overrides]
