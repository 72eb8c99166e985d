"""The GPU kernel of tree attention, as far as a CPU goes: varlen under an emulation of PyTorch's function,
and which kernel is chosen where. launch/gpu_check.py checks it on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_layouts import DECODERS, FLOAT32, FLOAT64, LISTS, Sequences, gradients, half_way
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

import rdo.sequences.kernels.varlen
import rdo.sequences.preparation
from emulated import varlen_attn, varlen_attn_of_2_11
from helpers import policy, relative_error
from rdo.runtime.errors import UserError
from rdo.sequences import forward
from rdo.sequences.attention import choose_kernel
from rdo.sequences.forward import Reads, hidden_states
from rdo.sequences.kernels.varlen import GatherRows, VarlenPlan
from rdo.sequences.layout import PrefixTree, make_layout
from rdo.sequences.preparation import head_width, set_kernel, set_layout, why_not_tree
from rdo.sequences.readout import span_log_probabilities

EVERY_DTYPE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def emulate(monkeypatch: pytest.MonkeyPatch, function: Callable[..., torch.Tensor] = varlen_attn) -> None:
    """Puts an emulation in the place of PyTorch's variable-length attention, in every dtype that it computes in."""
    monkeypatch.setattr(varlen, "varlen_attn", function)
    monkeypatch.setattr(rdo.sequences.kernels.varlen, "HALF", EVERY_DTYPE)


