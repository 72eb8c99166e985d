"""The report of a sweep: rows from what is finished in a run folder, and the figure of alpha and beta."""

import json
from pathlib import Path
from typing import Any

import pytest

from rdo.errors import UserError
from rdo.lineage import determinants, swept
from rdo.report.aggregate import aggregate
from rdo.report.sweep import beside, draw_sweep, lines_over, logarithmic, panels, sweep_figure
from rdo.stages.eval import evaluate_policy, evaluate_scorers
from rdo.stages.found import finished_evaluations
from rdo.stages.report import make_report
from test_report import policy, scorer
from tiny import tiny_run

SHORT = ("eval.judges=[oracle]", "diffmodel.max_steps=2", "align.max_steps=2", "align.batch_size=8")


def point(name: str, reward: float, seed: int = 0, rc: str = "reward", **values: float) -> dict[str, Any]:
    """A policy of a sweep; double underscores stand for dots."""
    named = {key.replace("__", "."): value for key, value in values.items()}
    sweep = {"values": named, "others": {"align.training.learning_rate": 1e-4}}
    return policy(name, reward, seed, rc, world="", sweep=sweep)


def world(*rows: dict[str, Any]) -> dict[str, Any]:
    return aggregate({"policies": list(rows)})[0]


def test_a_line_is_what_differs_in_one_setting_alone():
    """A grid of alpha and beta: along alpha one line for each beta, and one for each beta along alpha."""
    grid = [
        point(f"{alpha} {beta}", alpha + beta, rc__alpha=alpha, loss__beta=beta)
        for alpha in (1.0, 0.0, 0.5)
        for beta in (0.1, 0.3)
    ]
    found = lines_over(world(*grid)["policies"], "rc.alpha")
    assert [line.name for line in found] == ["dpo, rc reward, beta 0.1", "dpo, rc reward, beta 0.3"]
    assert [[at for at, _ in line.points] for line in found] == [[0.0, 0.5, 1.0]] * 2
    assert [row["name"] for _, row in found[1].points] == ["0.0 0.3", "0.5 0.3", "1.0 0.3"]
    assert len(lines_over(world(*grid)["policies"], "loss.beta")) == 3
    assert lines_over(world(*grid)["policies"], "diffmodel.beta0") == []


def test_rows_that_differ_otherwise_are_on_no_line():
    one, other = point("a", 1.0, rc__alpha=0.0), point("b", 2.0, rc__alpha=1.0)
    other["sweep"]["others"] = {"align.training.learning_rate": 2e-4}
    assert lines_over(world(one, other)["policies"], "rc.alpha") == []
    another_loss = {**point("c", 2.0, rc__alpha=1.0), "group": "kto"}
    assert lines_over(world(one, another_loss)["policies"], "rc.alpha") == []
    assert sweep_figure(world(one, other)) is None


def test_the_figure_shows_reward_and_kl_with_intervals_and_units():
    rows = [point(f"alpha {alpha}", 1 + alpha, rc__alpha=alpha, loss__beta=0.1) for alpha in (0.0, 0.5, 1.0)]
    rows.append(point("dpo none", 1.25, rc="none", loss__beta=0.1))
    figure = sweep_figure(world(*rows))
    assert figure is not None
    reward, kl = figure.axes
    assert reward.get_ylabel() == "mean reward by “oracle”"
    assert kl.get_ylabel() == "KL to the base policy, nats"
    assert reward.get_xlabel() == kl.get_xlabel() == "alpha, the exponent in the coefficient R^alpha (rc.alpha)"
    assert [text.get_text() for text in reward.get_xticklabels()] == ["0", "0.5", "1"]
    (container,) = reward.containers
    line, _, (bars,) = container
    assert line.get_xydata().tolist() == [[0.0, 1.0], [0.5, 1.5], [1.0, 2.0]]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [
        pytest.approx([0.9, 1.1]),
        pytest.approx([1.4, 1.6]),
        pytest.approx([1.9, 2.1]),
    ]
    assert reward.get_legend_handles_labels()[1] == ["dpo, no coefficient", "dpo, rc reward"]
    level = next(drawn for drawn in reward.get_lines() if drawn.get_label() == "dpo, no coefficient")
    assert list(level.get_ydata()) == [1.25, 1.25]
    low, high = reward.get_ylim()
    assert low < 0.9
    assert high > 2.1


