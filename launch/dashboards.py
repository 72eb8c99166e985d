"""Dashboards in wandb, as code: one for training runs, one for a sweep, one that compares coefficients.

python launch/dashboards.py --check                 builds them here and says what they hold; needs no login
python launch/dashboards.py --check runs/toy-toy    and names what no run in that folder has logged
python launch/dashboards.py [--group toy-toy]       saves them as views of the project (after `wandb login`)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import wandb
import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces

from rdo.errors import UserError
from rdo.printable import single_line
from rdo.schema import TrackerConfig
from rdo.tracking.wandb_run import logged_names

STEP = "global_step"
TRAINING = ("sft", "rm", "diffmodel", "align")
# What training runs log at every step, by the section that shows it; a run has what its stage and loss know.
CURVES: dict[str, tuple[str, ...]] = {
    "Loss": ("loss", "alignment_loss", "sft_loss", "comparison_loss", "duplication", "reverse"),
    "Implicit reward": (
        "implicit_reward_accuracy",
        "implicit_reward_margin",
        "implicit_reward_desirable",
        "implicit_reward_undesirable",
        "policy_margin",
        "kl_estimate",
        "log_ratio_chosen",
        "log_ratio_rejected",
    ),
    "Coefficients": ("weight_mean", "weight_zero_share", "effective_sample_share"),
    "Scorers": ("accuracy", "difference_size"),
    "Lengths": ("chosen_length", "rejected_length", "response_length", "sequence_length"),
    "Optimization": ("learning_rate", "head_learning_rate", "gradient_norm", "epoch"),
    "Machine": ("tokens_per_second", "unique_token_share", "memory_bytes", "seconds"),
}
# The settings of a sweep, as finished runs have them where they have an effect.
SWEPT = {"made.alpha": "alpha", "made.beta": "beta", "made.beta0": "beta0", "made.beta1": "beta1"}
SEVERAL_COLOURS = [panels.GradientPoint(color="#0072B2", offset=0), panels.GradientPoint(color="#D55E00", offset=100)]


def curves(names: Iterable[str]) -> list[Any]:
    """One line plot a measure."""
    return [panels.LinePlot(title=name.replace("_", " "), x=STEP, y=[name]) for name in names]


def section(name: str, members: list[Any], columns: int = 3) -> Any:
    """An open section, so many panels in a row."""
    layout = workspaces.SectionLayoutSettings(columns=columns, rows=2)
    return workspaces.Section(name=name, panels=members, is_open=True, layout_settings=layout)


def view(name: str, sections: list[Any], jobs: Iterable[str], options: argparse.Namespace, **runs: Any) -> Any:
    """A saved view of the project, of the runs of some stages, and of one group if that is given."""
    filters = [workspaces.Metric("JobType").isin(list(jobs))]
    if options.group:
        filters.append(workspaces.Metric("Group") == options.group)
    return workspaces.Workspace(
        entity=options.entity or "",
        project=options.project,
        name=name,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=workspaces.RunsetSettings(filters=filters, **runs),
    )


def training(options: argparse.Namespace) -> Any:
    """One run, or a few: every curve, then what its evaluation found, with samples."""
    sections = [section(name, curves(names)) for name, names in CURVES.items()]
    sections.append(
        section(
            "Evaluation",
            [
                *(
                    panels.WeavePanelSummaryTable(table_name=f"tables/{name}")
                    for name in ("evaluation", "against_base")
                ),
                panels.WeavePanelSummaryTable(table_name="tables/by_confidence"),
                panels.WeavePanelSummaryTable(table_name="tables/samples"),
            ],
            columns=2,
        )
    )
    return view("rdo: one run", sections, (*TRAINING, "eval"), options)


def sweep(options: argparse.Namespace) -> Any:
    """A sweep: alpha and the betas against reward and KL, and all of them at once."""
    axes = [
        panels.ParallelCoordinatesPlotColumn(metric=panels.Config(name), display_name=shown)
        for name, shown in SWEPT.items()
    ]
    ends = [panels.ParallelCoordinatesPlotColumn(metric=panels.SummaryMetric(name)) for name in ("log_ratio", "reward")]
    scorers = [
        panels.ScatterPlot(
            title=f"{SWEPT[name]} against a scorer's accuracy",
            x=panels.Config(name),
            y=panels.SummaryMetric("label_accuracy"),
        )
        for name in ("made.beta0", "made.beta1")
    ]
    sections = [
        section(
            "Reward",
            [
                panels.ScatterPlot(
                    title=f"{shown} against reward", x=panels.Config(name), y=panels.SummaryMetric("reward")
                )
                for name, shown in SWEPT.items()
            ],
            columns=2,
        ),
        section(
            "KL",
            [
                panels.ScatterPlot(
                    title=f"{shown} against KL, nats", x=panels.Config(name), y=panels.SummaryMetric("kl")
                )
                for name, shown in SWEPT.items()
            ],
            columns=2,
        ),
        section(
            "All at once",
            [
                panels.ParallelCoordinatesPlot(columns=[*axes, *ends], gradient=SEVERAL_COLOURS),
                panels.ScatterPlot(
                    title="KL (nats) against reward", x=panels.SummaryMetric("kl"), y=panels.SummaryMetric("reward")
                ),
                panels.ParameterImportancePlot(with_respect_to="reward"),
            ],
            columns=1,
        ),
        section("Scorers", scorers, columns=2),
    ]
    columns = ["summary:reward", "summary:kl", *(f"config:{name}" for name in SWEPT)]
    return view("rdo: sweep", sections, ["eval"], options, pinned_columns=columns)


def coefficients(options: argparse.Namespace) -> Any:
    """No coefficient, reward and diff side by side: the curves of training, and what evaluations found."""
    measures = (
        "implicit_reward_accuracy",
        "implicit_reward_margin",
        "log_ratio_chosen",
        "log_ratio_rejected",
        "effective_sample_share",
        "weight_mean",
        "loss",
        "gradient_norm",
        "chosen_length",
    )
    found = ("reward", "kl", "log_ratio", "length")
    bars = [panels.BarPlot(title=name.replace("_", " "), metrics=[name], groupby="rc.name") for name in found]
    shares = [
        panels.BarPlot(
            title=f"coefficients: {name.replace('_', ' ')}", metrics=[f"coefficients/{name}"], groupby="rc.name"
        )
        for name in ("mean", "negative_share", "effective_sample_share")
    ]
    sections = [
        section("What evaluations found", bars, columns=2),
        section("Coefficients of the training set", shares),
        section("Training", curves(measures)),
    ]
    grouping = [workspaces.Config("loss.name"), workspaces.Config("rc.name")]
    return view("rdo: coefficients", sections, ["align", "eval"], options, groupby=grouping)


DASHBOARDS = (training, sweep, coefficients)


# ---------------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------------


def names_in(workspace: Any) -> set[str]:
    """What a dashboard refers to, by "history:", "summary:" and "config:", in the form that it is saved in."""
    specification = json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True))["spec"]
    found = set()
    for part in specification["section"]["panelBankConfig"]["sections"]:
        for panel in part["panels"]:
            found |= set(references(panel["viewType"], panel["config"]))
    for run_set in specification["section"]["runSets"]:
        found |= {f"config:{plain(group['name'])}" for group in run_set["grouping"]}
        found |= {name for name in run_set["runFeed"]["columnPinned"] if not name.startswith("run:")}
    return found


def references(kind: str, config: dict[str, Any]) -> Iterator[str]:
    """What one panel refers to."""
    yield from (f"history:{name}" for name in config.get("metrics", ()) if kind == "Run History Line Plot")
    yield from (f"summary:{name}" for name in config.get("metrics", ()) if kind == "Bar Chart")
    yield from (f"history:{name}" for name in config.get("mediaKeys", ()))
    yield from (f"{kind_of}:{plain(name)}" for kind_of, name in axes_of(config))
    if "groupBy" in config:
        yield f"config:{plain(config['groupBy'])}"
    if "targetKey" in config:
        yield f"summary:{config['targetKey']}"
    if kind == "Run History Line Plot":
        yield f"history:{config['xAxis']}"
    if kind == "Weave":
        yield f"history:{config['panel2Config']['exp']['fromOp']['inputs']['key']['val']}"


def axes_of(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Kind and name of the axes of scatter plots and parallel coordinates."""
    axes = [config.get(axis, "") for axis in ("xAxis", "yAxis", "zAxis")]
    for axis in (*axes, *(column["accessor"] for column in config.get("columns", ()))):
        kind, separator, name = axis.partition(":")
        if separator:
            yield kind, name


