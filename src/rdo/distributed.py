"""The processes of one run: who they are, and how they wait for each other, agree, and fail together.

All processes run the same code in the same order. What only one may do (reading raw data, writing results, printing)
the first does, and the others wait. They wait by looking into a small key-value store, not in a collective, so that a
wait may last for hours, and ends when the process is asked to stop or another process fails.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch.distributed import HashStore, PrefixStore, Store, TCPStore

from rdo import interrupts
from rdo.errors import UserError

# How often a waiting process looks, at first and in the long run, and the thread that watches for failures.
SHORTEST, LONGEST, WATCH = 0.002, 0.1, 0.5
# How long one that has failed stays, so that the others hear of it before they lose the connection.
FAREWELL = 3 * WATCH
# And how long one that is done waits for the others.
PATIENCE = 60.0
RENDEZVOUS = timedelta(minutes=10)
COLLECTIVE = timedelta(hours=2)
FAILED, STOP, LEAVING = "failed", "stop", "leaving"


@dataclass(frozen=True)
class World:
    """This process among the run's `size` processes: its number, and its number on its own machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and talks."""
        return self.rank == 0


@dataclass
class State:
    """What `start` has set up. `turn` numbers the waits, which every process has in the same order."""

    world: World = field(default_factory=World)
    store: Store = field(default_factory=HashStore)
    started: bool = False
    turn: int = 0
    watching: threading.Thread | None = None


_state = State()
_leaving = threading.Event()


def world() -> World:
    """The processes that `start` has found; one alone until then."""
    return _state.world


def found_world(environment: Mapping[str, str]) -> World:
    """The processes that torchrun, deepspeed or srun have started, by their environment.

    A batch script of SLURM has a task number as well, but is no task: only srun's steps have their number of tasks.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return World(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", 0)))
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        return World(
            int(environment["SLURM_PROCID"]),
            int(environment["SLURM_STEP_NUM_TASKS"]),
            int(environment.get("SLURM_LOCALID", 0)),
        )
    return World()


def meeting_point(environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port at which the processes find each other: torchrun's, or made from the job's nodes and number.

    Raises UserError where the environment does not say.
    """
    if "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
        return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    nodes = environment.get("SLURM_STEP_NODELIST")
    if not nodes:
        raise UserError("MASTER_ADDR and MASTER_PORT are not set: start the processes with srun or torchrun")
    job, step = int(environment.get("SLURM_JOB_ID", 0)), int(environment.get("SLURM_STEP_ID", 0))
    port = 20000 + (31 * job + step) % 20000
    if environment.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1", port
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0], port


def start(device: str) -> World:
    """Brings the processes of this run together, once; one process alone needs nothing. device: `cpu` or `cuda`.

    On the first process nothing changes; the others print nothing from here on. Raises UserError where the processes
    do not find each other.
    """
    found = found_world(os.environ)
    if _state.started or found.size == 1:
        return _state.world
    host, port = meeting_point(os.environ)
    # torchrun holds the store itself.
    hosts = found.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        # Each thread has a connection of its own: one that waits would keep the other from looking.
        own, watched = (
            TCPStore(host, port, found.size, hosts and not n, RENDEZVOUS, wait_for_workers=False) for n in range(2)
        )
        initialize(device, found, own)
    except RuntimeError as error:
        what = f"the {found.size} processes of this run do not find each other at {host}:{port}"
        raise UserError(f"{what} ({error}); MASTER_PORT=NUMBER names another port") from error
    prefix = f"rdo{os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}"
    _state.world, _state.started, _state.store = found, True, PrefixStore(prefix, own)
    _state.watching = threading.Thread(target=watch, args=(PrefixStore(prefix, watched),), daemon=True)
    _state.watching.start()
    if not found.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
    return found


