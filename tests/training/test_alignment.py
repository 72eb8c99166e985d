"""From scores to weighted pairs: rankings, coefficients in their place, KTO's partners, the choice of records."""

from __future__ import annotations

import random
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rdo.data.records import Preference, Record
from rdo.objectives.choice import LossChoice, choose_loss
from rdo.objectives.losses import dpo
from rdo.runtime.errors import UserError
from rdo.settings import RcConfig, TrainingConfig
from rdo.stages.align import check_data, rc_settings
from rdo.stages.reference import partners
from rdo.stages.run import select
from rdo.stages.score import Scores, pairs_to_score
from rdo.stages.supervision import own_scores, supervision, weigh


def pair_record(identifier: str, chosen: int = 0, **others: object) -> Record:
    return Record(identifier, f"query {identifier}", ("a", "b"), (Preference(chosen, 1 - chosen),), **others)  # type: ignore[arg-type]


RECORDS = [pair_record("one"), pair_record("two")]
IDS = [record.id for record in RECORDS]
PAIRS = [((0, 1),), ((0, 1),)]


def scored(*differences: float) -> dict[str, Scores]:
    """A difference model's outputs for RECORDS."""
    outputs = {(r.id, 0, 1): d for r, d in zip(RECORDS, differences, strict=True)}
    return {"diff": Scores({}, outputs, frozenset(outputs))}


def weights(rc: RcConfig, *differences: float) -> list[float]:
    weighted, _ = weigh(IDS, PAIRS, rc, scored(*differences), seed=0)
    return [pair.weight for group in weighted for pair in group]


def test_weights_are_r_to_the_alpha() -> None:
    assert weights(RcConfig("diff", alpha=0.5), 0.25, 4.0) == [0.5, 2.0]
    assert weights(RcConfig("diff", alpha=1.0), 0.25, 4.0) == [0.25, 4.0]
    assert weights(RcConfig("diff", alpha=1.0, scale="mean"), 0.25, 4.0) == pytest.approx([0.25 / 2.125, 4 / 2.125])


@pytest.mark.parametrize("negative", ["clip", "abs", "flip", "floor", "error"])
@pytest.mark.parametrize("scale", ["none", "mean"])
def test_alpha_zero_is_no_coefficient_to_the_bit(negative: str, scale: str) -> None:
    none, _ = weigh(IDS, PAIRS, RcConfig("none"), {}, seed=0)
    zero, _ = weigh(IDS, PAIRS, RcConfig("diff", alpha=0.0, negative=negative, scale=scale), scored(3.0, -1.0), 0)
    assert zero == none


def test_flip_swaps_the_pair_that_the_scorer_contradicts() -> None:
    """The golden number 0.544135: R = [2, -0.5], alpha 0.5, beta 0.2, mean over both pairs."""
    weighted, statistics = weigh(IDS, PAIRS, RcConfig("diff", alpha=0.5, negative="flip"), scored(2.0, -0.5), 0)
    assert statistics is not None
    assert statistics["negative_share"] == 0.5
    policy, reference = [(-10.0, -12.0), (-20.0, -18.0)], [(-11.0, -11.0), (-19.0, -19.0)]
    total = 0.0
    for n, group in enumerate(weighted):
        for pair in group:
            values = [policy[n][pair.chosen], policy[n][pair.rejected]]
            against = [reference[n][pair.chosen], reference[n][pair.rejected]]
            loss = dpo(*(torch.tensor([v]) for v in (*values, *against)), beta=0.2)
            total += pair.weight * float(loss) / 2
    assert total == pytest.approx(0.544135, abs=5e-7)


def test_ablations() -> None:
    assert weights(RcConfig("diff", ablation="filter"), 3.0, -1.0) == [1.0, 0.0]
    shuffled = {tuple(weights(RcConfig("diff", alpha=1.0, ablation="shuffle"), 3.0, 7.0)) for _ in range(3)}
    assert shuffled in ({(3.0, 7.0)}, {(7.0, 3.0)})  # the same permutation every time


ONE_SIDED = [-1.0] * 198 + [0.5, 1.0]  # a paper's form that always says "the second"


