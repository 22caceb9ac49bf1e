"""One set of random matrices in two files of equal work, for engines that do not know our architecture.

    >>> files = equal_work(PEER)                           # doctest: +SKIP
    >>> files.ours.name, files.stock.name
    ('peer-Q4_0.gguf', 'peer-qwen3moe-Q4_0.gguf')

Ours is a DECO model with gated experts and no shared one; stock is qwen3moe with the very same matrices and as many
experts per token as ours has on average. llama-bench feeds random tokens, which share experts by chance only, so the
unions over n tokens are alike as well: engines are compared, not what chunk-level sparsity gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blockffn import gguf_contract
from blockffn.eval.planted import files as planted_files
from blockffn.eval.planted import model as planted
from blockffn.eval.planted.files import Say
from blockffn.eval.planted.model import ACTIVE_SHARE, FIRST_TOKEN, PlantedShape
from blockffn.quantize import canonical_type, quantize

# the hidden size, heads and experts of the 1.2B shape; fewer layers and tokens, since its head would hide the rest
PEER = PlantedShape("peer", "deco", 1792, 12, 14, 56, 128, 32000, activation="silu", gated=True)
SEED = 0

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight", "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight", "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.moe_router.weight": "ffn_gate_inp.weight", "mlp.expert_gate_proj.weight": "ffn_gate_exps.weight",
    "mlp.expert_up_proj.weight": "ffn_up_exps.weight", "mlp.expert_down_proj.weight": "ffn_down_exps.weight",
}  # fmt: skip
_MODEL = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}


@dataclass(frozen=True)
class EqualWork:
    """The two files, and the number of experts that the stock one gives every token."""

    ours: Path
    stock: Path
    n_used: int


def n_used(shape: PlantedShape) -> int:
    """Return the experts of a token that stock architectures, which need a constant number, come closest with."""
    return round(ACTIVE_SHARE * shape.n_expert)


def equal_work(
    shape: PlantedShape = PEER, kind: str = "Q4_0", folder: Path | None = None, say: Say = lambda line: None
) -> EqualWork:
    """Return both files, making what is missing. kind: a type of `blockffn quantize`. Errors: as planted.files."""
    (ours,) = planted_files.files(shape, ("expert",), kind, folder, say)
    stock = ours.with_name(f"{shape.name}-qwen3moe-{kind}.gguf")
    if not stock.exists():
        say(f"writing {stock.name}")
        half = stock.with_name(stock.stem + "-half.gguf")
        try:
            write_stock(shape, half)
            quantize(half, stock, canonical_type(kind))
        finally:
            half.unlink(missing_ok=True)
    return EqualWork(ours, stock, n_used(shape))


def write_stock(shape: PlantedShape, target: Path) -> None:
    """Write the matrices of a gated DECO shape as a qwen3moe file in F16; the router stays F32 as in ours."""
    import gguf

    writer = gguf.GGUFWriter(target, "qwen3moe")
    _write_header(writer, shape)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for name, values in _tensors(shape):
        rounded = values.astype(np.float16)  # as in the checkpoint that ours is converted from
        half = values.ndim > 1 and not name.endswith("ffn_gate_inp.weight")
        writer.add_tensor(name, rounded if half else rounded.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_header(writer: Any, shape: PlantedShape) -> None:
    used, head_dim = n_used(shape), shape.head_dim
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(used * shape.expert_dim)
    writer.add_expert_feed_forward_length(shape.expert_dim)
    writer.add_expert_count(shape.n_expert)
    writer.add_expert_used_count(used)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head)
    writer.add_bool(gguf_contract.key(gguf_contract.FFN_DENSE, "qwen3moe"), True)  # stock kernels in our tree too
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape.n_vocab)
    words = list(planted.pieces(shape))
    bytes_ = [f"<0x{byte:02X}>" for byte in range(FIRST_TOKEN - 3)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *bytes_, *words])
    writer.add_token_scores([0.0] * shape.n_vocab)
    types = [planted_files.UNKNOWN, planted_files.CONTROL, planted_files.CONTROL]
    writer.add_token_types(types + [planted_files.BYTE] * len(bytes_) + [planted_files.NORMAL] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _tensors(shape: PlantedShape) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield (GGUF name, values): what the checkpoint holds, without the router norm, with query and key norms."""
    for name, values in planted.tensors(shape, SEED):
        part = name.removeprefix("model.")
        if not part.startswith("layers."):
            yield _MODEL.get(part, "output.weight"), values
            continue
        _, layer, rest = part.split(".", 2)
        if rest == "mlp.router_norm.weight":
            continue
        yield f"blk.{layer}.{_LAYER[rest]}", _by_expert(shape, rest, values)
        if rest == "self_attn.o_proj.weight":
            for norm in ("attn_q_norm", "attn_k_norm"):
                yield f"blk.{layer}.{norm}.weight", np.ones(shape.head_dim, np.float32)


def _by_expert(shape: PlantedShape, name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Cut the matrices of all experts apart: [E*d, h] to [E, d, h], and down [h, E*d] to [E, h, d]."""
    if "expert_down" in name:
        return values.reshape(shape.n_embd, shape.n_expert, shape.expert_dim).transpose(1, 0, 2)
    return values.reshape(shape.n_expert, shape.expert_dim, shape.n_embd) if "expert_" in name else values
