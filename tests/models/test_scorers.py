"""Forms of scorer: their values against texts put together by hand, and what must not change them."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import processors
from tqdm import tqdm
from transformers import PreTrainedModel

from helpers import TEXTS, relative_error, scorer, tokenizer
from rdo.data.encoding import encode
from rdo.data.records import Preference, Record
from rdo.models.scorers import FORMS, ComparisonTemplate, add_value, check_form
from rdo.runtime.errors import UserError
from rdo.sequences import forward
from rdo.sequences.forward import Reads, read_all
from rdo.sequences.layout import LayoutName
from rdo.sequences.preparation import set_layout
from rdo.training.tasks import learns_from

TOLERANCE = 1e-5
COMPARING = ["paper", "antisymmetric", "residual"]
LAYOUTS: list[LayoutName] = ["tree", "padded"]

TOKENIZER = tokenizer()
END = TOKENIZER.eos_token_id
QUERIES = [TEXTS[0], "Ask.", TEXTS[0] + TEXTS[1] + "\n\nHuman: Why?\n\nAssistant:"]
RESPONSES = (" Rye.", " Rye does. Bake it dark.", " No.", " Rye. Or not.", "", " Ask a baker, not me.")
PAIRS = [(0, 1), (1, 0), (2, 2), (3, 0), (4, 5), (5, 4), (1, 3), (4, 4)]
BEFORE = ("Query: ", "; Response 1: ", "; Response 2: ")
COMPARISON = ComparisonTemplate(BEFORE, TOKENIZER)
RECORDS = encode([Record(f"r{n}", query, RESPONSES) for n, query in enumerate(QUERIES)], TOKENIZER, "raw", 500)


def differences(form: str, record: int, pairs: list[tuple[int, int]] = PAIRS) -> Reads:
    reads = Reads()
    for first, second in pairs:
        add_value(reads, form, COMPARISON, RECORDS[record], first, second)
    return reads


def read(model: PreTrainedModel, layout: LayoutName, reads: Reads) -> torch.Tensor:
    assert set_layout(model, layout) == layout
    with torch.no_grad():
        return forward.read(model, layout, reads)


def ids(*texts: str) -> list[int]:
    """Texts tokenized apart and joined; "<end>" stands for the end of a response."""
    return [token for text in texts for token in ([END] if text == "<end>" else TOKENIZER(text).input_ids)]


def last_outputs(model: PreTrainedModel, sequence: list[int]) -> torch.Tensor:
    """Every output of the head at the last token of one sequence, run alone under transformers' own attention."""
    set_layout(model, "padded")
    with torch.no_grad():
        states = model.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
        return torch.stack([(states[-1] * row).sum() for row in model.score.weight])


def by_hand(model: PreTrainedModel, form: str, query: str, first: str, second: str) -> torch.Tensor:
    """f(first, second) as the table in rdo.models.scorers has it."""

    def compared(one: str, other: str) -> torch.Tensor:
        return last_outputs(model, ids(BEFORE[0], query, BEFORE[1], one, "<end>", BEFORE[2], other, "<end>"))

    def before_the_second(one: str) -> torch.Tensor:
        return last_outputs(model, ids(BEFORE[0], query, BEFORE[1], one, "<end>"))[0]

    if form == "pointwise":
        return last_outputs(model, ids(query, first, "<end>"))[0] - last_outputs(model, ids(query, second, "<end>"))[0]
    if form == "paper":
        return compared(first, second)[0]
    if form == "antisymmetric":
        return (compared(first, second)[0] - compared(second, first)[0]) / 2
    comparison = (compared(first, second)[1] - compared(second, first)[1]) / 2
    return before_the_second(first) - before_the_second(second) + comparison


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["llama-grouped", "gpt2"])
def test_values_are_those_of_texts_put_together_by_hand(name: str, form: str, layout: LayoutName):
    model = scorer(name, form)
    for number, query in enumerate(QUERIES):
        found = read(model, layout, differences(form, number))
        wanted = [by_hand(model, form, query, RESPONSES[a], RESPONSES[b]) for a, b in PAIRS]
        assert relative_error([found], [torch.stack(wanted)]) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reward_is_read_at_the_end_of_the_response(layout: LayoutName):
    model, reads = scorer("llama"), Reads()
    for response in range(len(RESPONSES)):
        add_value(reads, "pointwise", None, RECORDS[0], response)
    found = read(model, layout, reads)
    wanted = torch.stack([last_outputs(model, ids(QUERIES[0], text, "<end>"))[0] for text in RESPONSES])
    assert relative_error([found], [wanted]) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["pointwise", "antisymmetric", "residual"])
