#!/usr/bin/env python3
"""Submits stage=pipeline to a SLURM cluster: one job a stage and row, each started when what it needs is finished.

    launch/pipeline.py [--dry-run] [--until STAGE] [hydra/launcher=PROFILE] [KEY=VALUE ...]

KEY=VALUE is what `python train.py` takes, hydra.launcher.* included; the profile is one of conf/hydra/launcher, and
without one slurm, of one GPU. Nothing is waited for: launch/status.py RUN_DIR shows what becomes of the jobs. What is
finished already is found by its job within seconds. Examples:

    launch/pipeline.py hydra/launcher=slurm_node engine=zero2 experiment=paper_hh
    launch/pipeline.py --until score rc=diff && python train.py -m experiment=sweep_alpha hydra/launcher=slurm
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rdo.artifacts import Provenance
from rdo.checks import CONF, compose_config, plain
from rdo.errors import UserError
from rdo.main import check_command_line, fail
from rdo.objectives.choice import choose_loss
from rdo.run import Run
from rdo.schema import Config
from rdo.slurm import record
from rdo.stages.align import label, needed_scores
from rdo.stages.report import rows
from rdo.stages.scorer import STAGE_OF

ROOT = CONF.parent
STAGES = ("sft", "rm", "diffmodel", "score", "align", "eval", "report")
# By sbatch's name, what submitit's settings mean; the others are called the same.
RENAMED = {"timeout_min": "time", "tasks_per_node": "ntasks-per-node", "name": "job-name"}
OWN = ("_target_", "submitit_folder", "setup", "max_num_timeout", "array_parallelism", "signal_delay_s",
       "stderr_to_stdout", "additional_parameters", "mem_gb", "name")  # fmt: skip

# Of hydra's own files: one for all processes of a job, whose clocks differ.
FOLDER = "hydra.run.dir=${run_dir}/hydra/job-${oc.env:SLURM_JOB_ID}"
# SIGUSR2, before the time limit, reaches this script alone; it asks the processes to save and stop, and then requeues
# itself, which keeps the job's number and with it what depends on the job.
SCRIPT = """\
#!/bin/bash
cd {root} || exit
{setup}
stop=
trap 'stop=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR2
srun --unbuffered {command} &
step=$!
until wait "$step"; code=$?; ! kill -0 "$step" 2>/dev/null; do :; done
wait "$step"
code=$?
if [ -n "$stop" ] && [ "$code" != 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


@dataclass(eq=False)
class Job:
    """One command, and the jobs that must have finished before it: with success, or however they ended."""

    name: str
    overrides: list[str]
    after: list[Job] = field(default_factory=list)
    whatever: bool = False
    number: str = ""


class Plan:
    """The jobs of a pipeline, in an order in which each comes after what it needs; each only once."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}

    def add(self, stage: str, config: Config, sections: list[Any], overrides: list[str], *after: Job | None) -> Job:
        """The job of a stage: a new one, or the one that makes the same. sections: what alone determines its result."""
        needed = [job for job in after if job is not None]
        key = json.dumps([stage, config.seed, sections, [list(self.jobs.values()).index(job) for job in needed]])
        name = "-".join([stage, *said_of(stage, config)])
        return self.jobs.setdefault(key, Job(name, [f"stage={stage}", *overrides], needed))

    def add_row(self, config: Config, overrides: list[str]) -> Job:
        """What a row of the comparison needs, and its evaluation, the last job."""
        made = plain(config)
        data, model, subject = made["dataset"], made["model"], config.eval.subject
        sft = self.add("sft", config, [data, model, made["sft"]], overrides) if config.sft.enabled else None
        scorers: dict[str, Job | None] = {}
        loss = choose_loss(config.loss)
        run = Run(config, Provenance(Path(config.run_dir), "", {}), "")
        kinds, both_orders = needed_scores(run, loss) if subject == "policy" else ([], False)
        judges = [judge for judge in config.eval.judges if judge in STAGE_OF]
        wanted = {subject} if subject in STAGE_OF else {*kinds, *judges}
        for kind in sorted(wanted - ({"diff"} if subject == "base" else set())):
            section = made[STAGE_OF[kind]]
            scorers[kind] = None if section["path"] else self.add(STAGE_OF[kind], config, [section], overrides, sft)
        if subject in STAGE_OF:
            return self.add("eval", config, [made["eval"]], overrides, scorers[subject])
        judged = [job for kind, job in scorers.items() if kind in judges]
        if subject == "base":
            return self.add("eval", config, [made["eval"]], overrides, sft, *judged)
        own = replace(config, eval=replace(config.eval, subject="base"))
        base = self.add_row(own, [*overrides, "eval.subject=base"])
        score = None
        if kinds and not config.rc.scores:
            selection = [config.align.min_responses, config.align.max_records, kinds, both_orders]
            score = self.add("score", config, selection, overrides, *(scorers[kind] for kind in kinds))
            score.name = "-".join(["score", *kinds])
        align = self.add("align", config, [made["loss"], made["rc"], made["align"]], overrides, score, sft)
        return self.add("eval", config, [made["eval"]], overrides, align, base, *judged)


def said_of(stage: str, config: Config) -> Iterator[str]:
    """What tells a job's name from those of other rows."""
    if stage == "align" or (stage == "eval" and config.eval.subject == "policy"):
        yield label(choose_loss(config.loss), config.rc)
    elif stage == "eval":
        yield config.eval.subject


def planned(overrides: list[str], until: str) -> list[Job]:
    """The jobs of stage=pipeline with these overrides, up to a stage."""
    config, plan = compose_config(overrides), Plan()
    entries = [plan.add_row(row.config, shlex.split(row.command)[3:]) for row in rows(config, overrides)]
    if not entries:
        raise UserError("report.rows is empty: there is nothing to compare")
    jobs = list(plan.jobs.values())
    if until == "report":
        # The report is of what is finished, and names what is not.
        jobs.append(Job("report", ["stage=report", *overrides], list(dict.fromkeys(entries)), True))
    kept = STAGES[: STAGES.index(until) + 1]
    return [job for job in jobs if job.name.partition("-")[0] in kept]


def profile(overrides: list[str]) -> dict[str, Any]:
    """The settings of hydra/launcher."""
    if not any(text.startswith("hydra/launcher=") for text in overrides):
        overrides = ["hydra/launcher=slurm", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = compose("config", overrides=overrides, return_hydra_config=True).hydra.launcher
    if "submitit_folder" not in launcher or not launcher.get("setup"):
        raise UserError("hydra/launcher: give one of the SLURM profiles of conf/hydra/launcher")
    launcher.submitit_folder = ""  # of submitit's own jobs; it is made of what only a sweep has
    settings = OmegaConf.to_container(launcher, resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def options(settings: dict[str, Any], job: Job, folder: Path) -> list[str]:
    """sbatch's options for a job."""
    given = {RENAMED.get(key, key): value for key, value in settings.items() if key not in OWN and value is not None}
    given |= {"mem": f"{settings['mem_gb']}G"} if settings["mem_gb"] else {}
    given |= {"job-name": job.name, "signal": f"B:USR2@{settings['signal_delay_s']}", "open-mode": "append"}
    given |= {"output": str(folder / "%j-%x.log"), "kill-on-invalid-dep": "yes", **settings["additional_parameters"]}
    if job.after:
        given["dependency"] = ":".join(["afterany" if job.whatever else "afterok", *(j.number for j in job.after)])
    texts = {key.replace("_", "-"): value for key, value in given.items()}
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in texts.items()]


def submit(jobs: list[Job], settings: dict[str, Any], folder: Path, dry_run: bool) -> None:
    """Submits the jobs, each after the ones that it needs. Raises UserError where SLURM refuses one."""
    for job in jobs:
        job.after = [needed for needed in job.after if needed in jobs]
        command = shlex.join([sys.executable, "-u", "train.py", *job.overrides, FOLDER])
        line = ["sbatch", "--parsable", *options(settings, job, folder)]
        if dry_run:
            job.number = f"<{job.name}>"
            print(f"{shlex.join(line)}\n    {command}")
            continue
        script = SCRIPT.format(root=shlex.quote(str(ROOT)), setup="\n".join(settings["setup"]), command=command)
        try:
            done = subprocess.run(line, input=script, capture_output=True, text=True)
        except FileNotFoundError:
            raise UserError("there is no SLURM here (no sbatch in PATH)") from None
        if done.returncode:
            raise UserError(f"SLURM did not take the job {job.name}: {' '.join(done.stderr.split())}")
        job.number = done.stdout.strip().partition(";")[0]
        waits = f", after {', '.join(needed.number for needed in job.after)}" if job.after else ""
        print(f"{job.number} {job.name}{waits}", flush=True)
        record(folder, job.number, {job.number: (job.name, folder / f"{job.number}-{job.name}.log")})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    parser.add_argument("--until", choices=STAGES, default="report", help="the last stage to submit")
    given, overrides = parser.parse_known_args()
    check_command_line(overrides)
    try:
        settings = profile(overrides)
        own = [text for text in overrides if not text.lstrip("+~").startswith("hydra")]
        folder = (ROOT / compose_config(own).run_dir / "slurm").resolve()
        folder.mkdir(parents=True, exist_ok=True)
        submit(planned(own, given.until), settings, folder, given.dry_run)
        if not given.dry_run:
            print(f"logs: {folder}; what becomes of them: launch/status.py {folder.parent}")
    except Exception as error:
        fail(error)


if __name__ == "__main__":
    main()
