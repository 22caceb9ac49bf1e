"""Configurations: what is believed, what is derived, and what the notes say about it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint

from blockffn.convert import families, load_canonical
from blockffn.convert.checkpoint import Checkpoint, open_checkpoint
from blockffn.convert.deco import parse_layer_freq
from blockffn.convert.families import read_config
from blockffn.convert.model import ModelConfig
from blockffn.errors import BlockffnError

DECO: dict[str, Any] = {"family": "deco", "norm": "simple", "attention": "gqa", "n_head": 4, "n_head_kv": 4}


def read(folder: Path, **options: Any) -> tuple[ModelConfig, str]:
    """Configuration and notes of a checkpoint with these options."""
    checkpoint: Checkpoint = open_checkpoint(write_checkpoint(folder, with_tokenizer=False, **options))
    return read_config(checkpoint), "\n".join(checkpoint.notes)


def test_llama_cpp_has_limits(tmp_path: Path) -> None:
    config, _ = read(tmp_path)
    families.check_runs(dataclasses.replace(config, n_layer=512))
    with pytest.raises(BlockffnError, match="at most 512 layers"):
        families.check_runs(dataclasses.replace(config, n_layer=513))


def test_scales(tmp_path: Path) -> None:
    config, _ = read(tmp_path, n_layer=3)
    assert (config.embedding_scale, config.logit_scale) == (12.0, 32 / 64)
    assert config.residual_scale == pytest.approx(1.4 / math.sqrt(3), abs=1e-12)


def test_norms_inside_mla_have_their_own_eps(tmp_path: Path) -> None:
    config, _ = read(tmp_path)
    assert config.mla is not None and (config.rms_eps, config.mla.norm_eps) == (1e-5, 1e-6)


def test_v_head_dim_of_the_file_is_ignored(tmp_path: Path) -> None:
    config, notes = read(tmp_path, n_head=2, nope=20, config={"v_head_dim": 999})
    assert config.mla is not None and config.mla.v_head_dim == 32
    assert "v_head_dim = 999 is stale" in notes


def test_training_files_have_their_own_value_width(tmp_path: Path) -> None:
    """BMTrain's code takes dim_v_head, whatever hidden size / heads is; a missing vocab_size follows from the rows."""
    shape = {"layout": "bmtrain", "n_head": 2, "nope": 20}

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            at = f"encoder.layers.{layer}.self_att.self_attention."
            tensors[at + "kv_up_proj.weight"] = torch.zeros(2 * (20 + 24), 16)
            tensors[at + "o_proj.weight"] = torch.zeros(64, 2 * 24)

    changes = {"dim_v_head": 24, "vocab_size": None}
    config, notes = read(tmp_path, **shape, edit=widen, config=changes)  # type: ignore[arg-type]
    assert config.mla is not None and (config.mla.v_head_dim, config.n_vocab) == (24, 512)
    assert "the embedding has 512 rows" in notes
    load_canonical(tmp_path)


def test_defaults_of_the_authors_code(tmp_path: Path) -> None:
    dropped = ["norm_scale", "norm_after_router", "rms_norm_eps", "router_act", "hidden_act", "tie_word_embeddings"]
    config, notes = read(tmp_path, tied=True, norm="sum", config=dict.fromkeys(dropped))
    assert config.moe is not None
    assert (config.tied, config.rms_eps, config.moe.router_norm, config.moe.router_norm_scale) == (
        True,
        1e-6,
        "sum",
        1.0,
    )
    assert (config.moe.activation, config.rope_base) == ("silu", 10000.0)
    assert all(key in notes for key in dropped if key != "norm_scale")


def test_missing_norm_name_is_settled_by_the_tensor(tmp_path: Path) -> None:
    config, notes = read(tmp_path, norm="rms", config={"norm_after_router": None})
    assert config.moe is not None and config.moe.router_norm == "rms"
    assert "the tensors router_norm.weight say rms" in notes


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_missing_attention_type_is_settled_by_the_tensors(tmp_path: Path, attention: str) -> None:
    config, _ = read(tmp_path, attention=attention, config={"attention_type": None})
    assert (config.mla is not None) == (attention == "mla")


def test_remoe_counts_the_shared_experts(tmp_path: Path) -> None:
    config, _ = read(tmp_path, family="remoe", n_expert=5, n_shared=2, expert_dim=24)
    assert config.moe is not None
    assert (config.moe.n_expert, config.moe.shared_dim, config.moe.router_norm) == (5, 48, "none")


