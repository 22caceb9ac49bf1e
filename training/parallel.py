"""Several processes that train one model: each takes a part of every batch, all make the same step.

    torchrun --nproc-per-node 4 -m blockffn train model.toml

torchrun starts the processes and says who they are. Gradients and figures are summed over them, so that a step is that
of one process with the whole batch, up to the order of the sum. Rank 0 alone logs, evaluates and writes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from blockffn.errors import BlockffnError


def open_world(device: torch.device) -> None:
    """Join the processes that torchrun started; nothing without torchrun, or when joined already."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def close_world() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process among `size()`: 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def check_passes(passes: int) -> None:
    """Raise BlockffnError unless the forward passes of a step can be shared out evenly."""
    if passes % size():
        raise BlockffnError(
            f"[optimizer] batch_sequences / micro_sequences: expected a multiple of the {size()} processes, "
            f"found {passes}"
        )


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in one message per type."""
    if size() == 1:
        return
    for kind in dict.fromkeys(t.dtype for t in tensors):
        same = [t for t in tensors if t.dtype == kind]
        flat = torch.cat([t.flatten() for t in same])
        dist.all_reduce(flat)
        for t, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
            t.copy_(part.view_as(t))


def any_rank(value: bool, device: torch.device) -> bool:
    """Whether `value` holds in one process at least; every process has to ask."""
    if size() == 1:
        return value
    count = torch.tensor(float(value), device=device)
    dist.all_reduce(count)
    return bool(count > 0)
