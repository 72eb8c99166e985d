"""Half precision: training and its reference compute alike, and what cannot be trained is refused before any work."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rdo.runtime.errors import UserError
from rdo.runtime.store import Artifact
from rdo.stages.align import aligned_policy
from rdo.stages.scorer import scorer
from rdo.stages.sft import base_policy
from tiny import metrics, tiny_run

HALF = "engine.precision=bfloat16"
LORA = "model.lora.rank=4"
# Reference and step read the same micro-batch: kernels may round half precision otherwise in one of another shape.
ONE_BATCH = ("dataset.toy.candidate_queries=0", "align.batch_size=32", "align.epochs=2", "align.learning_rate=1e-2",
             "sft.max_steps=30")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return base_policy(tiny_run(tmp_path_factory.mktemp("base"), *ONE_BATCH))


def from_folder(base: Artifact) -> tuple[str, ...]:
    return f"model.path={base.folder / 'model'}", "model.tokenizer=path", "sft.enabled=false"


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize(
    "settings", [(), (HALF,), (HALF, LORA), (HALF, LORA, "model.dtype=bfloat16"), (LORA, "model.dtype=bfloat16",
     "engine.precision=auto")], ids=" ".join
)  # fmt: skip
def test_the_first_loss_is_ln2_in_every_precision(
    settings: tuple[str, ...], layout: str, base: Artifact, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, *ONE_BATCH, *from_folder(base), f"engine.layout={layout}", *settings)
    aligned = aligned_policy(run)
    first, second = metrics(aligned)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["log_ratio_chosen"] == pytest.approx(0, abs=1e-4)
    assert abs(second["loss"] - math.log(2)) > 1e-3


@pytest.mark.parametrize("form", ["pointwise", "residual"])
def test_what_is_trained_beside_a_base_in_half_precision_is_in_float32(
    form: str, base: Artifact, tmp_path: Path
) -> None:
    kind = "reward" if form == "pointwise" else "diff"
    betas = () if form == "pointwise" else ("diffmodel.form=residual", "diffmodel.beta0=0", "diffmodel.beta1=0")
    settings = (HALF, LORA, "model.dtype=bfloat16", "rm.max_steps=2", "diffmodel.max_steps=2")
    run = tiny_run(tmp_path, *from_folder(base), *settings, *betas)
    saved = load_file(scorer(run, kind).folder / "model" / "adapter_model.safetensors")
    assert {str(weight.dtype) for weight in saved.values()} == {"torch.float32"}
    assert any("score" in name for name in saved)


STAGES = {
    "sft": base_policy,
    "rm": lambda run: scorer(run, "reward"),
    "diffmodel": lambda run: scorer(run, "diff"),
    "align": aligned_policy,
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "settings",
    [("model.dtype=bfloat16",), ("model.dtype=float16", LORA, HALF), ("model.dtype=bfloat16", LORA),
     ("model.dtype=bfloat16", LORA, HALF, "engine=zero2")], ids=" ".join
)  # fmt: skip
def test_weights_that_cannot_be_trained_are_refused_before_any_work(
    stage: str, settings: tuple[str, ...], base: Artifact, tmp_path: Path
) -> None:
    start = () if stage == "sft" else ("sft.enabled=false",)
    run = tiny_run(tmp_path, *from_folder(base)[:2], *start, "loss=kto", *settings)
    with pytest.raises(UserError, match=r"model\.dtype=\w+: what is trained is trained in float32"):
        STAGES[stage](run)
    assert not list(tmp_path.rglob("*-*"))
