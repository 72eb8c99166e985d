"""Every causal language model of transformers, tiny and random, through loading and layouts, and the list of what
becomes of each; tests/sequences/test_architectures.py runs it."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from helpers import VOCABULARY, from_configuration, random_tree, relative_error
from rdo.models.pretrained import load_policy
from rdo.runtime.errors import UserError
from rdo.sequences.forward import Reads, read
from rdo.sequences.layout import LayoutName
from rdo.sequences.preparation import set_layout
from rdo.sequences.readout import Span
from rdo.settings import ModelConfig
from saved import saved

LIST = Path(__file__).parents[1] / "docs" / "architectures.md"
TOLERANCE = 1e-5
LARGEST = 20_000_000  # parameters; what our sizes do not make smaller (images and sound, mostly) is not tried
SEQUENCES = random_tree(7, count=6)
READS = Reads(SEQUENCES, [Span(s, max(1, len(ids) // 2)) for s, ids in enumerate(SEQUENCES) if len(ids) > 1])

# Sizes, by the names that configurations have for them.
VALUES: list[tuple[Any, str]] = [
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (256, "max_position_embeddings n_positions max_seq_len max_seq_length"),
    (
        48,
        "intermediate_size n_inner decoder_ffn_dim encoder_ffn_dim ffn_dim dff dim_ff ffn_hidden_size d_inner d_ff "
        "shared_expert_intermediate_size moe_intermediate_size mlp_hidden_size shared_intermediate_size "
        "expert_ffn_hidden_size prefix_dense_intermediate_size intermediate_size_mlp",
    ),
    (32, "hidden_size n_embd d_model embedding_size dim_model dim word_embed_proj_dim decoder_hidden_size lru_width"),
    (16, "kv_lora_rank q_lora_rank"),
    (
        8,
        "head_dim dim_head qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels hidden_size_per_layer_input "
        "sliding_window",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads rotary_dim "
        "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
        "moe_num_experts laurel_rank",
    ),
    (
        2,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers num_key_value_heads num_experts_per_tok moe_k experts_per_token moe_topk",
    ),
    (1, "eos_token_id n_group topk_group first_k_dense_replace n_shared_experts"),
    (0, "pad_token_id"),
    (True, "is_decoder"),
    (False, "use_cache"),
]
SIZES = {name: value for value, names in VALUES for name in names.split()}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
ROPE = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}
# What some ask for beside.
MORE: dict[str, dict[str, Any]] = {
    "bamba": MAMBA,
    "cohere_compass_text": {"rope_parameters": ROPE},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": MAMBA,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "xmod": {"languages": ["en"], "default_language": "en"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """A configuration with every size that it has set small, those of its parts, too."""
    named: set[str] = set(kind.attribute_map)
    for base in kind.__mro__:
        named |= set(vars(base).get("__annotations__", ()))
        named |= set(inspect.signature(vars(base)["__init__"]).parameters) if "__init__" in vars(base) else set()
    sizes = {name: value for name, value in SIZES.items() if name in named}
    sizes = {name: value for name, value in sizes.items() if kind.attribute_map.get(name) not in sizes}
    if "kv_lora_rank" in sizes:
        sizes["num_key_value_heads"] = 4
    parts = {name: tiny(part) for name, part in kind.sub_configs.items() if part is not transformers.AutoConfig}
    return kind(**{**sizes, **parts, **MORE.get(kind.model_type, {})})


def outcome(name: str) -> tuple[str, str, str]:
    """The class of an architecture, what became of it ("tree", "padded", "refused", "fails", "not tried", or "WRONG"),
    and why."""
    try:
        config = tiny(CONFIG_MAPPING[name])
        with torch.device("meta"):
            size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            return NAMES[name], "not tried", f"{size / 1e6:.0f}M parameters at our smallest sizes"
        model = from_configuration(config, AutoModelForCausalLM)
        with torch.no_grad():
            model.get_input_embeddings().weight[0] = 0  # that of padding, as loading makes it in some
        sums = alone(model)
        assert torch.stack(sums).isfinite().all()
    except Exception as error:  # whatever the code of an architecture may raise
        return NAMES[name], "not tried", f"our sizes do not make one: {type(error).__name__}"
    with tempfile.TemporaryDirectory() as folder:
        path = saved(model, Path(folder) / "model")
        try:
            runs, worst = loaded(path, "float32", sums)
            if not worst < TOLERANCE:  # rounding is nothing in double precision, and a wrong path what it was
                runs, worst = loaded(path, "float64", sums)
        except UserError as error:
            return NAMES[name], "refused", shorten(str(error).replace(f"{path}", "it"), 120)
        except Exception as error:
            return NAMES[name], "fails", shorten(f"{type(error).__name__}: {error}", 120)
    return (NAMES[name], runs, "") if worst < TOLERANCE else (NAMES[name], "WRONG", f"{worst:.1e}")


def loaded(path: Path, dtype: str, sums: list[torch.Tensor]) -> tuple[LayoutName, float]:
    """The layout that a saved model runs in, and the worst error: of what it says loaded, of padded rows, of a tree."""
    model = load_policy(path, ModelConfig(dtype=dtype))
    runs = set_layout(model, "auto")
    set_layout(model, "padded")
    wanted = alone(model)
    slope = gradients(model, torch.stack(wanted))
    errors = [relative_error(wanted, sums)]
    for layout in {"padded", runs}:
        set_layout(model, layout)
        found = read(model, layout, READS)
        errors += [relative_error(list(found), wanted), relative_error(gradients(model, found), slope)]
    return runs, max(errors)


def alone(model: PreTrainedModel) -> list[torch.Tensor]:
    """Log-probabilities, one sequence at a time through the model's own forward pass and logits."""
    sums = []
    for span in READS.spans:
        ids = torch.tensor([SEQUENCES[span.sequence]])
        tokens = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        sums.append(tokens[span.start - 1 :].sum())
    return sums


def gradients(model: PreTrainedModel, sums: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1.0, 1.5, len(sums), dtype=sums.dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad((weights * sums).sum(), parameters, allow_unused=True, materialize_grads=True))


def line(name: str) -> str:
    """A row of the list."""
    made, became, why = outcome(name)
    return f"| `{name}` | {made} | {became} | {why} |"


HEAD = f"""# Architectures

What becomes of every causal language model of transformers {transformers.__version__}, by `model_type`: made tiny, with
random weights, saved, loaded, and run. `tree` and `padded`: its log-probabilities and gradients equal those of each
sequence alone through the model's own logits, to {TOLERANCE:.0e} of their norm, in padded rows and, where that is said,
in a tree. `refused`: in the words that follow. `fails`: in its own code and words. `not tried`: this makes no
small one.

`RDO_ARCHITECTURES=all python -m pytest tests/sequences/test_architectures.py` compares with this list (minutes, on one
core); `RDO_ARCHITECTURES=write` writes it anew.

| type | class | becomes | why |
|---|---|---|---|
"""
