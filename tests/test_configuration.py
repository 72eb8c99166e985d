"""The configuration: everything in conf/ composes, and whatever cannot run is refused in one line that names it."""

import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import rdo.objectives.losses
from rdo import checks
from rdo.checks import CONF, compose_config, setting_names, without_effect
from rdo.models.scorers import DIFFERENCE_FORMS
from rdo.objectives.choice import choose_loss
from rdo.objectives.coefficients import NEGATIVE
from rdo.runtime.errors import UserError
from rdo.sequences.attention import KERNELS
from rdo.settings import Config, DifferenceForm, Kernel, Negative

GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in CONF.iterdir()
    if folder.is_dir() and folder.name != "hydra"  # hydra's own groups: see stages/test_comparison.py
}
FILES = [(group, name) for group, names in GROUPS.items() for name in names]

# What a choice needs beside itself to be complete.
NEEDS = {
    "dataset/file": ["model=small", "dataset.path=pairs.jsonl"],
    "dataset/hh": ["model=small"],
    "dataset/hh_plus": ["model=small", "dataset.path=pairs.jsonl"],
    "dataset/tldr": ["model=small"],
    **{f"model/{name}": ["model.path=someone/model"] for name in ("hub", "hub_small", "hub_medium")},
}


def refusal(*overrides: str) -> str:
    """The message that a command line is refused with, which must be a single line."""
    with pytest.raises(UserError) as caught:
        compose_config(overrides)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("group", "name"), FILES, ids=lambda value: value)
def test_every_choice_of_every_group_composes(group, name):
    config = compose_config([f"{group}={name}", *NEEDS.get(f"{group}/{name}", [])])
    if group in ("rc", "stage", "loss", "tracker", "engine"):
        section = getattr(config, group)
        wanted = "eval" if (group, name) == ("stage", "pipeline") else name  # it evaluates every row
        assert (section["name"] if group == "loss" else section.name) == wanted


@pytest.mark.parametrize("experiment", GROUPS["experiment"])
def test_every_row_of_every_experiment_is_a_row(experiment):
    rows = compose_config([f"experiment={experiment}"]).rows.split(",")
    assert set(rows) <= set(GROUPS["row"])
    assert len(set(rows)) == len(rows)
    compose_config([f"experiment={experiment}", f"row={rows[-1]}"])


def test_rows_say_what_their_names_say():
    """A row changes its loss, coefficients, and settings of its own; one builds upon another."""
    config = compose_config(["row=rrhf_six_reward_shuffled"])
    assert (config.loss["name"], config.rc.name, config.rc.ablation) == ("rrhf", "reward", "shuffle")
    assert config.align.min_responses == 6
    assert compose_config(["row=dpo_1e-3", "align.learning_rate=1e-5"]).align.learning_rate == 1e-5
    assert compose_config(["experiment=sweep_beta", "row=kto"]).loss["name"] == "kto"
    assert compose_config(["seed=7"]).dataset.toy.seed == 7


def test_choices_are_those_of_the_code():
    assert get_args(Kernel) == ("auto", *KERNELS)
    assert get_args(Negative) == NEGATIVE
    assert get_args(DifferenceForm) == DIFFERENCE_FORMS


