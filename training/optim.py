"""Optimizers and schedule of the trainer.

AdamW for everything, or Muon (orthogonalised momentum, arXiv 2502.16982) for the matrices inside the layers with AdamW
for embeddings, head, routers and norms: on a few million tokens Muon learns markedly more per token.

    >>> optimizers = make_optimizers(decoder, config)
    >>> set_learning_rate(optimizers, wsd(step, config) )
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from blockffn.training.config import OptimizerConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic whose five-fold iteration maps singular values near 1


def wsd(step: int, config: OptimizerConfig) -> float:
    """Learning rate of `step`: linear warm-up, constant, exponential decay to final_ratio over the last decay_steps."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decayed = step - (config.steps - config.decay_steps)
    if decayed < 0:
        return config.learning_rate
    return config.learning_rate * config.final_ratio ** ((decayed + 1) / config.decay_steps)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Move all singular values of [..., m, n] towards 1 by Newton-Schulz iteration (Muon)."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # [..., m, m]
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, Nesterov step, orthogonalised; scaled by 0.2 sqrt(max(m, n)) so that AdamW's learning rates fit.

    A parameter [E, m, n] counts as E matrices: every expert is a matrix of its own.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply one update."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]))
                scale = 0.2 * max(p.shape[-2:]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def make_optimizers(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Optimizers over canonical (name, parameter) pairs; vectors (norms, router factors) are not decayed.

    A group's ``factor`` multiplies the learning rate: see `set_learning_rate`.
    """
    kinds: dict[str, list[nn.Parameter]] = {"matrix": [], "table": [], "router": [], "vector": []}
    for name, p in named:
        if p.requires_grad:
            kinds[_kind(name, p)].append(p)
    decay = config.weight_decay
    groups = [
        {"params": kinds["table"], "weight_decay": decay, "factor": config.table_rate},
        {"params": kinds["router"], "weight_decay": decay, "factor": config.router_rate},
        {"params": kinds["vector"], "weight_decay": 0.0, "factor": config.vector_rate},
    ]
    if config.kind == "adamw":
        groups.append({"params": kinds["matrix"], "weight_decay": decay, "factor": 1.0})
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=betas, fused=True)
    ]
    if config.kind == "muon" and kinds["matrix"]:
        optimizers.append(Muon(kinds["matrix"], lr=config.learning_rate, weight_decay=decay))
    return optimizers


def _kind(name: str, p: nn.Parameter) -> str:
    last = name.rpartition(".")[2]
    if p.dim() < 2:
        return "vector"
    return "router" if last == "router" else "table" if last in ("embed", "lm_head") else "matrix"


def clip_gradients(named: Iterable[tuple[str, nn.Parameter]], limit: float) -> dict[str, float]:
    """Scale the gradients of the router matrices, and those of all else, to a norm of at most `limit` each.

    The router objectives are steep (beta 100): in one norm over everything they would shorten every other step, and a
    large language-model gradient would silence the router. The authors clip the router matrices as a group of their
    own. Returns both norms before clipping, ``gradient`` and, where there are routers, ``router_gradient``; where one
    is not finite no gradient is touched.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, p in named:
        group = "router_gradient" if name.rpartition(".")[2] == "router" else "gradient"
        groups.setdefault(group, []).append(p)
    gradients = {group: [p.grad for p in params if p.grad is not None] for group, params in groups.items()}
    norms = {group: float(nn.utils.get_total_norm(found)) for group, found in gradients.items()}
    if all(math.isfinite(norm) for norm in norms.values()):
        for group, norm in norms.items():
            nn.utils.clip_grads_with_norm_(groups[group], limit, torch.tensor(norm))
    return norms


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Give every group the rate times its factor (1 where it has none)."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
