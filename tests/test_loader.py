"""What llama.cpp's loader says about files of our architectures that are not right: one message with the key or the
tensor, what was expected and what was found; never an assertion, which would end the Python process."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edited_gguf import edit_gguf, values
from small_models import write_models

import blockffn
from blockffn import library
from blockffn.errors import BlockffnError

LAYERS = (0, 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of small_models.py."""
    folder = tmp_path_factory.mktemp("small")
    write_models(folder)
    return folder


def refusal(path: Path) -> str:
    """The message with which the file is refused."""
    with pytest.raises(BlockffnError) as caught:
        blockffn.Llama(path, n_ctx=64, n_threads=1)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


KEYS: list[tuple[str, dict[str, Any], str]] = [
    ("mla", {"block_count": 0}, "blockffn.block_count: expected 1 to 512; found 0"),
    ("mla", {"context_length": 0}, "blockffn.context_length: expected 1 to 2147483647; found 0"),
    ("mla", {"expert_count": 2000}, "blockffn.expert_count: expected at most 1024; found 2000"),
    ("mla", {"expert_used_count": 0}, "blockffn.expert_used_count: expected 1 to the number of experts, 7; found 0"),
    ("mla", {"expert_feed_forward_length": 0}, "blockffn.expert_feed_forward_length: expected at least 1; found 0"),
    ("mla", {"attention.key_length": 31}, "attention.key_length: expected 32 (attention.kv_lora_rank + rope.dimension"),
    ("mla", {"attention.value_length": 15}, "attention.value_length: expected 16 (attention.kv_lora_rank); found 15"),
    ("mla", {"attention.head_count_kv": 2}, "attention.head_count_kv: expected 1 (latent attention); found 2"),
    ("mla", {"attention.key_length_mla": 16}, "key_length_mla: expected more than rope.dimension_count, 16; found 16"),
    ("mla", {"attention.value_length_mla": 0}, "attention.value_length_mla: expected at least 1; found 0"),
    ("mla", {"rope.dimension_count": 15}, "blockffn.rope.dimension_count: expected an even number; found 15"),
    ("mla", {"rope.scaling.type": "llama3"}, "rope.scaling.type: expected none, linear, yarn or longrope; found 'llam"),
    ("mla", {"rope.freq_base": float("nan")}, "blockffn.rope.freq_base: expected a positive number; found nan"),
    ("mla", {"embedding_scale": float("inf")}, "blockffn.embedding_scale: expected a finite number; found inf"),
    ("mla", {"attention.layer_norm_rms_epsilon": -1.0}, "epsilon: expected a number that is not negative; found -1.0"),
    ("mla", {"vocab_size": 4000000000}, "blockffn.vocab_size: expected the rows of token_embd.weight, 512; found 4000"),
    ("mla", {"router.norm": "l2"}, "blockffn.router.norm: expected one of none, rms, sum, normal; found 'l2'"),
    ("mla", {"hidden_activation": "norm_silu"}, "hidden_activation: expected silu, relu or gelu; found norm_silu"),
    ("mla", {"nextn_predict_layers": 1}, "blockffn.nextn_predict_layers: expected 0; found 1"),
    ("mla", {"attention.causal": False}, "blockffn.attention.causal: expected true; found false"),
    ("mla", {"pooling_type": 9}, "blockffn.pooling_type: expected 0 to 3"),
    ("mla", {"embedding_length_out": 32}, "embedding_length_out: expected the embedding length, 64; found 32"),
    ("gqa", {"attention.head_count": [4, 2]}, "attention.head_count: expected the same value for all layers; found 4 "),
    ("gqa", {"attention.head_count": 0}, "blockffn.attention.head_count: expected at least 1; found 0"),
    ("gqa", {"attention.head_count_kv": 3}, "attention.head_count_kv: expected a divisor of the 4 heads; found 3"),
    ("gqa", {"attention.value_length": 8}, "attention.value_length: expected the key length, 16; found 8"),
    ("gqa", {"rope.dimension_count": 32}, "blockffn.rope.dimension_count: expected 1 to 16; found 32"),
    ("twin-gqa", {"feed_forward_length": [96, 0]}, "feed_forward_length: 0 for layer 1, which marks a layer of expert"),
    ("twin-gqa", {"expert_used_count": 1}, "blockffn.expert_used_count: expected 0, as there are no experts; found 1"),
]


@pytest.mark.parametrize(("model", "keys", "message"), KEYS, ids=[f"{m}-{next(iter(k))}" for m, k, _ in KEYS])
def test_key(model: str, keys: dict[str, Any], message: str, models: Path, tmp_path: Path) -> None:
    named = {f"blockffn.{key}": value for key, value in keys.items()}
    assert message in refusal(edit_gguf(models / f"{model}.gguf", tmp_path / "bad.gguf", named))


