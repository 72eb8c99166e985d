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

from collections.abc import Sequence

import transformers

from rdo.data.encoding import EncodedRecord, begin_ids
from rdo.runtime.errors import UserError
from rdo.sequences.forward import Reads, decoder_head
from rdo.sequences.readout import Scalar

DIFFERENCE_FORMS = ("paper", "antisymmetric", "residual")
FORMS = ("pointwise", *DIFFERENCE_FORMS)


class ComparisonTemplate:
    """The token ids of three texts, before query, first and second response in a difference model's input."""

    def __init__(self, texts: Sequence[str], tokenizer: transformers.PreTrainedTokenizerBase):
        self.query, self.first, self.second = (tuple(tokenizer(t, add_special_tokens=False).input_ids) for t in texts)
        # What begins a sequence stays where it belongs: in front of everything.
        self.begin = begin_ids(tokenizer)

    def head(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Everything in front of the first response's ids."""
        begun = len(self.begin) if tuple(prompt[: len(self.begin)]) == self.begin else 0
        return (*prompt[:begun], *self.query, *prompt[begun:], *self.first)


def add_value(
    reads: Reads, form: str, template: ComparisonTemplate | None, record: EncodedRecord, *responses: int
) -> None:
    """Lists what a scorer says of a record's responses: r(response) of one, f(first, second) of two. A template belongs
    to every form but the pointwise one."""
    value: list[Scalar] = []
    if form == "pointwise":
        for response, factor in zip(responses, (1.0, -1.0), strict=False):
            number = reads.add(record.prompt, record.responses[response])
            value.append(Scalar(number, len(reads.sequences[number]) - 1, factor=factor))
        reads.scalars.append(value)
        return
    assert template is not None
    head, (first, second) = template.head(record.prompt), responses
    orders = [(first, second, 1.0)] if form == "paper" else [(first, second, 1.0), (second, first, -1.0)]
    for one, other, sign in orders:
        number = reads.add(head, record.responses[one], template.second, record.responses[other])
        end = len(reads.sequences[number]) - 1
        if form == "residual":
            end_of_first = len(head) + len(record.responses[one]) - 1
            value += [Scalar(number, end_of_first, factor=sign), Scalar(number, end, label=1, factor=sign / 2)]
        else:
            value.append(Scalar(number, end, factor=sign / len(orders)))
    reads.scalars.append(value)


def check_form(model: transformers.PreTrainedModel) -> str:
    """The scorer's form; UserError where its architecture cannot have it."""
    form = str(model.config.rdo_form)
    if form == "residual" and decoder_head(model) is None:
        raise UserError("form=residual reads the first response before the second is seen: it needs a decoder")
    return form
