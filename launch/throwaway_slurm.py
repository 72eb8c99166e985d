#!/usr/bin/env python3
"""A SLURM cluster of one node on this machine, to try sweeps, requeues and preemption on: up in a second or two, all of
it under one folder, no root, no systemd, no munge, no accounting.

    launch/throwaway_slurm.py up FOLDER         then: export SLURM_CONF=FOLDER/slurm.conf
    launch/throwaway_slurm.py down FOLDER

Partitions: `low` (the default), and `high`, whose jobs preempt those of `low`; these are requeued. Needs Debian's or
Ubuntu's package slurm-wlm, whose slurmd runs without munge and control groups.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

# A cluster's daemons are not in a user's PATH.
SEARCH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"))
SECONDS = 30.0

# cred_expire, sched_interval: the defaults (two minutes, one minute) are what a requeue would wait for.
CONFIGURATION = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName=localhost NodeAddr=127.0.0.1 Port={node_port} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=localhost MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def installed() -> bool:
    """Whether SLURM's programs are here."""
    return all(shutil.which(name, path=SEARCH) for name in ("slurmctld", "slurmd", "srun", "sbatch"))


def environment(folder: Path) -> dict[str, str]:
    """What makes this cluster the one that SLURM's commands talk to."""
    return {"SLURM_CONF": str(folder.resolve() / "slurm.conf")}


def asked(folder: Path, *command: str) -> str:
    """What one of SLURM's commands says of this cluster; nothing where it fails."""
    told = os.environ | environment(folder) | {"PATH": SEARCH}
    return subprocess.run(command, env=told, capture_output=True, text=True, timeout=SECONDS).stdout.strip()


def up(folder: Path) -> dict[str, str]:
    """Starts a cluster, and returns `environment`. Raises RuntimeError where it does not come up."""
    folder = folder.resolve()
    if not installed():
        raise RuntimeError("SLURM is not installed (apt-get install --no-install-recommends slurm-wlm)")
    if processes(folder):
        raise RuntimeError(f"there is a cluster in {folder}: take it down first")
    for name in ("state", "spool"):
        shutil.rmtree(folder / name, ignore_errors=True)  # jobs of a cluster before this one
        (folder / name).mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"controller_port": one.getsockname()[1], "node_port": other.getsockname()[1]}
    names = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser()}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, **ports, **names))
    asked(folder, "slurmctld")
    asked(folder, "slurmd", "-N", "localhost")
    if not wait_for(lambda: set(asked(folder, "sinfo", "-h", "-o", "%t").split()) == {"idle"}):
        down(folder)
        raise RuntimeError(f"the node was not idle after {SECONDS:.0f} s: see {folder}/slurm*.log")
    return environment(folder)


def down(folder: Path) -> None:
    """Ends a cluster with all of its jobs; nothing of it is left but its folder."""
    asked(folder, "scancel", "--me")
    wait_for(lambda: not asked(folder, "squeue", "--me", "-h"))
    asked(folder, "scontrol", "shutdown")
    if not wait_for(lambda: not processes(folder)):
        for number in processes(folder):
            os.kill(number, signal.SIGKILL)


def processes(folder: Path) -> list[int]:
    """The process ids of this cluster's daemons, and of all that its jobs have started."""
    mark = f"SLURM_CONF={environment(folder)['SLURM_CONF']}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            name, variables = (entry / "comm").read_text(), (entry / "environ").read_bytes()
        except OSError:
            continue
        # A user's own commands have the mark, too.
        if mark in variables.split(b"\0") and (name.startswith("slurm") or b"\0SLURM_JOB_ID=" in variables):
            found.append(int(entry.name))
    return found


def wait_for(condition: Callable[[], object]) -> bool:
    """Whether a condition comes to hold in time."""
    end = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def main() -> None:
    if len(sys.argv) != 3 or sys.argv[1] not in ("up", "down"):
        sys.exit(__doc__)
    try:
        {"up": up, "down": down}[sys.argv[1]](Path(sys.argv[2]))
    except (RuntimeError, subprocess.SubprocessError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
