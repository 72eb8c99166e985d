"""hydra/launcher=slurm: the points of a sweep as jobs of a SLURM array, by submitit.

Hydra looks for launchers in packages of this name alone. hydra-submitit-launcher's own ends at the first job that
failed, and where SLURM keeps no accounts waits for ever for one whose process was killed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from submitit import AutoExecutor, SlurmJob
from submitit.core.core import Job
from submitit.core.utils import FailedJobError, UncompletedJobError
from submitit.helpers import as_completed
from submitit.slurm.slurm import SlurmInfoWatcher

from rdo.runtime.errors import UserError

SOURCE = Path(__file__).parents[1]


class Queue(SlurmInfoWatcher):
    """Asks `squeue`, which every cluster has, in place of the accounts: a job that is not in the queue has ended."""

    def _make_command(self) -> list[str]:
        return ["squeue", "--me", "--array", "--noheader", "--format=%i"]

    def read_info(self, string: Any) -> dict[str, dict[str, str]]:
        queued = string.decode().split()
        return {job: {"State": "RUNNING" if job in queued else "COMPLETED"} for job in self._registered}


class RdoSlurmLauncher(SlurmLauncher):
    """Submits the points of a sweep, waits for all, and says of each that failed why, and where its log is."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """A point that failed costs the others nothing: it is noted for the report, and where a sweeper counts failures
        told to it. Where SLURM takes no job, and on Ctrl-C, which ends no job, the process ends with one line."""
        from rdo.runtime.failing import FAILED, fail

        assert self.config is not None
        try:
            jobs = self.submit(job_overrides, initial_job_idx)
        except Exception as error:
            fail(error)
        array, points = jobs[0].job_id.partition("_")[0], dict(zip(jobs, job_overrides, strict=True))
        print(f"[slurm] job {array}, {len(jobs)} of them; logs: {jobs[0].paths.folder.parent}", flush=True)
        counted = "max_failure_rate" in self.config.hydra.sweeper
        returned = {}
        try:
            for job in as_completed(jobs, poll_frequency=1):
                try:
                    returned[job] = job.results()[0]
                except (FailedJobError, UncompletedJobError):
                    point, failure = list(points[job]), UserError(why(job))
                    name = " ".join(text for text in point if text not in self.config.hydra.overrides.task)
                    print(f"[slurm] {job.job_id} {name}: failed: {failure}", flush=True)
                    FAILED.append((point, str(failure)))
                    status, value = (JobStatus.FAILED, failure) if counted else (JobStatus.COMPLETED, None)
                    returned[job] = JobReturn(point, status=status, _return_value=value)
        except KeyboardInterrupt:
            fail(UserError(f"no longer waiting for job {array}, which goes on; `scancel {array}` ends it"))
        return [returned[job] for job in jobs]

    def submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[Job[JobReturn]]:
        """One job a point, as hydra-submitit-launcher submits them."""
        SlurmJob.watcher = Queue(delay_s=10)
        SlurmJob._results_timeout_s = 2  # a file system may be late, and a job that failed brings nothing
        settings = dict(self.params)
        settings["setup"] = [*settings["setup"], f"export PYTHONPATH={SOURCE}:$PYTHONPATH"]
        folder, timeouts = settings.pop("submitit_folder"), settings.pop("max_num_timeout")
        executor = AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
        common = BaseQueueConf.__dataclass_fields__
        executor.update_parameters(**{key if key in common else f"slurm_{key}": settings[key] for key in settings})
        state = Singleton.get_state()
        numbered = enumerate(job_overrides, initial_job_idx)
        calls = [(list(point), "hydra.sweep.dir", number, f"job_id_for_{number}", state) for number, point in numbered]
        return executor.map_array(self, *zip(*calls, strict=True))


def why(job: Job[Any]) -> str:
    """Why a job left no result, by the last error that its logs show, and where they are."""
    logs = sorted(job.paths.folder.glob(f"{job.job_id}_*_log.out"))
    said = [line for log in logs for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    reason = said[-1].removeprefix("error: ") if said else "ended without a result"
    return f"{reason}; log: {logs[0] if logs else job.paths.folder}"
