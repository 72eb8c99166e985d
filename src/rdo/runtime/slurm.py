"""The jobs of a sweep on a SLURM cluster: submitted, told apart, waited for, by what `squeue` and their folders say.

`sacct` is not asked: not every cluster keeps accounts, and a job whose process was killed leaves no result to wait for.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from submitit import AutoExecutor
from submitit.core.core import Job
from submitit.core.utils import FailedJobError, FailedSubmissionError, pickle_load

from rdo.runtime.errors import UserError
from rdo.runtime.files import write_json
from rdo.runtime.progress import say

# How often the queue is asked, at first and in the long run.
SHORTEST, LONGEST = 1.0, 30.0
# How long after its end the result of a job must be seen: the queue may be ahead of the file system.
LATE_SECONDS = 20.0
# Ended without a result, for certain. What the queue has forgotten, COMPLETED and PREEMPTED may yet bring one.
FAILED = ("BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
FORGOTTEN, WAITS = "FORGOTTEN", "PENDING"
ENDED = (*FAILED, "COMPLETED", "PREEMPTED", FORGOTTEN)
LOG_BYTES = 2**16
ERROR, NOTE = "error: ", "jobs-"


def queue(numbers: Iterable[str]) -> dict[str, str] | None:
    """The state of the jobs of these numbers that the queue knows, by number (12, or 12_0 of an array), with the reason
    where one waits. None where it does not answer, as a busy controller may not."""
    command = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={','.join(numbers)}"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    if asked.returncode:
        # It has forgotten all of them.
        return {} if "Invalid job id" in asked.stderr else None
    states = {}
    for line in asked.stdout.splitlines():
        number, state, reason = line.strip().split("|", 2)
        states[number] = f"{state} ({reason})" if state == WAITS and reason not in ("None", "") else state
    return states


def record(folder: Path, name: str, jobs: Mapping[str, tuple[str, Path]]) -> None:
    """Notes jobs for launch/status.py, by number: what each does, and where its log is."""
    write_json(folder / f"{NOTE}{name}.json", {number: [title, str(log)] for number, (title, log) in jobs.items()})


def submitted(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    folder: str,
    timeouts: int,
    parameters: dict[str, Any],
) -> list[Job[Any]]:
    """One job a call, together as an array. Raises UserError where there is no SLURM, or it refuses them."""
    try:
        executor = AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=timeouts)
        executor.update_parameters(**parameters)
        return executor.map_array(function, *zip(*calls, strict=True))
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        said = [line.partition("error: ")[2] for line in str(error).splitlines() if "error: " in line]
        reason = "; ".join(said) or str(error)
        raise UserError(f"SLURM took no job: {reason}; see hydra.launcher.* (--cfg hydra -p hydra.launcher)") from error
    except RuntimeError as error:
        if "srun" not in str(error):
            raise
        raise UserError(
            "hydra/launcher=slurm: there is no SLURM here (no srun in PATH); leave hydra/launcher out to run here"
        ) from error


class Jobs:
    """The jobs of one sweep, and what is known of them."""

    def __init__(self, jobs: Sequence[Job[Any]], names: Sequence[str], first: int):
        """names: what tells each from the others, to be shown. first: the number of the first in the whole sweep."""
        self.jobs = list(jobs)
        self.titles = [f"#{number} {name}".rstrip() for number, name in enumerate(names, first)]
        self.array = self.jobs[0].job_id.partition("_")[0]
        self.states: dict[int, str] = {}
        self.ended: dict[int, float] = {}
        self.outcomes: dict[int, Any] = {}

    def wait(self) -> list[Any]:
        """What each job has returned, or the UserError that says why it has returned nothing.

        Raises UserError on Ctrl-C, which ends no job.
        """
        folder = self.jobs[0].paths.folder.parent
        logs = [job.task(0).paths.stdout for job in self.jobs]
        titles = zip((job.job_id for job in self.jobs), zip(self.titles, logs, strict=True), strict=True)
        record(folder, self.array, dict(titles))
        say(f"[slurm] job {self.array}, {len(self.jobs)} of them; logs: {folder}")
        pause = SHORTEST
        try:
            while True:
                changed = self.look()
                if len(self.outcomes) == len(self.jobs):
                    return [self.outcomes[number] for number in range(len(self.jobs))]
                pause = SHORTEST if changed else min(LONGEST, 1.2 * pause)
                time.sleep(pause)
        except KeyboardInterrupt:
            raise UserError(
                f"no longer waiting for job {self.array}, which goes on without this process; `scancel {self.array}` "
                "ends it; the same command, once it is done, shows what was found"
            ) from None

    def look(self) -> bool:
        """Asks the queue, says what has changed, and keeps the outcomes of jobs that have ended; whether any change."""
        known = queue([self.array])
        before = dict(self.states)
        for number, job in enumerate(self.jobs):
            if number in self.outcomes:
                continue
            if known is not None:
                self.states[number] = known.get(job.job_id, FORGOTTEN)
            state = self.states.get(number, WAITS)
            if (result := read_result(job)) is not None:
                self.outcomes[number] = result
            elif state in ENDED and self.overdue(number, state):
                self.outcomes[number] = UserError(why(job, state))
            if number in self.outcomes or (state != before.get(number) and state not in (*ENDED, "COMPLETING")):
                say(f"[slurm] {job.job_id} {self.titles[number]}: {described(self.outcomes.get(number), state)}")
        return self.states != before

    def overdue(self, number: int, state: str) -> bool:
        """Whether a job that has ended will bring no result any more."""
        since = self.ended.setdefault(number, time.monotonic())
        return state in FAILED or time.monotonic() - since > LATE_SECONDS


def read_result(job: Job[Any]) -> Any:
    """What the first process of a job returned, or the UserError that says what it raised; None as long as any of its
    processes has left nothing."""
    results = [job.task(rank).paths.result_pickle for rank in range(job.num_tasks)]
    with suppress(OSError):  # so that a network file system looks anew
        job.paths.folder.chmod(job.paths.folder.stat().st_mode)
    if not all(result.exists() for result in results):
        return None
    for result in results[::-1]:
        outcome, returned = pickle_load(result)
        if outcome == "error":
            return UserError(f"{returned.strip().splitlines()[-1]}; log: {job.task(0).paths.stdout}")
    return returned


def why(job: Job[Any], state: str) -> str:
    """Why a job left no result, and where its log is."""
    for log in sorted(job.task(0).paths.folder.glob(f"{job.job_id}_*_log.out")):
        if error := last_error(log):
            return f"{error}; log: {log}"
    return f"ended without a result ({state.lower()}); log: {job.task(0).paths.stdout}"


def last_error(log: Path) -> str | None:
    """The last error of ours that a log shows, if it is there at all."""
    if not log.exists():
        return None
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    said = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)]
    return said[-1] if said else None


def described(outcome: Any, state: str) -> str:
    """What has become of a job, in words."""
    if outcome is None:
        return state.lower()
    if isinstance(outcome, UserError):
        return f"failed: {outcome}"
    value = outcome.return_value
    return "done" if value is None else f"done: {value:g}"
