"""Forms of scorer: which sequences a comparison f(a, b) reads, and how the reads add up.

Every form is a linear read-out over plain token sequences, so training, scoring and reports treat all alike; the
tree finds what the sequences of a query share.

| form | f(a, b) |
|---|---|
| pointwise | r(a) - r(b), r read at the end of query + response |
| paper | g(a, b), read at the last token of query + a + b (RDO section 3.1) |
| antisymmetric | [g(a, b) - g(b, a)] / 2 |
| residual | r(a) - r(b) + [g(a, b) - g(b, a)] / 2, r read at the end of the first response, before the second is seen |

The last two give f(y, y) = 0 and f(a, b) = -f(b, a) exactly, so that no regulariser and no order is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rdo.data.encoding import EncodedRecord, begin_id
from rdo.runtime import stopping
from rdo.runtime.errors import UserError
from rdo.sequences.forward import is_decoder_scorer, read_scalars
from rdo.sequences.layout import LayoutName, TokenIds, make_layout
from rdo.sequences.packing import pack
from rdo.sequences.readout import Scalar

DIFFERENCE_FORMS = ("paper", "antisymmetric", "residual")
FORMS = ("pointwise", *DIFFERENCE_FORMS)
Value = list[Scalar]


@dataclass
class Reading:
    """Sequences of one record (or several) and the values to be read off them."""

    sequences: list[tuple[int, ...]] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)

    def add(self, ids: Iterable[int]) -> int:
        """Lists a sequence; its number."""
        self.sequences.append(tuple(ids))
        return len(self.sequences) - 1


class ComparisonTemplate:
    """The token ids of three texts, before query, first and second response in a difference model's input."""

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase):
        self.query, self.first, self.second = (tuple(tokenizer(t, add_special_tokens=False).input_ids) for t in texts)
        # A beginning-of-sequence id stays where it belongs: in front of everything.
        self.begin = begin_id(tokenizer)

    def head(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Everything in front of the first response's ids."""
        if self.begin is not None and prompt and prompt[0] == self.begin:
            return (self.begin, *self.query, *prompt[1:], *self.first)
        return (*self.query, *prompt, *self.first)


def add_reward(reading: Reading, record: EncodedRecord, response: int) -> None:
    """Lists the pointwise reward of one response."""
    ids = (*record.prompt, *record.responses[response])
    reading.values.append([Scalar(reading.add(ids), len(ids) - 1)])


def add_difference(
    reading: Reading, form: str, template: ComparisonTemplate, record: EncodedRecord, first: int, second: int
) -> None:
    """Lists f(first, second) of a record under the given form."""
    if form == "pointwise":
        value = []
        for response, factor in ((first, 1.0), (second, -1.0)):
            ids = (*record.prompt, *record.responses[response])
            value.append(Scalar(reading.add(ids), len(ids) - 1, factor=factor))
        reading.values.append(value)
        return
    head = template.head(record.prompt)
    orders = [(first, second, 1.0)]
    if form != "paper":
        orders.append((second, first, -1.0))
    value = []
    for one, other, sign in orders:
        ids = (*head, *record.responses[one], *template.second, *record.responses[other])
        sequence = reading.add(ids)
        if form == "residual":
            end_of_first = len(head) + len(record.responses[one]) - 1
            value.append(Scalar(sequence, end_of_first, label=0, factor=sign))
            value.append(Scalar(sequence, len(ids) - 1, label=1, factor=sign / 2))
        else:
            value.append(Scalar(sequence, len(ids) - 1, factor=sign if form == "paper" else sign / 2))
    reading.values.append(value)


def check_form(model: PreTrainedModel) -> str:
    """The scorer's form; UserError where its architecture cannot have it."""
    form = str(model.config.rdo_form)
    if form == "residual" and not is_decoder_scorer(model):
        raise UserError("form=residual reads the first response before the second is seen: it needs a decoder")
    return form


def merge(readings: Sequence[Reading]) -> tuple[list[tuple[int, ...]], list[Value]]:
    """The sequences and values of several readings as those of one."""
    sequences: list[tuple[int, ...]] = []
    values: list[Value] = []
    for reading in readings:
        offset = len(sequences)
        sequences.extend(reading.sequences)
        values.extend(
            [Scalar(read.sequence + offset, read.position, read.label, read.factor) for read in value]
            for value in reading.values
        )
    return sequences, values


def read_under(
    bar: tqdm, model: PreTrainedModel, layout: LayoutName, readings: Sequence[Reading], budget: int
) -> list[list[float]]:
    """Every value of every reading, without gradients, in the order given, under a bar that counts readings. Raises
    Stopped between two batches when the process is asked to stop."""
    results: list[list[float]] = [[] for _ in readings]
    sequences: list[list[TokenIds]] = [list(reading.sequences) for reading in readings]
    with torch.no_grad():
        for batch in pack(sequences, layout, budget):
            stopping.check()
            chosen = [readings[number] for number in batch]
            ids, values = merge(chosen)
            numbers = read_scalars(model, make_layout(layout, ids), values).tolist()
            position = 0
            for number, reading in zip(batch, chosen, strict=True):
                results[number] = numbers[position : position + len(reading.values)]
                position += len(reading.values)
            bar.update(len(batch))
    return results
