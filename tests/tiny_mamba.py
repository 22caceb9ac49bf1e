"""A tiny random model of the stock `mamba` architecture: its memory is a state that cannot be cut at a position.

path = write_mamba(tmp_path / "mamba.gguf")
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tiny_llama import N_VOCAB, add_vocabulary

N_EMBD, N_INNER, N_STATE, N_CONV, RANK, N_LAYER = 32, 64, 8, 4, 4, 2


def write_mamba(path: Path, seed: int = 0) -> Path:
    """Write one model file, float32."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(4096)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(N_CONV)
    writer.add_ssm_inner_size(N_INNER)
    writer.add_ssm_state_size(N_STATE)
    writer.add_ssm_time_step_rank(RANK)
    writer.add_vocab_size(N_VOCAB)
    add_vocabulary(writer, {})

    def add(name: str, *shape: int, gain: float = 1.0) -> None:
        writer.add_tensor(name, (gain * rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32))

    add("token_embd.weight", N_VOCAB, N_EMBD, gain=np.sqrt(N_EMBD))
    for i in range(N_LAYER):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(N_EMBD, dtype=np.float32))
        add(f"blk.{i}.ssm_in.weight", 2 * N_INNER, N_EMBD, gain=2.0)
        add(f"blk.{i}.ssm_conv1d.weight", N_INNER, N_CONV, gain=2.0)
        writer.add_tensor(f"blk.{i}.ssm_conv1d.bias", np.zeros(N_INNER, dtype=np.float32))
        add(f"blk.{i}.ssm_x.weight", RANK + 2 * N_STATE, N_INNER, gain=2.0)
        add(f"blk.{i}.ssm_dt.weight", N_INNER, RANK)
        writer.add_tensor(f"blk.{i}.ssm_dt.bias", np.zeros(N_INNER, dtype=np.float32))
        decay = -np.tile(np.arange(1, N_STATE + 1, dtype=np.float32), (N_INNER, 1))
        writer.add_tensor(f"blk.{i}.ssm_a", decay)
        writer.add_tensor(f"blk.{i}.ssm_d", np.ones(N_INNER, dtype=np.float32))
        add(f"blk.{i}.ssm_out.weight", N_EMBD, N_INNER)
    writer.add_tensor("output_norm.weight", np.ones(N_EMBD, dtype=np.float32))
    add("output.weight", N_VOCAB, N_EMBD, gain=3.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
