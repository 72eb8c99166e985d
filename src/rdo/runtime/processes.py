"""The processes of one run: who they are, how they find each other, wait for each other, and agree.

All processes run the same code in the same order. What only one may do (reading raw data, writing results, printing)
the first does, and the others wait. One that fails ends by itself and says why; the launcher (torchrun, or srun with
SLURM_KILL_BAD_EXIT=1) ends the others.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from submitit.slurm.slurm import SlurmJobEnvironment

# Until the processes have found each other, and until one must have come to where the others wait: the first may wait
# for the folder that another run is training in.
RENDEZVOUS, COLLECTIVE = timedelta(minutes=10), timedelta(days=7)
# What gloo and NCCL say in a process whose peer has ended.
PEER_ENDED = re.compile(
    r"Connection (closed|reset) by peer|Connection was likely closed|Broken pipe|[Rr]emote process exited|"
    r"NCCL communicator was aborted"
)


@dataclass(frozen=True)
class World:
    """This process among the run's `size` processes: its number, and its number on its own machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


_world = World()


def world() -> World:
    """The processes that `start` has brought together; one alone until then."""
    return _world


def is_rank0() -> bool:
    """Whether this is the process that writes and talks."""
    return _world.rank == 0


def found_world() -> World:
    """The processes that torchrun, deepspeed or srun have started, by the environment.

    A batch script of SLURM has a task number as well, but is no task: only srun's steps have their number of tasks.
    """
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        if all(name in os.environ for name in names):
            return World(*(int(os.environ[name]) for name in names))
    return World()


def start(device: str) -> World:
    """Brings the processes of this run together, once; one process alone needs nothing. device: `cpu` or `cuda`.

    On the first process nothing changes; the others print nothing to standard output from here on.
    """
    global _world
    found = found_world()
    if _world.size > 1 or found.size == 1:
        return _world
    if "MASTER_ADDR" not in os.environ:
        job = SlurmJobEnvironment()
        port = 20000 + int(job.raw_job_id) % 20000
        os.environ |= {"MASTER_ADDR": job.hostnames[0], "MASTER_PORT": str(port)}
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(found.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    store, _, _ = next(dist.rendezvous("env://", found.rank, found.size, timeout=RENDEZVOUS))
    dist.init_process_group(backend, store=store, rank=found.rank, world_size=found.size, timeout=COLLECTIVE)
    atexit.register(dist.destroy_process_group)  # else a process may be aborted when it exits
    _world = found
    if found.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    return found


def barrier() -> None:
    """Waits until every process is here."""
    if _world.size > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU, where waiting costs nothing


def broadcast(make: Callable[[], Any]) -> Any:
    """What `make` returns on the first process, on every process."""
    if _world.size == 1:
        return make()
    told = [make() if is_rank0() else None]
    dist.broadcast_object_list(told)
    return told[0]


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor on the CPU over all processes."""
    if _world.size > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_gather(values: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other."""
    if _world.size == 1:
        return values
    lists: list[list[Any]] = [[] for _ in range(_world.size)]
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def dealt(count: int, size: int, work: Callable[[range], list[Any]]) -> list[Any]:
    """What `work` makes of `count` things, on every process and in order. It is given parts of `size`, whatever the
    number of processes that they are dealt to."""
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    own = [(n, work(part)) for n, part in enumerate(parts) if n % _world.size == _world.rank]
    return [value for _, made in sorted(all_gather(own), key=lambda entry: entry[0]) for value in made]


def peer_ended(error: BaseException) -> bool:
    """Whether an error says no more than that another process has ended, which itself says why."""
    return _world.size > 1 and isinstance(error, RuntimeError) and bool(PEER_ENDED.search(str(error)))
