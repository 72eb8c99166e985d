"""The configuration: everything in conf/ composes, and whatever cannot run is refused in one line that names it."""

import copy
import math
import re
import shutil
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import rdo.losses
from rdo import configuration
from rdo.alignment import choose_loss
from rdo.checks import UNBOUNDED, without_effect
from rdo.configuration import ABOVE_0, AT_LEAST_1, CHOICES, CONF, RANGES, compose_config, sweep_points
from rdo.errors import UserError
from rdo.schema import Config
from rdo.stages.report import rows

GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in CONF.iterdir()
    if folder.is_dir() and folder.name != "hydra"  # hydra's own groups: see test_sweeps.py
}
FILES = [(group, name) for group, names in GROUPS.items() for name in names]

# What a choice needs beside itself to be complete.
NEEDS = {
    "dataset/file": ["model=small", "dataset.path=pairs.jsonl"],
    "dataset/hh": ["model=small"],
    "dataset/hh_plus": ["model=small", "dataset.path=pairs.jsonl"],
    "dataset/tldr": ["model=small"],
    "model/hub": ["model.path=someone/model"],
}


def refusal(*overrides: str) -> str:
    """The message that a command line is refused with, which must be a single line."""
    with pytest.raises(UserError) as caught:
        compose_config(overrides)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def leaves(section: Any = None, prefix: str = "") -> dict[str, Any]:
    """Every setting of the schema by its dotted key, with its default; the loss is open and not in it."""
    found: dict[str, Any] = {}
    for field in fields(section or Config()):
        value = getattr(section or Config(), field.name)
        if is_dataclass(value):
            found |= leaves(value, f"{prefix}{field.name}.")
        elif field.name != "loss":
            found[prefix + field.name] = value
    return found


LEAVES = leaves()


@pytest.mark.parametrize(("group", "name"), FILES, ids=lambda value: value)
def test_every_choice_of_every_group_composes(group, name):
    config = compose_config([f"{group}={name}", *NEEDS.get(f"{group}/{name}", [])])
    if group in ("rc", "stage", "loss", "tracker", "engine"):
        section = getattr(config, group)
        assert (section["name"] if group == "loss" else section.name) == name


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_row_of_every_experiment_composes(experiment):
    config = compose_config([f"experiment={experiment}"])
    assert config.report.rows
    worlds = list(config.report.worlds.values()) or [[]]
    for number, row in enumerate(config.report.rows.values()):
        compose_config([f"experiment={experiment}", *worlds[number % len(worlds)], *row])


def test_the_seed_of_a_comparison_is_the_users_own():
    assert compose_config(["seed=7"]).report.seeds == [7]
    assert compose_config(["seed=7"]).dataset.toy.seed == 7
    assert compose_config(["report.seeds=[1,2]"]).report.seeds == [1, 2]


@pytest.mark.parametrize("group", GROUPS)
def test_a_misspelt_choice_is_refused_with_the_choices(group):
    message = refusal(f"{group}=nonsense")
    assert message == f"{group}=nonsense: must be one of {', '.join(GROUPS[group])}"


