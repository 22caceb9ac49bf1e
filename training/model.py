"""The decoder of BlockFFN and DECO in plain torch: the formulas, in the order in which a token meets them.

    >>> from blockffn.training.model import ReferenceModel
    >>> model = ReferenceModel.from_checkpoint("examples/tiny-blockffn")
    >>> out = model.forward([1, 318, 275])
    >>> out.logits.shape, out.active.shape
    (torch.Size([3, 4096]), torch.Size([8, 3, 32]))

This is what the C++ graph is compared with, and the trainer trains these very modules. Nothing is cached, absorbed,
folded or skipped: every expert is computed and multiplied with its score, zero or not. Parameters carry the canonical
names and shapes of blockffn.convert.model. B sequences of T tokens, h = hidden size, E experts of width d.
Sources: BlockFFN arXiv 2507.08771, DECO arXiv 2605.10933, MLA DeepSeek-V2 arXiv 2405.04434 section 2.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from blockffn.convert.model import MlaConfig, ModelConfig, MoeConfig
from blockffn.errors import BlockffnError

SUM_EPS = 1e-5  # in the denominator of router norm `sum`
QUERY_BLOCK = 256  # of attention in a training step: in bfloat16 128 and 512 are slower, with 512 tokens


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32 at least."""
    wide = x.to(at_least_float32(x.dtype))
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight.to(normed.dtype)).to(x.dtype)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else becomes float32."""
    return dtype if dtype == torch.float64 else torch.float32


def activation(name: str, x: Tensor) -> Tensor:
    """The elementwise functions of gguf_contract.ACTIVATIONS; norm_silu* are built on silu by `Experts.hidden`."""
    if name == "silu":
        return functional.silu(x)
    if name == "relu":
        return functional.relu(x)
    if name == "gelu":
        return functional.gelu(x)
    if name == "relu_squared":
        return functional.relu(x).square()
    raise BlockffnError(f"activation: expected one of silu, relu, gelu, relu_squared, found {name!r}")


@lru_cache(maxsize=4)
def rope_of(config: ModelConfig, n_token: int, dim: int, dtype: torch.dtype, device: torch.device) -> Rope:
    """The tables that every layer of a model shares, made once per length, type and device."""
    return Rope(config, n_token, dim, dtype, device)


class Rope:
    """Rotary positions 0..T-1 on two halves (NeoX order), base and linear scaling of the configuration."""

    @torch.inference_mode(False)  # tables that are kept must also serve a training step
    def __init__(self, config: ModelConfig, n_token: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        if config.rope_scaling not in ("none", "linear", "dynamic"):
            raise BlockffnError(f"rope_scaling: expected none, linear or dynamic, found {config.rope_scaling!r}")
        if config.rope_scaling == "dynamic" and n_token > config.n_ctx_train:
            raise BlockffnError(
                f"rope_scaling dynamic: {n_token} tokens are more than the trained context of {config.n_ctx_train}, "
                "where the scaling would begin to change all positions; use a shorter text"
            )
        dtype = at_least_float32(dtype)
        position = torch.arange(n_token, dtype=torch.float64, device=device)
        if config.rope_scaling == "linear":
            position = position / config.rope_factor
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
        angle = torch.outer(position, config.rope_base**-exponent)  # [T, dim/2]
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x [B, H, T, dim]: the pair (i, i + dim/2) turns by position * base^(-2i/dim)."""
        first, second = x.to(self.cos.dtype).chunk(2, dim=-1)  # [B, H, T, dim/2] each
        turned = torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)
        return turned.to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(dim)) v over the past: q, k [B, H, T, dim], v [B, H, T, dim_v] -> [B, T, H * dim_v].

    A training step on the CPU takes blocks of queries: forward and backward need half the time of torch's kernel in
    bfloat16, and as plain products over all keys they would need 1.5 times as much.
    """
    if q.requires_grad and q.device.type == "cpu":
        mixed = torch.cat(list(_attention_blocks(q * q.shape[-1] ** -0.5, k, v)), dim=2)  # [B, H, T, dim_v]
    else:
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.transpose(1, 2).flatten(2)


def _attention_blocks(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Tensor]:
    """The rows of the scaled queries q in blocks of QUERY_BLOCK; a block sees no key after its own last token."""
    for first in range(0, q.shape[2], QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, q.shape[2])
        future = torch.full((last - first, last), -torch.inf, dtype=q.dtype).triu(first + 1)
        scores = torch.matmul(q[:, :, first:last], k[:, :, :last].mT) + future  # [B, H, block, last]
        yield torch.matmul(scores.softmax(dim=-1), v[:, :, :last])


def parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter; `Decoder.initialise` or a checkpoint fills it."""
    return nn.Parameter(torch.empty(shape))