def test_linear_rope(tmp_path: Path) -> None:
    config, _ = read(tmp_path, config={"rope_scaling": {"type": "linear", "factor": 4.0}})
    assert (config.rope_scaling, config.rope_factor) == ("linear", 4.0)


def test_dynamic_rope_names_its_limit(tmp_path: Path) -> None:
    config, notes = read(tmp_path, config={"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})
    assert (config.rope_scaling, config.rope_factor) == ("dynamic", 2.0)
    assert "up to 256 tokens of context, not beyond" in notes


ROPE_5 = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}


@pytest.mark.parametrize("family", [{}, DECO], ids=["blockffn", "deco"])
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_parameters": ROPE_5, "rope_theta": None}, (5e5, "linear", 4.0)),
        ({"rope_parameters": ROPE_5, "rope_theta": 5e5, "rope_scaling": ROPE_5}, (5e5, "linear", 4.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2, "rope_theta": 7e3}, "rope_theta": None}, (7e3, "linear", 2)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": None}, (5e5, "none", 1.0)),
        ({"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0}, "rope_theta": None}, (5e5, "none", 1)),
        ({"rope_parameters": {}, "rope_theta": 9e4}, (9e4, "none", 1.0)),
    ],
)  # fmt: skip
def test_rope_parameters(
    tmp_path: Path, family: dict[str, Any], config: dict[str, Any], expected: tuple[float, str, float]
) -> None:
    """What transformers 5 saves in place of rope_theta and rope_scaling."""
    found, notes = read(tmp_path, **family, config=config)
    assert (found.rope_base, found.rope_scaling, found.rope_factor) == expected
    assert "rope_" not in notes


def test_unread_rope_settings_are_named(tmp_path: Path) -> None:
    _, notes = read(tmp_path, config={"rope_parameters": ROPE_5 | {"beta_fast": 32}, "rope_theta": None})
    assert "keys that are not read: rope_parameters.beta_fast" in notes


def test_unread_keys_are_named(tmp_path: Path) -> None:
    """The note says what was not read; whether it matters, the converter cannot know."""
    _, notes = read(tmp_path, config={"favourite_colour": "blue"})
    assert "keys that are not read: favourite_colour" in notes and "influence" not in notes


def test_training_files_are_untied_by_default(tmp_path: Path) -> None:
    """BMTrain's own default; that of the Hugging Face class is true."""
    config, notes = read(tmp_path, layout="bmtrain", config={"tie_lm_head": None})
    assert not config.tied and "no tie_lm_head; BMTrain's code then uses False" in notes


def test_deco_believes_the_keys_that_shapes_confirm(tmp_path: Path) -> None:
    config, notes = read(tmp_path, **DECO)
    assert (config.n_layer, config.n_head_kv, config.dense_dim) == (2, 4, (96, 0))
    assert "believed num_layers = 2 and not num_hidden_layers = 32: the tensors have 2 layers" in notes
    assert "believed num_query_groups = 4 and not num_key_value_heads = 2" in notes
    assert "believed ffn_hidden_size = 96 and not intermediate_size = 10240" in notes


def test_deco_may_also_be_right_in_the_old_keys(tmp_path: Path) -> None:
    config, notes = read(tmp_path, **DECO, config={"num_layers": 9, "num_hidden_layers": 2})
    assert config.n_layer == 2 and "believed num_hidden_layers = 2 and not num_layers = 9" in notes


@pytest.mark.parametrize("key", ["num_layers", "num_query_groups", "ffn_hidden_size"])
def test_deco_without_the_new_key_needs_a_right_old_one(tmp_path: Path, key: str) -> None:
    with pytest.raises(BlockffnError, match="the tensors show"):
        read(tmp_path, **DECO, config={key: None})


def test_deco_scales_of_the_base_model_are_not_believed(tmp_path: Path) -> None:
    config, notes = read(tmp_path, **DECO, config={"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256})
    assert (config.embedding_scale, config.residual_scale, config.logit_scale) == (1.0, 1.0, 1.0)
    assert "not believed, as use_mup is false: scale_emb, scale_depth, dim_model_base" in notes


def test_deco_gate_is_decided_by_the_tensor(tmp_path: Path) -> None:
    config, notes = read(tmp_path, **DECO, gated=True, config={"expert_not_gated": None})
    assert config.moe is not None and config.moe.gated
    assert "expert_gate_proj is there" in notes
    config, notes = read(tmp_path, **DECO, gated=True, config={"expert_not_gated": True})
    assert config.moe is not None and config.moe.gated
    assert "not believed" in notes


def test_deco_names_unknown_keys_about_routing(tmp_path: Path) -> None:
    """They may be of training only, or not: a warning, apart from the keys that say nothing about experts."""
    _, notes = read(tmp_path, **DECO, config={"moe_router_temperature": 0.5, "favourite_colour": "blue"})
    assert (
        "WARNING: config.json: unknown keys about the experts were not applied: moe_router_temperature = 0.5" in notes
    )
    assert "keys that are not read: favourite_colour" in notes


def test_deco_router_type_is_not_read(tmp_path: Path) -> None:
    """The authors' exporter writes the default of the training framework's other router, which is replaced."""
    for value in ("topk", "anything"):
        _, notes = read(tmp_path / value, **DECO, config={"router_type": value, "use_blockffn": None})
        assert f"router_type = '{value}' is not read by a BlockFFN layer" in notes


def test_deco_believes_the_eps_of_the_training_framework(tmp_path: Path) -> None:
    config, notes = read(tmp_path, **DECO, config={"norm_epsilon": 1e-5, "rms_norm_eps": 1e-6})
    assert config.rms_eps == 1e-5 and config.moe is not None and config.moe.activation_eps == 1e-5
    assert "believed norm_epsilon = 1e-05 and not rms_norm_eps = 1e-06" in notes
    config, _ = read(tmp_path, **DECO, config={"norm_epsilon": None, "rms_norm_eps": 1e-6})
    assert config.rms_eps == 1e-6


@pytest.mark.parametrize("key", ["head_dim", "kv_channels"])
def test_deco_head_size_follows_from_the_tensor(tmp_path: Path, key: str) -> None:
    config, notes = read(tmp_path, **DECO, config={key: 128})
    assert config.head_dim == 16 and f"{key} = 128 not believed: q_proj has 64 rows for 4 heads" in notes


def test_deco_without_the_bias_key(tmp_path: Path) -> None:
    config, notes = read(tmp_path, **DECO, config={"moe_router_enable_expert_bias": None})
    assert config.moe is not None and config.moe.bias_method == "none"
    assert "expert_bias is not there" in notes


@pytest.mark.parametrize(
    "config", [{"rotary_base": 5e5, "rope_theta": None}, {"rope_theta": 5e5}, {"rotary_base": 5e5, "rope_theta": 5e5}]
)
def test_deco_rope_base_has_two_names(tmp_path: Path, config: dict[str, Any]) -> None:
    assert read(tmp_path, **DECO, config=config)[0].rope_base == 5e5


def test_deco_router_variants(tmp_path: Path) -> None:
    fixed, _ = read(tmp_path / "fixed", **DECO, router_fixed=True)
    scalar, _ = read(tmp_path / "scalar", **DECO, router_scalar=True)
    unused, _ = read(tmp_path / "null", **(DECO | {"norm": "null"}))
    normal, notes = read(tmp_path / "normal", **(DECO | {"norm": "normal"}))
    assert fixed.moe and scalar.moe and unused.moe and normal.moe
    assert (fixed.moe.router_scale, fixed.moe.router_weight) == (0.75, 0)
    assert (scalar.moe.router_scale, scalar.moe.router_weight) == (1.0, 1)
    assert (unused.moe.router_norm, unused.moe.router_weight) == ("none", 0)
    assert normal.moe.router_norm == "normal" and "dense by nature" in notes


def test_unused_router_norm_of_deco(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.router_norm.weight"] = torch.ones(7)

    _, tensors = load_canonical(write_checkpoint(tmp_path, **(DECO | {"norm": "null"}), edit=add))
    assert "layers.1.router_norm" not in tensors


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([0, 1, 1], [0, 1, 1]),
        ("[0]*1+[1]*2", [0, 1, 1]),
        ("([0] + [1, 1])", [0, 1, 1]),
        ("2*[0]+[1]", [0, 0, 1]),
        ("([0]+[1])*2", [0, 1, 0, 1]),
    ],
)
def test_layer_freq(value: object, expected: list[int]) -> None:
    assert parse_layer_freq(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "__import__('os').system('true')", "[0]*10**9", "[x for x in (1,)]", "[0]*-1", "[2]", "1", 1, "", "[[0]]",
        "[0]*99999", "[0]+1", [0, True], "[0" * 200, "lambda: [0]", None,
    ],
)  # fmt: skip
def test_layer_freq_is_never_evaluated(value: object) -> None:
    with pytest.raises(BlockffnError, match="moe_layer_freq: expected a list of 0 and 1"):
        parse_layer_freq(value)
