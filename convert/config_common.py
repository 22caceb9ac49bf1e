"""What both configuration readers share: names of activations, RoPE scaling, token ids, harmless keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockffn.convert.checkpoint import Checkpoint
from blockffn.convert.fields import Fields
from blockffn.errors import BlockffnError

# Dense and shared FFNs; gelu is the exact one (erf) in every checkpoint.
DENSE_ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu"}
EXPERT_ACTIVATIONS = {**DENSE_ACTIVATIONS, "relu2": "relu_squared", "sqrelu": "relu_squared"}

# Keys of Hugging Face configurations that change nothing in the numbers of a forward pass.
HARMLESS = (
    "architectures", "auto_map", "attention_dropout", "hidden_dropout", "dropout", "initializer_range", "model_type",
    "pad_token_id", "tokenizer_class", "torch_dtype", "dtype", "transformers_version", "use_cache", "_name_or_path",
    "_attn_implementation", "attn_implementation", "id2label", "label2id", "return_dict", "output_attentions",
    "output_hidden_states", "is_encoder_decoder", "name_or_path", "pretraining_tp",
)  # fmt: skip


def read_rope(fields: Fields, n_ctx_train: int) -> tuple[str, float]:
    """Return (kind, factor) of rope_scaling: none, linear or dynamic (NTK, inert within the trained context)."""
    if not fields.has("rope_scaling"):
        return "none", 1.0
    scaling = fields.values["rope_scaling"]
    if not isinstance(scaling, dict):
        fields.wrong("rope_scaling", "null or an object with type and factor")
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind in (None, "default"):
        return "none", 1.0
    inner = Fields({"rope_scaling.type": kind, "rope_scaling.factor": scaling.get("factor")}, fields.file, fields.note)
    kind = inner.choice("rope_scaling.type", {"linear": "linear", "dynamic": "dynamic"})
    factor = inner.number("rope_scaling.factor")
    if factor < 1.0:
        inner.wrong("rope_scaling.factor", "a number >= 1")
    if kind == "dynamic":
        fields.note(
            f"rope_scaling dynamic (factor {factor:g}) changes nothing up to max_position_embeddings = {n_ctx_train}, "
            f"and llama.cpp has no such scaling: the model runs in llama.cpp up to {n_ctx_train} tokens of context, "
            "not beyond"
        )
    return kind, factor


def read_token_ids(fields: Fields) -> tuple[int | None, tuple[int, ...], int | None]:
    """Return bos, all eos ids, pad; None or () where config.json has none (the tokenizer may know more)."""

    def ids(key: str) -> tuple[int, ...]:
        if not fields.has(key):
            return ()
        value: Any = fields.values[key]
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in values):
            fields.wrong(key, "a token id or a list of token ids")
        return tuple(values)

    bos, eos, pad = ids("bos_token_id"), ids("eos_token_id"), ids("pad_token_id")
    return (bos[0] if bos else None), eos, (pad[0] if pad else None)


def read_vocab_size(checkpoint: Checkpoint, fields: Fields, embed: str) -> int:
    """Return vocab_size; a file without it is settled by the rows of the embedding."""
    if not fields.has("vocab_size") and embed in checkpoint.tensors:
        rows = checkpoint.tensors[embed].shape[0]
        fields.note(f"{fields.file} has no vocab_size; the embedding has {rows} rows")
        return rows
    return fields.integer("vocab_size")


def count_layers(checkpoint: Checkpoint, prefix: str) -> int:
    """Number of layers that the tensors show: 1 + the largest N in names like ``model.layers.N.``."""
    numbers = [name[len(prefix) :].split(".")[0] for name in checkpoint.tensors if name.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def model_name(checkpoint: Checkpoint) -> str:
    """general.name: the last part of the folder's path or of the hub id."""
    given = Path(checkpoint.source)
    return given.resolve().name if given.exists() else given.name


def check_heads(fields: Fields, hidden: int, heads: int) -> None:
    """hidden_size must be a multiple of the head count: the authors' code derives head sizes from the quotient."""
    if hidden % heads:
        raise BlockffnError(
            f"{fields.file}: num_attention_heads: expected a divisor of hidden_size = {hidden}, found {heads}; "
            "correct the file"
        )