@pytest.mark.parametrize("group", GROUPS)
def test_a_misspelt_group_is_refused(group):
    assert f"{group}x" in refusal(f"{group}x={GROUPS[group][0]}")


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schema alone, without groups: composes faster, and says the same of keys and types."""
    (tmp_path / "config.yaml").write_text("defaults: [schema, _self_]\n")
    monkeypatch.setattr(configuration, "CONF", tmp_path)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("key", LEAVES)
def test_a_misspelt_key_is_refused_and_named(key):
    message = refusal(f"{key}x=1")
    assert message.startswith(f"{key}x: there is no such setting")
    assert key.split(".")[-1] in message  # the right spelling is among what there is


@pytest.mark.parametrize("key", {key.rpartition(".")[0]: key for key in LEAVES}.values())
def test_a_misspelt_key_of_any_section_is_refused_with_all_groups_in_place(key):
    assert refusal(f"{key}x=1").startswith(f"{key}x: there is no such setting")


@pytest.mark.parametrize("key", ["seedx", "rc.alphax", "dataset.toy.pairsx"])
def test_plus_does_not_smuggle_in_an_unknown_key(key):
    assert refusal(f"+{key}=1").startswith(f"{key}: there is no such setting")


def test_a_misspelt_section_and_a_key_below_a_value_are_named():
    assert "difmodel" in refusal("difmodel.form=paper")
    assert "rc.alpha.x" in refusal("rc.alpha.x=1")


@pytest.mark.parametrize("text", ["rc=null", "rc=3", "rc.alpha", "rc.alpha=[", "rc.alpha=0,1", "align=null", "align=3"])
def test_a_malformed_override_is_refused_and_named(text):
    assert text in refusal("seed=1", text)


@pytest.mark.parametrize(
    ("file", "line", "key"), [("rc/diff", "alphaa: 0.5", "rc.alphaa"), ("loss/dpo", "bet: 1", "loss.bet")]
)
def test_a_misspelt_key_in_a_file_is_named(tmp_path, monkeypatch, file, line, key):
    shutil.copytree(CONF, tmp_path / "conf")
    with (tmp_path / "conf" / f"{file}.yaml").open("a") as text:
        text.write(f"\n{line}\n")
    monkeypatch.setattr(configuration, "CONF", tmp_path / "conf")
    assert key in refusal(file.replace("/", "="))


WRONG = {int: "1.5", float: "high", bool: "perhaps", str: "[1]", list: "3", dict: "3"}


# One setting of each type in each section.
TYPED = {(key.rpartition(".")[0], type(value)): key for key, value in LEAVES.items() if value is not None}


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("key", TYPED.values())
def test_a_value_of_the_wrong_type_is_refused_and_named(key):
    assert key in refusal(f"{key}={WRONG[type(LEAVES[key])]}")


@pytest.fixture(scope="module")
def default() -> Config:
    return compose_config([])


def with_value(config: Config, key: str, value: Any) -> Config:
    """A copy of a config with one value changed."""
    made = copy.deepcopy(config)
    *path, name = key.split(".")
    section: Any = made
    for part in path:
        section = getattr(section, part)
    assert hasattr(section, name)
    setattr(section, name, [value] if isinstance(getattr(section, name), list) else value)
    return made


@pytest.mark.parametrize("key", [*RANGES, *AT_LEAST_1, *ABOVE_0])
def test_a_value_out_of_range_is_refused_with_the_range(default, key):
    low, high = RANGES.get(key, (1 if key in AT_LEAST_1 else 0, UNBOUNDED))
    below, kind = (0, "above") if key in ABOVE_0 else (low - 1, "at least")
    beyond = [high + 1] if high < UNBOUNDED else [math.inf] if "float" in annotation(key) else []
    for value in [below, *beyond]:
        with pytest.raises(UserError, match=f"^{re.escape(key)}={value}.*: must be {kind} {low:g}"):
            configuration.check_values(with_value(default, key, value))
    if key not in ABOVE_0:
        configuration.check_values(with_value(default, key, low))


@pytest.mark.parametrize("key", CHOICES)
def test_a_value_that_is_no_choice_is_refused_with_the_choices(default, key):
    with pytest.raises(UserError, match=f"^{re.escape(key)}=nonsense: must be one of .*{CHOICES[key][-1]}$"):
        configuration.check_values(with_value(default, key, "nonsense"))


def test_every_number_has_a_rule():
    """A new number in the schema needs a range, or it is listed here with the reason why any value will do."""
    ruled = {"dataset.split_seed", "dataset.toy.seed"}  # what a hash takes
    numbers = {key for key in LEAVES if re.match(r"(int|float)\b", annotation(key))} - ruled
    assert numbers == {*RANGES, *AT_LEAST_1, *ABOVE_0} - {"report.seeds"}  # a list of numbers


def annotation(key: str) -> str:
    """Type of a setting, as the schema writes it."""
    section: Any = Config()
    *path, name = key.split(".")
    for part in path:
        section = getattr(section, part)
    return next(str(field.type) for field in fields(section) if field.name == name)


FILE = ["dataset=file", "model=small", "dataset.path=pairs.jsonl"]
IMPOSSIBLE = {
    "dataset.path": ["dataset=file", "model=small"],
    "dataset.hub_name": ["dataset=hh", "model=small", "dataset.hub_name=null"],
    "validation_share + dataset.test_share": ["dataset.validation_share=0.5", "dataset.test_share=0.5"],
    "model.path": ["model=hub"],
    "model=toy": ["dataset=file", "dataset.path=pairs.jsonl"],
    "sft.enabled=false": ["sft.enabled=false"],
    "model.heads=3": ["model.heads=3"],
    "model.key_value_heads=3": ["model.key_value_heads=3"],
    "model.difference_template": ["model.difference_template=[a,b]"],
    "rc=oracle": ["rc=oracle", "dataset=hh", "model=small"],
    "rc.control=shuffle has no effect with rc.name=none": ["rc.control=shuffle"],
    "rc.order=antisymmetric has no effect with rc.name=reward": ["rc=reward", "rc.order=antisymmetric"],
    "rc.epsilon=0.01 has no effect with rc.negative=clip": ["rc=diff", "rc.epsilon=0.01"],
    "dataset.path=pairs.jsonl has no effect with dataset.source=toy": ["dataset.path=pairs.jsonl"],
    "dataset.path=b.jsonl has no effect with dataset.source=hub": ["dataset=hh", "model=small", "dataset.path=b.jsonl"],
    "set dataset.hub_name=null": [*FILE, "dataset.hub_name=someone/data"],
    "dataset.hub_config=c has no effect": [*FILE, "dataset.hub_config=c"],
    "dataset.format=hh has no effect with dataset.source=toy": ["dataset.format=hh"],
    "dataset.max_invalid_share=0.5 has no effect": [*FILE, "dataset.max_invalid_share=0.5"],
    "needs dataset.hub_split": ["dataset=hh", "model=small", "dataset.hub_test_split=test"],
    "test on another": ["dataset=hh", "model=small", "dataset.hub_split=a", "dataset.hub_test_split=a"],
    "must be a file or a list of files": [*FILE[:2], "dataset.path=[3]"],
    "dataset.path: a file": [*FILE[:2], "dataset.path=[]"],
    "dataset.template=chat": [*FILE, "dataset.template=chat"],
    "model.path is not set; leave it out": ["model.revision=v1"],
    "is a folder; leave it out": ["model.path=.", "model.revision=v1"],
    "eval.temperature=0.5 has no effect with eval.decoding=greedy": ["eval.decoding=greedy", "eval.temperature=0.5"],
    "eval.judges=oracle,oracle: names a judge twice": ["eval.judges=[oracle,oracle]"],
    "tracker.group=mine has no effect with tracker.name=none": ["tracker.group=mine"],
    "rm.path is a finished scorer": ["rm.path=a/b", "rm.backbone=c/d"],
    "diffmodel.path names a finished one": ["stage=diffmodel", "diffmodel.path=a/b"],
    "stage=sft has nothing to do": ["stage=sft", "model=alpaca"],
    "loss.ranking=reward has no effect": ["loss.ranking=reward"],
    "loss.sft_reduction=sum has no effect": ["loss.sft_reduction=sum"],
    "loss.robust=true has no effect": ["loss.robust=true"],
    "loss.length_penalty=nan: must be finite": ["loss=rrhf", "loss.length_penalty=nan"],
    "report.seeds is empty": ["report.seeds=[]"],
    "report.seeds=[1, 1]: names a seed twice": ["report.seeds=[1,1]"],
    "report.folder=../elsewhere": ["report.folder=../elsewhere"],
    "report.rows.mine: run_dir is the same for all rows": ['+report.rows.mine=["run_dir=elsewhere"]'],
    "run_dir is empty": ["run_dir="],
    "rm.path is empty": ["rm.path="],
    "run_dir=~/runs: ~ is not expanded": ["run_dir='~/runs'"],
    "model.name=a/b: names a folder": ["model.name=a/b"],
    "dataset.name=..: names a folder": ["dataset.name='..'"],
    "rc.negative must be clip": ["rc=diff", "rc.control=filter", "rc.negative=abs"],
    "rc.scale must be none": ["rc=diff", "rc.control=filter", "rc.scale=mean"],
    "diffmodel.form=pointwise": ["diffmodel.form=pointwise"],
    "set diffmodel.beta0=0": ["diffmodel.form=antisymmetric"],
    "diffmodel.form=residual": ["diffmodel.form=residual", "diffmodel.beta0=0"],
    "loss.ranking=labels": ["loss=rrhf", "loss.ranking=labels", "align.min_responses=3"],
    "loss.mean_over=samples": ["loss.mean_over=samples"],
    "loss.mean_over=pairs": ["loss=kto", "loss.mean_over=pairs"],
}


@pytest.mark.parametrize("named", IMPOSSIBLE)
def test_settings_that_exclude_each_other_are_refused(named):
    assert named in refusal(*IMPOSSIBLE[named])


def test_a_comparison_of_nothing_is_refused_where_one_is_made(default):
    empty = copy.deepcopy(default)
    empty.report.rows = {}
    with pytest.raises(UserError, match=r"^report\.rows is empty"):
        configuration.check(empty)
    empty.stage.name = "align"
    configuration.check(empty)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("rc.alhpa=0.5", "rc.alpha"),
        ("difmodel.form=paper", "diffmodel"),
        ("dataset.toy.pears=3", "dataset.toy.pairs"),
        ("alpha=0.5", "model.lora.alpha or rc.alpha"),
        ("tokens_per_microbatch=3", "engine.tokens_per_micro_batch"),
        ("form=paper", "diffmodel.form"),
        ("rc=rewrad", "reward"),
        ("dataset=tdlr", "tldr"),
        ("stage=algin", "align"),
        ("engine.layout=forrest", "forest"),
        ("engine.attention=varlem", "varlen"),
        ("eval.judges=[orcale]", "oracle"),
        ("loss.bta=0.1", "loss.beta"),
        ("loss.pairs=rankin", "ranking"),
        ("stage.name=evall", "eval"),
    ],
)
def test_what_was_meant_is_suggested(given, meant):
    assert refusal(given).endswith(f"(did you mean {meant}?)")


def test_what_is_like_nothing_gets_no_suggestion():
    assert "did you mean" not in refusal("xyzzy=1")
    assert "did you mean" not in refusal("learning_rat=1")  # four sections have one


@pytest.mark.parametrize("key", ["model.path", "run_dir", "report.title", "dataset.name", "tracker.project"])
def test_a_control_character_is_refused_and_shown_as_an_escape(default, key):
    with pytest.raises(UserError, match=re.escape(f"{key}=a\\x1b[2Jb: holds a control character")):
        configuration.check(with_value(default, key, "a\x1b[2Jb"))


def test_what_has_no_effect_without_coefficients_is_noted():
    found = without_effect(compose_config(["stage=align", "rc.alpha=1", "rc.scale=mean"]))
    assert found == ["rc.alpha=1.0 has no effect with rc=none", "rc.scale=mean has no effect with rc=none"]
    assert without_effect(compose_config(["stage=align", "rc=diff", "rc.alpha=1"])) == []
    assert without_effect(compose_config(["rc.alpha=1"])) == []  # the rows of a comparison read it


def test_data_is_inspected_whatever_the_model():
    compose_config(["stage=inspect", "dataset=file", "dataset.path=[a.jsonl,b.jsonl]", "dataset.template=chat"])


def test_settings_beside_the_impossible_ones_are_fine():
    compose_config(["model.path=someone/model", "model.revision=v1"])
    compose_config(["model.path=someone/model", f"model.revision={'0123456789' * 4}"])
    compose_config(["dataset=hh", "model=small", "dataset.hub_split=a", "dataset.hub_test_split=b"])
    compose_config([*FILE, "dataset.on_invalid=skip", "dataset.max_invalid_share=0.5", "dataset.format=hh"])
    compose_config(["tracker=wandb", "tracker.project=mine"])
    compose_config(["dataset=file", "dataset.path=pairs.jsonl", "model=toy", "model.path=someone/model"])
    compose_config(["rc=diff", "rc.control=filter"])
    compose_config(["diffmodel.form=residual", "diffmodel.beta0=0", "diffmodel.beta1=0"])
    compose_config(["loss=rrhf", "loss.ranking=labels", "align.min_responses=2"])
    compose_config(["align.max_steps=null", "align.max_gradient_norm=null"])


def test_a_sweep_is_checked_value_by_value():
    points = list(sweep_points(["rc=none,diff", "rc.alpha=0,0.5,1", "loss=dpo", "run_dir=a"]))
    assert points[0] == ["rc=none", "rc.alpha=0", "loss=dpo", "run_dir=a"]
    assert len(points) == 1 + 1 + 2
    assert {text for point in points for text in point} >= {"rc=diff", "rc.alpha=0.5", "rc.alpha=1"}
    assert list(sweep_points(["rc.alpha=interval(0,1)"])) == []


# ---------------------------------------------------------------------------------------------------------------------
# The group `loss`: its keys are the parameters of a function
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", GROUPS["loss"])
def test_a_misspelt_setting_of_a_loss_is_refused_with_its_settings(loss):
    own = compose_config([f"loss={loss}"]).loss
    message = refusal(f"loss={loss}", "loss.betax=1")
    assert message.startswith(f"loss.betax: loss={loss} has no such setting")
    assert all(key in message for key in own if key != "name")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["loss.beta=high"], "loss.beta='high': must be of type float"),
        (["loss.beta=true"], "loss.beta=True: must be of type float"),
        (["loss.beta=0"], "loss.beta=0.0: must be above 0"),
        (["loss.beta=nan"], "loss.beta=nan: must be finite"),
        (["loss.beta=inf"], "loss.beta=inf: must be finite"),
        (["loss.robust=3"], "loss.robust=3: must be of type bool"),
        (["loss.sft_weight=some"], "loss.sft_weight"),
        (["loss.sft_weight=-1"], "loss.sft_weight=-1.0: must be at least 0"),
        (["loss.label_smoothing=0.7"], "label_smoothing"),
        (["loss.pairs=all"], "loss.pairs=all: must be one of preferences, ranking"),
        (["loss=rrhf", "loss.normalise_by=words"], "loss.normalise_by=words"),
        (["~loss.beta"], "loss.beta: loss=dpo needs a value"),
        (["loss.name=ipo"], "loss.name=ipo: there is no such"),
        (["loss.name=best_response"], "loss.name=best_response"),
    ],
)
def test_a_loss_that_cannot_run_is_refused_before_any_work(overrides, named):
    assert named in refusal(*overrides)


def test_general_settings_of_a_loss_need_no_plus():
    assert choose_loss(compose_config(["loss.sft_weight=0.5"]).loss).sft_weight == 0.5


def hinge(policy_chosen: torch.Tensor, policy_rejected: torch.Tensor, *, margin: float) -> torch.Tensor:
    """A loss that this project does not have."""
    return torch.relu(margin - policy_chosen + policy_rejected)


def test_a_new_loss_is_one_function_and_one_file(tmp_path, monkeypatch):
    """And nothing else: it composes, is checked like the others, and trains a policy."""
    from rdo.files import read_json_lines
    from rdo.stages.align import aligned_policy
    from tiny import tiny_run

    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf" / "loss" / "hinge.yaml").write_text("name: hinge\nmargin: 2.0\n")
    monkeypatch.setattr(configuration, "CONF", tmp_path / "conf")
    monkeypatch.setattr(rdo.losses, "hinge", hinge, raising=False)
    assert "margin" in refusal("loss=hinge", "loss.margins=1")
    assert "hinge" in refusal("loss=nonsense")
    run = tiny_run(tmp_path, "loss=hinge", "align.max_steps=1", "sft.max_steps=1", "rc=oracle")
    made = aligned_policy(run)
    assert made.folder.name.startswith("hinge-oracle-0.5-")
    assert len(read_json_lines(made.folder / "metrics.jsonl")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Dead options
# ---------------------------------------------------------------------------------------------------------------------

# Names for people and for manifests: nothing has to read them.
LABELS = {"engine.name"}


def test_every_setting_is_read_somewhere():
    """A setting that nothing reads is a promise not kept. Checking a value is not reading it."""
    source = "\n".join(code(file) for file in sorted((Path(rdo.__file__).parent).rglob("*.py")))
    dead = [key for key in LEAVES if key not in LABELS and not re.search(rf"[.\"]{key.split('.')[-1]}\b", source)]
    assert not dead


def code(file: Path) -> str:
    """A source file without its comments; nothing of the files that declare and check settings."""
    if file.name in ("schema.py", "configuration.py", "checks.py"):
        return ""
    return re.sub(r"#.*", "", file.read_text())


def test_rows_of_a_comparison_are_added_and_dropped_as_the_readme_says():
    given = ['+report.rows.mine=["loss=dpo","rc=diff","rc.alpha=1"]', "~report.rows.rrhf", "report.seeds=[0,1]"]
    entries = list(rows(compose_config(given), given))
    assert {row.seed for row in entries} == {0, 1}
    names = {row.name for row in entries}
    assert "mine" in names
    assert "rrhf" not in names
    mine = next(row for row in entries if row.name == "mine")
    assert mine.config.rc.alpha == 1.0
    assert mine.command == "python train.py stage=eval seed=0 loss=dpo rc=diff rc.alpha=1"