@pytest.mark.parametrize(
    ("rc", "differences", "said"),
    [
        (RcConfig("diff"), ONE_SIDED, r"for 0\.97% .*R < 0 in 99\.0%.*rc\.order=antisymmetric or diffmodel\.form="),
        (RcConfig("diff", ablation="filter"), ONE_SIDED, r"count for 1\.00% .*train the scorer longer"),
        (RcConfig("diff", order="antisymmetric"), [-1.0] * 200, r"count for 0\.00% .*: train the scorer longer"),
        (RcConfig("diff", min_effective_share=1e-6), [-1.0] * 200, "count for 0"),
        (RcConfig("diff", alpha=1.0), [1e-3] * 199 + [100.0], r"count for 0\.50%.*R < 0 in 0\.0%"),
        (RcConfig("diff", min_effective_share=0.001), ONE_SIDED, None),
        (RcConfig("diff", negative="abs"), ONE_SIDED, None),
        (RcConfig("diff"), [-1.0] * 180 + [1.0] * 20, None),
    ],
)
def test_weights_that_leave_next_to_nothing_to_learn_from_are_refused(
    rc: RcConfig, differences: list[float], said: str | None
) -> None:
    ids = [f"r{n}" for n in range(len(differences))]
    outputs = {(name, 0, 1): value for name, value in zip(ids, differences, strict=True)}
    outputs |= {(name, 1, 0): -value for name, value in zip(ids, differences, strict=True)}
    read = {"diff": Scores({}, outputs, frozenset((name, 0, 1) for name in ids))}
    with pytest.raises(UserError, match=said) if said else nullcontext() as caught:
        weigh(ids, [((0, 1),)] * len(ids), rc, read, seed=0)
    assert said is None or len(str(caught.value)) < 300


@pytest.mark.parametrize("outputs", [{("x", 0, 1): 3.0, ("x", 1, 0): 1.0}, {("x", 0, 1): 3.0}])
def test_r_is_read_from_the_forward_order_whatever_else_was_scored(outputs: dict[tuple[str, int, int], float]) -> None:
    read = Scores({}, outputs, frozenset({("x", 0, 1)}))
    assert read.difference("x", 0, 1) == -read.difference("x", 1, 0) == 3.0
    if len(outputs) == 2:
        assert read.difference("x", 0, 1, "antisymmetric") == -read.difference("x", 1, 0, "antisymmetric") == 1.0
        assert read.output("x", 1, 0) == 1.0


def test_gold_reads_the_scores_of_the_data() -> None:
    records = [pair_record("one", scores=(1.0, 0.25)), pair_record("two", scores=(1.0, -3.0))]
    weighted, _ = weigh(IDS, PAIRS, RcConfig("gold", alpha=1.0), {"gold": own_scores(records)}, seed=0)
    assert [pair.weight for group in weighted for pair in group] == [0.75, 4.0]


def test_settings_without_effect_do_not_make_another_run() -> None:
    assert rc_settings(RcConfig("none", alpha=0.1)) is None
    reward, filtered = RcConfig("reward"), RcConfig("reward", ablation="filter")
    assert rc_settings(RcConfig("reward", order="antisymmetric")) == rc_settings(reward)
    assert rc_settings(RcConfig("reward", min_effective_share=0.5)) == rc_settings(reward)
    assert rc_settings(RcConfig("diff", order="antisymmetric")) != rc_settings(RcConfig("diff"))
    assert rc_settings(RcConfig("reward", alpha=1.0)) != rc_settings(reward)
    assert rc_settings(RcConfig("reward", alpha=1.0, ablation="filter")) == rc_settings(filtered)


def test_pairs_to_score() -> None:
    """15 unordered or 30 ordered pairs of six responses; a labelled pair chosen first, for R is f(y_w, y_l)."""
    for labelled in (Preference(4, 5), Preference(5, 4)):
        six = Record("six", "q", tuple("abcdef"), (labelled,))
        assert len(pairs_to_score(six, False)) == 15
        assert (labelled.chosen, labelled.rejected) in pairs_to_score(six, False)
        assert len(set(pairs_to_score(six, True))) == 30
    assert pairs_to_score(pair_record("one", chosen=1), False) == [(1, 0)]
    assert pairs_to_score(Record("bare", "q", ("a", "b")), False) == [(0, 1)]


