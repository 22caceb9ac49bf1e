"""Every checkpoint layout -> canonical tensors (names and shapes: blockffn.convert.model).

    config, tensors = load_canonical("BlockFFN-Medium")
    tensors["layers.0.up_exps"].shape    # torch.Size([40, 128, 1280]), read when asked for

`map_tensors` checks presence, shape and leftovers of all tensors before any value is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from blockffn.convert.checkpoint import BF16, DTYPES, Checkpoint, open_checkpoint
from blockffn.convert.families import read_config
from blockffn.convert.model import ModelConfig
from blockffn.convert.tensor_names import BMTRAIN, DECO_MOE, HF, expert_sources
from blockffn.errors import BlockffnError

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Source:
    """Where one canonical tensor comes from and how its values are rearranged into `shape`."""

    name: str  # in the checkpoint
    stored: tuple[int, ...]  # shape there
    shape: tuple[int, ...]  # canonical
    arrange: Callable[[Array], Array]


def load_canonical(src: str | PathLike[str]) -> tuple[ModelConfig, Mapping[str, torch.Tensor]]:
    """Open a checkpoint of any layout; returns its configuration and a mapping that loads a tensor when asked for it.

    Keys are the canonical names without suffix (``embed``, ``layers.0.q_a``); types are those of the file.
    Raises BlockffnError for everything that is missing, superfluous, misshapen or contradictory.
    """
    checkpoint = open_checkpoint(str(src))
    config = read_config(checkpoint)
    return config, _TorchTensors(checkpoint, map_tensors(checkpoint, config))


def load_array(checkpoint: Checkpoint, source: Source) -> Array:
    """Return the values of one canonical tensor (bfloat16 as dtype BF16)."""
    return source.arrange(checkpoint.load(source.name))


def map_tensors(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, Source]:
    """Return the source of every canonical tensor of this model, in the order of the layers."""
    claimed: set[str] = set()
    sources: dict[str, Source] = {}
    names = BMTRAIN if "dim_model" in checkpoint.config else HF
    for canonical, shape in canonical_shapes(config).items():
        layer, _, part = canonical.rpartition(".")
        prefix = names["layer"].format(i=layer.split(".")[1]) if layer else ""
        if part in ("up_exps", "gate_exps", "down_exps"):
            source = _expert_source(checkpoint, prefix, part, shape)
        else:
            source = _plain_source(checkpoint, prefix, names, part, shape, config)
        _check_type(checkpoint, source.name)
        sources[canonical] = source
        claimed.add(source.name)
    claimed |= _unused(checkpoint, config, names)
    leftover = sorted(set(checkpoint.tensors) - claimed)
    if leftover:
        more = f" and {len(leftover) - 1} more" if len(leftover) > 1 else ""
        raise BlockffnError(
            f"{checkpoint.tensors[leftover[0]].file.name}: tensor {leftover[0]}{more}: nothing in this model claims "
            "it; config.json does not describe this file, or it belongs to another model"
        )
    return sources


def _check_type(checkpoint: Checkpoint, name: str) -> None:
    info = checkpoint.tensors[name]
    if info.dtype not in DTYPES:
        raise BlockffnError(
            f"{info.file.name}: {name}: expected one of {', '.join(sorted(DTYPES))}, found {info.dtype}; convert from "
            "unquantized weights"
        )


def canonical_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of all canonical tensors that a model of this configuration has."""
    shapes: dict[str, tuple[int, ...]] = {"embed": (config.n_vocab, config.n_embd)}
    for i in range(config.n_layer):
        shapes |= {f"layers.{i}.{part}": shape for part, shape in _layer_shapes(config, i).items()}
    shapes["output_norm"] = (config.n_embd,)
    if not config.tied:
        shapes["lm_head"] = (config.n_vocab, config.n_embd)
    return shapes


def _layer_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    h, heads = config.n_embd, config.n_head
    shapes: dict[str, tuple[int, ...]] = {"attn_norm": (h,)}
    if mla := config.mla:
        q_dim, kv_dim = mla.nope_head_dim + mla.rope_head_dim, mla.nope_head_dim + mla.v_head_dim
        shapes |= {"q_a": (mla.q_lora_rank, h), "q_a_norm": (mla.q_lora_rank,), "q_b": (heads * q_dim, mla.q_lora_rank)}
        shapes |= {"kv_a": (mla.kv_lora_rank + mla.rope_head_dim, h), "kv_a_norm": (mla.kv_lora_rank,)}
        shapes |= {"kv_b": (heads * kv_dim, mla.kv_lora_rank), "o": (h, heads * mla.v_head_dim)}
    else:
        kv = config.n_head_kv * config.head_dim
        shapes |= {"q": (heads * config.head_dim, h), "k": (kv, h), "v": (kv, h), "o": (h, heads * config.head_dim)}
    shapes["ffn_norm"] = (h,)
    if (width := config.dense_dim[layer]) > 0:
        return shapes | {"gate": (width, h), "up": (width, h), "down": (h, width)}
    return shapes | _moe_shapes(config)


