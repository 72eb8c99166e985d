"""How many tokens a micro-batch may have where nobody says it: what fits into the memory that is free. Results depend
on it by rounding alone."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
import transformers

from rdo.runtime.processes import broadcast, world
from rdo.sequences.forward import input_embeddings
from rdo.sequences.readout import LOGITS_BUDGET
from rdo.settings import EngineConfig

SMALLEST, LARGEST = 256, 16384  # beyond the largest nothing gets faster
# The limits of a container, which has its own view of these files; there may be none, and `max` is none.
LIMITS = [Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory/memory.limit_in_bytes")]


def tokens_per_micro_batch(model: transformers.PreTrainedModel, config: EngineConfig, trained: bool) -> int:
    """engine.tokens_per_micro_batch; where that is null, a power of two by the model's size and free memory, the same
    on all processes, which all call this.

    trained: activations are kept for the backward pass, and there will be gradients and the optimizer's two moments.
    """
    if config.tokens_per_micro_batch is not None:
        return config.tokens_per_micro_batch
    budget = broadcast(lambda: fitting(model, config, trained, free_memory(model.device)))
    if budget < LARGEST:
        print(f"[memory] engine.tokens_per_micro_batch={budget}, by what is free", flush=True)
    return budget


def fitting(model: transformers.PreTrainedModel, config: EngineConfig, trained: bool, free: float) -> int:
    """The largest power of two whose micro-batch takes half of the free bytes, for what is counted here is not all.

    A layer of a Llama makes 12 numbers a token as wide as the model, and 4 as wide as its inner layer. Going backward
    needs those of all layers, or the input of all, and one layer's at a time.
    """
    vocabulary, width = input_embeddings(model).shape
    shape = model.config.get_text_config()
    layers = shape.num_hidden_layers
    layer = 12 * width + 4 * (getattr(shape, "intermediate_size", None) or 4 * width)
    numbers, states = layer, 0.0
    if trained:
        numbers = layer + layers * width if config.gradient_checkpointing else layers * layer
        states = 3 * sum(weight.numel() for weight in model.parameters() if weight.requires_grad) / world().size
    logits = 3 * min(LOGITS_BUDGET, LARGEST * vocabulary)  # of a chunk of tokens, three times
    tokens = int(((free - 4 * states) / 2 - 4 * logits) / (4 * numbers))
    return 1 << (min(max(tokens, SMALLEST), LARGEST).bit_length() - 1)


def free_memory(device: torch.device) -> float:
    """Bytes that this process may take, of the GPU or of the machine, which it shares with the others."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [int(text) for path in LIMITS if path.exists() and (text := path.read_text().strip()).isdigit()]
    return min([psutil.virtual_memory().available, *limits]) / world().size
