"""Generation: a batch says what its prompts would say alone, the same seed repeats, and only the policy decides."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from helpers import TEXTS, configuration, from_configuration, tokenizer
from rdo.models.generation import Generation, cut, generate_batch
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
    made = [generate_batch(policy, TOKENIZER, batch, config, seed * 100 + n) for n, batch in enumerate(batches)]
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


def test_what_follows_the_end_is_dropped():
    word = TOKENIZER("Rye").input_ids
    assert cut([*word, END, 0, 0], TOKENIZER) == Generation("Rye", (*word, END), True)
    assert cut([*word, END, *word], TOKENIZER) == Generation("Rye", (*word, END), True)
    assert cut(word, TOKENIZER) == Generation("Rye", tuple(word), False)
    assert cut([END], TOKENIZER) == Generation("", (END,), True)


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
