"""What a family writes it reads back: read(write(config)) == config, and all tensors, over all that it can hold."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import DATA

from blockffn.convert import families, load_canonical
from blockffn.convert.checkpoint import Checkpoint, TensorInfo
from blockffn.convert.model import MlaConfig, ModelConfig, MoeConfig, canonical_shapes
from blockffn.convert.save import save_checkpoint
from blockffn.convert.tensor_map import map_tensors
from blockffn.gguf_contract import ACTIVATIONS, BIAS_METHODS

EXPERTS = MoeConfig(
    n_expert=5, expert_dim=6, gated=False, activation="silu", activation_eps=0.0, router_norm="none",
    router_norm_eps=0.0, router_norm_scale=1.0, router_scale=1.0, router_weight=0, bias_method="none", shared_dim=0,
    shared_gated=False,
)  # fmt: skip
BASE = ModelConfig(
    name="m", family="blockffn", n_vocab=512, n_embd=16, n_layer=3, n_head=2, n_head_kv=2, head_dim=8, n_ctx_train=256,
    rms_eps=1e-5, rope_base=10000.0, rope_scaling="none", rope_factor=1.0, embedding_scale=12.0,
    residual_scale=1.4 / math.sqrt(3), logit_scale=256 / 16, tied=False, mla=None, moe=EXPERTS, dense_dim=(0, 0, 0),
    dense_activation="silu", bos_id=1, eos_ids=(2,), pad_id=None,
)  # fmt: skip
PLAIN = ("silu", "relu", "gelu", "relu_squared")
MLA = MlaConfig(q_lora_rank=6, kv_lora_rank=5, nope_head_dim=4, rope_head_dim=2, v_head_dim=8, norm_eps=1e-6)
ATTENTION = ({"mla": MLA}, {"n_head_kv": 1}, {})
DECODERS = (
    {},
    {"rope_scaling": "linear", "rope_factor": 4.0, "rope_base": 5e5, "eos_ids": (2, 5), "pad_id": 0},
    {"rope_scaling": "dynamic", "rope_factor": 2.0, "tied": True, "bos_id": None, "eos_ids": ()},
    {"residual_scale": 1.0, "logit_scale": 1.0, "embedding_scale": 1.0, "rms_eps": 1e-6},
    {"residual_scale": 0.1, "logit_scale": 1 / 3, "embedding_scale": 0.3},
)


def blockffn() -> Iterator[ModelConfig]:
    norms = (
        {"router_norm": "rms", "router_norm_eps": None, "router_weight": 5},
        {"router_norm": "sum", "router_norm_scale": 2.0},
        {"router_norm": "none"},
    )
    for activation, norm, attention, decoder in itertools.product(PLAIN, norms, ATTENTION, DECODERS):
        config = dataclasses.replace(BASE, dense_activation=activation, **attention, **decoder)
        eps = {"router_norm_eps": config.rms_eps} if "router_norm_eps" in norm else {}
        yield dataclasses.replace(config, moe=dataclasses.replace(EXPERTS, activation=activation, **norm | eps))


def vanilla() -> Iterator[ModelConfig]:
    for activation, attention, decoder in itertools.product(PLAIN[:3], ATTENTION, DECODERS):
        values = {"family": "vanilla", "moe": None, "dense_dim": (24,) * 3, "dense_activation": activation}
        yield dataclasses.replace(BASE, **values | attention | decoder)


def remoe() -> Iterator[ModelConfig]:
    for activation, shared, attention, decoder in itertools.product(PLAIN, (0, 12), ATTENTION, DECODERS):
        moe = dataclasses.replace(EXPERTS, activation=activation, shared_dim=shared)
        yield dataclasses.replace(BASE, family="remoe", moe=moe, dense_activation=activation, **attention, **decoder)


def deco() -> Iterator[ModelConfig]:
    routers = [
        {"router_norm": norm, "router_weight": weight, "router_scale": scale}
        for norm in ("none", "rms", "normal")
        for weight, scale in ((5, 1.0), (1, 1.0), (0, 1.0), (0, -0.75))
    ]
    fixed = {"family": "deco", "embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0}
    layers = ((0, 0, 0), (24, 0, 0), (24, 24, 0))
    decoders = [{k: v for k, v in decoder.items() if k not in fixed} for decoder in DECODERS[:3]]
    decoders[1] |= {"head_dim": 4, "n_head_kv": 1}
    choices = itertools.product(ACTIVATIONS, routers, BIAS_METHODS, (False, True), (0, 12))
    for number, (activation, router, bias, gated, shared) in enumerate(choices):
        config = dataclasses.replace(BASE, **fixed | decoders[number % 3], dense_dim=layers[number // 3 % 3])
        moe = dataclasses.replace(
            EXPERTS,
            activation=activation,
            activation_eps=config.rms_eps if activation in ("norm_silu", "norm_silu_nomean") else 0.0,
            router_norm_eps=0.0 if router["router_norm"] == "none" else config.rms_eps,
            bias_method=bias,
            gated=gated,
            shared_dim=shared,
            shared_gated=shared > 0,
            **router,
        )
        yield dataclasses.replace(config, moe=moe)


GRID = {"blockffn": blockffn, "vanilla": vanilla, "remoe": remoe, "deco": deco}


@pytest.mark.parametrize("family", GRID)
def test_read_of_write_is_the_same(family: str) -> None:
    """Configuration, names and shapes; no value is needed for that."""
    count = 0
    for config in GRID[family]():
        keys, layout = families.write_config(config)
        stored = {}
        for canonical, shape in canonical_shapes(config).items():
            name, value = layout.store(canonical, torch.empty(shape, device="meta"))
            stored[name] = TensorInfo(name, tuple(value.shape), "BF16", Path("model.safetensors"))
        checkpoint = Checkpoint(Path("m"), "m", json.loads(json.dumps(keys)), stored, [])
        assert families.read_config(checkpoint) == config
        assert set(map_tensors(checkpoint, config)) == set(canonical_shapes(config))
        count += 1
    assert count == {"blockffn": 180, "vanilla": 45, "remoe": 120, "deco": 7 * 12 * 3 * 4}[family]


@pytest.mark.parametrize("family", GRID)
def test_values_come_back(tmp_path: Path, family: str) -> None:
    """Through files: every value in bfloat16, the expert bias in float32."""
    configs = list(GRID[family]())
    random = torch.Generator().manual_seed(1)
    for config in configs[:: len(configs) // 12]:
        tensors = {name: torch.randn(shape, generator=random) for name, shape in canonical_shapes(config).items()}
        folder = tmp_path / "m"
        save_checkpoint(folder, config, tensors.items(), DATA / "tokenizer.model")
        found, values = load_canonical(folder)
        assert found == config and set(values) == set(tensors)
        for name, value in tensors.items():
            wanted = value if name.endswith("expert_bias") else value.bfloat16()
            assert torch.equal(values[name], wanted), name
        assert not list(folder.glob("*.partial"))