def test_tokens_that_repeat(models: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    tokens = GGUFReader(models / "mla.gguf").fields["tokenizer.ggml.tokens"].contents()
    tokens[300] = tokens[301]
    bad = edit_gguf(models / "mla.gguf", tmp_path / "bad.gguf", {"tokenizer.ggml.tokens": tokens})
    assert "tokenizer.ggml.tokens: expected 512 different tokens; found 511" in refusal(bad)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "blk.0.ffn_up_exps.weight",
            np.zeros((7, 0, 64), np.float32),
            r"at least one value; found shape \s*64, +0, +7",
        ),
        (
            "blk.0.ffn_up_exps.weight",
            (np.zeros((7, 32, 64), np.int32), "I32"),
            r"a quantized type of weights; found i32",
        ),
        ("blk.0.ffn_router_norm.weight", (np.zeros(7, np.int32), "I32"), r"F32.*found i32"),
        ("blk.1.attn_norm.weight", (np.zeros(68, np.uint8), "Q8_0"), r"F32, F16 or BF16; found q8_0"),
        ("blk.0.attn_norm.weight", np.ones(63, np.float16), r"wrong shape; expected +64, got +63"),
    ],
)
def test_tensor(name: str, value: Any, message: str, models: Path, tmp_path: Path) -> None:
    bad = edit_gguf(models / "mla.gguf", tmp_path / "bad.gguf", tensors={name: value})
    assert re.search(f"tensor '{re.escape(name)}'.*{message}", refusal(bad))


@pytest.mark.parametrize(
    ("model", "name", "kind"),
    [("mla-q8_0", "blk.0.ffn_up_exps.scale", np.float32), ("twin-gqa", "blk.0.attn_k.scale", np.float16)],
)
def test_scales_that_no_graph_reads(model: str, name: str, kind: type, models: Path, tmp_path: Path) -> None:
    value = np.ones(7 if "exps" in name else 1, kind)
    bad = edit_gguf(models / f"{model}.gguf", tmp_path / "bad.gguf", tensors={name: value})
    assert f"tensor '{name}': models of this architecture have no scales beside their weights" in refusal(bad)


VECTORS = {
    "mla": ["attn_norm", "ffn_norm", "attn_q_a_norm", "attn_kv_a_norm", "ffn_router_norm"],
    "deco": ["ffn_act_mean", "ffn_act_norm", "ffn_router_norm", "exp_probs_b"],
}


@pytest.mark.parametrize("model", VECTORS)
@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_vectors_of_other_tools_are_converted(model: str, kind: str, models: Path, tmp_path: Path) -> None:
    """The same logits as those of the file that holds the rounded values as F32, from both graphs."""
    from gguf import GGMLQuantizationType, GGUFReader, quants

    present = {tensor.name for tensor in GGUFReader(models / f"{model}.gguf").tensors}
    suffixes = {"exp_probs_b": "bias"}
    names = {f"blk.{layer}.{v}.{suffixes.get(v, 'weight')}" for v in VECTORS[model] for layer in LAYERS} & present
    assert len(names) >= len(VECTORS[model])
    names |= {"output_norm.weight"}
    short, rounded = {}, {}
    for name in names:
        value = values(models / f"{model}.gguf", name)
        stored = quants.quantize(value, GGMLQuantizationType[kind])
        short[name] = (stored, kind)
        rounded[name] = quants.dequantize(stored, GGMLQuantizationType[kind]).astype(np.float32)
    tokens = [1, 5, 300, 17, 9]
    for ffn in ("union", "dense"):
        logits = []
        for tensors in (short, rounded):
            path = edit_gguf(models / f"{model}.gguf", tmp_path / "vectors.gguf", tensors=dict(tensors))
            llm = blockffn.Llama(path, n_ctx=64, n_threads=1, ffn=ffn)
            logits.append(llm.logits(tokens))
            llm.close()
        assert np.isfinite(logits[0]).all() and np.array_equal(logits[0], logits[1])


def test_draft_head_with_more_rows_than_tokens(models: Path, tmp_path: Path) -> None:
    bad = edit_gguf(
        models / "head.gguf", tmp_path / "head.gguf", tensors={"output.weight": np.zeros((513, 64), np.float32)}
    )
    llm = blockffn.Llama(models / "gqa.gguf", n_ctx=64, n_threads=1)
    with pytest.raises(BlockffnError, match=r"tensor 'output.weight': expected at most 512 rows.*found 513"):
        blockffn.EagleDrafter(bad, llm)
    llm.close()


def test_command_line_says_it_in_one_line(models: Path, tmp_path: Path, blockffn_cli: Any) -> None:
    bad = edit_gguf(models / "mla.gguf", tmp_path / "bad.gguf", {"blockffn.rope.dimension_count": 15})
    result = blockffn_cli("run", "-m", bad, "-p", "a", "-n", "1")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr == f"error: {bad}: blockffn.rope.dimension_count: expected an even number; found 15\n"


def test_mutated_files(models: Path) -> None:
    """`make fuzz` in short: other files with every seed, here one seed and the build that people use."""
    found = library.find()
    assert found is not None
    command = [found / "fuzz-load", "--count", "700", "--seed", "7", *sorted(models.glob("*.gguf"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    numbers = re.search(r"700 mutations: (\d+) loaded, (\d+) refused, 0 failed", result.stdout)
    assert numbers and int(numbers[1]) > 100 and int(numbers[2]) > 300
