"""Generation: a batch says what its prompts would say alone, the same seed repeats, and only the policy decides."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from helpers import TEXTS, configuration, from_configuration, tokenizer
from layouts import layout_tokenizer
from rdo.data.encoding import Ending, find_ending
from rdo.models.generation import Generation, Stops, cut, find_stops, generate_batch
from rdo.sequences.preparation import set_layout
from rdo.settings import EvalConfig

TOKENIZER = tokenizer()
END = TOKENIZER.eos_token_id
PROMPTS = [
    tuple(TOKENIZER(text).input_ids) for text in (*TEXTS, "A", "Why rye and not wheat, and since when?", TEXTS[0])
]
NEW = 12


def model(name: str = "llama-grouped", likelier: float = 2.0) -> PreTrainedModel:
    """A policy whose end of sequence is likely, so that some responses stop and some do not."""
    made = from_configuration(configuration(name), AutoModelForCausalLM, seed=4)
    made.lm_head.bias = torch.nn.Parameter(torch.zeros(made.config.vocab_size))
    with torch.no_grad():
        made.lm_head.bias[END] = likelier
    return made


def run(policy: PreTrainedModel, prompts=PROMPTS, seed: int = 0, **settings) -> list[Generation]:
    config = EvalConfig(**{"decoding": "greedy", "max_new_tokens": NEW, "batch_size": 4, **settings})
    batches = [prompts[start : start + config.batch_size] for start in range(0, len(prompts), config.batch_size)]
    found = find_stops(policy, TOKENIZER, find_ending("raw", TOKENIZER))
    made = [generate_batch(policy, TOKENIZER, batch, config, seed * 100 + n, found) for n, batch in enumerate(batches)]
    return [one for batch in made for one in batch]


def greedy(policy: PreTrainedModel, prompt: tuple[int, ...]) -> list[int]:
    """The likeliest token again and again, every time from scratch."""
    set_layout(policy, "padded")
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + NEW and (len(ids) == len(prompt) or ids[-1] != END):
            ids.append(int(policy(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("name", "likelier"), [("llama-grouped", 2.0), ("gpt2", 3.0)])
def test_a_batch_says_what_each_prompt_would_say_alone(name: str, likelier: float):
    policy = model(name, likelier)
    wanted = [greedy(policy, prompt) for prompt in PROMPTS]
    assert {ids[-1] == END for ids in wanted} == {True, False}
    for size in (1, 4, 100):
        # Training leaves tree attention behind; generation must not run under it.
        assert set_layout(policy, "tree") == "tree"
        assert [list(found.ids) for found in run(policy, batch_size=size)] == wanted


def test_a_response_stops_at_its_first_end_and_no_special_token_reaches_the_text():
    found = run(model())
    for one in found:
        assert one.stopped == (one.ids[-1] == END)
        assert END not in one.ids[:-1]
        assert one.stopped or len(one.ids) == NEW
        assert one.text == TOKENIZER.decode(one.ids, skip_special_tokens=True)
        assert "<end>" not in one.text
        assert "<pad>" not in one.text


def stops(**others) -> Stops:
    return Stops(**{"ids": (END,), "texts": (), "ending": Ending("<end>", (END,)), **others})


WORD, MORE, SPACE = (TOKENIZER(text).input_ids for text in ("Rye", " keeps", " "))
CUT: list[tuple[list[int], Stops, Generation]] = [
    ([*WORD, END, 0, 0], stops(), Generation("Rye", (*WORD, END), True)),
    ([*WORD, END, *WORD], stops(), Generation("Rye", (*WORD, END), True)),
    (WORD, stops(), Generation("Rye", tuple(WORD), False)),
    ([END], stops(), Generation("", (END,), True)),
    ([*WORD, 0, END], stops(ids=(0, END)), Generation("Rye", (*WORD, 0), True)),
    (
        [*WORD, *SPACE, END],
        stops(ending=Ending(" <end>", (*SPACE, END))),
        Generation("Rye", (*WORD, *SPACE, END), True),
    ),
    ([*WORD, *MORE, *WORD, 0], stops(texts=("ke", "xyz")), None),
    ([*WORD, *MORE, END], stops(texts=("xyz",)), Generation("Rye keeps", (*WORD, *MORE, END), True)),
]


@pytest.mark.parametrize(("row", "stops", "wanted"), CUT)
def test_what_follows_an_end_is_dropped(row, stops, wanted):
    found = cut(row, TOKENIZER, stops)
    if wanted is None:  # however "keeps" is tokenized
        assert (found.text, found.stopped) == ("Rye ", True)
        assert "Rye ke" in TOKENIZER.decode(found.ids)
        assert "ke" not in TOKENIZER.decode(found.ids[:-1])
    else:
        assert found == wanted


# What says that a token ends a response: for each layout the tokens by which generation stops.
STOPS = {
    **{"Gemma": {"<eos>", "<end_of_turn>"}, "Qwen2 base": {"<|endoftext|>", "<|im_end|>"}, "Llama 2": {"</s>"}},
    **{"Llama 3": {"<|end_of_text|>", "<|eot_id|>"}, "an end in text": {"</s>"}},
}


@pytest.mark.parametrize("name", STOPS)
def test_generation_stops_at_whatever_ends_a_turn(name):
    """A policy that says one token for ever is stopped by it where it is an end, whoever says so, and by no other."""
    tokenizer, policy = layout_tokenizer(name), model()
    assert len(tokenizer) <= policy.config.vocab_size
    found = find_stops(policy, tokenizer, find_ending("chat", tokenizer))
    ends = {tokenizer.convert_tokens_to_ids(token) for token in STOPS[name]}
    own = tokenizer.convert_tokens_to_ids("<pad>")
    assert set(found.ids) == ends | {policy.generation_config.eos_token_id}
    policy.generation_config.eos_token_id = [own, own]
    found = find_stops(policy, tokenizer, find_ending("chat", tokenizer), ["zz"])
    assert set(found.ids) == ends | {own}
    assert found.texts == (("zz", "\n###") if name == "an end in text" else ("zz",))
    config = EvalConfig(decoding="greedy", max_new_tokens=4)
    word = tokenizer("z", add_special_tokens=False).input_ids[-1]
    for said in (*found.ids, word):
        with torch.no_grad():
            policy.lm_head.bias.zero_()[said] = 1e4
        (one,) = generate_batch(policy, tokenizer, [(5, 6)], config, 0, found)
        # A text ends a response too, and stands in its ids, not in its text.
        assert one == Generation("", (word, word) if said == word else (said,), True)


def test_the_same_seed_repeats_exactly_and_another_does_not():
    policy = model()
    first = run(policy, seed=1, decoding="sample")
    torch.rand(7)  # what else draws random numbers in between does not matter
    assert run(policy, seed=1, decoding="sample") == first
    assert run(policy, seed=2, decoding="sample") != first


def test_sampling_follows_the_policys_own_distribution():
    """At a low temperature sampling is greedy; at 1 the first tokens are as frequent as the policy has it."""
    policy = model()
    assert run(policy, decoding="sample", temperature=1e-4) == run(policy)
    drawn = run(policy, [PROMPTS[3]] * 4000, decoding="sample", max_new_tokens=1, batch_size=4000)
    counts = torch.bincount(torch.tensor([one.ids[0] for one in drawn]), minlength=300) / 4000
    with torch.no_grad():
        wanted = torch.softmax(policy(input_ids=torch.tensor([PROMPTS[3]])).logits[0, -1], -1)
    # Half the summed difference: 0.10 is expected of 4000 draws from 300 ids; the 50 likeliest alone would give 0.49.
    assert float((counts - wanted).abs().sum() / 2) < 0.15


@pytest.mark.parametrize("decoding", ["greedy", "sample"])
def test_a_models_own_generation_settings_change_nothing(decoding: str):
    """Many published models bring penalties and limits in generation_config.json: they are not the policy."""
    policy = model()
    wanted = run(policy, decoding=decoding)
    own = GenerationConfig(repetition_penalty=5.0, suppress_tokens=list(range(2, 200)), top_k=1, max_length=3)
    policy.generation_config = own
    assert run(policy, decoding=decoding) == wanted
    assert policy.generation_config is own
