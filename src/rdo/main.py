"""What train.py runs: a config in, a stage's result out, and errors as one line."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rdo.alignment import choose_loss
from rdo.artifacts import Artifact, Provenance, is_finished
from rdo.configuration import compose_config, plain, sweep_points, typed
from rdo.errors import UserError
from rdo.files import read_json
from rdo.report.console import describe_policy, describe_scorer
from rdo.run import Cache, Run
from rdo.stages.align import aligned_policy, needed_scores
from rdo.stages.eval import EVALUATION, evaluate_policy, evaluate_scorers
from rdo.stages.report import make_report
from rdo.stages.score import scores
from rdo.stages.scorer import STAGE_OF, scorer
from rdo.stages.sft import base_policy

# Jobs of one sweep in one process share loaded data.
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


def run_stage(composed: DictConfig) -> float | None:
    """Runs the stage that the config names; prints a UserError as one line and exits with 1.

    Returns what a sweep compares, from stage=eval: a scorer's label accuracy, or a policy's mean reward by the first
    of eval.judges.
    """
    try:
        config = typed(composed)
        prepare_process(config.engine.threads)
        overrides = list(HydraConfig.get().overrides.task)
        command = shlex.join(["python", "train.py", *overrides])
        provenance = Provenance(Path(config.run_dir), command, plain(config), config.build_inputs)
        run = Run(config, provenance, config.stage.name, CACHE)
        started = time.perf_counter()
        if config.stage.name in STAGES:
            artifact = STAGES[config.stage.name](run)
            print(f"{config.stage.name}: {artifact.folder} ({time.perf_counter() - started:.1f} s)", flush=True)
            return finished(artifact)
        else:
            make_report(run, overrides, build=config.stage.name == "pipeline")
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    return None


def finished(artifact: Artifact) -> float | None:
    """Shows what an evaluation found; what a sweep compares, if the stage has such a number."""
    if (artifact.folder / EVALUATION).exists():
        evaluation = read_json(artifact.folder / EVALUATION)
        describe = describe_scorer if "label_accuracy" in evaluation else describe_policy
        print(f"{describe(evaluation)}\n  {artifact.folder / EVALUATION}", flush=True)
    return artifact.manifest()["results"].get("metric") if is_finished(artifact.folder) else None


def prepare_process(threads: int | None) -> None:
    """Quiets libraries that talk over the progress bars, and sets the number of threads where the config says."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads is not None:
        torch.set_num_threads(threads)


def check_command_line(arguments: list[str]) -> None:
    """Composes a command line before hydra does, so that a mistake in it, or in any value of a sweep, is one line."""
    overrides = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    if any(argument.startswith("-") for argument in overrides):
        return  # --help, --cfg and the like are hydra's own
    try:
        for point in [overrides] if overrides == arguments else sweep_points(overrides):
            compose_config(point)
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