DPO = choose_loss({"name": "dpo", "beta": 0.1})


def rrhf(ranking: str) -> LossChoice:
    return choose_loss({"name": "rrhf", "pairs": "ranking", "ranking": ranking, "mean_over": "queries"})


def test_rankings() -> None:
    record = Record("x", "q", ("a", "b", "c"), (Preference(1, 0),), scores=(0.1, 0.9, 0.5))
    by_scores, by_labels = (supervision(record, rrhf(ranking), {}) for ranking in ("scores", "labels"))
    assert (set(by_scores.pairs), by_scores.best) == ({(1, 2), (1, 0), (2, 0)}, 1)
    assert (by_labels.pairs, by_labels.best) == (((1, 0),), 1)
    # g(i, j) = i - j + 5: a pure order bias of 5 that the antisymmetric mean removes.
    outputs = {("x", i, j): i - j + 5.0 for i in range(3) for j in range(3) if i != j}
    read = {"diff": Scores({}, outputs)}
    assert supervision(record, rrhf("diff"), read).best == 2
    assert read["diff"].ranking(record) == [-1.5, 0.0, 1.5]
    assert read["diff"].ranking(record, baseline=True) == [0.0, 1.0, 2.0]
    tied = Record("x", "q", ("a", "b"), (Preference(0, 1, tie=True),))
    assert supervision(tied, DPO, {}).pairs == ()


SCORED, BARE = pair_record("scored", scores=(1.0, 0.25)), Record("bare", "q", ("a", "b"), scores=(1.0, 0.0))


@pytest.mark.parametrize(
    ("records", "loss", "rc", "said"),
    [
        ([SCORED, RECORDS[0]], rrhf("scores"), "none", r"loss\.ranking=scores: record one"),
        ([SCORED], rrhf("scores"), "none", None),
        (RECORDS, rrhf("reward"), "gold", "rc=gold: record one"),
        ([BARE], DPO, "none", "loss=dpo compares labelled pairs"),
        ([BARE], rrhf("scores"), "none", None),
    ],
)
def test_data_that_cannot_serve_the_loss_is_refused_before_any_work(
    records: list[Record], loss: LossChoice, rc: str, said: str | None
) -> None:
    config = SimpleNamespace(rc=RcConfig(rc), dataset=SimpleNamespace(name="made-up"), align=TrainingConfig())
    run: Any = SimpleNamespace(config=config, records=lambda split: records)
    with pytest.raises(UserError, match=said) if said else nullcontext():
        check_data(run, loss)


def test_selection_and_partners_do_not_depend_on_the_order_of_records() -> None:
    records = [pair_record(f"r{n}") for n in range(20)]
    shuffled = list(records)
    random.Random(2).shuffle(shuffled)
    config = TrainingConfig(max_records=7)
    first, second = select(records, config), select(shuffled, config)
    assert [records[n].id for n in first] == [shuffled[n].id for n in second]
    assert len(first) == 7
    assert select([RECORDS[0], Record("six", "q", tuple("abcdef"))], TrainingConfig(min_responses=6)) == [1]
    by_id = [{rs[n].id: rs[m].id for n, m in partners(rs, chosen).items()} for rs, chosen in
             ((records, first), (shuffled, second))]  # fmt: skip
    assert by_id[0] == by_id[1]
    assert all(n != m for n, m in by_id[0].items())


def test_partner_has_another_query() -> None:
    """A response to the same query would be no mismatch; one query alone is an error, not a silent zero."""
    same = [Record(f"s{n}", "the same", ("a", "b"), (Preference(0, 1),)) for n in range(3)]
    other = Record("o", "another", ("a", "b"), (Preference(0, 1),))
    records = [*same, other]
    found = partners(records, list(range(4)))
    assert all(records[n].query != records[m].query for n, m in found.items())
    with pytest.raises(UserError, match="only one query"):
        partners(same, [0, 1, 2])
