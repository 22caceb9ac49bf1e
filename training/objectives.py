"""What the trainer adds to the language-model loss, and the sparsity figures it reports.

All act on the router of each expert layer; the trainer averages over all layers, a dense one counting as 0. r [B, T, E]
are router logits, a = relu(r), p = a / (sum_e a + 1e-5); `documents` [B, T] numbers the document of each token, -1 for
padding.
Sources: BlockFFN arXiv 2507.08771 section 3.2 and appendix (locality, chunk sparsification, factor scheduler), DECO
arXiv 2605.10933 (router entropy, its controller, the loss-free bias).

    >>> from blockffn.training.objectives import token_sparsity
    >>> token_sparsity(torch.tensor([[[True, False, False, False]]]))
    0.75
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-5
CHUNK_SIZES = (2, 4, 8, 16, 32, 64)


def shares(selected: Tensor) -> Tensor:
    """p = a / (sum_e a + 1e-5) for a [..., E]: the scores scaled to sum 1 (0 where no expert is active)."""
    return selected / (selected.sum(dim=-1, keepdim=True) + EPS)


def activation_locality(r: Tensor, documents: Tensor, beta: float = 100.0) -> Tensor:
    """Neighbours should use the same experts: BCE of logit beta * r_t against target sigmoid(beta * r_{t+1}).

    r [B, T, E] -> scalar, the mean over experts and over the pairs of neighbours that lie in one document; 0 when
    there is no such pair. The gradient runs through both sides, as the formula is written.
    """
    same = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)  # [B, T-1]
    target = torch.sigmoid(beta * r[:, 1:])  # [B, T-1, E]
    loss = functional.binary_cross_entropy_with_logits(beta * r[:, :-1], target, reduction="none")  # [B, T-1, E]
    return (loss.mean(dim=-1) * same).sum() / same.sum().clamp(min=1)


def chunk_sparsification(selected: Tensor, documents: Tensor, chunk: int = 64) -> Tensor:
    """Few experts should serve a chunk: 1 - mean_{chunk, e} exp(sum_{t in chunk} ln(1 - p_{t,e} + 1e-5)).

    selected a [B, T, E] -> scalar. Chunks are disjoint stretches of `chunk` tokens of a sequence, the last one may be
    shorter; padding counts for nothing, and a chunk of padding alone is left out of the mean. Read 1 - p as the chance
    that a token does without expert e: the product is the chance that the whole chunk does.
    """
    b, t, e = selected.shape
    n_chunk = -(-t // chunk)
    real = functional.pad(documents >= 0, (0, n_chunk * chunk - t))  # [B, n_chunk * chunk]
    log_unused = torch.log(1 - shares(selected) + EPS)  # [B, T, E]
    log_unused = functional.pad(log_unused, (0, 0, 0, n_chunk * chunk - t)) * real[..., None]
    unused = log_unused.view(b, n_chunk, chunk, e).sum(dim=2).exp()  # [B, n_chunk, E]
    counted = real.view(b, n_chunk, chunk).any(dim=-1)  # [B, n_chunk]
    return 1 - (unused.mean(dim=-1) * counted).sum() / counted.sum().clamp(min=1)


def router_entropy(selected: Tensor, documents: Tensor) -> Tensor:
    """DECO: mean over tokens of sum_e -p ln(p + 1e-5); selected a [B, T, E] -> scalar. Padding is left out."""
    p, real = shares(selected), documents >= 0
    entropy = -(p * torch.log(p + EPS)).sum(dim=-1)  # [B, T]
    return (entropy * real).sum() / real.sum().clamp(min=1)


@dataclass
class AdaptiveFactor:
    """BlockFFN's scheduler of the chunk sparsification factor, step by step as AdaptiveLinearScheduler of the authors.

    The factor rises linearly to `start` during `warmup` steps. Windows of `window` steps are counted from step 0. At
    the end of each window from step `stable` on, `stable` itself included, the mean loss of the last window is divided
    by that of the window before; the factor moves linearly over the next window to `ratio` times its value. A ratio
    above 1 (the loss rises again) is raised to at least `min_ratio`; the factor never exceeds `max_factor` times its
    start.
    """

    start: float
    warmup: int = 0
    stable: int = 0
    window: int = 100
    min_ratio: float = 1.025
    max_factor: float = 4.0
    step: int = 0
    origin: float = field(default=-1.0)
    goal: float = field(default=-1.0)
    total: float = 0.0
    previous: float | None = None

    def __post_init__(self) -> None:
        if self.origin < 0:
            self.origin = self.goal = self.start

    def value(self) -> float:
        """The factor of the current step."""
        if self.step < self.warmup:
            return self.start * (self.step + 1) / self.warmup
        return self.origin + (self.goal - self.origin) * (self.step % self.window + 1) / self.window

    def update(self, loss: float) -> None:
        """Tell the loss of the current step and go to the next one."""
        self.total += loss
        self.step += 1
        if self.step % self.window:
            return
        mean, self.total, self.origin = self.total / self.window, 0.0, self.goal
        if self.step >= self.stable and self.previous is not None and self.previous > 0:
            ratio = mean / self.previous
            if ratio > 1:
                ratio = max(ratio, self.min_ratio)
            self.goal = min(self.goal * ratio, self.start * self.max_factor)
        self.previous = mean

    def state(self) -> dict[str, object]:
        """Everything needed to go on: ``AdaptiveFactor(**state)``."""
        return asdict(self)


@dataclass
class EntropyController:
    """DECO's multiplicative controller: times m while too many experts are active, else divided by m.

    The coefficient never falls below `start`.
    """

    start: float = 1e-8
    multiplier: float = 1.001
    target: float = 0.2
    coefficient: float = -1.0

    def __post_init__(self) -> None:
        if self.coefficient < 0:
            self.coefficient = self.start

    def value(self) -> float:
        """The coefficient of the current step."""
        return self.coefficient

    def update(self, activation_ratio: float) -> None:
        """Tell the share of active experts of the current step and go to the next one."""
        if activation_ratio > self.target:
            self.coefficient *= self.multiplier
        else:
            self.coefficient = max(self.coefficient / self.multiplier, self.start)

    def state(self) -> dict[str, object]:
        """Everything needed to go on: ``EntropyController(**state)``."""
        return asdict(self)


@torch.no_grad()
def update_expert_bias(bias: Tensor, routed: Tensor, documents: Tensor, target: float, rate: float = 1e-3) -> None:
    """DECO's loss-free bias, in place: b -= rate * sign(tokens per expert - target per expert).

    bias [E]; routed bool [B, T, E] is r + b' > 0, not a > 0: a positive bias adds no expert to a > 0, so that counting
    there would let the bias of an idle expert grow for ever. `target` is the wanted share of routed experts: an
    expert's target is target * tokens. Padding does not count.
    """
    real = documents >= 0  # [B, T]
    load = (routed & real[..., None]).sum(dim=(0, 1)).to(torch.float64)  # [E]
    bias -= rate * torch.sign(load - target * real.sum()).to(bias.dtype)


def token_sparsity(active: Tensor) -> float:
    """TLS of one layer: 1 - mean share of active experts; active bool [B, T, E]."""
    return 1 - float(active.float().mean())


def chunk_sparsity(active: Tensor, chunk: int) -> float:
    """CLS_c of one layer: 1 - mean share of experts that some token of a chunk uses; active bool [B, T, E].

    Chunks are disjoint; the incomplete last one is dropped. NaN when a sequence is shorter than a chunk.
    """
    b, t, e = active.shape
    whole = active[:, : t - t % chunk].reshape(b, t // chunk, chunk, e)
    return 1 - float(whole.any(dim=2).float().mean())


def sparsity_report(active: Sequence[Tensor]) -> dict[str, list[float]]:
    """Per layer: ``tls`` and ``cls_2`` ... ``cls_64``, from active bool [B, T, E] of each layer."""
    report = {"tls": [token_sparsity(layer) for layer in active]}
    for chunk in CHUNK_SIZES:
        if active and active[0].shape[1] >= chunk:
            report[f"cls_{chunk}"] = [chunk_sparsity(layer, chunk) for layer in active]
    return report
