"""Tiny random models of the stock `llama` architecture, for tests that need some model and not ours.

    path = write_llama(tmp_path / "llama.gguf", seed=1, n_layer=2)

The vocabulary has single bytes and `<s>`, `</s>`; weights are drawn once per seed. `scale` makes the next token depend
more or less sharply on the text: greedy text of such a model wanders for thousands of tokens without a loop.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

N_SPECIAL = 3  # <unk>, <s>, </s>
N_VOCAB = 256 + N_SPECIAL


def write_llama(
    path: Path,
    seed: int = 0,
    n_embd: int = 64,
    n_layer: int = 2,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_ff: int = 96,
    scale: float = 1.0,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    vocab_edit: dict[int, bytes] | None = None,
    n_vocab: int = N_VOCAB,
    experts: tuple[int, int] | None = None,
) -> Path:
    """Write one model file; `kind` is the type of the matrices; `vocab_edit` replaces token texts.

    Tokens beyond N_VOCAB are words that no text of the tests holds. experts: how many every layer has (a mixture as
    Mixtral's), and how many of them a token takes.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(n_embd // n_head)
    writer.add_vocab_size(n_vocab)
    if experts:
        writer.add_expert_count(experts[0])
        writer.add_expert_used_count(experts[1])
    add_vocabulary(writer, vocab_edit or {}, n_vocab)
    head = n_embd // n_head

    def add(name: str, *shape: int, gain: float = 1.0) -> None:
        weights = (gain * rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, weights)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    add("token_embd.weight", n_vocab, n_embd, gain=np.sqrt(n_embd))
    for i in range(n_layer):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(n_embd, dtype=np.float32))
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", np.ones(n_embd, dtype=np.float32))
        add(f"blk.{i}.attn_q.weight", n_embd, n_embd, gain=2.0)
        add(f"blk.{i}.attn_k.weight", n_head_kv * head, n_embd, gain=2.0)
        add(f"blk.{i}.attn_v.weight", n_head_kv * head, n_embd)
        add(f"blk.{i}.attn_output.weight", n_embd, n_embd)
        suffix, of_each = ("_exps", (experts[0],)) if experts else ("", ())
        if experts:
            add(f"blk.{i}.ffn_gate_inp.weight", experts[0], n_embd)
        add(f"blk.{i}.ffn_gate{suffix}.weight", *of_each, n_ff, n_embd)
        add(f"blk.{i}.ffn_up{suffix}.weight", *of_each, n_ff, n_embd)
        add(f"blk.{i}.ffn_down{suffix}.weight", *of_each, n_embd, n_ff)
    writer.add_tensor("output_norm.weight", np.ones(n_embd, dtype=np.float32))
    add("output.weight", n_vocab, n_embd, gain=3.0 * scale)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_vocabulary(writer: gguf.GGUFWriter, edit: dict[int, bytes], n_vocab: int = N_VOCAB) -> None:
    """Add bytes and special tokens, some of them with other texts."""
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256))]
    for token, text in edit.items():
        tokens[token] = text
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, *[gguf.TokenType.BYTE] * 256]
    words = [f"word{token}".encode() for token in range(N_VOCAB, n_vocab)]
    tokens, kinds = tokens + words, kinds + [gguf.TokenType.NORMAL] * len(words)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_space_prefix(False)
