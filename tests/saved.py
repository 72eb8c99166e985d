"""Models on disk, as several tests save, read and attack them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from helpers import TEXTS, relative_error, tokenizer
from rdo.models.pretrained import save_model
from rdo.sequences import forward
from rdo.sequences.forward import Reads
from rdo.sequences.layout import make_layout
from rdo.sequences.preparation import set_layout
from rdo.sequences.readout import Scalar, Span

TOKENIZER = tokenizer()
SEQUENCES = [(*TOKENIZER(text).input_ids, 1) for text in TEXTS]
SPANS = Reads(SEQUENCES, [Span(s, 5) for s in range(len(SEQUENCES))])
ENDS = Reads(SEQUENCES, scalars=[[Scalar(s, len(ids) - 1)] for s, ids in enumerate(SEQUENCES)])
FLAT = make_layout("padded", SEQUENCES)


class Touch:
    """Unpickling this would run code: it touches a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def saved(model: Any, folder: Path, **how: Any) -> Path:
    save_model(model, TOKENIZER, folder, **how)
    return folder


def read(model: PreTrainedModel, layout: str = "auto") -> torch.Tensor:
    """What the model says of the sequences: log-probabilities, or a scorer's values."""
    return forward.read(model, set_layout(model, layout), ENDS if hasattr(model.config, "rdo_form") else SPANS)


def outputs(model: PreTrainedModel, layout: str = "auto") -> torch.Tensor:
    with torch.no_grad():
        return read(model, layout)


def plain_logits(model: Any) -> torch.Tensor:
    """The logits of padded rows through a model's own forward, as transformers and peft run it."""
    own = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    set_layout(own, "padded")
    with torch.no_grad():
        return model.eval()(input_ids=FLAT.ids, attention_mask=FLAT.mask).logits  # type: ignore[union-attr]


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-6) -> bool:
    real = FLAT.mask.bool() if wanted.dim() == 3 else slice(None)  # type: ignore[union-attr]  # padding means nothing
    return relative_error([found[real]], [wanted[real]]) < tolerance
