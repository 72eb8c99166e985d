"""The token bound of a work: its unique tokens times what a token costs a plain dense pass of the same model.

Plain: transformers' own forward (and backward) pass over rows of one length, nothing padded, nothing shared, with the
same matrix products, a head that is read at the same share of the positions, and about as many tokens as a micro-batch
of ours has. The rows are so long that a token attends to as many others as ours do on average: the cost of attention
grows with the path, and among sequences of uneven length most tokens are in long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from rdo.bench.measure import Contestant
from rdo.bench.works import Work, head_of
from rdo.forest import Forest, TokenIds, count_unique
from rdo.models import computing_in, is_decoder_scorer
from rdo.readout import in_full_precision


def path_length(sequences: Sequence[TokenIds]) -> int:
    """The length of equal rows whose tokens attend to as many others as those of the forest do on average."""
    return 1 + round(2 * float(Forest(sequences).positions.double().mean()))


def mean_length(sequences: Sequence[TokenIds]) -> int:
    """The plain mean length."""
    return round(float(np.mean([len(ids) for ids in sequences])))


def dense_pass(
    work: Work, attention: str, precision: torch.dtype, budget: int, length: int, trained: bool
) -> Contestant:
    """The dense pass over rows of a length. attention: the model's usual implementation."""
    model, unique = work.model, count_unique(work.sequences)
    count = max(1, round(min(unique, budget) / length))
    read = min(length, max(1, round(length * work.reads / unique)))
    ids = torch.randint(2, model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    head = head_of(model)

    def run() -> torch.Tensor:
        with torch.set_grad_enabled(trained), computing_in(precision, model):
            states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            outputs = in_full_precision(head(states[:, -read:].flatten(0, 1)))
        scalar = is_decoder_scorer(model)
        loss = outputs.mean() if scalar else cross_entropy(outputs, ids[:, -read:].flatten())
        if trained:
            loss.backward()
        return loss.detach()

    def after() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        return torch.tensor([float(ids.numel())])

    return Contestant("dense", run, lambda: model.set_attn_implementation(attention), after)


class Bound:
    """The dense passes of a work, to take turns with the others, and what they say."""

    def __init__(self, work: Work, attention: str, precision: torch.dtype, budget: int):
        def dense(length: int, trained: bool) -> Contestant:
            return dense_pass(work, attention, precision, budget, length, trained)

        self.path = path_length(work.sequences)
        self.unique, self.beforehand = count_unique(work.sequences), count_unique(work.beforehand)
        self.passes = {"path": dense(self.path, work.trained), "mean": dense(mean_length(work.sequences), work.trained)}
        if self.beforehand:
            self.passes["beforehand"] = dense(self.path, False)

    @property
    def contestants(self) -> list[Contestant]:
        return list(self.passes.values())

    def seconds(self, number: int, kind: str = "path") -> float:
        """What the work takes at its bound, by the dense passes of one round."""
        found = self.unique * per_token(self.passes[kind], number)
        if self.beforehand:
            found += self.beforehand * per_token(self.passes["beforehand"], number)
        return found

    def share(self, ours: Contestant, kind: str = "path") -> float:
        """The bound's share of our time, the median of the rounds."""
        return median(self.seconds(number, kind) / own for number, own in enumerate(ours.seconds))


def per_token(dense: Contestant, number: int) -> float:
    """Seconds of a round, by token."""
    assert dense.numbers is not None
    return dense.seconds[number] / float(dense.numbers[-1])
