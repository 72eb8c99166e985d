"""Any number of processes under DeepSpeed's ZeRO (Rajbhandari et al. 2020): optimizer state, gradients and weights
are divided among them, stage by stage.

A step is one update however many micro-batches each process has: DeepSpeed reduces gradients at the last one, and
divides by the number of processes, which the loss is multiplied with before.
"""

from __future__ import annotations

import gc
import importlib
import logging
import math
import os
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import transformers

from rdo.models.lora import trained_state
from rdo.runtime.errors import UserError
from rdo.runtime.files import Damaged, check_zip, move_folder, read_json, replace_file, synchronize, write_json
from rdo.runtime.processes import barrier, broadcast, is_rank0, world
from rdo.sequences.forward import Reads, read
from rdo.sequences.layout import LayoutName
from rdo.settings import EngineConfig
from rdo.training.engine import foreign, precision_of

DESCRIPTION = "checkpoint.json"
# More of DeepSpeed's settings of ZeRO, by its own names.
ZERO: dict[str, Any] = {}
# What DeepSpeed's files hold beside tensors and plain data; a file that names anything else is not loaded.
CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class Root(torch.nn.Module):
    """The model as DeepSpeed sees it: every forward pass is one call of this module, so that weights which are used
    outside their own layer (the output head's) are there all the while."""

    def __init__(self, model: transformers.PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, layout: LayoutName, reads: Reads) -> torch.Tensor:
        return read(self.model, layout, reads)


class ZeroEngine:
    """See `engine.Engine`."""

    suffix = ""

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        max_gradient_norm: float | None,
        config: EngineConfig,
    ):
        deepspeed = imported(model.device)
        self.model, self.precision = model, precision_of(config, model.device)
        # What a checkpoint and the run that takes it up must have in common.
        self.common = {"engine": config.name, "processes": world().size, "precision": str(self.precision)}
        root = Root(model)
        self.engine, *_ = deepspeed.initialize(
            model=root,
            optimizer=optimizer,
            config=settings(config.name, self.precision, max_gradient_norm),
            dist_init_required=False,
        )
        if config.name.startswith("zero3"):
            # Weights that are read outside the forward pass of their own layer: those of heads (see readout.py).
            for head in (model.get_output_embeddings(), getattr(model, "score", None)):
                for weight in () if head is None else head.parameters():
                    deepspeed.zero.register_external_parameter(root, weight)
        self.engine.checkpoint_engine = own_files()()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.engine.optimizer.param_groups

    def read(self, layout: LayoutName, reads: Reads) -> torch.Tensor:
        return self.engine(layout, reads)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * world().size)

    def step(self) -> float | None:
        self.engine.step()
        if self.precision == torch.float16 and self.engine.optimizer.overflow:
            return None
        return float(self.engine.get_global_grad_norm())

    def save(self, path: Path, step: int) -> None:
        temporary = path.with_name(f".{path.name}.part")
        if is_rank0():
            shutil.rmtree(temporary, ignore_errors=True)
        barrier()
        self.engine.save_checkpoint(
            str(temporary),
            tag="state",
            client_state={"step": step, "random": torch.get_rng_state()},
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        barrier()
        if is_rank0():
            files = sorted(file.name for file in (temporary / "state").iterdir())
            write_json(temporary / DESCRIPTION, {**self.common, "step": step, "files": files})
            synchronize(temporary)
            move_folder(temporary, path)

    def load(self, path: Path) -> int:
        if damage := broadcast(lambda: damage_of(path)):
            raise Damaged(damage)
        there = read_json(path / DESCRIPTION)
        for what, here in self.common.items():
            if there[what] != here:
                raise UserError(
                    f"{path} was saved with {what} {there[what]}, and this run has {here}: start it with the same "
                    f"as before, or delete {path.parent}, and the same command starts from step 0"
                )
        try:
            _, state = self.engine.load_checkpoint(str(path), tag="state", load_module_strict=False)
        except (RuntimeError, KeyError, ValueError, AssertionError) as error:
            raise foreign(path, str(error)) from error
        torch.set_rng_state(state["random"].cpu())
        return int(state["step"])

    def finish(self) -> dict[str, torch.Tensor] | None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        state: dict[str, torch.Tensor] = {}
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        tensors = {**dict(self.model.named_buffers(remove_duplicate=False)), **weights}
        for name in trained_state(self.model):
            tensor = tensors[name]
            whole = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
            partitioned = [tensor] if whole is None and hasattr(tensor, "ds_id") else []
            with GatheredParameters(partitioned, enabled=bool(partitioned)):
                if is_rank0():
                    state[name] = (tensor if whole is None else whole).detach().to("cpu", copy=True)
        self.engine.destroy()
        gc.collect()
        return state if is_rank0() else None


def damage_of(path: Path) -> str | None:
    """What of a checkpoint is not as it was written, if anything."""
    try:
        for name in read_json(path / DESCRIPTION)["files"]:
            check_zip(path / "state" / name)
    except (Damaged, OSError, ValueError, LookupError, TypeError) as error:
        return str(error)
    return None


@cache
def imported(device: torch.device) -> Any:
    """DeepSpeed, ready to be used on this kind of device, without compiling anything and without MPI."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # also where there is a GPU that is not to be used
    for name, value in (("RANK", world().rank), ("WORLD_SIZE", world().size), ("LOCAL_RANK", world().local_rank)):
        os.environ.setdefault(name, str(value))
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)  # DeepSpeed's calls
    logging.getLogger("compilers").setLevel(logging.WARNING)  # that it looks for is no news
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # An optional speed-up on CPUs whose compilation takes a minute, and fails where there is no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed("gloo" if device.type == "cpu" else "nccl", verbose=False)
    return deepspeed


def settings(name: str, precision: torch.dtype, max_gradient_norm: float | None) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    zero: dict[str, Any] = {"stage": int(name.removeprefix("zero")[0]), **ZERO}
    if name.endswith("_offload"):
        zero |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    return {
        "train_micro_batch_size_per_gpu": 1,  # ours are packed by tokens; this number has no effect
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_gradient_norm or 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == torch.bfloat16},
        "fp16": {"enabled": precision == torch.float16, "initial_scale_power": 16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,  # torch's own AdamW: DeepSpeed's needs a compiler
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": math.inf,
    }


@cache
def own_files() -> type:
    """DeepSpeed's way of writing and reading checkpoint files, but each whole or not at all, and running no code."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class OwnFiles(TorchCheckpointEngine):
        def save(self, state_dict: Any, path: str) -> None:
            with replace_file(Path(path)) as temporary:
                torch.save(state_dict, temporary)

        def load(self, path: str, map_location: Any = None) -> Any:
            classes = []
            for name in CLASSES:
                module, _, attribute = name.rpartition(".")
                classes.append(getattr(importlib.import_module(module), attribute))
            with torch.serialization.safe_globals(classes):
                return torch.load(path, map_location=map_location, weights_only=True)

    return OwnFiles