def test_several_seeds_are_one_point_and_the_title_says_what_the_bars_are():
    rows = [point(f"alpha {at}", at + seed, seed, rc__alpha=at) for at in (0.0, 1.0) for seed in (0, 1)]
    figure = sweep_figure(world(*rows))
    assert figure is not None
    assert figure.get_suptitle() == "Error bars: standard deviation over seeds"
    assert figure.axes[0].containers[0][0].get_xydata().tolist() == [[0.0, 0.5], [1.0, 1.5]]


def test_scorers_are_drawn_by_their_betas():
    rows = []
    for number, beta in enumerate((0.0, 0.01, 1.0)):
        sweep = {"values": {"diffmodel.beta0": beta, "diffmodel.beta1": 0.1}, "others": {}}
        rows.append({**scorer(f"beta {beta}", number, ""), "seed": 0, "form": "paper", "sweep": sweep})
    drawn = aggregate({"scorers": rows})[0]
    assert [[panel.quantity for panel in row] for row in panels(drawn)] == [
        ["accuracy against the true reward", "antisymmetry gap, mean |f(a, b) + f(b, a)|"]
    ]
    figure = sweep_figure(drawn)
    assert figure is not None
    assert figure.axes[0].get_xscale() == "symlog"
    assert len(figure.axes[0].containers[0][0].get_xydata()) == 3


def test_a_kl_that_nobody_knows_is_left_out():
    rows = [point(f"alpha {at}", at, rc__alpha=at) for at in (0.0, 1.0)]
    for row in rows:
        row["evaluation"]["kl"] = {"value": None, "low": None, "high": None, "count": 0}
    figure = sweep_figure(world(*rows))
    assert figure is not None
    assert len(figure.axes) == 1


def test_lines_stand_beside_each_other():
    assert [beside(0.5, [0.0, 1.0], steps) for steps in (-1, 0, 1)] == pytest.approx([0.494, 0.5, 0.506])
    assert [beside(1.0, [0.01, 0.1, 1.0], steps) for steps in (0, 1)] == pytest.approx([1.0, 1.02])
    assert beside(0.0, [0.0, 0.01, 1.0], 1) == pytest.approx(0.0002)


@pytest.mark.parametrize(
    ("tried", "wide"),
    [
        ([0.0, 0.25, 0.5, 0.75, 1.0], False),
        ([0.1, 0.5], False),
        ([0.03, 0.1, 0.3, 1.0], True),
        ([0.0, 0.01, 0.1], True),
    ],
)
def test_an_axis_is_logarithmic_for_a_sweep_over_magnitudes(tried, wide):
    assert logarithmic(tried) == wide


def test_the_picture_of_the_first_world_with_a_sweep(tmp_path: Path) -> None:
    rows = [point(f"alpha {at}", at, rc__alpha=at) for at in (0.0, 1.0)]
    assert draw_sweep({"policies": rows}, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not draw_sweep({"policies": rows[:1]}, tmp_path / "none.png")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]