def read(model: PreTrainedModel, sequences: Sequences, kernel: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states of every sequence and log-probabilities, under a kernel, or in the padded layout."""
    if kernel == "padded":
        set_layout(model, "padded")
    else:
        assert why_not_tree(model, kernel, model.dtype) is None
    layout = make_layout("padded" if kernel == "padded" else "tree", sequences)
    hidden = hidden_states(model, layout)
    states = [hidden[layout.index(s, np.arange(len(ids)))] for s, ids in enumerate(sequences)]
    return states, span_log_probabilities(hidden, model.get_output_embeddings(), layout, half_way(sequences))


def check(model: PreTrainedModel, sequences: Sequences, kernel: str, tolerance: float) -> None:
    """Whether hidden states, log-probabilities and gradients under a kernel are those of the padded layout."""
    wanted_states, wanted = read(model, sequences, "padded")
    wanted_gradients = gradients(model, wanted)
    states, found = read(model, sequences, kernel)
    assert relative_error(states, wanted_states) < tolerance
    assert relative_error([found], [wanted]) < tolerance
    assert relative_error(gradients(model, found), wanted_gradients) < tolerance


@pytest.mark.parametrize(
    ("model", "dtype", "name", "function"),
    [
        *((model, torch.float32, name, varlen_attn) for model in DECODERS for name in ("tree", "three differences")),
        *((m, torch.float64, name, varlen_attn) for m in ("llama-grouped", "mistral-window") for name in LISTS),
        # Where PyTorch knows no groups of heads.
        *((m, torch.float64, "six responses", varlen_attn_of_2_11) for m in ("llama", "llama-grouped")),
    ],
)
def test_varlen_agrees_with_the_padded_layout(monkeypatch: pytest.MonkeyPatch, model: str, dtype, name: str, function):
    emulate(monkeypatch, function)
    check(policy(model, dtype), LISTS[name], "varlen", FLOAT64 if dtype == torch.float64 else FLOAT32)


def test_varlen_gathers_nothing_where_nothing_is_shared():
    assert VarlenPlan(PrefixTree([(2, 3, 4), (5, 6)]), "cpu").rows is None
    assert VarlenPlan(PrefixTree([(2, 3, 4), (2, 6)]), "cpu").rows is not None


def test_varlen_computes_in_half_precision_under_autocast(monkeypatch: pytest.MonkeyPatch):
    """Queries and keys come in float32 there, values in bfloat16."""
    taken: list[torch.dtype] = []

    @wraps(varlen_attn)
    def noting(query: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        taken.append(query.dtype)
        return varlen_attn(query, *others, **options)

    model, sequences = policy("llama-grouped"), LISTS["six responses"]
    exact = gradients(model, read(model, sequences, "padded")[1])
    monkeypatch.setattr(varlen, "varlen_attn", noting)
    assert why_not_tree(model, "varlen", torch.bfloat16) is None
    errors = {}
    for kernel in ("padded", "varlen"):
        layout = "padded" if kernel == "padded" else "tree"
        if kernel == "padded":
            set_layout(model, "padded")
        else:
            assert why_not_tree(model, "varlen", torch.bfloat16) is None
        with torch.autocast("cpu", torch.bfloat16):
            sums = forward.read(model, layout, Reads(sequences, half_way(sequences)))
        errors[kernel] = relative_error(gradients(model, sums), exact)
    assert set(taken) == {torch.bfloat16}
    assert 0 < errors["varlen"] < 1.5 * errors["padded"] < 0.15


def test_varlen_refuses_to_compute_in_full_precision():
    model = policy()
    reason = why_not_tree(model, "varlen", torch.float32)
    assert reason is not None
    assert "engine.attention=auto" in reason
    assert set_layout(model, "auto") == "tree"


class Additions(TorchFunctionMode):
    """Notes the dtypes that are added up in: a GPU rounds every addition to them, a CPU some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(self, function: Any, types: Any, given: Any = (), options: Any = None) -> Any:
        if "index" in function.__name__ and given[0].is_floating_point():
            self.dtypes.append(given[0].dtype)
        return function(*given, **(options or {}))


def test_gradients_of_a_row_that_many_read_are_added_in_float32():
    tensor = torch.ones(2, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.tensor([0] * 1000 + [1])
    read = GatherRows.apply(tensor, rows)
    read.sum().backward()
    # One at a time, bfloat16 counts to 256 and stays there.
    assert tensor.grad[:, 0, 0].tolist() == [1000.0, 1.0]
    with Additions() as additions:
        GatherRows.backward(SimpleNamespace(saved_tensors=(rows,), tokens=2), torch.ones_like(read))
        GatherRows.backward(SimpleNamespace(saved_tensors=(rows,), tokens=2), torch.ones_like(read).double())
    assert additions.dtypes == [torch.float32, torch.float64]


CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
FULL, BRAIN, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
# What auto takes; where that is not varlen, why it is refused to whom demands it.
RULE: list[tuple[torch.device, torch.dtype, int, dict[str, Any], str, str | None]] = [
    (CPU, FULL, 64, {}, "contiguous", "needs an NVIDIA GPU"),
    (CPU, BRAIN, 64, {}, "contiguous", "needs an NVIDIA GPU"),
    (CUDA, BRAIN, 64, {}, "varlen", None),
    (CUDA, HALF, 128, {}, "varlen", None),
    (CUDA, BRAIN, 256, {"capability": (9, 0)}, "varlen", None),
    (CUDA, BRAIN, 192, {"capability": (8, 9)}, "varlen", None),
    (CUDA, BRAIN, 256, {"capability": (8, 6)}, "gathered", "up to 192, and the model's is 256"),
    (CUDA, BRAIN, 256, {"capability": (12, 0)}, "gathered", "up to 192"),
    (CUDA, BRAIN, 260, {}, "gathered", "multiple of 8 up to 256, and the model's is 260"),
    (CUDA, BRAIN, 100, {}, "gathered", "multiple of 8"),
    (CUDA, BRAIN, 12, {}, "gathered", "multiple of 8"),
    (CUDA, HALF, 64, {"capability": (7, 5)}, "gathered", "compute capability"),
    (CUDA, BRAIN, 64, {"flash": False}, "gathered", "flash attention"),
    (CUDA, BRAIN, 64, {"cudnn": True}, "gathered", "cuDNN"),
    (CUDA, FULL, 64, {}, "gathered", r"this is float32 \(see engine\.precision"),
    (CUDA, DOUBLE, 64, {}, "gathered", "this is float64"),
]


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] = (8, 0),
    flash: bool = True,
    cudnn: bool = False,
) -> None:
    """A GPU, and a PyTorch that was built for it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: flash)
    monkeypatch.setattr(varlen, "_should_use_cudnn", lambda index: cudnn, raising=False)


@pytest.mark.parametrize(("device", "dtype", "width", "machine", "chosen", "said"), RULE)
def test_the_kernel_is_chosen_by_one_rule(monkeypatch, device, dtype, width, machine, chosen, said):
    pretend(monkeypatch, **machine)
    assert choose_kernel("auto", device, dtype, width) == chosen
    for kernel in ("gathered", chosen):
        assert choose_kernel(kernel, device, dtype, width) == kernel
    if said:
        with pytest.raises(UserError, match=rf"^engine\.attention=varlen .*{said}.*; use engine\.attention=auto$"):
            choose_kernel("varlen", device, dtype, width)


def test_on_a_cpu_the_gpu_kernel_is_refused():
    model = policy()
    with pytest.raises(UserError, match=r"engine\.attention=varlen needs a"):
        set_layout(model, "auto", "varlen")
    assert set_layout(model, "padded", "varlen") == "padded"


@pytest.mark.parametrize(
    ("weights", "precision", "computed"),
    [(FULL, None, FULL), (FULL, FULL, FULL), (FULL, BRAIN, BRAIN), (BRAIN, None, BRAIN), (DOUBLE, FULL, DOUBLE)],
)
def test_the_rule_is_asked_for_what_attention_computes_in(monkeypatch, weights, precision, computed):
    asked: list[Any] = []
    monkeypatch.setattr(rdo.sequences.preparation, "choose_kernel", lambda *rule: asked.append(rule) or "gathered")
    model = policy("llama", weights)
    set_layout(model, "auto", "auto", precision)
    assert asked == [("auto", CPU, computed, 8)]


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "gemma3", "llama-grouped"])
def test_the_width_of_a_head_is_found_in_every_config(name: str):
    assert head_width(policy(name)) == 8


def test_a_kernel_that_the_model_itself_cannot_run_is_left_out_aloud(monkeypatch, capsys):
    def broken(*inputs: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    model = policy()
    emulate(monkeypatch, broken)
    monkeypatch.setattr(rdo.sequences.preparation, "choose_kernel", lambda *rule: "varlen")
    assert set_layout(model, "auto") == "tree"
    assert model.config._attn_implementation == "rdo_tree_gathered"
    said = capsys.readouterr().out
    assert "engine.attention=gathered, because of varlen" in said
    assert "no kernel image" in said
    with pytest.raises(UserError, match=r"engine\.attention=varlen cannot run this model.*=auto.*no kernel image"):
        set_layout(model, "auto", "varlen")
    emulate(monkeypatch)
    set_kernel(model, "auto", torch.float32)
    assert model.config._attn_implementation == "rdo_tree_varlen"


def test_a_kernel_with_another_alignment_is_found_out(monkeypatch: pytest.MonkeyPatch):
    """Aligned at the top left, a segment's tokens see the beginning of their path alone."""

    @wraps(varlen_attn)
    def top_left(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any, **options: Any) -> Any:
        offsets, lengths = others[1], others[0].diff()
        own = torch.cat([torch.arange(n) + start for n, start in zip(lengths, offsets, strict=False)])
        return varlen_attn(query, key[own], value[own], others[0], others[0], others[2], others[2], **options)

    emulate(monkeypatch, top_left)
    reason = why_not_tree(policy(), "varlen", torch.float32)
    assert reason is not None
    assert "more than their own path" in reason
