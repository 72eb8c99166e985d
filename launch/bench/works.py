"""What everybody is measured on: records, models, and the work of every stage as this project does it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, permutations, product
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace as Bench  # see make_bench
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
from rdo.models.pretrained import load_policy, load_scorer, new_policy, new_scorer, save_model
from rdo.models.scorers import ComparisonTemplate, add_value
from rdo.models.traits import head_parameters
from rdo.objectives.choice import choose_loss
from rdo.objectives.losses import best_response, rrhf_pairs
from rdo.sequences import forward
from rdo.sequences.forward import Reads, read_all
from rdo.sequences.layout import LayoutName, Padded, TokenIds
from rdo.sequences.preparation import set_layout
from rdo.settings import EngineConfig, EvalConfig, ModelConfig
from rdo.training.alignment import AlignmentRecord, AlignmentTask, Pair
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


def made_records(
    count: int, responses: int, vocabulary: int, seed: int = 0, query: int | None = None
) -> list[EncodedRecord]:
    """Records of random words with log-normal lengths, cut to LONGEST tokens; or all alike, with a query of so many.

    Lengths are evenly spaced quantiles in random order, so that a few records are as long and as uneven as many would
    be; the query of a record alone has the mean length, for the median of a skewed distribution is far below.
    """
    generator = np.random.default_rng(seed)

    def drawn(size: int, median: float, spread: float) -> np.ndarray:
        normal = [NormalDist().inv_cdf((n + 0.5) / size) for n in range(size)]
        return np.round(median * np.exp(spread * generator.permutation(normal)))

    queries, answers = np.full(count, query or QUERY), np.full((count, responses), RESPONSE)
    if query is None:
        lengths = np.clip(drawn(count, QUERY_MEDIAN, QUERY_SPREAD), 2, LONGEST - RESPONSE)
        queries = lengths if count > 1 else queries
        answers = drawn(count * responses, RESPONSE_MEDIAN, RESPONSE_SPREAD).reshape(count, responses)
        answers = np.clip(answers, 2, LONGEST - queries[:, None])
    records = []
    for n, row in enumerate(np.column_stack([queries, answers]).astype(int)):
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


@contextmanager
def make_bench(model: ModelConfig, engine: EngineConfig, device: torch.device, **options: Any) -> Iterator[Bench]:
    """What all measurements share: policy, reference and reward (from model.path, or with random weights), the
    tokenizer, a folder with copies of the three, for TRL, transformers' name of each layout's attention, and the
    options: against, threads, rounds, pairs, say(line).

    The reference is the policy with noise on its weights, or DPO's loss would be ln 2 whatever anybody computes; the
    scorer's head, which would start at zero, is random.
    """
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
            for weight in head_parameters(reward):
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
        save_model(reference, tokenizer, folder / "reference")
        save_model(reward, tokenizer, folder / "reward")
        subjects = {"policy": policy, "reference": reference, "reward": load_scorer(folder / "reward", model)}
        for subject, wanted in product(subjects.values(), ("auto", "padded")):
            layout = set_layout(subject.to(device), wanted, engine.attention, precision)
            attention[layout] = str(subject.config._attn_implementation)
        shared = {"engine": engine, "device": device, "folder": folder, "precision": precision, "attention": attention}
        yield Bench(**shared, tokenizer=tokenizer, **subjects, **options)


@dataclass
class Work:
    """One kind of work on some records.

    run(layout): its numbers, [any number]: the loss, or all outputs. reads: at how many positions of `sequences` a head
    is read. beforehand: sequences that a forward pass reads before (KTO's mismatched pairs), all of whose responses'
    tokens are read. Generation reads on and on, and has no sequences.
    """

    name: str
    model: PreTrainedModel
    records: list[EncodedRecord]  # for TRL
    run: Callable[[LayoutName], torch.Tensor]
    sequences: Sequence[TokenIds] = ()
    reads: int = 0
    trained: bool = False
    beforehand: Sequence[TokenIds] = ()


def make_work(name: str, bench: Bench, records: list[EncodedRecord] | None = None) -> Work:
    """One work by its name, on made-up records of its own if it is given none."""
    if records is None:
        share, responses, _ = WORKS[name]
        count = max(2 if name == "kto" else 1, round(bench.pairs * share))  # KTO's estimate needs another's responses
        records = made_records(count, responses, bench.policy.config.vocab_size, seed=list(WORKS).index(name))
    if name in (*LOSSES, "rm", "difference"):
        return training_work(name, bench, records)
    return (generation_work if name == "generation" else reading_work)(name, bench, records)


@contextmanager
def one_by_one() -> Iterator[None]:
    """Under it the padded layout runs every sequence alone, in a row of its own length: no padding, nothing shared."""

    def alone(model: PreTrainedModel, layout: Padded) -> torch.Tensor:
        rows = [torch.from_numpy(ids)[None].to(model.device) for ids in layout.sequences]
        states = [model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in rows]
        return pad_sequence(states, batch_first=True).flatten(0, 1)

    with patch.object(forward, "hidden_states", alone):
        yield


def training_work(name: str, bench: Bench, records: list[EncodedRecord]) -> Work:
    """Forward and backward pass of one step, through the product's own: of a loss; of the reward model; or of the
    difference model with both regularisers, three f a pair."""
    model, before = bench.policy, []
    if name in LOSSES:
        task, before = alignment_task(name, bench, records)
    else:
        model, template = bench.reward, ComparisonTemplate(COMPARISON, bench.tokenizer)
        form, beta = ("pointwise", 0.0) if name == "rm" else ("paper", 0.1)
        pairs = ById([(record.id, 0, 1) for record in records], lambda n: (records[n], Preference(0, 1)))
        task = ScorerTask(pairs, form, template, beta, beta, seed=0)
    examples = [task.example(n, 0) for n in range(len(records))]
    sequences = [ids for example in examples for ids in example.sequences]
    engine = TorchEngine(model, torch.optim.SGD(model.parameters()), None, bench.engine)

    def run(layout: LayoutName) -> torch.Tensor:
        dealt = deal_step(examples, layout, bench.engine.tokens_per_micro_batch)
        return torch.tensor([training_step(task, engine, layout, dealt)["loss"]])

    of_losses = (len(example.encoded.responses[r]) for example in examples for r in example.responses)
    reads = sum(of_losses) if name in LOSSES else len(sequences)
    return Work(name, model, records, run, sequences, reads, True, before)


def alignment_task(
    name: str, bench: Bench, records: list[EncodedRecord]
) -> tuple[AlignmentTask, list[tuple[int, ...]]]:
    """DPO or KTO on pairs, or RRHF on ranked responses; and the sequences of KTO's mismatched pairs. These are as TRL
    has them: of all chosen responses, then all rejected ones, the one before."""
    loss = choose_loss(LOSSES[name])
    mismatched: list[tuple[tuple[int, ...], ...]] = [()] * len(records)
    if loss.needs_kl:
        samples = [record.responses[n] for n in (0, 1) for record in records]
        shifted = [samples[-1], *samples[:-1]]
        mismatched = list(zip(shifted[: len(records)], shifted[len(records) :], strict=True))
    known = [[0.0] * len(record.responses) for record in records]
    if loss.needs_reference:
        bench.reference.set_attn_implementation(bench.attention["padded"])
        items = [responses_of(record, others) for record, others in zip(records, mismatched, strict=True)]
        known = read_all(tqdm(disable=True), bench.reference, "padded", items, bench.engine.tokens_per_micro_batch)
    examples = []
    for record, others, values in zip(records, mismatched, known, strict=True):
        count = len(record.responses)
        ranks = [float(len(response) % 7) + n / 10 for n, response in enumerate(record.responses)]
        pairs = tuple(Pair(i, j) for i, j in (rrhf_pairs(ranks) if loss.pairs == "ranking" else [(0, 1)]))
        best = best_response(ranks) if loss.sft_weight else None
        more = tuple(zip(others, values[count:], strict=True))
        examples.append(AlignmentRecord(record, pairs, tuple(values[:count]), best=best, mismatched=more))
    before = [(*record.prompt, *ids) for record, two in zip(records, mismatched, strict=True) for ids in two]
    return AlignmentTask(ById([example.record_id for example in examples], examples.__getitem__), loss), before


def reading_work(name: str, bench: Bench, records: list[EncodedRecord]) -> Work:
    """Without gradients: log-probabilities of all responses (reference), or f of all pairs of a record's responses, in
    one order (score15 of six) or both (score30)."""
    if name == "reference":
        model, items = bench.reference, [responses_of(record) for record in records]
        reads = sum(len(ids) for record in records for ids in record.responses)
    else:
        model, items = bench.reward, [Reads() for _ in records]
        template = ComparisonTemplate(COMPARISON, bench.tokenizer)
        ordered = combinations if name == "score15" else permutations
        for record, listed in zip(records, items, strict=True):
            for i, j in ordered(range(len(record.responses)), 2):
                add_value(listed, "paper", template, record, i, j)
        reads = sum(map(len, items))
    sequences = [ids for item in items for ids in item.sequences]

    def run(layout: LayoutName) -> torch.Tensor:
        found = read_all(tqdm(disable=True), model, layout, items, bench.engine.tokens_per_micro_batch)
        return torch.tensor([number for values in found for number in values])

    return Work(name, model, records, run, sequences, reads)


def responses_of(record: EncodedRecord, others: Sequence[Sequence[int]] = ()) -> Reads:
    """The log-probabilities of a record's responses, and of others to its prompt."""
    reads = Reads()
    for response in (*record.responses, *others):
        reads.add_response(record.prompt, response)
    return reads


def generation_work(name: str, bench: Bench, records: list[EncodedRecord]) -> Work:
    """Greedy responses to all prompts at once, as stage eval makes them, or one by one. What must agree are the
    first tokens: later ones follow from earlier ones, and a tie may break either way."""
    from rdo.models.generation import generate_batch  # needs pyarrow

    config = EvalConfig(decoding="greedy", max_new_tokens=NEW_TOKENS)

    def run(layout: LayoutName) -> torch.Tensor:
        size, made = 1 if layout == "padded" else config.batch_size, []
        for start in range(0, len(records), size):
            prompts = [record.prompt for record in records[start : start + size]]
            made += generate_batch(bench.policy, bench.tokenizer, prompts, config, seed=start)
        return torch.tensor([one.ids[0] for one in made])

    return Work(name, bench.policy, records, run)