# ---------------------------------------------------------------------------------------------------------------------
# What is finished in a run folder
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two sweeps leave: over alpha and beta1 (so that both are scorers, too), and over beta and the seed."""
    folder = tmp_path_factory.mktemp("sweep")
    for beta1 in ("0.1", "1"):
        for alpha in ("0", "1"):
            swept_over = [f"rc.alpha={alpha}", f"diffmodel.beta1={beta1}", "rc=diff", "rc.negative=abs"]
            evaluate_policy(tiny_run(folder, *SHORT, *swept_over), "policy")
        evaluate_scorers(tiny_run(folder, *SHORT, f"diffmodel.beta1={beta1}"), "diff")
    for overrides in (["loss.beta=0.2"], ["loss.beta=0.5"], ["loss.beta=0.2", "seed=1"]):
        evaluate_policy(tiny_run(folder, *SHORT, *overrides), "policy")
    return folder


@pytest.fixture(scope="module")
def report(run_dir: Path) -> dict[str, Any]:
    """What report.found=true makes of it."""
    run = tiny_run(run_dir, "stage=report", "report.found=true")
    make_report(run, ["stage=report", "report.found=true"], build=False)
    return json.loads((run_dir / "report" / "report.json").read_text())


def test_the_points_of_a_sweep_are_found_and_named_by_what_they_differ_in(run_dir, report):
    assert {(row["name"], row["seed"]) for row in report["policies"]} == {
        ("base", 0),
        ("base", 1),
        ("dpo-diff-0, diffmodel.beta1=0.1", 0),
        ("dpo-diff-0, diffmodel.beta1=1.0", 0),
        ("dpo-diff-1, diffmodel.beta1=0.1", 0),
        ("dpo-diff-1, diffmodel.beta1=1.0", 0),
        ("dpo-none, loss.beta=0.2", 0),
        ("dpo-none, loss.beta=0.2", 1),
        ("dpo-none, loss.beta=0.5", 0),
    }
    names = {"scorer-diff, diffmodel.beta1=0.1", "scorer-diff, diffmodel.beta1=1.0"}
    assert {row["name"] for row in report["scorers"]} == names
    assert report["missing"] == []
    assert (run_dir / "report" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "What a setting leads to" in (run_dir / "report" / "report.html").read_text()


def test_the_figure_of_a_found_sweep_has_every_line(report):
    (drawn,) = aggregate(report)
    policies, scorers = drawn["policies"], drawn["scorers"]
    alphas = {line.name: [at for at, _ in line.points] for line in lines_over(policies, "rc.alpha")}
    assert alphas == {"dpo, rc diff, beta1 0.1": [0.0, 1.0], "dpo, rc diff, beta1 1.0": [0.0, 1.0]}
    assert [[at for at, _ in line.points] for line in lines_over(policies, "loss.beta")] == [[0.2, 0.5]]
    betas = [[at for at, _ in line.points] for line in lines_over(policies, "diffmodel.beta1")]
    assert betas == [[0.1, 1.0], [0.1, 1.0]]
    assert [[at for at, _ in line.points] for line in lines_over(scorers, "diffmodel.beta1")] == [[0.1, 1.0]]


def test_what_a_policy_was_judged_by_is_no_setting_of_it(run_dir):
    """The judges of two evaluations may differ in what the policies have in common."""
    found, _ = finished_evaluations(run_dir)
    plain = next(one.artifact for one in found if one.name == "dpo-none, loss.beta=0.5")
    values, others = swept(run_dir, plain.manifest())
    assert values == {"loss.beta": 0.5}
    assert others["align.training.max_steps"] == 2
    assert not any(name.startswith("diffmodel") for name in others)
    weighed = next(one.artifact for one in found if one.name == "dpo-diff-1, diffmodel.beta1=1.0")
    assert swept(run_dir, weighed.manifest())[0] == {
        "rc.alpha": 1.0,
        "loss.beta": 0.2,
        "diffmodel.beta0": 0.1,
        "diffmodel.beta1": 1.0,
    }
    assert not any(name.endswith(".seed") for name in determinants(run_dir, weighed.manifest()))


def test_an_evaluation_that_is_damaged_is_named_and_the_others_are_shown(run_dir):
    path = next((run_dir / "eval").glob("dpo-none-*")) / "evaluation.json"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-5])
        found, problems = finished_evaluations(run_dir)
    finally:
        path.write_bytes(whole)
    assert len(found) == 10
    (problem,) = problems
    assert f"{path} has {len(whole) - 5} bytes" in problem


def test_a_folder_without_evaluations_and_a_pipeline_are_refused(tmp_path):
    with pytest.raises(UserError, match="reports the evaluations that are finished"):
        make_report(tiny_run(tmp_path, "stage=report", "report.found=true"), [], build=False)
    with pytest.raises(UserError, match="use stage=report"):
        make_report(tiny_run(tmp_path, "report.found=true"), [], build=True)
