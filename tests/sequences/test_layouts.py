"""Tree = padded = every sequence alone through the plain model: hidden states, log-probabilities and gradients.

The reference (`alone`) knows no layout: one unpadded sequence at a time, transformers' own attention, log_softmax of
full logits. Errors are relative: norm of the difference over the norm of what is wanted. The worst of what follows is
8e-7 in float32 and 2e-15 in float64, so that the tolerances leave room and still find any token that sees too much.
"""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, MiniMaxConfig, PreTrainedModel

import rdo.sequences.kernels.gathered
from helpers import COMMON, GROUPED, configuration, policy, random_tree, relative_error, scorer, words
from rdo.runtime.errors import UserError
from rdo.sequences.forward import Reads, hidden_states, read
from rdo.sequences.layout import PrefixTree, make_layout
from rdo.sequences.preparation import set_layout
from rdo.sequences.readout import Scalar, Span, span_log_probabilities

FLOAT32, FLOAT64 = 1e-5, 1e-12
DECODERS = ["llama", "llama-grouped", "mistral-window", "qwen2", "gpt2", "gpt2-by-layer", "gpt-neox", "gemma", "gemma3"]
ENCODERS = ["bert", "deberta"]

Sequences = list[tuple[int, ...]]

COIN = random.Random(3)
QUERY, FIRST, SECOND, TURN = words(COIN, 12), words(COIN, 9), words(COIN, 11), words(COIN, 6)
RESPONSES = [words(COIN, COIN.randint(3, 12)) for _ in range(6)]
LISTS: dict[str, Sequences] = {
    "tree": random_tree(1, count=10),
    "other tree": random_tree(2, count=12, longest=30),
    "single tokens": [(5,), (6,), (5, 7)],
    "shared turns": [QUERY + FIRST, QUERY + FIRST + TURN + SECOND, QUERY + FIRST + TURN + RESPONSES[0]],
    "prefix and duplicate": [QUERY + FIRST, QUERY, QUERY + FIRST, QUERY + FIRST + SECOND],
    "pair": [QUERY + FIRST, QUERY + SECOND],
    "six responses": [QUERY + response for response in RESPONSES],
    # f(a, b), f(a, a) and f(b, a) of the difference model
    "three differences": [QUERY + a + TURN + b for a, b in ((FIRST, SECOND), (FIRST, FIRST), (SECOND, FIRST))],
    "thirty pairs": [QUERY + a + TURN + b for a in RESPONSES for b in RESPONSES if a is not b],
}


