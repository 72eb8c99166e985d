"""Scorers whose accuracies are known beforehand: position only, constant, perfect, and a few pairs done by hand."""

import json
import warnings

import numpy as np
import pytest

from rdo.evaluation.scorers import evaluate_scorer


def test_a_model_that_knows_only_the_position_is_a_coin() -> None:
    count = 4000
    found = evaluate_scorer(np.ones(count), np.ones(count), np.ones(count), np.ones(count))
    assert found["accuracy_chosen_first"]["value"] == 1.0
    assert found["accuracy_chosen_second"]["value"] == 0.0
    assert found["label_accuracy"]["value"] == pytest.approx(0.5, abs=0.03)
    assert found["gold_accuracy"] == found["label_accuracy"]
    assert found["label_accuracy_both_orders"]["value"] == 0.5
    assert found["first_preferred_share"]["value"] == 1.0
    assert found["antisymmetry_gap"] == 2.0


def test_a_constant_zero_is_half_right_everywhere() -> None:
    found = evaluate_scorer([0.0] * 7, [0.0] * 7, [1.0] * 7)
    for name in ("label_accuracy", "label_accuracy_both_orders", "accuracy_chosen_first", "accuracy_chosen_second"):
        assert found[name]["value"] == 0.5
        assert found[name]["count"] == 7
    assert found["first_preferred_share"]["value"] == 0.5
    assert found["negative_share"] == 0.0
    assert [part["count"] for part in found["by_confidence"]] == [2, 2, 2, 1]


def test_pointwise_scores_do_not_depend_on_the_order_shown() -> None:
    forward = np.array([3.0, 1.0, -2.0, 0.5, 0.0])
    labels = np.array([1.0, 1.0, 1.0, 0.5, 1.0])  # the fourth pair is a tie
    for seed in range(5):
        found = evaluate_scorer(forward, -forward, labels, seed=seed)
        assert found["pairs"] == 5
        assert found["ties"] == 1
        # right, right, wrong, half right over four decided pairs
        assert found["label_accuracy"]["value"] == 2.5 / 4
        assert found["label_accuracy_both_orders"]["value"] == 2.5 / 4
        assert found["accuracy_chosen_first"] == found["accuracy_chosen_second"]
        assert found["antisymmetry_gap"] == 0.0
        assert found["negative_share"] == 0.25
        # |f| ascending over the decided pairs: 0 (half), 1 (right), 2 (wrong), 3 (right)
        assert [part["label_accuracy"]["value"] for part in found["by_confidence"]] == [0.5, 1.0, 0.0, 1.0]
        assert [part["low"] for part in found["by_confidence"]] == [0.0, 1.0, 2.0, 3.0]


def test_without_an_gold_its_fields_are_none() -> None:
    found = evaluate_scorer([1.0], [-1.0], [1.0])
    for name in ("gold_accuracy", "gold_accuracy_both_orders", "labels_gold_accuracy"):
        assert found[name] is None
    assert found["mislabelled_share_where_contradicted"] is None
    assert found["mislabelled_share_elsewhere"] is None
    assert found["by_confidence"][0]["gold_accuracy"] is None


def test_gold_by_hand() -> None:
    forward = np.array([1.0, -1.0, 2.0, -3.0, 4.0, 5.0, 6.0])
    labels = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0])
    # labels: right, wrong, wrong, right, (equal under the gold), (a tie), (unknown)
    gold = [0.7, -0.2, -1.0, 0.3, 0.0, 2.0, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate_scorer(forward, -forward, labels, gold, seed=3)
    # scorer against the gold on the four pairs with an answer: right, right, wrong, wrong
    assert found["gold_accuracy"]["value"] == 0.5
    assert found["gold_accuracy"]["count"] == 4
    assert found["gold_accuracy_both_orders"]["value"] == 0.5
    assert found["labels_gold_accuracy"]["value"] == 0.5
    # contradicted labels: the second (mislabelled) and the fourth (right); elsewhere: the first and the third
    assert found["mislabelled_share_where_contradicted"]["value"] == 0.5
    assert found["mislabelled_share_elsewhere"]["value"] == 0.5
    assert found["mislabelled_share_elsewhere"]["count"] == 2
    assert found["label_accuracy"]["value"] == pytest.approx(4 / 6)
    # six decided pairs by |f|: {1, 1}, {2, 3}, {4}, {6}; the last two have no gold answer
    assert [part["count"] for part in found["by_confidence"]] == [2, 2, 1, 1]
    assert [part["gold_accuracy"]["value"] for part in found["by_confidence"]] == [1.0, 0.0, None, None]


def test_both_orders_cancels_a_position_bias() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(size=3000)
    forward, backward = truth + 2.0, -truth + 2.0  # knows the truth, but leans to the first response
    found = evaluate_scorer(forward, backward, np.ones(3000), truth)
    assert found["gold_accuracy_both_orders"]["value"] == 1.0
    assert found["gold_accuracy"]["value"] < 0.6
    assert found["antisymmetry_gap"] == pytest.approx(4.0)
    assert found["accuracy_chosen_first"]["value"] > 0.95
    assert found["accuracy_chosen_second"]["value"] < 0.05


def test_the_same_seed_gives_the_same_numbers_and_they_are_json() -> None:
    random = np.random.default_rng(1)
    forward, backward = random.normal(size=2500), random.normal(size=2500)
    first = evaluate_scorer(forward, backward, np.ones(2500), seed=4)
    assert first == evaluate_scorer(forward, backward, np.ones(2500), seed=4)
    assert first["label_accuracy"] != evaluate_scorer(forward, backward, np.ones(2500), seed=5)["label_accuracy"]
    assert json.loads(json.dumps(first, allow_nan=False)) == first


def test_no_pairs_and_only_ties() -> None:
    empty = evaluate_scorer([], [], [], [])
    assert empty["pairs"] == 0
    assert empty["label_accuracy"]["value"] is None
    assert empty["antisymmetry_gap"] is None
    ties = evaluate_scorer([1.0, -1.0], [-1.0, 1.0], [0.5, 0.5])
    assert ties["ties"] == 2
    assert ties["label_accuracy"]["value"] is None
    assert ties["negative_share"] is None
    assert ties["first_preferred_share"]["count"] == 2
