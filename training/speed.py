"""What a step costs and what the machine could do: the share of torch.mm's own rate that training reaches (MFU)."""

from __future__ import annotations

import statistics
import time

import torch

from blockffn.training.model import Decoder

SIDE = 1024  # of the square matrices that are multiplied
ROUNDS = 9


def flops_per_token(decoder: Decoder, length: int) -> float:
    """Floating-point operations that one token of a sequence of `length` costs, forward and backward, all experts.

    Six for each weight of a matrix (the embedding counts as head, not as a table) and, in attention, six for each
    element of the keys and values of half the sequence on average. Recomputed activations do not count.
    """
    config = decoder.config
    weights = sum(p.numel() for name, p in decoder.canonical() if p.dim() > 1 and (name != "embed" or config.tied))
    mla = config.mla
    keys, values = (config.head_dim,) * 2 if mla is None else (mla.nope_head_dim + mla.rope_head_dim, mla.v_head_dim)
    return 6.0 * weights + 6.0 * config.n_layer * config.n_head * (keys + values) * length / 2


def matmul_rate(device: torch.device, precision: str) -> float:
    """Floating-point operations per second of torch.mm on square matrices, with torch's threads: a median.

    precision: float32 or bfloat16, as in [run].
    """
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        float(torch.mm(a, b)[0, 0])  # reading it waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * SIDE**3 / statistics.median(seconds[1:])
