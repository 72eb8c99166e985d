"""How far a policy moved is said after its training, with what to do where it did not, or ran away."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdo.evaluation.numbers import describe
from rdo.stages.align import aligned_policy
from tiny import tiny_run

STILL, AWAY = "it hardly moved; raise align.learning_rate", "it ran away; lower align.learning_rate"


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        (("loss=dpo", "align.learning_rate=1e-9"), STILL),
        (("loss=kto", "align.learning_rate=1e-9"), STILL),
        (("loss=dpo", "align.learning_rate=3e-3"), None),
        (("loss=dpo", "align.learning_rate=1", "align.max_gradient_norm=null"), AWAY),
    ],
)
def test_a_policy_says_how_far_it_moved(
    settings: tuple[str, ...], hint: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aligned_policy(tiny_run(tmp_path, "align.batch_size=8", "align.epochs=2", *settings))
    (said,) = [line for line in capsys.readouterr().out.splitlines() if " moved by " in line]
    assert "nats a response (mean |log-ratio|; of chosen responses " in said
    assert [text for text in (STILL, AWAY) if text in said] == [hint] * (hint is not None)


@pytest.mark.parametrize(("kl", "hint"), [(0.001, STILL), (1.0, None), (30.0, AWAY), (None, None)])
def test_an_evaluation_says_it_of_the_kl(kl: float | None, hint: str | None) -> None:
    estimate = {"value": kl, "low": kl, "high": kl, "count": 8}
    said = describe({"kl": estimate, "against_base": {"reward": {"win": {"value": 0.5}}}})
    assert [text for text in (STILL, AWAY) if text in said] == [hint] * (hint is not None)
    assert "moved" not in describe({"kl": {"value": 0.0}, "against_base": None})  # a base policy
