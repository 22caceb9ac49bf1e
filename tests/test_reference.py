"""The torch reference against a second reading of the formulas: one token, one head, one expert at a time (float64)."""

from __future__ import annotations

import argparse
import inspect
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from torch.nn import functional

from blockffn.convert.model import MlaConfig, ModelConfig, MoeConfig
from blockffn.errors import BlockffnError
from blockffn.sparsity import of_activity
from blockffn.training.model import Decoder, ReferenceModel, causal_attention

MOE = MoeConfig(
    n_expert=7, expert_dim=4, gated=False, activation="silu", activation_eps=0.0, router_norm="rms",
    router_norm_eps=1e-5, router_norm_scale=1.0, router_scale=1.0, router_weight=7, bias_method="none",
    shared_dim=0, shared_gated=False,
)  # fmt: skip
CONFIG = ModelConfig(
    name="test", family="blockffn", n_vocab=29, n_embd=12, n_layer=2, n_head=3, n_head_kv=3, head_dim=4,
    n_ctx_train=16, rms_eps=1e-5, rope_base=10000.0, rope_scaling="none", rope_factor=1.0, embedding_scale=12.0,
    residual_scale=0.7, logit_scale=0.5, tied=True, mla=MlaConfig(6, 5, 4, 2, 4, 1e-6), moe=MOE, dense_dim=(0, 0),
    dense_activation="silu", bos_id=1, eos_ids=(2,), pad_id=None,
)  # fmt: skip
DECO = replace(MOE, activation="norm_silu", activation_eps=1e-5, router_norm="none", shared_dim=3, shared_gated=True)

REMOE = replace(MOE, router_norm="none", router_weight=0, shared_dim=3, activation="gelu")
NORMAL = replace(DECO, router_norm="normal", router_weight=0, router_scale=0.3, activation="relu_squared")
NO_MEAN = replace(DECO, activation="norm_silu_nomean", bias_method="base")
NO_NORM = replace(DECO, activation="norm_silu_norms", bias_method="rms", shared_dim=0)
LINEAR = replace(CONFIG, mla=None, rope_scaling="linear", rope_factor=4.0)
NONE = replace(MOE, router_norm="none", router_weight=0)
CASES = {
    "block-mla": CONFIG,
    "block-gqa": replace(CONFIG, mla=None, n_head_kv=1, tied=False),
    "sum": replace(CONFIG, moe=replace(MOE, router_norm="sum", router_norm_scale=1.5, router_weight=0)),
    "none-one-layer": replace(CONFIG, n_layer=1, dense_dim=(0,), moe=NONE),
    "one-head-linear-rope": replace(LINEAR, n_head=1, n_head_kv=1, head_dim=12),
    "vanilla": replace(CONFIG, moe=None, dense_dim=(9, 5)),
    "remoe": replace(CONFIG, moe=REMOE, dense_activation="gelu"),
    "deco": replace(CONFIG, moe=DECO, mla=None, dense_dim=(9, 0), embedding_scale=1.0),
    "deco-gated-scalar": replace(CONFIG, moe=replace(DECO, gated=True, router_weight=1), mla=None),
    "deco-nomean-bias": replace(CONFIG, moe=NO_MEAN),
    "deco-norms-bias-rms": replace(CONFIG, moe=NO_NORM),
    "deco-normal-fixed": replace(CONFIG, moe=NORMAL),
}  # fmt: skip


def random_decoder(config: ModelConfig, seed: int = 3) -> Decoder:
    """A decoder in float64 whose norms and biases are random too, so that leaving one out shows."""
    decoder = Decoder(config).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in decoder.canonical():
            value.normal_(0.0, 0.4, generator=generator)
            if name.endswith(("_norm", "attn_norm")):
                value.add_(1.0)
    return decoder


def silu(x):
    return x / (1 + np.exp(-x))


def act(name, x):
    if name == "gelu":
        return np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))(x)
    return {"silu": silu, "relu": lambda v: np.maximum(v, 0), "relu_squared": lambda v: np.maximum(v, 0) ** 2}[name](x)


def norm(x, eps, weight=1.0):
    return x / np.sqrt(np.mean(x**2) + eps) * weight


def rotate(config, x, position):
    """Pair (i, i + half) is a complex number, turned by position * base^(-2i/dim)."""
    half = len(x) // 2
    position = position / (config.rope_factor if config.rope_scaling == "linear" else 1.0)
    z = np.array(
        [
            complex(x[i], x[i + half]) * np.exp(1j * position * config.rope_base ** (-2 * i / len(x)))
            for i in range(half)
        ]
    )
    return np.concatenate([z.real, z.imag])


