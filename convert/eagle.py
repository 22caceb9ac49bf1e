"""An EAGLE-2 draft head -> GGUF (architecture blockffn-eagle), with what it shares with its target.

    report = convert_head("BlockFFN-3B-SFT-EAGLE", "BlockFFN-3B-SFT", "head.gguf", outtype="f16")

The published head has no embedding, no output matrix, no tokenizer and no scales of its own: they are taken from the
target, a checkpoint folder, a hub id, or a converted GGUF file. With `draft_tokens` the head scores only the tokens of
a list (see draft_tokens.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION

from blockffn import gguf_contract as names
from blockffn.convert import writer
from blockffn.convert.checkpoint import Checkpoint, open_checkpoint
from blockffn.convert.convert import ConvertReport
from blockffn.convert.draft_tokens import read_draft_tokens
from blockffn.convert.families import read_config
from blockffn.convert.fields import Fields, check_option, shown
from blockffn.convert.metadata import FILE_TYPES, check_values, model_metadata
from blockffn.convert.plan import OUTTYPES, PlannedTensor, choose_outtype, matrix_type, plan_tensors
from blockffn.convert.tensor_map import Array, map_tensors
from blockffn.convert.vocab import read_vocab
from blockffn.errors import BlockffnError
from blockffn.gguf_file import read_gguf

SHARED_KEYS = (
    names.VOCAB_SIZE, names.CONTEXT_LENGTH, names.EMBEDDING_LENGTH, names.RMS_EPSILON, names.ROPE_FREQ_BASE,
    names.ROPE_SCALING_TYPE, names.ROPE_SCALING_FACTOR, names.EMBEDDING_SCALE, names.LOGIT_SCALE,
)  # fmt: skip
OPTIONAL_KEYS = (names.ROPE_SCALING_FACTOR,)
LAYER = {
    "self_attn.q_proj": names.ATTN_Q, "self_attn.k_proj": names.ATTN_K, "self_attn.v_proj": names.ATTN_V,
    "self_attn.o_proj": names.ATTN_OUT, "input_layernorm": names.ATTN_NORM, "post_attention_layernorm": names.FFN_NORM,
    "mlp.gate_proj": names.FFN_GATE, "mlp.up_proj": names.FFN_UP, "mlp.down_proj": names.FFN_DOWN,
}  # fmt: skip
IGNORED = re.compile(r"embed_tokens\.weight|.*rotary_emb\.inv_freq")  # the target's embedding is used


@dataclass(frozen=True)
class Shared:
    """What a head takes from its target."""

    name: str
    keys: dict[str, Any]  # SHARED_KEYS without the architecture
    tokenizer: dict[str, Any]  # all tokenizer.* keys
    load: Callable[[str], Array]  # GGUF tensor name -> values [n_vocab, n_embd]
    tied: bool  # the output matrix is the embedding


@dataclass(frozen=True)
class HeadShape:
    """Sizes of the head, from its config.json."""

    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int


def convert_head(
    src: str | PathLike[str],
    target: str | PathLike[str],
    outfile: str | PathLike[str],
    *,
    outtype: str = "auto",
    dry_run: bool = False,
    draft_tokens: str | PathLike[str] | None = None,
) -> ConvertReport:
    """Convert the head in folder or hub id `src`, made for `target`, to `outfile`; see the module's docstring.

    Raises BlockffnError, and leaves no file, when a tensor is missing, has another shape or is unknown.
    """
    started = time.monotonic()
    check_option("outtype", outtype, OUTTYPES)
    head = open_checkpoint(str(src))
    shared = read_target(str(target), head.note)
    shape = _read_shape(head, shared.keys[names.EMBEDDING_LENGTH])
    listed = _find_draft_tokens(head, draft_tokens)
    ids = read_draft_tokens(listed, shared.keys[names.VOCAB_SIZE]) if listed else None
    kind = choose_outtype(outtype, head)
    plan = [*_head_tensors(head, shape, shared.keys[names.EMBEDDING_LENGTH], kind), *_shared_tensors(shared, ids, kind)]
    values = _metadata(shape, shared, ids, kind) | shared.tokenizer
    check_values(values)
    report = ConvertReport(
        source=str(src),
        name=str(values["general.name"]),
        family="eagle",
        outtype=kind,
        layout="-",
        files=[Path(outfile)],
        tensors=plan,
        n_tokens=len(shared.tokenizer["tokenizer.ggml.tokens"]),
        notes=head.notes,
        dry_run=dry_run,
    )
    if dry_run:
        writer.check_target(Path(outfile), report.n_bytes)
        return report
    report.files = writer.write_gguf(Path(outfile), values, plan, arch=names.ARCH_EAGLE)
    report.seconds = time.monotonic() - started
    return report


def read_target(target: str, note: Callable[[str], None]) -> Shared:
    """Read what a head needs from a checkpoint or from a converted GGUF file; decisions go to `note`."""
    return _target_file(Path(target), note) if target.endswith(".gguf") else _target_checkpoint(target)


def _find_draft_tokens(head: Checkpoint, given: str | PathLike[str] | None) -> Path | None:
    """The file as it is named, or of this name in the head's folder (or the hub's copy of it)."""
    if given is None:
        if lists := sorted(file.name for file in head.folder.glob("freq_*.pkl")):
            head.note(f"the folder holds {', '.join(lists)}: --draft-tokens NAME cuts the output matrix to its tokens")
        return None
    inside = head.folder / given
    return inside if inside.is_file() and not Path(given).is_file() else Path(given)


def _target_checkpoint(target: str) -> Shared:
    checkpoint = open_checkpoint(target)
    config = read_config(checkpoint)
    everything = model_metadata(config, "expert", "f32")
    keys = {name: everything[names.key(name)] for name in SHARED_KEYS if names.key(name) in everything}
    plan = {t.name: t for t in plan_tensors(checkpoint, config, map_tensors(checkpoint, config), "f32", "expert")}
    return Shared(
        config.name,
        keys,
        read_vocab(checkpoint, config).metadata(),
        lambda name: plan[name].load(),
        names.OUTPUT not in plan,
    )


def _target_file(target: Path, note: Callable[[str], None]) -> Shared:
    file = read_gguf(target)  # all parts of a split model
    if file.architecture != names.ARCH:
        raise BlockffnError(
            f"{target}: expected the architecture {names.ARCH}, found {shown(file.architecture)}: no target of this "
            "head"
        )
    parts, count = file.metadata.get("split.count", 1), file.metadata.get("split.tensors.count", len(file.tensors))
    if parts not in (len(file.paths), 0) or count != len(file.tensors):
        raise BlockffnError(
            f"{target}: expected the {shown(parts)} parts of a split model with {shown(count)} tensors, found "
            f"{len(file.paths)} with {len(file.tensors)}; name the first part by the name that it was written under"
        )
    keys = {name: file.get(name) for name in SHARED_KEYS if file.get(name) is not None}
    missing = [names.key(name) for name in SHARED_KEYS if name not in keys and name not in OPTIONAL_KEYS]
    if missing:
        raise BlockffnError(f"{target}: {missing[0]} is missing: convert the target again")
    tensors = {tensor.name: tensor for tensor in file.tensors}
    size = (keys[names.EMBEDDING_LENGTH], keys[names.VOCAB_SIZE])
    tied = names.OUTPUT not in tensors
    for name in (names.TOKEN_EMBD,) if tied else (names.TOKEN_EMBD, names.OUTPUT):
        if name not in tensors or tensors[name].shape != size:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            raise BlockffnError(f"{target}: {name}: expected {list(size)}, found {found}: convert the target again")
        if tensors[name].type not in ("F32", "F16", "BF16"):
            note(
                f"{name} comes from {tensors[name].type} of {target.name}, with its rounding; name the checkpoint of "
                "the target, or a file in F16 or BF16, to keep it exact"
            )
    tokenizer = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    if len(tokenizer.get("tokenizer.ggml.tokens", ())) != keys[names.VOCAB_SIZE]:
        raise BlockffnError(f"{target}: expected {keys[names.VOCAB_SIZE]} tokens in its tokenizer: convert it again")
    for key, value in tokenizer.items():
        if key.endswith("precompiled_charsmap"):
            tokenizer[key] = bytes(value)

    def load(name: str) -> Array:
        try:
            return tensors[name].read()
        except NotImplementedError as error:
            raise BlockffnError(f"{target}: {name}: {error}; take a target in another type") from error

    return Shared(str(file.metadata.get("general.name", target.stem)), keys, tokenizer, load, tied)


def _read_shape(head: Checkpoint, n_embd: int) -> HeadShape:
    fields = Fields(head.config, f"{head.folder}/config.json", head.note)
    fc = head.tensors.get("fc.weight")
    if fc is None or fc.shape != (n_embd, 2 * n_embd):
        found = "none" if fc is None else " x ".join(map(str, fc.shape))
        raise BlockffnError(
            f"{head.folder}: fc.weight: expected {n_embd} x {2 * n_embd} for a target of hidden size {n_embd}, found "
            f"{found}: not a head of this target"
        )
    heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim") if fields.has("head_dim") else n_embd // heads
    if head_dim % 2:
        fields.wrong("head_dim", "an even number, as coordinates are rotated in pairs")
    return HeadShape(
        n_layer=fields.integer("num_hidden_layers"),
        n_head=heads,
        n_head_kv=fields.integer("num_key_value_heads"),
        head_dim=head_dim,
        n_ff=fields.integer("intermediate_size"),
    )


def _expected(shape: HeadShape, n_embd: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield (checkpoint name, GGUF name, shape) of every tensor of the head."""
    yield "fc.weight", names.FC, (n_embd, 2 * n_embd)
    yield "fc.bias", names.FC_BIAS, (n_embd,)
    yield "input_norm1.weight", names.EMBD_NORM.format(i=0), (n_embd,)
    yield "input_norm2.weight", names.HIDDEN_NORM.format(i=0), (n_embd,)
    q, kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (q, n_embd), "self_attn.k_proj": (kv, n_embd), "self_attn.v_proj": (kv, n_embd),
        "self_attn.o_proj": (n_embd, q), "input_layernorm": (n_embd,), "post_attention_layernorm": (n_embd,),
        "mlp.gate_proj": (shape.n_ff, n_embd), "mlp.up_proj": (shape.n_ff, n_embd),
        "mlp.down_proj": (n_embd, shape.n_ff),
    }  # fmt: skip
    for layer in range(shape.n_layer):
        for part, size in sizes.items():
            if layer > 0 or part != "input_layernorm":
                yield f"layers.{layer}.{part}.weight", LAYER[part].format(i=layer), size