def half_way(sequences: Sequences) -> list[Span]:
    """Spans that start in the middle of their sequences; a token without a past has no log-probability."""
    return [Span(s, max(1, len(ids) // 2)) for s, ids in enumerate(sequences) if len(ids) > 1]


def alone(model: PreTrainedModel, sequences: Sequences) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states of every sequence, and log-probabilities of `half_way`, in the slowest and most obvious way."""
    set_layout(model, "padded")
    states = [model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in sequences]
    sums = []
    for span in half_way(sequences):
        ids = sequences[span.sequence]
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        total = torch.zeros((), dtype=logits.dtype)
        for position in range(span.start, len(ids)):
            total = total + torch.log_softmax(logits[position - 1], dim=-1)[ids[position]]
        sums.append(total)
    return states, sums


def laid_out(
    model: PreTrainedModel, sequences: Sequences, name: str, budget: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The same through a layout, with log-probabilities in chunks of `budget` logits."""
    assert set_layout(model, name) == name
    layout = make_layout(name, sequences)  # type: ignore[arg-type]
    hidden = hidden_states(model, layout)
    states = [hidden[layout.index(s, torch.arange(len(ids)).numpy())] for s, ids in enumerate(sequences)]
    return states, span_log_probabilities(hidden, model.get_output_embeddings(), layout, half_way(sequences), budget)


def gradients(model: PreTrainedModel, sums: torch.Tensor) -> list[torch.Tensor]:
    """Gradient of every parameter, under a weight of its own for every log-probability."""
    weights = torch.linspace(-1.0, 1.5, len(sums), dtype=sums.dtype)
    return list(torch.autograd.grad((weights * sums).sum(), list(model.parameters())))


def check(model: PreTrainedModel, sequences: Sequences, tolerance: float, budget: int = 2**20) -> None:
    wanted_states, wanted_sums = alone(model, sequences)
    wanted_gradients = gradients(model, torch.stack(wanted_sums))
    for name in ("tree", "padded"):
        states, sums = laid_out(model, sequences, name, budget)
        assert relative_error(states, wanted_states) < tolerance, name
        assert relative_error(list(sums), wanted_sums) < tolerance, name
        found = gradients(model, sums)
        assert relative_error(found, wanted_gradients) < tolerance, name
        if tolerance == FLOAT64:
            # Tensor by tensor too, so that no small one is lost in the whole (whose rounding some are nothing but).
            whole = torch.stack([gradient.norm() for gradient in wanted_gradients]).norm()
            for one, other in zip(found, wanted_gradients, strict=True):
                assert (one - other).norm() <= tolerance * (other.norm() + 1e-3 * whole), name


AGREE = [
    *((model, torch.float32, name) for model in DECODERS[:2] for name in LISTS),
    *(("llama-grouped", torch.float64, name) for name in LISTS),
    *((model, torch.float32, name) for model in DECODERS[2:] for name in ("tree", "shared turns", "three differences")),
    *((model, torch.float64, "shared turns") for model in DECODERS[2:]),
]


@pytest.mark.parametrize(("model", "dtype", "name"), AGREE)
def test_layouts_agree_with_sequences_alone(model: str, dtype: torch.dtype, name: str):
    check(policy(model, dtype), LISTS[name], FLOAT64 if dtype == torch.float64 else FLOAT32)


@pytest.mark.parametrize("seed", range(10))
def test_layouts_agree_on_random_trees(seed: int):
    check(policy("llama-grouped", torch.float64, seed), random_tree(seed + 100, count=9), FLOAT64)


@pytest.mark.parametrize("call_cost", [0, 10**9])
@pytest.mark.parametrize("model", ["llama-grouped", "mistral-window"])
def test_how_segments_are_grouped_changes_nothing(monkeypatch: pytest.MonkeyPatch, model: str, call_cost: int):
    monkeypatch.setattr(rdo.sequences.kernels.gathered, "CALL_COST", call_cost)
    segments = PrefixTree(LISTS["thirty pairs"]).segments
    groups = rdo.sequences.kernels.gathered.group_segments(segments)
    # Equal sizes always go together; at the most there is one call for the root and one for everything else.
    sizes = {(segment.shared > 0, len(segment.path), segment.stop - segment.start) for segment in segments}
    assert len(groups) == (len(sizes) if call_cost == 0 else 2)
    check(policy(model, torch.float64), LISTS["thirty pairs"], FLOAT64)


@pytest.mark.parametrize("budget", [1, 200])
def test_chunks_of_the_head_change_nothing(budget: int):
    check(policy("llama-grouped", torch.float64), LISTS["six responses"], FLOAT64, budget)


def test_only_the_asked_tokens_count():
    model, ids = policy(), QUERY + FIRST
    set_layout(model, "tree")
    whole = read(model, "tree", Reads([ids], [Span(0, 1), Span(0, len(QUERY)), Span(0, len(ids) - 1)]))
    # Log-probabilities are negative: the fewer tokens, the higher.
    assert whole[0] < whole[1] < whole[2] < 0


def test_half_precision_is_read_in_full():
    model, sequences = policy("llama", torch.bfloat16), LISTS["pair"]
    assert set_layout(model, "tree") == "tree"
    found = read(model, "tree", Reads(sequences, half_way(sequences)))
    assert found.dtype == torch.float32
    reward_model = scorer("llama", dtype=torch.bfloat16)
    assert set_layout(reward_model, "tree") == "tree"
    assert read(reward_model, "tree", Reads(sequences, scalars=[[Scalar(0, 3)]])).dtype == torch.float32
    # Close to float32's own numbers, within what eight bits of mantissa allow.
    wanted = torch.stack(alone(model, sequences)[1])
    assert relative_error([found], [wanted]) < 0.05


@pytest.mark.parametrize("model", ENCODERS)
def test_encoders_run_flat_and_padding_changes_no_score(model: str):
    encoder = scorer(model)
    assert set_layout(encoder, "auto") == "padded"
    sequences = [QUERY + FIRST, QUERY + SECOND + TURN, TURN]
    reads = Reads(sequences, scalars=[[Scalar(s, len(ids) - 1)] for s, ids in enumerate(sequences)])
    with torch.no_grad():
        found = read(encoder, "padded", reads)
        wanted = torch.stack([encoder(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences])
    assert relative_error([found], [wanted]) < FLOAT32
    with pytest.raises(UserError, match=r"engine\.layout"):
        set_layout(encoder, "tree")
    with pytest.raises(UserError, match=r"engine\.layout"):
        read(encoder, "tree", reads)
    # The refusal leaves it usable.
    with torch.no_grad():
        assert torch.equal(read(encoder, "padded", reads), found)


def unsupported(name: str) -> PreTrainedModel:
    if name == "gemma2":
        return policy("gemma2")
    kinds = ["linear_attention", "full_attention"]
    return AutoModelForCausalLM.from_config(
        MiniMaxConfig(**COMMON, **GROUPED, num_local_experts=2, head_dim=8, layer_types=kinds)
    )


@pytest.mark.parametrize(("name", "reason"), [("gemma2", "softcap"), ("minimax", "more than their own path")])
def test_decoders_that_a_tree_would_falsify_are_refused_by_name(name: str, reason: str):
    """Gemma2 caps its attention's logits; MiniMax has recurrent layers, and declares the interface all the same."""
    model = unsupported(name)
    before = model.config._attn_implementation
    with pytest.raises(UserError, match=rf"engine\.layout=padded.*{reason}|{reason}.*engine\.layout=padded"):
        set_layout(model, "tree")
    assert set_layout(model, "auto") == "padded"
    assert model.config._attn_implementation == before
    sequences = LISTS["pair"]
    with torch.no_grad():
        found = read(model, "padded", Reads(sequences, half_way(sequences)))
        wanted = torch.stack(alone(model, sequences)[1])
    assert relative_error([found], [wanted]) < FLOAT32


def test_a_tree_under_another_attention_is_never_reached():
    model = AutoModelForCausalLM.from_config(configuration("llama"))
    assert set_layout(model, "tree") == "tree"
    with pytest.raises(UserError, match=r"engine\.layout=padded"), torch.no_grad():
        model(input_ids=torch.tensor([QUERY]))
    assert set_layout(model, "padded") == "padded"
    with torch.no_grad():
        model(input_ids=torch.tensor([QUERY]))