def heads_of(config, w, x, t):
    """q, k, v of one token, each a list over heads."""
    if config.mla is None:
        q, k, v = (
            np.split(w[name] @ x, n)
            for name, n in (("q", config.n_head), ("k", config.n_head_kv), ("v", config.n_head_kv))
        )
        group = config.n_head // config.n_head_kv
        k, v = [k[h // group] for h in range(config.n_head)], [v[h // group] for h in range(config.n_head)]
        return [rotate(config, a, t) for a in q], [rotate(config, a, t) for a in k], v
    m = config.mla
    q = np.split(w["q_b"] @ norm(w["q_a"] @ x, m.norm_eps, w["q_a_norm"]), config.n_head)
    q = [np.concatenate([a[: m.nope_head_dim], rotate(config, a[m.nope_head_dim :], t)]) for a in q]
    low = w["kv_a"] @ x
    shared = rotate(config, low[m.kv_lora_rank :], t)
    kv = np.split(w["kv_b"] @ norm(low[: m.kv_lora_rank], m.norm_eps, w["kv_a_norm"]), config.n_head)
    return q, [np.concatenate([a[: m.nope_head_dim], shared]) for a in kv], [a[m.nope_head_dim :] for a in kv]


def attention(config, w, rows):
    q, k, v = zip(*(heads_of(config, w, x, t) for t, x in enumerate(rows)), strict=True)
    result = []
    for t in range(len(rows)):
        mixed = []
        for head in range(config.n_head):
            score = np.array([q[t][head] @ k[past][head] / math.sqrt(len(q[t][head])) for past in range(t + 1)])
            weight = np.exp(score) / np.exp(score).sum()
            mixed.append(sum(weight[past] * v[past][head] for past in range(t + 1)))
        result.append(w["o"] @ np.concatenate(mixed))
    return result


def experts(config, w, x):
    """One token through a layer of experts, looping over those with a > 0; returns y, router logits, active set."""
    moe = config.moe
    r = w["router"] @ x
    bias = w.get("expert_bias", np.zeros(moe.n_expert)) * (np.sqrt(np.mean(r**2)) if moe.bias_method == "rms" else 1.0)
    a = np.array([max(r[e], 0.0) if r[e] + bias[e] > 0 else 0.0 for e in range(moe.n_expert)])
    s = a
    if moe.router_norm == "rms":
        s = norm(a, moe.router_norm_eps)
    elif moe.router_norm == "normal":
        s = norm(a - a.mean(), moe.router_norm_eps)
    elif moe.router_norm == "sum":
        s = a / (a.sum() * moe.router_norm_scale + 1e-5)
    s = s * w.get("router_norm", 1.0) * moe.router_scale
    source = w["gate_exps"] if moe.gated else w["up_exps"]
    z = source @ x  # [E, d]
    if moe.activation in ("norm_silu", "norm_silu_norms"):
        z = z - source.reshape(-1, len(x)).mean(axis=0) @ x  # the mean row, as the converter folds it
    y = np.zeros_like(x)
    for e in range(moe.n_expert):
        if a[e] <= 0 and moe.router_norm != "normal":
            continue
        u = (
            norm(z[e], moe.activation_eps, w["act_norm"])
            if moe.activation in ("norm_silu", "norm_silu_nomean")
            else z[e]
        )
        u = act("silu" if moe.activation.startswith("norm") else moe.activation, u)
        u = u * (w["up_exps"][e] @ x) if moe.gated else u
        y = y + s[e] * (w["down_exps"][e] @ u)
    if moe.shared_dim:
        up = w["shared_up"] @ x
        hidden = (
            act(config.dense_activation, w["shared_gate"] @ x) * up
            if moe.shared_gated
            else act(config.dense_activation, up)
        )
        y = y + w["shared_down"] @ hidden
    return y, r, a > 0


def literal(decoder, tokens):
    config = decoder.config
    named = {name: value.detach().numpy() for name, value in decoder.canonical()}
    rows = [named["embed"][t] * config.embedding_scale for t in tokens]
    routers, active = [], []
    for layer in range(config.n_layer):
        prefix = f"layers.{layer}."
        w = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
        mixed = attention(config, w, [norm(x, config.rms_eps, w["attn_norm"]) for x in rows])
        rows = [x + config.residual_scale * m for x, m in zip(rows, mixed, strict=True)]
        inputs = [norm(x, config.rms_eps, w["ffn_norm"]) for x in rows]
        if config.dense_dim[layer]:
            outputs = [w["down"] @ (act(config.dense_activation, w["gate"] @ x) * (w["up"] @ x)) for x in inputs]
        else:
            outputs, r, a = zip(*(experts(config, w, x) for x in inputs), strict=True)
            routers.append(np.stack(r))
            active.append(np.stack(a))
        rows = [x + config.residual_scale * y for x, y in zip(rows, outputs, strict=True)]
    hidden = np.stack([norm(x, config.rms_eps, named["output_norm"]) for x in rows])
    logits = hidden * config.logit_scale @ named.get("lm_head", named["embed"]).T
    return logits, hidden, routers, active


@pytest.mark.parametrize("case", CASES)
def test_equals_literal_formulas(case):
    decoder = random_decoder(CASES[case])
    model = ReferenceModel(decoder.config, dict(decoder.canonical()), torch.float64)
    tokens = [1, 5, 28, 0, 5, 5, 17]
    out = model.forward(tokens)
    logits, hidden, routers, active = literal(decoder, tokens)
    np.testing.assert_allclose(out.logits.numpy(), logits, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(out.hidden.numpy(), hidden, rtol=1e-9, atol=1e-9)
    assert out.active.shape[0] == len(active) == len(decoder.config.moe_layers)
    for layer, (r, a) in enumerate(zip(routers, active, strict=True)):
        np.testing.assert_allclose(out.router_logits[layer].numpy(), r, rtol=1e-9, atol=1e-9)
        assert (out.active[layer].numpy() == a).all()
        assert 0 < a.mean() < 1


def test_positive_bias_adds_no_expert_and_negative_removes():
    decoder = random_decoder(CASES["deco-nomean-bias"])
    ffn = decoder.expert_layers()[0]
    r = torch.tensor([[[-1.0, 0.2, 0.5, -0.1, 0.3, 0.0, 2.0]]], dtype=torch.float64)
    with torch.no_grad():
        ffn.expert_bias.copy_(torch.tensor([5.0, -0.3, 0.0, 1.0, -0.2, 1.0, -2.0]))
    assert ffn.selected(r).tolist() == [[[0.0, 0.0, 0.5, 0.0, pytest.approx(0.3), 0.0, 0.0]]]


@pytest.mark.parametrize("case", ["deco-nomean-bias", "block-mla"])
def test_given_choices_replace_the_routers_own(case):
    """Its own choices given back change nothing; an expert taken away is missing in that token and in later ones."""
    decoder = random_decoder(CASES[case])
    model = ReferenceModel(decoder.config, dict(decoder.canonical()), torch.float64)
    own = model.forward([1, 5, 28, 0])
    same = model.forward([1, 5, 28, 0], own.active.numpy())
    assert torch.equal(same.logits, own.logits) and torch.equal(same.active, own.active)
    fewer = own.active.numpy().copy()
    fewer[0, 2] = False
    other = model.forward([1, 5, 28, 0], fewer)
    assert torch.equal(other.logits[:2], own.logits[:2]) and not torch.allclose(other.logits[2:], own.logits[2:])
    assert not other.active[0, 2].any()
    assert torch.equal(model.forward([1, 5, 28, 0]).logits, own.logits)  # nothing is left behind


def test_token_without_active_expert_gives_zero():
    decoder = random_decoder(CONFIG)
    ffn = decoder.expert_layers()[0]
    x = torch.ones(1, 1, 12, dtype=torch.float64)
    with torch.no_grad():
        ffn.router.fill_(-1.0)
        y, logits = ffn(x)
    assert (logits < 0).all() and (y == 0).all()


def test_negative_router_weight_keeps_expert_active():
    decoder = random_decoder(CONFIG)
    with torch.no_grad():
        decoder.expert_layers()[0].router_norm.fill_(-1.0)
    model = ReferenceModel(CONFIG, dict(decoder.canonical()), torch.float64)
    out = model.forward([3, 4, 5])
    assert (out.active[0] == (out.router_logits[0] > 0)).all() and out.active[0].any()


def test_generate_takes_the_largest_logit_and_stops_at_eos():
    decoder = random_decoder(CONFIG)
    model = ReferenceModel(CONFIG, dict(decoder.canonical()), torch.float64)
    text = [1, 7]
    follow = model.generate(text, 5)
    for token in follow:
        assert token == int(model.forward(text).logits[-1].argmax())
        text.append(token)
    stops = ReferenceModel(replace(CONFIG, eos_ids=(follow[0],)), dict(decoder.canonical()), torch.float64)
    assert stops.generate([1, 7], 5) == follow[:1]


def test_float32_is_close_to_float64():
    decoder = random_decoder(CASES["deco"])
    tensors = dict(decoder.canonical())
    wide = ReferenceModel(decoder.config, tensors, torch.float64).forward([1, 2, 3])
    narrow = ReferenceModel(decoder.config, tensors).forward([1, 2, 3])
    assert narrow.logits.dtype == torch.float32
    torch.testing.assert_close(narrow.logits.double(), wide.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [[], [29], [-1], [[1, 2]]])
def test_refuses_bad_tokens(tokens):
    model = ReferenceModel(CONFIG, dict(random_decoder(CONFIG).canonical()))
    with pytest.raises(BlockffnError, match="tokens: expected"):
        model.forward(tokens)


def test_refuses_dynamic_rope_beyond_trained_context():
    config = replace(CONFIG, rope_scaling="dynamic", rope_factor=2.0, n_ctx_train=3)
    tensors = dict(random_decoder(config).canonical())
    within = ReferenceModel(config, tensors).forward([1, 2, 3])
    plain = ReferenceModel(CONFIG, tensors).forward([1, 2, 3])
    torch.testing.assert_close(within.logits, plain.logits)
    with pytest.raises(BlockffnError, match="dynamic"):
        ReferenceModel(config, tensors).forward([1, 2, 3, 4])


def test_tables_made_in_inference_mode_serve_training():
    decoder = random_decoder(replace(CONFIG, rope_base=12345.0))
    with torch.inference_mode():
        decoder(torch.tensor([[1, 2, 3]]))
    decoder(torch.tensor([[1, 2, 3]]))[0].sum().backward()
    assert torch.isfinite(decoder.embed.grad).all()


def test_names_missing_and_misshapen_tensors():
    tensors = dict(random_decoder(CONFIG).canonical())
    missing = {name: value for name, value in tensors.items() if name != "layers.1.kv_b"}
    with pytest.raises(BlockffnError, match=r"layers\.1\.kv_b: expected shape \[24, 5\], found none"):
        ReferenceModel(CONFIG, missing)
    with pytest.raises(BlockffnError, match=r"embed: expected shape \[29, 12\], found \[28, 12\]"):
        ReferenceModel(CONFIG, {**tensors, "embed": tensors["embed"][:28]})


@pytest.mark.parametrize("length", [1, 7, 256, 257, 600])
def test_attention_of_a_training_step_is_that_of_torch(length):
    """Blocks of queries, forward and backward, in float64; blocks that are not full, and a single one."""
    q, k, v = (torch.randn(2, 3, length, dim, dtype=torch.float64, requires_grad=True) for dim in (5, 5, 4))
    found, wanted = causal_attention(q, k, v), functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(found, wanted.transpose(1, 2).flatten(2))
    weights = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    expected = torch.autograd.grad((wanted.transpose(1, 2).flatten(2) * weights).sum(), (q, k, v))
    torch.testing.assert_close(gradients, expected)


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize(
    "name,n_parameter,loss,sparsity",
    [
        ("tiny-blockffn", 6_756_352, 4.0, 0.7),
        ("tiny-blockffn-draft", 1_520_864, 4.0, 0.7),
        ("tiny-deco", 8_231_367, 4.5, 0.85),
    ],
)
def test_bundled_model_is_sparse_and_knows_python(name, n_parameter, loss, sparsity):
    """The trained weights, not only their shapes: a random model has a loss of ln 4096 = 8.3 and sparsity 0.5."""
    model = ReferenceModel.from_checkpoint(EXAMPLES / name)
    assert sum(value.numel() for _, value in model.decoder.canonical()) == n_parameter
    pieces = SentencePieceProcessor(model_file=str(EXAMPLES / name / "tokenizer.model"))
    tokens = [1, *pieces.encode(inspect.getsource(json.decoder))][:257]
    out = model.forward(tokens[:-1])
    assert torch.nn.functional.cross_entropy(out.logits, torch.tensor(tokens[1:])) < loss
    assert 1 - out.active.float().mean() > sparsity


@pytest.mark.parametrize("name", ["tiny-blockffn", "tiny-blockffn-draft", "tiny-deco"])
def test_experts_of_bundled_models_are_alive(name):
    """At most 5 % dead on their validation text; on 24 windows of the standard library a few more do not come up."""
    model = ReferenceModel.from_checkpoint(EXAMPLES / name)
    pieces = SentencePieceProcessor(model_file=str(EXAMPLES / name / "tokenizer.model"))
    tokens = [t for module in (argparse, inspect, json.decoder) for t in pieces.encode(inspect.getsource(module))]
    windows = [model.forward([1, *tokens[i : i + 512]]).active for i in range(0, 24 * 512, 512)]
    found = of_activity(torch.cat(windows, dim=1).numpy(), window=513)
    assert found.dead_share < 0.15 and found.always_on_share < 0.1