def _moe_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    moe, h = config.moe, config.n_embd
    assert moe is not None
    n, d = moe.n_expert, moe.expert_dim
    shapes: dict[str, tuple[int, ...]] = {"router": (n, h)}
    if moe.router_weight:
        shapes["router_norm"] = (moe.router_weight,)
    if moe.bias_method != "none":
        shapes["expert_bias"] = (n,)
    if moe.gated:
        shapes["gate_exps"] = (n, d, h)
    shapes |= {"up_exps": (n, d, h), "down_exps": (n, h, d)}
    if moe.activation in ("norm_silu", "norm_silu_nomean"):
        shapes["act_norm"] = (d,)
    if moe.shared_dim:
        if moe.shared_gated:
            shapes["shared_gate"] = (moe.shared_dim, h)
        shapes |= {"shared_up": (moe.shared_dim, h), "shared_down": (h, moe.shared_dim)}
    return shapes


def _expert_source(checkpoint: Checkpoint, prefix: str, part: str, shape: tuple[int, ...]) -> Source:
    """Find the big expert tensor among the layouts; several spell the same name, so the shape tells them apart."""
    tried: list[str] = []
    for candidate in expert_sources(part, shape):
        for suffix in ("", ".weight"):
            name = prefix + candidate.name + suffix
            info = checkpoint.tensors.get(name)
            if info is None:
                continue
            if info.shape == candidate.stored:
                return Source(name, candidate.stored, shape, candidate.arrange)
            tried.append(f"{name}: expected shape {list(candidate.stored)}, found {list(info.shape)}")
    if tried:
        unique = " or ".join(dict.fromkeys(tried))
        raise BlockffnError(f"{checkpoint.folder}: {unique} ({_experts(shape)}); config.json and the weights differ")
    names = " or ".join(dict.fromkeys(prefix + candidate.name for candidate in expert_sources(part, shape)))
    raise BlockffnError(f"{checkpoint.folder}: tensor missing: expected {names}; download the checkpoint again")


def _experts(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} experts, rows and columns of one expert {shape[1]} x {shape[2]}"


def _plain_source(
    checkpoint: Checkpoint, prefix: str, names: dict[str, str], part: str, shape: tuple[int, ...], config: ModelConfig
) -> Source:
    """A tensor that is stored as it is used; only BMTrain's router may be transposed."""
    candidates = [prefix + choice for choice in _spellings(names, part, config)]
    for name in candidates:
        for spelled in (name, name.removesuffix(".weight")):
            info = checkpoint.tensors.get(spelled)
            if info is None:
                continue
            if info.shape == shape:
                return Source(spelled, shape, shape, lambda values: values)
            if part == "router" and names is BMTRAIN and info.shape == shape[::-1]:
                return Source(spelled, info.shape, shape, lambda values: values.T)  # [h, E] -> [E, h]
            if info.shape == () and shape == (1,):
                return Source(spelled, (), shape, lambda values: values.reshape(1))
            raise BlockffnError(
                f"{info.file.name}: {spelled}: expected shape {list(shape)}, found {list(info.shape)}; config.json "
                "and the weights differ"
            )
    raise BlockffnError(
        f"{checkpoint.folder}: tensor missing: expected {' or '.join(candidates)} of shape {list(shape)}; download "
        "the checkpoint again, or correct config.json"
    )


def _spellings(names: dict[str, str], part: str, config: ModelConfig) -> list[str]:
    if config.family == "deco" and part in DECO_MOE:
        return [DECO_MOE[part]]
    return names[part].split(" | ")


def _unused(checkpoint: Checkpoint, config: ModelConfig, names: dict[str, str]) -> set[str]:
    """Tensors that may be there without meaning: a tied head, cached RoPE frequencies, an unused router norm."""
    unused = {name for name in checkpoint.tensors if name.endswith(".rotary_emb.inv_freq")}
    if config.tied and "lm_head.weight" in checkpoint.tensors:
        _check_tied(checkpoint, names["embed"])
        unused.add("lm_head.weight")
    if config.family == "deco" and config.moe and checkpoint.config.get("router_norm_type") in (None, "null"):
        ignored = {name for name in checkpoint.tensors if name.endswith(".mlp.router_norm.weight")}
        if ignored:
            checkpoint.note("router_norm.weight is there but not used: router_norm_type is null")
        unused |= ignored
    return unused


def _check_tied(checkpoint: Checkpoint, embed: str) -> None:
    """With tied embeddings a stored head has to be the embedding itself."""
    _check_type(checkpoint, "lm_head.weight")
    table, head = checkpoint.load(embed), checkpoint.load("lm_head.weight")
    if table.shape != head.shape or table.dtype != head.dtype or not _same(table, head):
        raise BlockffnError(
            "config.json: tie_word_embeddings is true (the default when missing), but lm_head.weight differs from "
            f"{embed}; set it to false if the head was trained by itself, or remove lm_head.weight"
        )
    checkpoint.note("lm_head.weight equals the embedding and is not stored twice (tie_word_embeddings)")


def _same(left: Array, right: Array) -> bool:
    """Bitwise equality, in pieces of 4096 rows so that no large temporary appears."""
    kind = np.dtype(f"u{left.dtype.itemsize}")
    pieces = range(0, left.shape[0], 4096)
    return all(np.array_equal(left[i : i + 4096].view(kind), right[i : i + 4096].view(kind)) for i in pieces)


class _TorchTensors(Mapping[str, "torch.Tensor"]):
    """Canonical tensors as torch tensors, read from disk at each access."""

    def __init__(self, checkpoint: Checkpoint, sources: dict[str, Source]) -> None:
        self._checkpoint = checkpoint
        self._sources = sources

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        values = np.array(load_array(self._checkpoint, self._sources[name]), order="C")  # own, writable memory
        if values.dtype == BF16:
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(values)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)
