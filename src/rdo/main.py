"""What train.py runs: a config in, a stage's result out, and errors as one line."""

from __future__ import annotations

import gc
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import huggingface_hub
import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rdo.checks import one_line, plain, typed, without_effect
from rdo.evaluation.numbers import describe, stage_metric
from rdo.objectives.choice import choose_loss
from rdo.runtime import processes, stopping
from rdo.runtime.errors import UserError, described
from rdo.runtime.failing import FAILED, fail, show
from rdo.runtime.files import read_json
from rdo.runtime.store import Artifact, Provenance
from rdo.sequences.preparation import keep_memory
from rdo.settings import Config, EngineConfig
from rdo.stages.align import aligned_policy, needed_scores
from rdo.stages.evaluate import EVALUATION, evaluate_policy, evaluate_scorers
from rdo.stages.plan import announce
from rdo.stages.report import make_report
from rdo.stages.run import Cache, Run
from rdo.stages.score import scores
from rdo.stages.scorer import STAGE_OF, scorer
from rdo.stages.sft import base_policy

# Points of one sweep in one process share loaded data.
CACHE = Cache()


def score(run: Run) -> Artifact:
    """Stage score: what the loss and the coefficients read of the training split."""
    loss = choose_loss(run.config.loss)
    kinds, both_orders = needed_scores(run, loss)
    if not kinds:
        raise UserError(f"loss={loss.name} rc={run.config.rc.name} reads no scores: choose rc=reward or rc=diff")
    return [scores(run, kind, "train", both_orders, run.config.align) for kind in kinds][-1]


def evaluate(run: Run) -> Artifact:
    """Stage eval: a scorer's accuracy, or a policy's own responses."""
    subject = run.config.eval.subject
    if subject in STAGE_OF:
        return evaluate_scorers(run, subject)
    return evaluate_policy(run, subject)


STAGES: dict[str, Callable[[Run], Artifact]] = {
    "sft": base_policy,
    "rm": lambda run: scorer(run, "reward"),
    "diffmodel": lambda run: scorer(run, "diff"),
    "score": score,
    "align": aligned_policy,
    "eval": evaluate,
}


@stopping.handled()
def run_stage(composed: DictConfig) -> float | None:
    """Runs the stage that the config names; shows a mistake of the user's as one line and exits with 1, unless it is
    one point of a sweep here, whose other points run all the same.

    Returns what a sweep compares, from stage=eval: a scorer's label accuracy, or a policy's mean reward by the first
    of eval.judges.
    """
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    try:
        config = typed(composed)
        # A row whose loss or coefficients are replaced is not that row any more.
        if not any(text.startswith(("loss=", "rc=")) for text in overrides):
            config = replace(config, row=hydra.runtime.choices["row"])
        value = run_config(config, overrides)
        processes.barrier()  # one that ends early may take the others with it
        return value
    except Exception as error:
        stopping.check(described(error))  # a library may make another error of a stop
        failure = error
    # On a cluster a point is a job of its own; one of several processes would leave the others in the middle of it.
    together = hydra.mode == RunMode.MULTIRUN and "BasicLauncher" in hydra.launcher._target_
    if not together or processes.world().size > 1:
        fail(failure)
    show(failure)
    FAILED.append((overrides, described(failure)))
    if "BasicSweeper" not in hydra.sweeper._target_:
        raise failure  # which optuna counts
    return None


def run_config(config: Config, overrides: list[str]) -> float | None:
    """Runs the stage of a checked config."""
    prepare_process(config.engine)
    for note in without_effect(config):
        print(f"note: {note}", flush=True)
    command = shlex.join(["python", "train.py", *overrides])
    provenance = Provenance(Path(config.run_dir), command, plain(config), config.build_inputs)
    run = Run(config, provenance, config.stage.name, CACHE)
    check_processes(config)
    processes.start(run.device().type)
    if config.stage.name == "inspect":
        from rdo.stages.inspect import inspect_data

        inspect_data(run)
        return None
    if config.stage.name == "report":
        make_report(config)
        return None
    started = time.perf_counter()
    missing: list[tuple[str, str]] = []
    STAGES[config.stage.name](replace(run, missing=missing))
    announce(config, missing)
    artifact = STAGES[config.stage.name](run)
    print(f"{config.stage.name}: {artifact.folder} ({time.perf_counter() - started:.1f} s)", flush=True)
    return finished(artifact, config.metric)


def check_processes(config: Config) -> None:
    """Raises UserError where several processes were started for what one does."""
    count = processes.found_world().size
    if count > 1 and config.stage.name in ("inspect", "report"):
        raise UserError(f"stage={config.stage.name} is one process's work, and {count} were started")
    if count > 1 and config.engine.name == "torch":
        raise UserError(f"engine=torch is one process, and {count} were started: use engine=zero2 (or zero1, zero3)")


def finished(artifact: Artifact, metric: str | None) -> float | None:
    """Shows what an evaluation found; what a sweep compares, as `stage_metric` has it."""
    if (artifact.folder / EVALUATION).exists():
        print(f"{describe(read_json(artifact.folder / EVALUATION))}\n  {artifact.folder / EVALUATION}", flush=True)
    return stage_metric(artifact, metric)


def prepare_process(config: EngineConfig) -> None:
    """Quiets libraries that talk over the progress bars, and makes the most of the processor."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()  # it retries, and what it ends in is an error of ours
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which saving a model imports, warns of it
    # On several threads of a CPU PyTorch else adds up gradients of gathered rows in whatever order the threads come.
    # (`use_deterministic_algorithms` does the same, and imports a compiler for seconds.)
    only_cpu = config.device == "cpu" or not torch.cuda.is_available()
    torch.set_deterministic_debug_mode("error" if only_cpu else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_memory()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if not gc.isenabled():  # see train.py
        gc.freeze()
        gc.enable()
    gc.collect()  # the models of a sweep's point before, which hold themselves


def refuse(error: Exception) -> NoReturn:
    """Shows what is wrong with a command line or a file of conf/, and exits with 1."""
    if isinstance(error, HydraException | OmegaConfBaseException | ValueError):
        said = UserError(one_line(error, sys.argv[1:]))
        said.__cause__ = error
        fail(said)
    fail(error)