def plain(name: str) -> str:
    """A setting's name as our config has it: wandb puts a "value" behind its first part."""
    first, _, rest = name.partition(".value")
    return first + rest


def missing(workspace: Any, run_dir: Path) -> list[str]:
    """What a dashboard refers to, and no run in the folder has logged."""
    return sorted(names_in(workspace) - logged_names(run_dir))


def check(options: argparse.Namespace) -> None:
    """Builds every dashboard and says what it holds. Raises UserError where a folder of runs holds no wandb run."""
    run_dir = Path(options.check) if options.check else None
    if run_dir and not logged_names(run_dir):
        raise UserError(f"{run_dir}: no run there has logged to wandb; make some with tracker=wandb")
    for build in DASHBOARDS:
        workspace = build(options)
        count = sum(len(part.panels) for part in workspace.sections)
        print(
            f"{workspace.name}: {count} panels in {len(workspace.sections)} sections, {len(names_in(workspace))} names"
        )
        if run_dir and (absent := missing(workspace, run_dir)):
            print(f"  not logged by any run in {run_dir}: {', '.join(absent)}")


def save(options: argparse.Namespace) -> None:
    """Saves the dashboards. Raises UserError where nobody is logged in, or wandb refuses."""
    if not wandb.login(prompt=False, verify=False):
        raise UserError("saving needs a login: run `wandb login` first (--check needs none)")
    try:
        options.entity = options.entity or wandb.Api().default_entity
        for build in DASHBOARDS:
            workspace = build(options)
            workspace.save_as_new_view()
            print(f"{workspace.name}: {workspace.url}")
    except Exception as error:  # wandb's and its transport's errors have no common class
        raise UserError(f"wandb did not take the dashboards: {single_line(str(error))}") from error


def main(arguments: list[str]) -> None:
    """Checks or saves, and shows a mistake as one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", nargs="?", const="", metavar="RUN_DIR", help="build only; with a folder, compare")
    parser.add_argument("--project", default=TrackerConfig.project)
    parser.add_argument("--entity", help="user or team; your own by default")
    parser.add_argument("--group", help="runs of this group alone: the name of a run_dir, if tracker.group is not set")
    options = parser.parse_args(arguments)
    try:
        if options.check is None:
            save(options)
        else:
            check(options)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