def _head_tensors(head: Checkpoint, shape: HeadShape, n_embd: int, kind: str) -> list[PlannedTensor]:
    plan = []
    for source, name, size in _expected(shape, n_embd):  # ends at the first layer that is not there
        found = head.tensors.get(source)
        if found is None or tuple(found.shape) != size:
            have = "none" if found is None else " x ".join(map(str, found.shape))
            raise BlockffnError(
                f"{head.folder}: tensor {source}: expected {' x '.join(map(str, size))}, found {have}; the checkpoint "
                "is incomplete or of another shape than its config.json says"
            )
        plan.append(PlannedTensor(name, size, matrix_type(size, kind), source, _loader(head, source)))
    known = {tensor.source for tensor in plan}
    for name in sorted(set(head.tensors) - known):
        if not IGNORED.fullmatch(name):
            raise BlockffnError(f"{head.folder}: unknown tensor {name}: expected the tensors of an EAGLE-2 head only")
        head.note(f"{name} is ignored: the head uses the target's embedding")
    return plan


def _loader(head: Checkpoint, source: str) -> Callable[[], Array]:
    return lambda: head.load(source)


def _shared_tensors(shared: Shared, ids: list[int] | None, kind: str) -> list[PlannedTensor]:
    """The target's embedding, and its output matrix where it has one or where the draft vocabulary is cut."""
    n_vocab, n_embd = shared.keys[names.VOCAB_SIZE], shared.keys[names.EMBEDDING_LENGTH]
    size = (n_vocab, n_embd)
    plan = [
        PlannedTensor(names.TOKEN_EMBD, size, matrix_type(size, kind), "target", lambda: shared.load(names.TOKEN_EMBD))
    ]
    output = names.TOKEN_EMBD if shared.tied else names.OUTPUT
    if ids is not None:
        cut = (len(ids), n_embd)
        rows = np.array(ids)
        plan.append(
            PlannedTensor(names.OUTPUT, cut, matrix_type(cut, kind), "target", lambda: shared.load(output)[rows])
        )
    elif not shared.tied:
        plan.append(PlannedTensor(names.OUTPUT, size, matrix_type(size, kind), "target", lambda: shared.load(output)))
    return plan


def _metadata(shape: HeadShape, shared: Shared, ids: list[int] | None, kind: str) -> dict[str, Any]:
    own: dict[str, Any] = {
        names.BLOCK_COUNT: shape.n_layer,
        names.FEED_FORWARD_LENGTH: shape.n_ff,
        names.HEAD_COUNT: shape.n_head,
        names.HEAD_COUNT_KV: shape.n_head_kv,
        names.KEY_LENGTH: shape.head_dim,
        names.VALUE_LENGTH: shape.head_dim,
        names.ROPE_DIMENSION_COUNT: shape.head_dim,
    }
    if ids is not None:
        own[names.DRAFT_TOKENS] = ids
    keys = {names.key(name, names.ARCH_EAGLE): value for name, value in (shared.keys | own).items()}
    return {
        "general.type": "model",
        "general.name": f"{shared.name} EAGLE head",
        "general.file_type": int(FILE_TYPES[kind]),
        "general.quantization_version": GGML_QUANT_VERSION,
    } | keys
