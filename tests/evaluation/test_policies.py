"""What a policy is judged on: which prompts, which ties, which judge; and what the terminal says of it."""

from __future__ import annotations

import re

import pytest

from rdo.data.records import Preference, Record
from rdo.evaluation.numbers import describe
from rdo.runtime.errors import UserError
from rdo.runtime.files import read_json, read_json_lines
from rdo.settings import EvalConfig
from rdo.stages.evaluate import EVALUATION, GENERATIONS, evaluate_policy, evaluate_scorers
from rdo.stages.generate import choose_prompts
from rdo.stages.scorer import load_kind, scorer
from tiny import tiny_run

REPEATED = [Record(f"r{n}", f"query {n // 3}", ("a", "b"), (Preference(0, 1),)) for n in range(12)]


def asked(records: list[Record], config: EvalConfig) -> list[Record]:
    return [records[n] for n in choose_prompts(records, config)]


def test_every_query_is_asked_before_any_is_asked_twice() -> None:
    four = asked(REPEATED, EvalConfig(prompts=4))
    assert len({record.query for record in four}) == 4
    six = asked(REPEATED, EvalConfig(prompts=6))
    assert six[:4] == four
    assert len(asked(REPEATED, EvalConfig(prompts=12))) == 12
    # Greedily, the same query gives the same response: a second one would only feign precision.
    assert len(asked(REPEATED, EvalConfig(prompts=12, decoding="greedy"))) == 4
    assert asked(REPEATED[::-1], EvalConfig(prompts=6)) == six


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A policy that hardly differs from its base, so that many responses are the same."""
    run = tiny_run(tmp_path_factory.mktemp("run"), "align.learning_rate=1e-9", "eval.decoding=greedy", "eval.prompts=6")
    return run, evaluate_policy(run, "policy")


def test_the_same_response_is_a_tie_for_every_judge(policy) -> None:
    _, artifact = policy
    evaluation = read_json(artifact.folder / EVALUATION)
    assert set(evaluation["against_base"]) == {"gold", "reward", "diff"}
    for judge in evaluation["against_base"].values():
        assert judge["tie"]["value"] == 1.0


def test_a_kl_is_claimed_of_samples_alone(policy) -> None:
    run, artifact = policy
    evaluation = read_json(artifact.folder / EVALUATION)
    assert evaluation["kl"]["value"] is None
    assert evaluation["log_ratio"]["value"] == pytest.approx(0.0, abs=1e-3)
    sampled = tiny_run(run.provenance.run_dir, "eval.prompts=6")
    base = read_json(evaluate_policy(sampled, "base").folder / EVALUATION)
    assert base["kl"]["value"] == 0.0
    assert "diff" not in base["rewards"]


def test_generations_stand_beside_the_evaluation(policy) -> None:
    _, artifact = policy
    lines = read_json_lines(artifact.folder / GENERATIONS)
    assert len(lines) == read_json(artifact.folder / EVALUATION)["prompts"]
    assert {"id", "query", "response", "stopped", "rewards"} <= lines[0].keys()


def test_a_scorer_of_the_other_kind_is_refused(policy) -> None:
    run, _ = policy
    with pytest.raises(UserError, match=r"rm\.path: .* form paper: see diffmodel\.path"):
        load_kind(run, scorer(run, "diff"), "reward")
    with pytest.raises(UserError, match=r"diffmodel\.path: .* form pointwise: see rm\.path"):
        load_kind(run, scorer(run, "reward"), "diff")


def test_what_the_terminal_says(policy) -> None:
    run, artifact = policy
    said = describe(read_json(artifact.folder / EVALUATION))
    assert re.search(r"^  rewards\.gold +\S+ \[.*, .*\]$", said, re.MULTILINE)
    assert re.search(r"^  against_base\.diff\.win +0\.000 \[", said, re.MULTILINE)
    said = describe(read_json(evaluate_scorers(run, "diff").folder / EVALUATION))
    assert re.search(r"^  accuracy_chosen_first +\S+ \[", said, re.MULTILINE)
    assert re.search(r"^  by_confidence\.4\.label_accuracy ", said, re.MULTILINE)


def test_a_sequence_longer_than_the_model_is_one_clear_error(tmp_path) -> None:
    run = tiny_run(tmp_path, "model.max_positions=64", "eval.max_new_tokens=60")
    with pytest.raises(UserError, match=r"a sequence of \d+ tokens, but LlamaForCausalLM takes 64; lower .*max_new"):
        evaluate_policy(run, "base")
    run = tiny_run(tmp_path, "model.max_positions=64")
    with pytest.raises(UserError, match=r"a sequence of \d+ tokens, but LlamaForSequenceClassification takes 64"):
        scorer(run, "diff")
