"""How arrays that are made on the host get to where a model runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def to_device(array: np.ndarray | torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The array as a tensor on the device, of the same shape and dtype.

    On a GPU the host does not wait for the copy: pinned memory lets it run beside whatever the GPU is busy with, and
    PyTorch keeps that memory until the copy is done.
    """
    tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def tensor_on(
    device: torch.device | str, values: Sequence[float] | Sequence[bool], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Numbers [values] on the device, of the dtype that they have by themselves unless another is given."""
    return to_device(torch.tensor(values, dtype=dtype), device)
