"""What the trainer adds to the language-model loss.

All act on the router of each expert layer; the trainer averages over all layers, a dense one counting as 0. r [B, T, E]
are router logits, a = relu(r), p = a / (sum_e a + 1e-5); `documents` [B, T] numbers the document of each token, -1 for
padding.
Sources: BlockFFN arXiv 2507.08771 section 3.2 and appendix (locality, chunk sparsification), DECO arXiv
2605.10933 (router entropy). To compare with: ReMoE arXiv 2412.14711 (L1), Switch arXiv 2101.03961 (load balance of
top-k routing). `use_pull` is an addition of this project.

    >>> a = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])             # expert 0 serves both tokens
    >>> round(chunk_sparsification(a, torch.zeros(1, 2), 2).item(), 3)
    0.5
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-5


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


def l1(selected: Tensor, documents: Tensor, target: float) -> Tensor:
    """ReMoE: mean over tokens of sum_e f_e a_e, where f_e is expert e's share of active tokens over `target`.

    selected a [B, T, E] -> scalar. f carries no gradient: the more an expert is used, the harder it is held down.
    """
    real = documents >= 0  # [B, T]
    n_real = real.sum().clamp(min=1)
    used = ((selected.detach() > 0) & real[..., None]).sum(dim=(0, 1)) / (target * n_real)  # [E]
    return ((selected * used).sum(dim=-1) * real).sum() / n_real


def load_balance(r: Tensor, selected: Tensor, documents: Tensor) -> Tensor:
    """Switch: E * sum_e f_e P_e, 1 where all experts are used alike. f: shares of choices, P: mean softmax of r.

    r and selected [B, T, E] -> scalar. f carries no gradient.
    """
    real = (documents >= 0)[..., None]  # [B, T, 1]
    chosen = ((selected.detach() > 0) & real).sum(dim=(0, 1)).to(r.dtype)  # [E]
    mean = (r.softmax(dim=-1) * real).sum(dim=(0, 1)) / real.sum().clamp(min=1)  # [E]
    return r.shape[-1] * (chosen / chosen.sum().clamp(min=1) * mean).sum()


def use_pull(r: Tensor, documents: Tensor, pull: Tensor) -> Tensor:
    """Mean over tokens and experts of pull_e * r_e, pull [E] of `controllers.ExpertUse`: the raw logit of an expert
    that is used too little rises, of one that is used too much falls; without it neither objective can wake an expert.

    r [B, T, E] -> scalar; inactive experts have a gradient.
    """
    real = documents >= 0  # [B, T]
    return ((r * pull).mean(dim=-1) * real).sum() / real.sum().clamp(min=1)
