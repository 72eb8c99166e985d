"""The models that everybody runs: a policy, a reference that differs from it, and a scorer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rdo.models import head_parameters
from rdo.pretrained import load_policy, load_scorer, new_policy, new_scorer, save_model
from rdo.schema import ModelConfig


@dataclass
class Subjects:
    """All on one device, weights in float32; copies of them lie in `folder` under the same names, for TRL."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    reward: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path


def make_subjects(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, folder: Path, device: torch.device
) -> Subjects:
    """From model.path, or with random weights. tokenizer: whose words are ids, see `trl.word_tokenizer`.

    The reference is the policy with noise on its weights, or DPO's loss would be ln 2 whatever anybody computes; the
    scorer's head, which would start at zero, is random.
    """
    policy = load_policy(config.path, config) if config.path else new_policy(config, tokenizer, seed=0)
    save_model(policy, tokenizer, folder / "policy")
    reference = load_policy(folder / "policy", config)
    reward = new_scorer(folder / "policy", "pointwise", config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in reference.parameters():
            if weight.dim() > 1:
                weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=generator).to(weight.dtype))
        for weight in head_parameters(reward):
            weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    save_model(reference, tokenizer, folder / "reference")
    save_model(reward, tokenizer, folder / "reward")
    reward = load_scorer(folder / "reward", config)
    moved = [model.to(device) for model in (policy, reference, reward)]  # type: ignore[arg-type]
    return Subjects(moved[0], moved[1], moved[2], tokenizer, folder)
