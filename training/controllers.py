"""What moves between steps: the factor of chunk sparsification, a term's coefficient, the use of experts, their bias.

    >>> factor = AdaptiveFactor(0.05, warmup=100, stable=1000)
    >>> factor.update(loss=0.4)
    >>> factor.value()
    0.001

Sources: BlockFFN arXiv 2507.08771 appendix (factor scheduler), DECO arXiv 2605.10933 (the entropy's controller, the
loss-free bias), ReMoE arXiv 2412.14711 (the same controller on L1). `ExpertUse` is an addition of this project.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


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

    def state(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return asdict(self)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        vars(self).update(state)


@dataclass
class SparsityController:
    """DECO's and ReMoE's multiplicative controller: times m while too many experts are active, else divided by m.

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

    def state(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return asdict(self)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        vars(self).update(state)


class ExpertUse:
    """The share of tokens that activate each expert, averaged over steps, and the pull towards a range of it.

    `low` and `high` bound the share; within them nothing is pulled. The share is an exponential mean with DECAY.
    """

    DECAY = 0.9

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.share: Tensor | None = None  # [layers, E], of the experts' layers

    def pull(self) -> Tensor | None:
        """[layers, E] from -1 (never used) to 1 (always used), 0 within the bounds; None before the first step."""
        if self.share is None:
            return None
        short = (self.share / self.low - 1).clamp(max=0)  # -1 at 0, 0 from low on
        return short + ((self.share - self.high) / (1 - self.high)).clamp(min=0)

    def update(self, share: Tensor) -> None:
        """Tell the shares of the current step, [layers, E]."""
        self.share = share if self.share is None else self.DECAY * self.share + (1 - self.DECAY) * share

    def state(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return {"share": self.share}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`; the bounds are those of the training file."""
        self.share = state["share"]


@torch.no_grad()
def update_expert_bias(bias: Tensor, share: Tensor, target: float, rate: float = 1e-3) -> None:
    """DECO's loss-free bias, in place: b -= rate * sign(share of tokens per expert - target).

    bias [E]; share [E] of the tokens with r + b' > 0, not a > 0: a positive bias adds no expert to a > 0, so that
    counting there would let the bias of an idle expert grow for ever.
    """
    bias -= rate * torch.sign(share - target).to(bias.dtype)
