#!/usr/bin/env python3
"""A SLURM cluster of one node on this machine, to try sweeps, requeues and preemption on: up in a second or two, all of
it under one folder, no root, no systemd, no munge, no accounting.

    launch/throwaway_slurm.py up FOLDER [--cpus 4]      says what to export
    launch/throwaway_slurm.py down FOLDER

Partitions: `low` (the default), and `high`, whose jobs preempt those of `low`; these are requeued. Needs Debian's or
Ubuntu's package slurm-wlm, whose slurmd runs without munge and control groups.
"""

from __future__ import annotations

import argparse
import getpass
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

DAEMONS = ("slurmctld", "slurmd")
# A cluster's daemons are not in a user's PATH.
SEARCH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/local/sbin"))
UP_SECONDS = 30.0
DOWN_SECONDS = 20.0

# cred_expire, sched_interval: the defaults (two minutes, one minute) are what a requeue would wait for.
# MinJobAge: for so long `squeue --states=all` remembers what has ended.
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
NodeName=localhost NodeAddr=127.0.0.1 Port={node_port} CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=localhost MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs of SLURM that are not installed here."""
    return [name for name in (*DAEMONS, "srun", "sbatch", "scontrol") if shutil.which(name, path=SEARCH) is None]


def environment(folder: Path) -> dict[str, str]:
    """What makes this cluster the one that SLURM's commands talk to."""
    return {"SLURM_CONF": str(folder / "slurm.conf")}


def up(folder: Path, cpus: int = 4) -> dict[str, str]:
    """Starts a cluster, and returns `environment`. Raises RuntimeError where it does not come up."""
    folder = folder.resolve()
    if lacking := missing():
        raise RuntimeError(f"not installed: {', '.join(lacking)} (apt-get install --no-install-recommends slurm-wlm)")
    if running(folder):
        raise RuntimeError(f"there is a cluster in {folder}: take it down first")
    for name in ("state", "spool"):
        shutil.rmtree(folder / name, ignore_errors=True)  # jobs of a cluster before this one
        (folder / name).mkdir(parents=True)
    controller_port, node_port = free_ports(2)
    settings = {"folder": folder, "cpus": cpus, "controller_port": controller_port, "node_port": node_port}
    settings |= {"host": socket.gethostname().split(".")[0], "user": getpass.getuser()}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(**settings))
    made = environment(folder)
    for command in (["slurmctld"], ["slurmd", "-N", "localhost"]):
        subprocess.run([program(command[0]), *command[1:]], env=os.environ | made, check=True)
    wait_until_idle(folder, made)
    return made


def program(name: str) -> str:
    """Where a program of SLURM lies."""
    found = shutil.which(name, path=SEARCH)
    assert found is not None, name  # see `missing`
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_until_idle(folder: Path, made: dict[str, str]) -> None:
    """Returns when the node takes jobs. Raises RuntimeError, the cluster taken down, where it does not."""
    state = ""
    end = time.monotonic() + UP_SECONDS
    while time.monotonic() < end:
        asked = subprocess.run(
            ["sinfo", "-h", "-o", "%t"], env=os.environ | made, capture_output=True, text=True, timeout=UP_SECONDS
        )
        state = asked.stdout.strip() or asked.stderr.strip()
        if set(asked.stdout.split()) == {"idle"}:
            return
        time.sleep(0.1)
    down(folder)
    raise RuntimeError(f"the node was not idle after {UP_SECONDS:.0f} s ({state}): see {folder}/slurm*.log")


def down(folder: Path) -> None:
    """Ends a cluster with all of its jobs; nothing of it is left but its folder."""
    folder = folder.resolve()
    made = os.environ | environment(folder)
    if "slurmctld" in running(folder):
        for how in ([], ["--signal=KILL"]):
            subprocess.run(["scancel", *how, "-u", getpass.getuser()], env=made, timeout=DOWN_SECONDS)
    end = time.monotonic() + DOWN_SECONDS
    while jobs(folder) and time.monotonic() < end:
        time.sleep(0.1)
    for number in jobs(folder):
        kill(number, signal.SIGKILL)
    # The node's daemon first: without the controller's it would wait for an answer. It removes its note of itself
    # before it ends.
    for name, number in sorted(running(folder).items(), reverse=True):
        kill(number, signal.SIGTERM)
        while is_daemon(number, name) and time.monotonic() < end:
            time.sleep(0.05)
        if is_daemon(number, name):
            kill(number, signal.SIGKILL)


def kill(number: int, which: int) -> None:
    """A signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(number, which)


def running(folder: Path) -> dict[str, int]:
    """The process ids of this cluster's daemons, by their names."""
    found = {}
    for name in DAEMONS:
        with suppress(OSError, ValueError):
            number = int((folder / f"{name}.pid").read_text())
            if is_daemon(number, name):
                found[name] = number
    return found


def is_daemon(number: int, name: str) -> bool:
    """Whether a process is this daemon, and not another one of the same number."""
    try:
        return name in Path(f"/proc/{number}/cmdline").read_text()
    except OSError:
        return False


def jobs(folder: Path) -> list[int]:
    """The process ids of all that this cluster's jobs have started; its configuration is in their environment."""
    mark = f"SLURM_CONF={folder / 'slurm.conf'}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if mark in variables and any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables):
                found.append(int(entry.name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("up", "down"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cpus", type=int, default=4, help="that the node pretends to have")
    given = parser.parse_args()
    try:
        if given.action == "up":
            made = up(given.folder, given.cpus)
            print("a cluster is up; for a shell that is to use it:")
            print(*(f"export {name}={shlex.quote(value)}" for name, value in made.items()), sep="\n")
        else:
            down(given.folder)
    except (RuntimeError, subprocess.SubprocessError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