class GqaAttention(nn.Module):
    """Grouped-query attention: H query heads share n_head_kv heads of keys and values; no biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config, h, dim = config, config.n_embd, config.head_dim
        self.q = parameter(config.n_head * dim, h)
        self.k = parameter(config.n_head_kv * dim, h)
        self.v = parameter(config.n_head_kv * dim, h)
        self.o = parameter(h, config.n_head * dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, h] -> [B, T, h]."""
        c, (b, t, _) = self.config, x.shape
        q = functional.linear(x, self.q).view(b, t, c.n_head, c.head_dim).transpose(1, 2)  # [B, H, T, dim]
        k = functional.linear(x, self.k).view(b, t, c.n_head_kv, c.head_dim).transpose(1, 2)  # [B, H_kv, T, dim]
        v = functional.linear(x, self.v).view(b, t, c.n_head_kv, c.head_dim).transpose(1, 2)  # [B, H_kv, T, dim]
        rope, group = rope_of(c, t, c.head_dim, x.dtype, x.device), c.n_head // c.n_head_kv
        k, v = rope(k).repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # [B, H, T, dim]
        return functional.linear(causal_attention(rope(q), k, v), self.o)


class MlaAttention(nn.Module):
    """Multi-head latent attention: queries, and keys with values, pass through low-rank bottlenecks.

    Per head, q and k are [nope | rope]; the rotated part of k is one vector that all heads share. The bottleneck norms
    have an eps of their own.
    """

    def __init__(self, config: ModelConfig, mla: MlaConfig) -> None:
        super().__init__()
        self.config, self.mla, h, n_head = config, mla, config.n_embd, config.n_head
        self.q_a = parameter(mla.q_lora_rank, h)
        self.q_a_norm = parameter(mla.q_lora_rank)
        self.q_b = parameter(n_head * (mla.nope_head_dim + mla.rope_head_dim), mla.q_lora_rank)
        self.kv_a = parameter(mla.kv_lora_rank + mla.rope_head_dim, h)
        self.kv_a_norm = parameter(mla.kv_lora_rank)
        self.kv_b = parameter(n_head * (mla.nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
        self.o = parameter(h, n_head * mla.v_head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, h] -> [B, T, h]."""
        m, n_head, (b, t, _) = self.mla, self.config.n_head, x.shape
        q_latent = rms_norm(functional.linear(x, self.q_a), self.q_a_norm, m.norm_eps)  # [B, T, q_lora]
        q = functional.linear(q_latent, self.q_b).view(b, t, n_head, -1).transpose(1, 2)  # [B, H, T, nope + rope]
        q_nope, q_rope = q.split([m.nope_head_dim, m.rope_head_dim], dim=-1)

        kv = functional.linear(x, self.kv_a)  # [B, T, kv_lora + rope]
        kv_latent, k_rope = kv.split([m.kv_lora_rank, m.rope_head_dim], dim=-1)
        kv_latent = rms_norm(kv_latent, self.kv_a_norm, m.norm_eps)  # [B, T, kv_lora]
        kv = functional.linear(kv_latent, self.kv_b).view(b, t, n_head, -1).transpose(1, 2)  # [B, H, T, nope + v]
        k_nope, v = kv.split([m.nope_head_dim, m.v_head_dim], dim=-1)

        rope = rope_of(self.config, t, m.rope_head_dim, x.dtype, x.device)
        k_rope = rope(k_rope[:, None]).expand(-1, n_head, -1, -1)  # [B, H, T, rope], one for all heads
        q = torch.cat((q_nope, rope(q_rope)), dim=-1)  # [B, H, T, nope + rope]
        k = torch.cat((k_nope, k_rope), dim=-1)  # [B, H, T, nope + rope]
        return functional.linear(causal_attention(q, k, v), self.o)


class DenseFfn(nn.Module):
    """The ordinary gated FFN, y = W_down (act(W_gate x) * W_up x), of dense twins and of DECO's first layers."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.activation = config.dense_activation
        self.gate = parameter(width, config.n_embd)
        self.up = parameter(width, config.n_embd)
        self.down = parameter(config.n_embd, width)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """x [B, T, h] -> [B, T, h], and no router logits."""
        hidden = activation(self.activation, functional.linear(x, self.gate)) * functional.linear(x, self.up)
        return functional.linear(hidden, self.down), None


class Experts(nn.Module):
    """ReLU-routed experts: y = sum_e s_e W_down[e] u_e, plus a shared expert where there is one.

    The router says how many experts a token activates: all with a positive score (BlockFFN section 3.1, DECO eq. 4-7).
    """

    def __init__(self, config: ModelConfig, moe: MoeConfig) -> None:
        super().__init__()
        self.config, self.moe, h = config, moe, config.n_embd
        e, d = moe.n_expert, moe.expert_dim
        self.router = parameter(e, h)
        self.router_norm = parameter(moe.router_weight) if moe.router_weight else None
        self.expert_bias = nn.Parameter(torch.zeros(e), requires_grad=False) if moe.bias_method != "none" else None
        self.up_exps = parameter(e, d, h)
        self.gate_exps = parameter(e, d, h) if moe.gated else None
        self.down_exps = parameter(e, h, d)
        self.act_norm = parameter(d) if moe.activation in ("norm_silu", "norm_silu_nomean") else None
        shared = moe.shared_dim
        self.shared_up = parameter(shared, h) if shared else None
        self.shared_gate = parameter(shared, h) if shared and moe.shared_gated else None
        self.shared_down = parameter(h, shared) if shared else None
        self.given: Tensor | None = None  # bool [B, T, E]: active sets to use in place of the router's own
        self.threshold, self.budget = 0.0, 0  # the dial of ReferenceModel.forward
        self.top_k = 0  # softmax and top-k in place of ReLU, for the trainer's comparisons; no published layout has it

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, h] -> y [B, T, h] and the router logits r [B, T, E] (float32 at least)."""
        wide = at_least_float32(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # who is active must not depend on the training precision
            logits = functional.linear(x.to(wide), self.router.to(wide))  # [B, T, E]
        scores = self.dialled(self.scores(self.selected(logits))).to(x.dtype)  # [B, T, E]
        weighted = self.hidden(x) * scores[..., None]  # [B, T, E, d]
        down = self.down_exps.transpose(0, 1).flatten(1)  # [h, E*d]
        y = functional.linear(weighted.flatten(2), down)
        return (y if self.shared_up is None else y + self.shared(x)), logits

    def selected(self, logits: Tensor) -> Tensor:
        """a = relu(r) inside the active set, else 0; the expert bias moves the threshold, not the score: [B, T, E]."""
        if self.top_k:
            p = logits.softmax(dim=-1)
            return torch.zeros_like(p).scatter(-1, (top := p.topk(self.top_k, dim=-1)).indices, top.values)
        a = functional.relu(logits)
        if self.given is not None:
            return a * self.given
        return a if self.expert_bias is None else torch.where(self.routed(logits), a, torch.zeros_like(a))

    def routed(self, logits: Tensor) -> Tensor:
        """r + b' > 0, bool [B, T, E]: what the expert bias selects, experts without a positive score included.

        b' is the bias, or the bias times the root mean square of r over all experts (method rms).
        """
        if self.expert_bias is None:
            return logits > 0
        bias = self.expert_bias.to(logits.dtype)  # [E]
        if self.moe.bias_method == "rms":
            bias = bias * logits.square().mean(dim=-1, keepdim=True).sqrt()  # [B, T, E]
        return logits + bias > 0

    def scores(self, a: Tensor) -> Tensor:
        """s = norm(a) * weight * router_scale: [B, T, E]. Means run over all experts, the inactive zeros included."""
        moe = self.moe
        if moe.router_norm == "sum":
            a = a / (a.sum(dim=-1, keepdim=True) * moe.router_norm_scale + SUM_EPS)
        elif moe.router_norm == "rms":
            a = rms_norm(a, None, moe.router_norm_eps)
        elif moe.router_norm == "normal":
            a = rms_norm(a - a.mean(dim=-1, keepdim=True), None, moe.router_norm_eps)
        elif moe.router_norm != "none":
            raise BlockffnError(f"router norm: expected none, rms, sum or normal, found {moe.router_norm!r}")
        weight = 1.0 if self.router_norm is None else self.router_norm.to(a.dtype)
        return a * weight * moe.router_scale

    def dialled(self, s: Tensor) -> Tensor:
        """s [B, T, E] with zeros where |s| < threshold * max_e |s|, then outside the `budget` largest sum_t |s|."""
        if self.threshold > 0:
            s = s * (s.abs() >= self.threshold * s.abs().amax(dim=-1, keepdim=True))
        if 0 < self.budget < s.shape[-1]:
            kept = s.abs().sum(dim=-2, keepdim=True).topk(self.budget, dim=-1).indices  # [B, 1, budget]
            s = s * torch.zeros_like(s[:, :1]).scatter(-1, kept, 1.0)
        return s

    def computed(self, logits: Tensor) -> Tensor:
        """Router logits [B, T, E] -> bool [B, T, E]: a > 0, before any norm, as far as the dial lets it."""
        a = self.selected(logits)
        return (a > 0) & (self.dialled(self.scores(a)) != 0) if self.threshold or self.budget else a > 0

    def hidden(self, x: Tensor) -> Tensor:
        """u_e = act(W_up[e] x), or act(W_gate[e] x) * (W_up[e] x) where gated: [B, T, E, d]."""
        shape = (*x.shape[:-1], self.moe.n_expert, self.moe.expert_dim)
        up = functional.linear(x, self.up_exps.flatten(0, 1)).view(shape)  # [B, T, E, d]
        if self.gate_exps is None:
            return self.expert_activation(up)
        return self.expert_activation(functional.linear(x, self.gate_exps.flatten(0, 1)).view(shape)) * up

    def expert_activation(self, z: Tensor) -> Tensor:
        """z [B, T, E, d] -> same. NormSiLU: minus the mean over all E*d, RMSNorm over d with shared weight, SiLU."""
        name = self.moe.activation
        if name in ("norm_silu", "norm_silu_norms"):
            z = z - z.mean(dim=(-2, -1), keepdim=True)
        if name in ("norm_silu", "norm_silu_nomean"):
            z = rms_norm(z, self.act_norm, self.moe.activation_eps)
        return activation("silu" if name.startswith("norm_silu") else name, z)

    def shared(self, x: Tensor) -> Tensor:
        """The expert that every token passes: SwiGLU, or plain without shared_gate (ReMoE): [B, T, h]."""
        assert self.shared_up is not None and self.shared_down is not None
        up, act = functional.linear(x, self.shared_up), self.config.dense_activation
        if self.shared_gate is None:
            return functional.linear(activation(act, up), self.shared_down)
        return functional.linear(activation(act, functional.linear(x, self.shared_gate)) * up, self.shared_down)


class Layer(nn.Module):
    """x + scale * attention(norm(x)), then x + scale * ffn(norm(x))."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.attn_norm = parameter(config.n_embd)
        self.attention = GqaAttention(config) if config.mla is None else MlaAttention(config, config.mla)
        self.ffn_norm = parameter(config.n_embd)
        width = config.dense_dim[index]
        if width == 0 and config.moe is None:
            raise BlockffnError(f"layer {index}: the configuration gives neither a dense width nor experts")
        self.ffn: DenseFfn | Experts
        self.ffn = DenseFfn(config, width) if width or config.moe is None else Experts(config, config.moe)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, T, h] -> x [B, T, h] and the router logits [B, T, E] of an expert layer."""
        scale, eps = self.config.residual_scale, self.config.rms_eps
        x = x + scale * self.attention(rms_norm(x, self.attn_norm, eps))
        y, router_logits = self.ffn(rms_norm(x, self.ffn_norm, eps))
        return x + scale * y, router_logits


class Decoder(nn.Module):
    """The whole model over batches: embedding, layers, final norm, head. The trainer and `ReferenceModel` share it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = parameter(config.n_vocab, config.n_embd)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.n_layer))
        self.recompute = False  # the layers' activations anew in the backward pass
        self.output_norm = parameter(config.n_embd)
        self.lm_head = None if config.tied else parameter(config.n_vocab, config.n_embd)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """tokens [B, T] -> hidden [B, T, h] after the final norm, and per expert layer the router logits [B, T, E]."""
        x = functional.embedding(tokens, self.embed) * self.config.embedding_scale  # [B, T, h]
        routers: list[Tensor] = []
        for layer in self.layers:
            x, router_logits = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
            if router_logits is not None:
                routers.append(router_logits)
        return rms_norm(x, self.output_norm, self.config.rms_eps), routers

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., h] after the final norm -> [..., V]."""
        head = self.embed if self.lm_head is None else self.lm_head
        return functional.linear(hidden * self.config.logit_scale, head)

    def expert_layers(self) -> list[Experts]:
        """The layers' expert modules, in order: n_moe_layers of them."""
        return [layer.ffn for layer in self.layers if isinstance(layer.ffn, Experts)]

    def active(self, routers: Sequence[Tensor]) -> list[Tensor]:
        """Which experts compute. Per layer: router logits [B, T, E] -> bool [B, T, E]."""
        return [ffn.computed(r) for ffn, r in zip(self.expert_layers(), routers, strict=True)]

    def canonical(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the names of blockffn.convert.model: ``layers.0.q_a``, not ``...attention.q_a``."""
        for name, value in self.named_parameters():
            yield re.sub(r"^(layers\.\d+)\.(?:attention|ffn)\.", r"\1.", name), value

    @torch.no_grad()
    def load(self, tensors: Mapping[str, object]) -> None:
        """Fill all parameters from canonical tensors, torch or numpy. Raises BlockffnError naming what is missing."""
        for name, value in self.canonical():
            if name not in tensors:
                raise BlockffnError(f"tensor {name}: expected shape {list(value.shape)}, found none in the checkpoint")
            source = torch.as_tensor(tensors[name])
            if source.shape != value.shape:
                raise BlockffnError(
                    f"tensor {name}: expected shape {list(value.shape)}, found {list(source.shape)}; "
                    "config.json and weights disagree"
                )
            value.copy_(source)

    @torch.no_grad()
    def initialise(self, std: float, router_scale: float, generator: torch.Generator) -> None:
        """Start values for training: norms 1, router factor `router_scale`, matrices normal(0, std)."""
        for name, value in self.canonical():
            short = name.rpartition(".")[2]
            if short == "router_norm":
                value.fill_(router_scale)
            elif short == "expert_bias":
                value.zero_()
            elif value.dim() == 1:
                value.fill_(1.0)
            else:
                value.normal_(0.0, std, generator=generator)


@dataclass(frozen=True)
class Output:
    """What the reference says about one text of T tokens."""

    logits: Tensor  # [T, V]
    hidden: Tensor  # [T, h], after the final norm, before the logit scale
    active: Tensor  # bool [n_moe_layers, T, E]
    router_logits: Tensor  # [n_moe_layers, T, E]


class ReferenceModel:
    """A checkpoint in torch, for parity checks; float32, or float64 on request. One text at a time, no cache."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, object], dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        self.decoder = Decoder(config).to(dtype)
        self.decoder.load(tensors)
        self.decoder.requires_grad_(False)

    @classmethod
    def from_checkpoint(cls, src: str | PathLike[str], dtype: torch.dtype = torch.float32) -> ReferenceModel:
        """Read a checkpoint of any layout that the converter reads. Raises BlockffnError as the converter does."""
        from blockffn.convert.tensor_map import load_canonical

        config, tensors = load_canonical(src)
        return cls(config, tensors, dtype)

    @torch.no_grad()
    def forward(
        self,
        tokens: Sequence[int] | Tensor,
        active: npt.NDArray[np.bool_] | None = None,
        threshold: float = 0.0,
        budget: int = 0,
    ) -> Output:
        """Evaluate tokens [T] from position 0. Raises BlockffnError for no tokens or an id outside the vocabulary.

        active: bool [n_moe_layers, T, E], active sets to use in place of the router's own; scores stay those of its
        logits. It separates what the weights do from choices that rounding flips.
        threshold, budget: leave out experts as blockffn.dial says; the whole text is one batch.
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64)
        if ids.dim() != 1 or ids.numel() == 0:
            raise BlockffnError(f"tokens: expected at least one token in one row, found shape {list(ids.shape)}")
        if int(ids.min()) < 0 or int(ids.max()) >= self.config.n_vocab:
            raise BlockffnError(
                f"tokens: expected ids from 0 to {self.config.n_vocab - 1}, found {ids.tolist()[:8]}..."
            )
        layers = self.decoder.expert_layers()
        try:
            for layer, given in zip(layers, () if active is None else active, strict=active is not None):
                layer.given = torch.from_numpy(given)[None]
            for layer in layers:
                layer.threshold, layer.budget = threshold, budget
            hidden, routers = self.decoder(ids[None])
            chosen = [a[0] for a in self.decoder.active(routers)]
        finally:
            for layer in layers:
                layer.given, layer.threshold, layer.budget = None, 0.0, 0
        shape = (0, ids.numel(), 0)
        return Output(
            logits=self.decoder.logits(hidden)[0],
            hidden=hidden[0],
            active=torch.stack(chosen) if chosen else torch.zeros(shape, dtype=torch.bool),
            router_logits=torch.stack([r[0] for r in routers]) if routers else torch.zeros(shape),
        )

    def generate(self, tokens: Sequence[int], n_predict: int) -> list[int]:
        """The `n_predict` tokens that follow by largest logit (fewer when an end token comes first, which is kept)."""
        text = list(tokens)
        for _ in range(n_predict):
            text.append(int(self.forward(text).logits[-1].argmax()))
            if text[-1] in self.config.eos_ids:
                break
        return text[len(tokens) :]
