"""A real SLURM cluster on this machine: jobs of a sweep are interrupted, and it ends as one that nothing interrupts.

Skipped where SLURM is not installed (apt-get install --no-install-recommends slurm-wlm).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from launch import throwaway_slurm

from rdo.runtime.store import Artifact
from tiny import TINY, metrics, weights

pytestmark = pytest.mark.skipif(not throwaway_slurm.installed(), reason="SLURM is not installed")
ROOT = Path(__file__).parents[2]
RANKS = 2
STEPS, EVERY = 60, 5
ALPHAS = (0, 1)
SWEEP = (
    "-m",
    "stage=align",
    f"rc.alpha={','.join(map(str, ALPHAS))}",
    *TINY,
    "loss=dpo",
    "rc=diff",
    "align.max_records=32",
    "align.batch_size=32",
    f"align.epochs={STEPS}",  # of one step
    f"engine.checkpoint_every_steps={EVERY}",
    "engine=zero2",
)
SHARED = ("sft", "diffmodel", "score", "reference")
PATIENCE = 120.0


class Cluster:
    """A throw-away cluster, and commands as a user of it would type them."""

    def __init__(self, folder: Path):
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.environment = os.environ | throwaway_slurm.up(folder) | threads

    def run(self, *command: str) -> str:
        """The standard output of a command that must succeed."""
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, text=True, timeout=2 * PATIENCE, check=True
        )
        return done.stdout

    def known(self, job: str, field: str) -> str:
        """What SLURM has in a field of a job."""
        return self.run("scontrol", "-o", "show", "job", job).split(f"{field}=")[1].split()[0]

    def launched(self, run_dir: Path) -> subprocess.Popen[str]:
        """The launcher of the sweep, as a user starts it."""
        launcher = ["hydra/launcher=slurm_cpu", f"hydra.launcher.tasks_per_node={RANKS}", f"run_dir={run_dir}"]
        command = [sys.executable, "train.py", *SWEEP, *launcher]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=self.environment, **pipes)

    def here(self, *run_dirs: Path) -> str:
        """What the same sweep says in processes of torchrun, in several run folders after each other."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        places = [f"run_dir={','.join(map(str, run_dirs))}", f"hydra.sweep.dir={run_dirs[0]}/hydra/here"]
        return self.run(sys.executable, *torchrun, "train.py", *SWEEP, *places)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "slurm"
    yield Cluster(folder)
    throwaway_slurm.down(folder)
    assert not throwaway_slurm.processes(folder)


def wait_until(what: str, condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def policies(run_dir: Path) -> list[Artifact]:
    """The policies of both points, whether finished or not, in the order of their alphas."""
    found = [sorted((run_dir / "align").glob(f"dpo-diff-{alpha}-*")) for alpha in ALPHAS]
    return [Artifact(folders[0], "") for folders in found if folders]


def steps(run_dir: Path, point: int) -> int:
    """How many steps of a point's training are in its metrics."""
    file = [*policies(run_dir), *[None] * len(ALPHAS)][point]
    if file is None or not (file.folder / "metrics.jsonl").exists():
        return 0
    return (file.folder / "metrics.jsonl").read_bytes().count(b"\n")


def logs(run_dir: Path) -> str:
    """All that the jobs of a run folder have said."""
    return "".join(file.read_text(errors="replace") for file in sorted(run_dir.glob("hydra/*/slurm/*/*_log.*")))


def ranks(job: str) -> list[int]:
    """The processes that srun has started for a job."""
    array, task = job.split("_")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            mine = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode()}
            if b"submitit.core._submit" in arguments and b"srun" not in arguments[0] and mine <= set(variables):
                found.append(int(entry.name))
    return sorted(found)


def test_a_sweep_that_is_interrupted_in_every_way_ends_as_one_that_is_not(cluster: Cluster, tmp_path: Path) -> None:
    disturbed, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    with cluster.launched(disturbed) as launcher:
        try:
            disturb(cluster, disturbed, launcher)
            said = launcher.communicate(timeout=PATIENCE)[0]
        finally:
            launcher.kill()
    assert launcher.returncode == 1, said
    assert "_0 rc.alpha=0: failed: " in said
    assert "error: these points could not run: rc.alpha=0\n" in said
    # Both points need the same base policy, difference model, scores and reference, at once: made once, by either.
    for stage in SHARED:
        assert logs(disturbed).count(f"[{stage}] {disturbed / stage}") == 1
    assert logs(disturbed).count("going on from") == len(ALPHAS), logs(disturbed)

    for stage in SHARED:  # which saves the time to make it again
        shutil.copytree(disturbed / stage, undisturbed / stage)
    said = cluster.here(disturbed, undisturbed)
    assert said.count("going on from") == 1  # the point whose process was killed
    for whole, mended in zip(policies(undisturbed), policies(disturbed), strict=True):
        assert [entry["step"] for entry in metrics(mended)] == list(range(1, STEPS + 1))
        assert metrics(mended) == metrics(whole)
        assert weights(mended) == weights(whole)
        assert mended.manifest()["key"] == whole.manifest()["key"]


def disturb(cluster: Cluster, run_dir: Path, launcher: subprocess.Popen[str]) -> None:
    """Interrupts the first point of a sweep twice, and the second once, in three ways."""
    assert launcher.stdout is not None
    array = launcher.stdout.readline().split()[2].rstrip(",")
    first, second = f"{array}_0", f"{array}_1"
    hold(run_dir, (first, second), EVERY)
    # As SLURM does before a time limit.
    cluster.run("scancel", "--signal=USR2", first)
    send(signal.SIGCONT, ranks(first))
    wait_until("the first point is requeued", lambda: cluster.known(first, "Restarts") == "1")
    # The whole node is wanted by a partition that comes first. (SLURM wakes whom it ends.)
    cluster.run("sbatch", "--partition=high", "--cpus-per-task=4", "--output=/dev/null", "--wrap", "true")
    wait_until("the second point is requeued", lambda: cluster.known(second, "Restarts") == "1")
    done = [steps(run_dir, point) for point in range(len(ALPHAS))]
    assert 0 < min(done) <= max(done) < STEPS // 2, f"{done} of {STEPS} steps"
    # A process of the first dies.
    wait_until("the first point trains", lambda: steps(run_dir, 0) > done[0] + EVERY)
    os.kill(ranks(first)[-1], signal.SIGKILL)
    wait_until("the first point fails", lambda: cluster.known(first, "JobState") == "FAILED")


def hold(run_dir: Path, jobs: Sequence[str], count: int) -> None:
    """Stops the processes of each point of a sweep as soon as it has done more than so many steps, so that it does not
    finish while another is behind. Returns when all are stopped."""
    held: set[str] = set()

    def all_are_held() -> bool:
        for point, job in enumerate(jobs):
            if job not in held and steps(run_dir, point) > count:
                send(signal.SIGSTOP, ranks(job))
                held.add(job)
        return len(held) == len(jobs)

    wait_until("all points train", all_are_held)


def send(number: signal.Signals, processes: Sequence[int]) -> None:
    """Sends a signal to those of some processes that have not ended."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