def test_a_response_against_itself_is_zero_and_turning_round_negates(form: str, layout: LayoutName):
    """Exactly, for what is added and what is taken away are summed apart."""
    model = scorer("llama-grouped", form)
    every = [(a, b) for a in range(6) for b in range(6)]
    values = read(model, layout, differences(form, 2, every)).view(6, 6)
    assert torch.equal(values.diagonal(), torch.zeros(6))
    assert values.abs().max() > 0.1
    assert torch.equal(values, -values.T)


def test_the_paper_form_has_neither_property():
    model = scorer("llama-grouped", "paper")
    forward, backward, same = read(model, "tree", differences("paper", 0, [(0, 1), (1, 0), (2, 2)])).tolist()
    assert abs(forward + backward) > 0.01
    assert abs(same) > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_order_budget_and_layout_change_no_score(form: str):
    model = scorer("llama-grouped", form)
    readings = [differences(form, number, pairs) for number in range(3) for pairs in (PAIRS, PAIRS[:1], PAIRS[2:5])]
    set_layout(model, "tree")
    wanted = read_all(tqdm(disable=True), model, "tree", readings, 100_000)
    assert [len(values) for values in wanted] == [len(reads) for reads in readings]
    order = list(range(len(readings)))
    random.Random(5).shuffle(order)
    for layout in LAYOUTS:
        set_layout(model, layout)
        for budget in (1, 700, 100_000):
            shuffled = read_all(tqdm(disable=True), model, layout, [readings[n] for n in order], budget)
            for place, number in enumerate(order):
                assert shuffled[place] == pytest.approx(wanted[number], rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("form", ["pointwise", "paper", "antisymmetric"])
@pytest.mark.parametrize("name", ["bert", "deberta"])
def test_encoders_score_flat(name: str, form: str):
    model = scorer(name, form)
    assert check_form(model) == form
    reading = differences(form, 1)
    found = read(model, "padded", reading)
    wanted = []
    with torch.no_grad():
        for value in reading.scalars:
            reads = [(model(input_ids=torch.tensor([reading.sequences[r.sequence]])).logits[0, 0], r) for r in value]
            wanted.append(sum(output * r.factor for output, r in reads))
    assert relative_error([found], [torch.stack(wanted)]) < TOLERANCE


def test_what_a_form_cannot_have_or_learn_from():
    with pytest.raises(UserError, match="needs a decoder"):
        check_form(scorer("bert", "residual"))
    assert check_form(scorer("llama", "residual")) == "residual"
    for form in FORMS:
        assert learns_from(form, Preference(0, 1))
        assert learns_from(form, Preference(0, 1, tie=True)) == (form != "pointwise")


def test_the_template_keeps_the_beginning_in_front():
    begun = tokenizer()
    begun.add_special_tokens({"bos_token": "<begin>"})
    begin = begun.bos_token_id
    begun.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", begin)]
    )
    template = ComparisonTemplate(BEFORE, begun)
    query, first = ids(BEFORE[0]), ids(BEFORE[1])
    assert list(template.head((begin, 7, 8))) == [begin, *query, 7, 8, *first]
    assert list(template.head((7, 8))) == [*query, 7, 8, *first]
    assert list(COMPARISON.head((begin, 7))) == [*query, begin, 7, *first]
