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
from rdo.sequences.attention import choose_kernel
from rdo.sequences.forward import hidden_states
from rdo.sequences.kernels.varlen import GatherRows, VarlenPlan, computed_dtype
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
    sums, _ = span_log_probabilities(hidden, model.get_output_embeddings(), layout, half_way(sequences))
    return states, sums


def check(model: PreTrainedModel, sequences: Sequences, kernel: str, tolerance: float) -> None:
    """Whether hidden states, log-probabilities and gradients under a kernel are those of the padded layout."""
    wanted_states, wanted = read(model, sequences, "padded")
    wanted_gradients = gradients(model, wanted)
    states, found = read(model, sequences, kernel)
    assert relative_error(states, wanted_states) < tolerance
    assert relative_error([found], [wanted]) < tolerance
    assert relative_error(gradients(model, found), wanted_gradients) < tolerance


@pytest.mark.parametrize("model", DECODERS)
@pytest.mark.parametrize("name", ["tree", "three differences"])
def test_varlen_agrees_with_the_flat_layout(monkeypatch: pytest.MonkeyPatch, model: str, name: str):
    emulate(monkeypatch)
    check(policy(model), LISTS[name], "varlen", FLOAT32)


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("model", ["llama-grouped", "mistral-window"])
def test_varlen_agrees_in_double_precision(monkeypatch: pytest.MonkeyPatch, model: str, name: str):
    emulate(monkeypatch)
    check(policy(model, torch.float64), LISTS[name], "varlen", FLOAT64)


@pytest.mark.parametrize("model", ["llama", "llama-grouped", "mistral-window"])
def test_varlen_agrees_where_pytorch_knows_no_groups(monkeypatch: pytest.MonkeyPatch, model: str):
    emulate(monkeypatch, varlen_attn_of_2_11)
    check(policy(model, torch.float64), LISTS["six responses"], "varlen", FLOAT64)


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
        if kernel == "padded":
            set_layout(model, "padded")
        else:
            assert why_not_tree(model, "varlen", torch.bfloat16) is None
        layout = make_layout("padded" if kernel == "padded" else "tree", sequences)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = hidden_states(model, layout)
            sums, _ = span_log_probabilities(hidden, model.get_output_embeddings(), layout, half_way(sequences))
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


def test_attention_computes_in_what_autocast_says_or_the_values_are_in():
    values = {dtype: torch.ones(1, dtype=dtype) for dtype in EVERY_DTYPE}
    assert {dtype: computed_dtype(value) for dtype, value in values.items()} == {dtype: dtype for dtype in EVERY_DTYPE}
    with torch.autocast("cpu", torch.bfloat16):
        assert computed_dtype(values[torch.float32]) == torch.bfloat16
        assert computed_dtype(values[torch.float64]) == torch.float64  # which autocast leaves alone


CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
FULL, BRAIN, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
RULE: list[tuple[torch.device, torch.dtype, int, dict[str, Any], str]] = [
    (CPU, FULL, 64, {}, "contiguous"),
    (CPU, BRAIN, 64, {}, "contiguous"),
    (CUDA, BRAIN, 64, {}, "varlen"),
    (CUDA, HALF, 128, {}, "varlen"),
    (CUDA, BRAIN, 256, {"capability": (9, 0)}, "varlen"),
    (CUDA, BRAIN, 256, {"capability": (8, 9)}, "gathered"),
    (CUDA, BRAIN, 192, {"capability": (8, 9)}, "varlen"),
    (CUDA, BRAIN, 256, {"capability": (12, 0)}, "gathered"),
    (CUDA, BRAIN, 260, {}, "gathered"),
    (CUDA, BRAIN, 100, {}, "gathered"),
    (CUDA, HALF, 64, {"capability": (7, 5)}, "gathered"),
    (CUDA, BRAIN, 64, {"flash": False}, "gathered"),
    (CUDA, BRAIN, 64, {"cudnn": True}, "gathered"),
    (CUDA, BRAIN, 12, {}, "gathered"),
    (CUDA, FULL, 64, {}, "gathered"),
    (CUDA, DOUBLE, 64, {}, "gathered"),
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


@pytest.mark.parametrize(("device", "dtype", "width", "machine", "chosen"), RULE)
def test_the_kernel_is_chosen_by_one_rule(monkeypatch, device, dtype, width, machine, chosen):
    pretend(monkeypatch, **machine)
    assert choose_kernel("auto", device, dtype, width) == chosen
    assert choose_kernel("gathered", device, dtype, width) == "gathered"
    if chosen != "gathered":
        assert choose_kernel(chosen, device, dtype, width) == chosen


@pytest.mark.parametrize(
    ("kernel", "device", "dtype", "width", "machine", "said"),
    [
        ("varlen", CPU, BRAIN, 64, {}, "needs an NVIDIA GPU"),
        ("varlen", CUDA, FULL, 64, {}, r"this is float32 \(see engine\.precision"),
        ("varlen", CUDA, BRAIN, 100, {}, "multiple of 8 up to 256, and the model's is 100"),
        ("varlen", CUDA, BRAIN, 256, {"capability": (8, 6)}, "up to 192, and the model's is 256"),
        ("varlen", CUDA, HALF, 64, {"capability": (7, 0)}, "compute capability"),
        ("varlen", CUDA, HALF, 64, {"flash": False}, "flash attention"),
        ("varlen", CUDA, HALF, 64, {"cudnn": True}, "cuDNN"),
    ],
)
def test_a_kernel_that_is_demanded_in_vain_is_refused_by_name(monkeypatch, kernel, device, dtype, width, machine, said):
    pretend(monkeypatch, **machine)
    with pytest.raises(UserError, match=rf"^engine\.attention={kernel} .*{said}.*; use engine\.attention=auto$"):
        choose_kernel(kernel, device, dtype, width)


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