FILE = ("dataset=file", "model=small", "dataset.path=pairs.jsonl")
LORA = ("model.lora.rank=8", "model.path=someone/model")
# A command line, and what the one line that refuses it must say.
REFUSED: dict[tuple[str, ...], str] = {
    # Keys and groups
    ("rc.alhpa=0.5",): "rc.alhpa: there is no such setting (did you mean rc.alpha?)",
    ("dataset.toy.pears=3",): "(did you mean dataset.toy.pairs?)",
    ("form=paper",): "(did you mean diffmodel.form?)",
    ("alpha=0.5",): "(did you mean model.lora.alpha or rc.alpha?)",
    ("rc.alpha.x=1",): "rc.alpha.x",
    ("xyzzy=1",): "xyzzy: there is no such setting; see --cfg job",
    ("+rc.alphax=1",): "rc.alphax: there is no such setting",
    ("rc=rewrad",): "rc=rewrad: must be one of diff, gold, none, reward (did you mean reward?)",
    ("rc.alpha",): "rc.alpha",
    ("rc.alpha=[",): "rc.alpha",
    ("rc.alpha=0,1",): "rc.alpha=0,1",
    ("align=3",): "align=3",
    # Types, choices and ranges
    ("seed=one",): "seed=one: must be a valid integer",
    ("rc.alpha=high",): "rc.alpha=high: must be a valid number",
    ("rc.alpha=2",): "rc.alpha=2: must be less than or equal to 1",
    ("align.learning_rate=0",): "align.learning_rate=0: must be greater than 0",
    ("rm.learning_rate=inf",): "rm.learning_rate=inf: must be a finite number",
    ("align.epochs=null",): "align.epochs=None: must be a valid integer",
    ("eval.judges=[glod]",): "eval.judges=glod: must be one of gold, reward, diff (did you mean gold?)",
    ("diffmodel.form=pointwise",): "diffmodel.form=pointwise: must be one of paper, antisymmetric, residual",
    ("model.difference_template=[a,b]",): "model.difference_template=['a', 'b']: must have at least 3 items",
    ("run_dir=",): "run_dir is empty",
    ("dataset.name='..'",): "dataset.name=..",
    # Data
    FILE[:2]: "needs dataset.path",
    (*FILE[:2], "dataset.path=[]"): "needs dataset.path",
    (*FILE[:2], "dataset.path={a: 1}"): "dataset.path={'a': 1}: must be",
    ("dataset=hh", "model=small", "dataset.hub_name=null"): "dataset.hub_name",
    ("dataset.validation_share=0.5", "dataset.test_share=0.5"): "validation_share + dataset.test_share",
    ("dataset.path=pairs.jsonl",): "dataset.path=pairs.jsonl has no effect with dataset.source=toy",
    (*FILE, "dataset.hub_name=someone/data"): "set dataset.hub_name=null",
    ("dataset.template_date=2025-01-01",): "has no effect with dataset.template=raw, only with dataset.template=chat",
    ("dataset.too_long=chop",): "dataset.too_long=chop: must be one of cut, drop",
    ("dataset.min_prompt_tokens=0",): "dataset.min_prompt_tokens=0: must be greater than or equal to 1",
    ("eval.stop=[a,'']",): "eval.stop is empty",
    ("dataset.template_date=today",): "dataset.template_date=today: must",
    ("dataset.template_date=2025-13-01",): "dataset.template_date=2025-13-01: month must be in 1..12",
    ("dataset.format=hh",): "dataset.format=hh has no effect with dataset.source=toy",
    ("dataset=hh", "model=small", "dataset.hub_test_split=test"): "needs dataset.hub_split",
    ("dataset=hh", "model=small", "dataset.hub_split=a", "dataset.hub_test_split=a"): "test on another",
    (*FILE, "dataset.template=chat"): "dataset.template=chat",
    # Models
    ("model=hub",): "model.path",
    ("dataset=file", "dataset.path=pairs.jsonl"): "model=toy reads the toy world's words only",
    ("sft.enabled=false",): "sft.enabled=false",
    ("stage=sft", "model=alpaca"): "stage=sft has nothing to do",
    ("model.heads=3",): "model.heads=3",
    ("model.key_value_heads=3",): "model.key_value_heads=3",
    ("model.revision=v1",): "model.path is not set; leave it out",
    ("model.path=.", "model.revision=v1"): "is a folder; leave it out",
    ("model.path=train.py",): "model.path=train.py: is a file",
    ("model.lora.alpha=8",): "model.lora.alpha=8.0 has no effect without model.lora.rank",
    ("model.lora.rank=8", "stage=sft"): "set model.path",
    (*LORA, "model.lora.target_modules=[]"): "model.lora.target_modules is empty",
    # Scorers and coefficients
    ("rc=gold", "dataset=hh", "model=small"): "rc=gold",
    ("rc.ablation=shuffle",): "rc.ablation=shuffle has no effect with rc.name=none",
    ("rc=reward", "rc.order=antisymmetric"): "rc.order=antisymmetric has no effect with rc.name=reward",
    ("rc=diff", "rc.ablation=filter", "rc.negative=abs"): "rc.negative must be clip",
    ("rc=diff", "rc.ablation=filter", "rc.scale=mean"): "rc.scale must be none",
    ("diffmodel.form=antisymmetric",): "diffmodel.beta0=0.1 has no effect with diffmodel.form=antisymmetric",
    ("diffmodel.form=residual", "diffmodel.beta0=0"): "set diffmodel.beta1=0.0",
    ("rm.path=a/b", "rm.backbone=c/d"): "rm.path is a finished scorer",
    ("stage=diffmodel", "diffmodel.path=a/b"): "diffmodel.path names a finished one",
    # Losses
    ("loss.bta=0.1",): "loss.bta: loss=dpo has no such setting; it has beta",
    ("loss.beta=high",): "loss.beta=high: must be a valid number",
    ("loss.beta=0",): "loss.beta=0.0: must be above 0",
    ("loss.robust=true",): "loss.robust=true has no effect",
    ("loss.sft_weight=-1",): "loss.sft_weight=-1: must be greater than or equal to 0",
    ("loss.label_smoothing=0.7",): "label_smoothing",
    ("loss.pairs=all",): "loss.pairs=all: must be 'preferences' or 'ranking'",
    ("loss=rrhf", "loss.normalise_by=words"): "loss.normalise_by=words",
    ("loss=rrhf", "loss.ranking=labels", "align.min_responses=3"): "loss.ranking=labels",
    ("loss.ranking=reward",): "loss.ranking=reward has no effect",
    ("loss.sft_reduction=sum",): "loss.sft_reduction=sum has no effect",
    ("loss.mean_over=samples",): "loss.mean_over=samples",
    ("loss=kto", "loss.mean_over=pairs"): "loss.mean_over=pairs",
    ("~loss.beta",): "loss.beta: loss=dpo needs a value",
    ("loss.name=best_response",): "loss.name=best_response",
    # Evaluation, tracking, reports
    ("eval.decoding=greedy", "eval.temperature=0.5"): "eval.temperature=0.5 has no effect with eval.decoding=greedy",
    ("eval.judges=[gold,gold]",): "eval.judges=gold,gold: names a judge twice",
    ("tracker.group=mine",): "tracker.group=mine has no effect with tracker.name=none",
    ("report.folder=../elsewhere",): "report.folder=../elsewhere",
    ("stage=inspect", "metric=loss"): "stage=inspect returns nothing",
    ("stage=eval", "metric=rewards.human"): "the judge of metric=rewards.human=human: must be one of",
}


