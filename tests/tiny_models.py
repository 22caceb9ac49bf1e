"""A tiny random model of a stock architecture (llama), for what does not depend on ours."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import sentencepiece

DATA = Path(__file__).parent / "data"


def write_stock_llama(
    path: Path, *, n_embd: int = 64, n_ff: int = 96, n_layer: int = 2, n_head: int = 2, n_ctx: int = 128
) -> Path:
    """Write a float32 GGUF of architecture llama with the tokenizer of tests/data and return its path."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "tokenizer.model"))
    n_vocab = pieces.vocab_size()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny stock llama")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(n_embd // n_head)
    writer.add_vocab_size(n_vocab)
    _add_tokenizer(writer, pieces)
    rng = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        scale = 0.02 if len(shape) > 1 else 0.0
        writer.add_tensor(name, (rng.standard_normal(shape) * scale * 10 + (len(shape) == 1)).astype(np.float32))

    add("token_embd.weight", n_vocab, n_embd)
    add("output_norm.weight", n_embd)
    add("output.weight", n_vocab, n_embd)
    for i in range(n_layer):
        add(f"blk.{i}.attn_norm.weight", n_embd)
        add(f"blk.{i}.ffn_norm.weight", n_embd)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", n_embd, n_embd)
        add(f"blk.{i}.ffn_gate.weight", n_ff, n_embd)
        add(f"blk.{i}.ffn_up.weight", n_ff, n_embd)
        add(f"blk.{i}.ffn_down.weight", n_embd, n_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, pieces: sentencepiece.SentencePieceProcessor) -> None:
    ids = range(pieces.vocab_size())
    kinds = [
        gguf.TokenType.UNKNOWN
        if pieces.is_unknown(i)
        else gguf.TokenType.CONTROL
        if pieces.is_control(i)
        else gguf.TokenType.BYTE
        if pieces.is_byte(i)
        else gguf.TokenType.NORMAL
        for i in ids
    ]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([pieces.id_to_piece(i) for i in ids])
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