def initialize(device: str, found: World, store: Store) -> None:
    """Makes torch's process group, which `leave` ends; without that a process may be aborted when it exits."""
    backend = "gloo"
    if device == "cuda":
        if found.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {found.local_rank} of this machine finds {torch.cuda.device_count()} GPUs: start one process "
                "a GPU"
            )
        torch.cuda.set_device(found.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(
        backend, store=store, rank=found.rank, world_size=found.size, timeout=COLLECTIVE
    )
    atexit.register(leave)


# ---------------------------------------------------------------------------------------------------------------------
# Waiting and agreeing
# ---------------------------------------------------------------------------------------------------------------------


def meet() -> None:
    """Waits until every process is here. Raises Stopped when this one is asked to stop, unless that is postponed."""
    if _state.world.size == 1:
        return
    key = next_key()
    _state.store.add(key, 1)
    wait_until(lambda: _state.store.add(key, 0) >= _state.world.size)


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns on the first process, as JSON has it, on every process. A UserError is everyone's."""
    if _state.world.size == 1:
        return make()
    key = next_key()
    if _state.world.first:
        try:
            said = {"value": make()}
        except UserError as error:
            _state.store.set(key, json.dumps({"error": str(error)}))
            raise
        _state.store.set(key, json.dumps(said))
    else:
        wait_until(lambda: _state.store.check([key]))
    told = json.loads(_state.store.get(key))
    if "error" in told:
        raise UserError(told["error"])
    return told["value"]


def next_key() -> str:
    """A name for the next thing that all processes do together."""
    _state.turn += 1
    return f"turn-{_state.turn}"


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for something in the store. Raises Stopped as `meet`."""
    pause = SHORTEST
    while not condition():
        if not interrupts.is_postponed():
            interrupts.check()
        time.sleep(pause)
        pause = min(LONGEST, 1.5 * pause)


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor on the CPU over all processes."""
    if _state.world.size > 1:
        values = values.clone()
        torch.distributed.all_reduce(values)
    return values


def gathered(values: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other."""
    if _state.world.size == 1:
        return values
    lists: list[list[Any]] = [[] for _ in range(_state.world.size)]
    torch.distributed.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def dealt(count: int, size: int, work: Callable[[range], list[Any]]) -> list[Any]:
    """What `work` makes of `count` things, on every process and in order. It is given parts of `size`, whatever the
    number of processes that they are dealt to."""
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    own = [(n, work(part)) for n, part in enumerate(parts) if n % _state.world.size == _state.world.rank]
    return [value for _, made in sorted(gathered(own), key=lambda entry: entry[0]) for value in made]


# ---------------------------------------------------------------------------------------------------------------------
# Failing and stopping together
# ---------------------------------------------------------------------------------------------------------------------


def watch(store: Store) -> None:
    """Runs beside the work: ends this process when another has failed, and passes on that one is asked to stop."""
    passed_on = False
    while not _leaving.wait(WATCH):
        try:
            if store.check([FAILED]):
                break
            if interrupts.requested() and not passed_on:
                store.set(STOP, "1")
                passed_on = True
            elif not interrupts.requested() and store.check([STOP]):
                os.kill(os.getpid(), signal.SIGTERM)
        except RuntimeError:
            if not _leaving.is_set():
                os.write(2, f"error: process {_state.world.rank} has lost the others, which ended unasked\n".encode())
            break
    if not _leaving.is_set():  # the one that has failed is leaving, and says why
        os._exit(1)


def fail() -> bool:
    """Tells the other processes, which end, that this one has failed. Whether it is the first, and is to say why."""
    _leaving.set()
    if not _state.started:
        if not found_world(os.environ).first:
            # What fails so early mostly fails everywhere alike: once the first has said so, the others are ended.
            time.sleep(2 * FAREWELL)
        return True
    rank = str(_state.world.rank)
    try:
        first = _state.store.compare_set(FAILED, "", rank) == rank.encode()
    except RuntimeError:  # nobody is left to tell
        return True
    return first


def farewell() -> None:
    """Stays until the others have heard that this process failed, before they lose the connection."""
    if _state.world.size > 1:
        time.sleep(FAREWELL)


def leave() -> None:
    """Waits for the others at the end of the work, for a process that exits early may take the others with it."""
    if not _leaving.is_set():
        _leaving.set()
        with suppress(RuntimeError):
            _state.store.add(LEAVING, 1)
            end = time.monotonic() + PATIENCE
            while _state.store.add(LEAVING, 0) < _state.world.size and time.monotonic() < end:
                time.sleep(LONGEST)
    # Python's end would find the thread within the store's C++, and ending a thread in there aborts the process.
    if _state.watching is not None:
        _state.watching.join(PATIENCE)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
