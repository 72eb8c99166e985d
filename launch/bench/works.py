"""What is measured: records like HH's, models, and one function a work that does it as this project does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from pathlib import Path
from statistics import NormalDist
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rdo.data.encoding import EncodedRecord
from rdo.data.records import Preference
from rdo.models.pretrained import load_policy, new_policy, new_scorer, save_model
from rdo.models.scorers import ComparisonTemplate, add_value
from rdo.models.traits import head_parameters
from rdo.objectives.choice import choose_loss
from rdo.objectives.losses import rrhf_pairs
from rdo.sequences import forward
from rdo.sequences.forward import Reads, read_all
from rdo.sequences.layout import LayoutName, Padded, TokenIds
from rdo.sequences.preparation import set_layout
from rdo.settings import EngineConfig, EvalConfig, ModelConfig
from rdo.training.alignment import AlignmentRecord, AlignmentTask, Mismatched, Pair
from rdo.training.engine import TorchEngine, precision_of
from rdo.training.step import deal_step, training_step
from rdo.training.tasks import ById, ScorerTask

RIVALS = ("trl", "trl_best", "padded", "unpadded")
# Of `pairs`, how many records a work takes (those that cost more take fewer), responses a record, who else can do it.
WORKS: dict[str, tuple[float, int, Sequence[str]]] = {
    "dpo": (1, 2, RIVALS),
    "kto": (1 / 4, 2, RIVALS),
    "rrhf": (1 / 4, 6, RIVALS[2:]),
    "rm": (1 / 4, 2, RIVALS),
    "difference": (3 / 8, 2, RIVALS[2:]),
    "score15": (1 / 8, 6, RIVALS[2:]),
    "score30": (1 / 8, 6, RIVALS[2:]),
    "reference": (1 / 2, 2, ("trl", *RIVALS[2:])),
    "generation": (1, 2, RIVALS[3:]),
}
BETA, NEW_TOKENS = 0.1, 32
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": BETA},
    "kto": {"name": "kto", "beta": BETA, "mean_over": "samples"},
    "rrhf": {"name": "rrhf", "pairs": "ranking", "ranking": "scores", "mean_over": "queries", "sft_weight": 1.0},
}
# Around the parts of a difference model's input.
COMPARISON = ("w2 w3 w4", "w5 w6 w7 w8 w9", "w10 w11 w12 w13 w14")
# Ids of made-up records: the padding of others' collators, and the end of a sequence; all other ids are words.
PAD, END, WORDS = 0, 1, 2
# Mean tokens of a query and a response on HH (RDO's cost argument), and the longest query + response; the standard
# deviation of their logarithms as counted on HH's helpful-base test split, and the medians that, cut, have these means.
QUERY, RESPONSE, LONGEST = 164, 145, 512
QUERY_SPREAD, RESPONSE_SPREAD = 1.1, 1.0
QUERY_MEDIAN, RESPONSE_MEDIAN = 125.55285, 116.63772


@dataclass(frozen=True)
class Bench:
    """What all measurements share. reference: the policy with noise on its weights, or DPO's loss would be ln 2
    whatever anybody computes. folder: has the three models, for TRL. attention: transformers' name of each layout's."""

    engine: EngineConfig
    device: torch.device
    precision: torch.dtype
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    policy: PreTrainedModel
    reference: PreTrainedModel
    reward: PreTrainedModel
    attention: dict[LayoutName, str]
    against: Sequence[str] = RIVALS
    threads: Sequence[int] = (1,)
    rounds: int = 3
    pairs: int = 8


@contextmanager
def make_bench(model: ModelConfig, engine: EngineConfig, device: torch.device, **options: Any) -> Iterator[Bench]:
    """Models from model.path, or with random weights. options: the last four fields of Bench."""
    vocabulary = AutoConfig.from_pretrained(model.path).vocab_size if model.path else model.vocabulary_size
    tokenizer, precision, attention = word_tokenizer(vocabulary), precision_of(engine, device), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        policy = load_policy(model.path, model) if model.path else new_policy(model, tokenizer, seed=0)
        save_model(policy, tokenizer, folder / "policy")
        reference = load_policy(folder / "policy", model)
        reward = new_scorer(folder / "policy", "pointwise", model, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in (weight for weight in reference.parameters() if weight.dim() > 1):
                weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=generator).to(weight.dtype))
            for weight in head_parameters(reward):  # which is zero
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
        save_model(reference, tokenizer, folder / "reference")
        save_model(reward, tokenizer, folder / "reward")
        for subject in (policy, reference, reward):
            for wanted in ("auto", "padded"):
                layout = set_layout(subject.to(device), wanted, engine.attention, precision)
                attention[layout] = str(subject.config._attn_implementation)
        yield Bench(engine, device, precision, folder, tokenizer, policy, reference, reward, attention, **options)


def hh_lengths(count: int, responses: int, generator: np.random.Generator) -> np.ndarray:
    """Tokens of queries and responses as on HH, [records, 1 + responses]: log-normal, cut to LONGEST together.

    They are evenly spaced quantiles in random order, so that a few records are as long and as uneven as many would be;
    the query of a record alone has the mean length, for the median of a skewed distribution is far below.
    """

    def drawn(size: int, median: float, spread: float) -> np.ndarray:
        normal = [NormalDist().inv_cdf((n + 0.5) / size) for n in range(size)]
        return np.round(median * np.exp(spread * generator.permutation(normal)))

    queries = np.clip(drawn(count, QUERY_MEDIAN, QUERY_SPREAD), 2, LONGEST - RESPONSE)
    queries = queries if count > 1 else np.array([QUERY])
    answers = drawn(count * responses, RESPONSE_MEDIAN, RESPONSE_SPREAD).reshape(count, responses)
    return np.column_stack([queries, np.clip(answers, 2, LONGEST - queries[:, None])]).astype(int)


def made_records(
    count: int, responses: int, vocabulary: int, seed: int = 0, query: int | None = None
) -> list[EncodedRecord]:
    """Records of random words, of HH's lengths; or all alike, with a query of so many tokens."""
    generator = np.random.default_rng(seed)
    alike = [[query, *[RESPONSE] * responses]] * count
    records = []
    for n, row in enumerate(hh_lengths(count, responses, generator) if query is None else alike):
        prompt, *others = (tuple(generator.integers(WORDS, vocabulary, size).tolist()) for size in row)
        records.append(EncodedRecord(f"{n:06d}", prompt, tuple((*answer[:-1], END) for answer in others)))
    return records


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """A tokenizer whose every word is one id: "w7" is 7."""
    ids = {"<pad>": PAD, "<eos>": END} | {f"w{n}": n for n in range(WORDS, vocabulary)}
    backend = Tokenizer(WordLevel(ids, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<pad>", "bos_token": None}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@dataclass(frozen=True)
class Pass:
    """A forward pass over sequences (trained: and a backward pass), and at how many positions a head is read."""

    sequences: Sequence[TokenIds]
    reads: int
    trained: bool = False


@dataclass(frozen=True)
class Work:
    """One kind of work on some records (which TRL is given). run(layout): the loss [1], or all outputs [any number].
    passes: all that it takes; none for generation, which reads on and on."""

    name: str
    model: PreTrainedModel
    records: list[EncodedRecord]
    run: Callable[[LayoutName], torch.Tensor]
    passes: Sequence[Pass] = ()


def make_work(name: str, bench: Bench, records: list[EncodedRecord] | None = None) -> Work:
    """One work by its name, on made-up records of its own if it is given none."""
    if records is None:
        share, responses, _ = WORKS[name]
        count = max(2 if name == "kto" else 1, round(bench.pairs * share))  # KTO's estimate needs another's responses
        records = made_records(count, responses, bench.policy.config.vocab_size, seed=list(WORKS).index(name))
    makers = {"rm": scorer_work, "difference": scorer_work, "reference": reference_work, "generation": generation_work}
    return makers.get(name, alignment_work if name in LOSSES else scoring_work)(name, bench, records)


@contextmanager
def one_by_one() -> Iterator[None]:
    """Under it the padded layout runs every sequence alone, in a row of its own length: no padding, nothing shared."""

    def alone(model: PreTrainedModel, layout: Padded) -> torch.Tensor:
        rows = [torch.from_numpy(ids)[None].to(model.device) for ids in layout.sequences]
        states = [model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in rows]
        return pad_sequence(states, batch_first=True).flatten(0, 1)

    with patch.object(forward, "hidden_states", alone):
        yield


def alignment_work(name: str, bench: Bench, records: list[EncodedRecord]) -> Work:
    """A step of DPO, of KTO on the same pairs, or of RRHF on ranked responses, the first of a record being the best."""
    loss, mismatched = choose_loss(LOSSES[name]), [()] * len(records)
    if loss.needs_kl:  # as TRL has them: of all chosen responses, then all rejected ones, the one before
        samples = [record.responses[n] for n in (0, 1) for record in records]
        shifted = [samples[-1], *samples[:-1]]
        mismatched = list(zip(shifted[: len(records)], shifted[len(records) :], strict=True))
    others = [replace(record, responses=more) for record, more in zip(records, mismatched, strict=True)]
    bench.reference.set_attn_implementation(bench.attention["padded"])
    both = [replace(one, responses=one.responses + more) for one, more in zip(records, mismatched, strict=True)]
    known = references(bench, "padded", both)
    examples = []
    for record, other, values in zip(records, others, known, strict=True):
        count = len(record.responses)
        pairs = tuple(Pair(i, j) for i, j in rrhf_pairs(range(0, -count, -1)))
        best, more = 0 if loss.sft_weight else None, Reads.of(other.prompt, other.responses)
        mismatch = Mismatched(more, tuple(values[count:])) if loss.needs_kl else None
        examples.append(AlignmentRecord(record, pairs, tuple(values[:count]), best=best, mismatched=mismatch))
    task = AlignmentTask(ById([record.id for record in records], examples.__getitem__), loss)
    passes = [reading(records, trained=True), *([reading(others)] if loss.needs_kl else [])]
    return Work(name, bench.policy, records, step_of(task, bench.policy, bench), passes)


def scorer_work(name: str, bench: Bench, records: list[EncodedRecord]) -> Work:
    """A step of the reward model, or of the difference model with both regularisers: three f a pair."""
    form, beta = ("pointwise", 0.0) if name == "rm" else ("paper", 0.1)
    pairs = ById([(record.id, 0, 1) for record in records], lambda n: (records[n], Preference(0, 1)))
    task = ScorerTask(pairs, form, ComparisonTemplate(COMPARISON, bench.tokenizer), beta, beta, seed=0)
    sequences = [ids for n in range(len(records)) for ids in task.example(n, 0).reads.sequences]
    passes = [Pass(sequences, len(sequences), trained=True)]
    return Work(name, bench.reward, records, step_of(task, bench.reward, bench), passes)


def step_of(task: Any, model: PreTrainedModel, bench: Bench) -> Callable[[LayoutName], torch.Tensor]:
    """Forward and backward pass of one step over all records of a task, through the product's own; its loss [1]."""
    examples = [task.example(n, 0) for n in range(len(task))]
    engine = TorchEngine(model, torch.optim.SGD(model.parameters()), None, bench.engine)

    def run(layout: LayoutName) -> torch.Tensor:
        dealt = deal_step(examples, layout, bench.engine.tokens_per_micro_batch)
        return torch.tensor([training_step(task, engine, layout, dealt)["loss"]])

    return run


def reading(records: list[EncodedRecord], trained: bool = False) -> Pass:
    """The pass that reads every token of every response."""
    sequences = [(*record.prompt, *ids) for record in records for ids in record.responses]
    return Pass(sequences, sum(len(ids) for record in records for ids in record.responses), trained)


def references(bench: Bench, layout: LayoutName, records: list[EncodedRecord]) -> list[list[float]]:
    """Log-probabilities of all responses of each record under the reference."""
    items = [Reads.of(record.prompt, record.responses) for record in records]
    return read_all(tqdm(disable=True), bench.reference, layout, items, bench.engine.tokens_per_micro_batch)


def reference_work(name: str, bench: Bench, records: list[EncodedRecord]) -> Work:
    def run(layout: LayoutName) -> torch.Tensor:
        return torch.tensor(references(bench, layout, records)).flatten()

    return Work(name, bench.reference, records, run, [reading(records)])


def scoring_work(name: str, bench: Bench, records: list[EncodedRecord]) -> Work:
    """f of all pairs of a record's responses, in one order (score15 of six) or both (score30)."""
    template, items = ComparisonTemplate(COMPARISON, bench.tokenizer), [Reads() for _ in records]
    for record, listed in zip(records, items, strict=True):
        for i, j in (combinations if name == "score15" else permutations)(range(len(record.responses)), 2):
            add_value(listed, "paper", template, record, i, j)

    def run(layout: LayoutName) -> torch.Tensor:
        budget = bench.engine.tokens_per_micro_batch
        return torch.tensor(read_all(tqdm(disable=True), bench.reward, layout, items, budget)).flatten()

    sequences = [ids for item in items for ids in item.sequences]
    return Work(name, bench.reward, records, run, [Pass(sequences, len(sequences))])


def generation_work(name: str, bench: Bench, records: list[EncodedRecord]) -> Work:
    """Greedy responses to all prompts at once, as stage eval makes them, or one by one. What must agree are the
    first tokens: later ones follow from earlier ones, and a tie may break either way."""
    from rdo.data.encoding import find_ending  # needs pyarrow
    from rdo.models.generation import find_stops, generate_batch

    config = EvalConfig(decoding="greedy", max_new_tokens=NEW_TOKENS)
    stops = find_stops(bench.policy, bench.tokenizer, find_ending("raw", bench.tokenizer))

    def run(layout: LayoutName) -> torch.Tensor:
        size, made = 1 if layout == "padded" else config.batch_size, []
        for start in range(0, len(records), size):
            prompts = [record.prompt for record in records[start : start + size]]
            made += generate_batch(bench.policy, bench.tokenizer, prompts, config, start, stops)
        return torch.tensor([one.ids[0] for one in made])

    return Work(name, bench.policy, records, run)
