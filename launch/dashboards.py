"""Dashboards in wandb, as code: one for training runs, one for a sweep, one that compares coefficients.

python launch/dashboards.py --check                 builds them here and says what they hold; needs no login
python launch/dashboards.py [--group toy-toy]       saves them as views of the project (after `wandb login`)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import wandb
import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces

from rdo.settings import TrackerConfig

STEP = "global_step"
TRAINING = ("sft", "rm", "diffmodel", "align")
# What training runs log at every step, by the section that shows it; a run has what its stage and loss know.
CURVES: dict[str, tuple[str, ...]] = {
    "Loss": ("loss", "alignment_loss", "sft_loss", "comparison_loss", "duplication", "reverse"),
    "Implicit reward": (
        "implicit_reward_accuracy", "implicit_reward_margin", "implicit_reward_desirable",
        "implicit_reward_undesirable", "policy_margin", "kl_estimate", "log_ratio_chosen", "log_ratio_rejected",
        "log_ratio_size",
    ),
    "Coefficients": ("weight_mean", "weight_zero_share", "effective_sample_share"),
    "Scorers": ("accuracy", "difference_size"),
    "Lengths": ("chosen_length", "rejected_length", "response_length", "sequence_length"),
    "Optimization": ("learning_rate", "head_learning_rate", "gradient_norm", "epoch"),
    "Machine": ("tokens_per_second", "unique_token_share", "memory_bytes", "seconds"),
}  # fmt: skip
COMPARED_CURVES = (
    "implicit_reward_accuracy", "implicit_reward_margin", "log_ratio_chosen", "log_ratio_rejected",
    "effective_sample_share", "weight_mean", "loss", "gradient_norm", "chosen_length",
)  # fmt: skip
# What evaluations show: tables in their history, numbers in their summary.
TABLES = ("tables/evaluation", "tables/against_base", "tables/by_confidence", "tables/samples")
RESULTS = ("reward", "kl", "log_ratio", "length")
# Of an aligned policy's training set.
COEFFICIENTS = ("coefficients/mean", "coefficients/negative_share", "coefficients/effective_sample_share")
# The settings of a sweep, as evaluations have them where they have an effect; and those that runs are grouped by.
SWEPT = {"made.alpha": "alpha", "made.beta": "beta", "made.beta0": "beta0", "made.beta1": "beta1"}
GROUPS = ("loss.name", "rc.name")
SEVERAL_COLOURS = [panels.GradientPoint(color="#0072B2", offset=0), panels.GradientPoint(color="#D55E00", offset=100)]


def titled(name: str) -> str:
    """A logged name as a title."""
    return name.replace("/", ": ").replace("_", " ")


def curves(names: Iterable[str]) -> list[Any]:
    """One line plot a measure."""
    return [panels.LinePlot(title=titled(name), x=STEP, y=[name]) for name in names]


def scatters(settings: Iterable[str], result: str) -> list[Any]:
    """Each setting against a result of evaluations."""
    return [
        panels.ScatterPlot(
            title=f"{SWEPT[name]} against {titled(result)}", x=panels.Config(name), y=panels.SummaryMetric(result)
        )
        for name in settings
    ]


def bars(names: Iterable[str]) -> list[Any]:
    """One bar plot a number, by coefficients."""
    return [panels.BarPlot(title=titled(name), metrics=[name], groupby=GROUPS[1]) for name in names]


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
    found = [panels.WeavePanelSummaryTable(table_name=name) for name in TABLES]
    sections = [section(name, curves(names)) for name, names in CURVES.items()]
    return view("rdo: one run", [*sections, section("Evaluation", found, 2)], (*TRAINING, "eval"), options)


def sweep(options: argparse.Namespace) -> Any:
    """A sweep: alpha and the betas against reward and KL, and all of them at once."""
    column = panels.ParallelCoordinatesPlotColumn
    axes = [column(metric=panels.Config(name), display_name=shown) for name, shown in SWEPT.items()]
    axes += [column(metric=panels.SummaryMetric(name)) for name in ("log_ratio", "reward")]
    reward, kl = panels.SummaryMetric("reward"), panels.SummaryMetric("kl")
    together = [
        panels.ParallelCoordinatesPlot(columns=axes, gradient=SEVERAL_COLOURS),
        panels.ScatterPlot(title="KL (nats) against reward", x=kl, y=reward),
        panels.ParameterImportancePlot(with_respect_to="reward"),
    ]
    sections = [
        section("Reward", scatters(SWEPT, "reward"), 2),
        section("KL (nats)", scatters(SWEPT, "kl"), 2),
        section("All at once", together, 1),
        section("Scorers", scatters(("made.beta0", "made.beta1"), "label_accuracy"), 2),
    ]
    columns = ["summary:reward", "summary:kl", *(f"config:{name}" for name in SWEPT)]
    return view("rdo: sweep", sections, ["eval"], options, pinned_columns=columns)


def coefficients(options: argparse.Namespace) -> Any:
    """No coefficient, reward and diff side by side: the curves of training, and what evaluations found."""
    sections = [
        section("What evaluations found", bars(RESULTS), 2),
        section("Coefficients of the training set", bars(COEFFICIENTS)),
        section("Training", curves(COMPARED_CURVES)),
    ]
    grouping = [workspaces.Config(name) for name in GROUPS]
    return view("rdo: coefficients", sections, ["align", "eval"], options, groupby=grouping)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="build only")
    parser.add_argument("--project", default=TrackerConfig.project)
    parser.add_argument("--entity", help="user or team; your own by default")
    parser.add_argument("--group", help="runs of this group alone: the name of a run_dir, if tracker.group is not set")
    options = parser.parse_args(arguments)
    if not options.check:
        if not wandb.login(prompt=False, verify=False):
            sys.exit("error: saving needs a login: run `wandb login` first (--check needs none)")
        options.entity = options.entity or wandb.Api().default_entity
    for build in (training, sweep, coefficients):
        workspace = build(options)
        count = sum(len(part.panels) for part in workspace.sections)
        print(f"{workspace.name}: {count} panels in {len(workspace.sections)} sections")
        if not options.check:
            workspace.save_as_new_view()
            print(f"  {workspace.url}")


if __name__ == "__main__":
    main(sys.argv[1:])