@pytest.mark.parametrize("overrides", REFUSED, ids=" ".join)
def test_what_cannot_run_is_refused_in_one_line(overrides):
    assert REFUSED[overrides] in refusal(*overrides)


@pytest.mark.parametrize("group", GROUPS)
def test_a_misspelt_choice_is_refused_with_the_choices(group):
    assert refusal(f"{group}=nonsense").startswith(f"{group}=nonsense: must be one of {', '.join(GROUPS[group])}")


@pytest.mark.parametrize(
    ("file", "line", "key"), [("rc/diff", "alphaa: 0.5", "rc.alphaa"), ("loss/dpo", "bet: 1", "loss.bet")]
)
def test_a_misspelt_key_in_a_file_is_named(tmp_path, monkeypatch, file, line, key):
    shutil.copytree(CONF, tmp_path / "conf")
    with (tmp_path / "conf" / f"{file}.yaml").open("a") as text:
        text.write(f"\n{line}\n")
    monkeypatch.setattr(checks, "CONF", tmp_path / "conf")
    assert key in refusal(file.replace("/", "="))


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.path=someone/model", "model.revision=v1"),
        ("dataset=hh", "model=small", "dataset.hub_split=a", "dataset.hub_test_split=b"),
        (*FILE, "dataset.on_invalid=skip", "dataset.max_invalid_share=0.5", "dataset.format=hh"),
        ("stage=inspect", "dataset=file", "dataset.path=[a.jsonl,b.jsonl]", "dataset.template=chat"),
        ("tracker=wandb", "tracker.project=mine"),
        ("dataset=file", "dataset.path=pairs.jsonl", "model=toy", "model.path=someone/model"),
        ("rc=diff", "rc.ablation=filter"),
        ("diffmodel.form=residual", "diffmodel.beta0=0", "diffmodel.beta1=0"),
        ("loss=rrhf", "loss.ranking=labels", "align.min_responses=2"),
        ("align.max_steps=null", "align.max_gradient_norm=null", "model.name=7"),
    ],
    ids=" ".join,
)
def test_settings_beside_the_impossible_ones_are_fine(overrides):
    compose_config(overrides)


def test_what_has_no_effect_without_coefficients_is_noted():
    found = without_effect(compose_config(["stage=align", "rc.alpha=1", "rc.scale=mean"]))
    assert found == ["rc.alpha=1.0 has no effect with rc=none", "rc.scale=mean has no effect with rc=none"]
    assert without_effect(compose_config(["stage=align", "rc=diff", "rc.alpha=1"])) == []


def test_general_settings_of_a_loss_need_no_plus():
    assert choose_loss(compose_config(["loss.sft_weight=0.5"]).loss).sft_weight == 0.5


def hinge(policy_chosen: torch.Tensor, policy_rejected: torch.Tensor, *, margin: float) -> torch.Tensor:
    """A loss that this project does not have."""
    return torch.relu(margin - policy_chosen + policy_rejected)


def test_a_new_loss_is_one_function_and_one_file(tmp_path, monkeypatch):
    """And nothing else: it composes, is checked like the others, and trains a policy."""
    from rdo.runtime.files import read_json_lines
    from rdo.stages.align import aligned_policy
    from tiny import tiny_run

    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf" / "loss" / "hinge.yaml").write_text("name: hinge\nmargin: 2.0\n")
    monkeypatch.setattr(checks, "CONF", tmp_path / "conf")
    monkeypatch.setattr(rdo.objectives.losses, "hinge", hinge, raising=False)
    assert "margin" in refusal("loss=hinge", "loss.margins=1")
    assert "hinge" in refusal("loss=nonsense")
    run = tiny_run(tmp_path, "loss=hinge", "align.max_steps=1", "sft.max_steps=1", "rc=gold")
    made = aligned_policy(run)
    assert made.folder.name.startswith("hinge-gold-0.5-")
    assert len(read_json_lines(made.folder / "metrics.jsonl")) == 1


def test_every_setting_is_read_somewhere():
    """A setting that nothing reads is a promise not kept. Checking a value is not reading it; nothing has to read the
    name of an engine."""
    files = [file for file in Path(rdo.__file__).parent.rglob("*.py") if file.name not in ("settings.py", "checks.py")]
    source = "\n".join(re.sub(r"#.*", "", file.read_text()) for file in files)
    names: list[Any] = [key for key in setting_names(Config()) if key not in ("engine.name", "loss")]
    assert not [key for key in names if not re.search(rf"[.\"]{key.split('.')[-1]}\b", source)]
