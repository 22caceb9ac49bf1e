"""What a GGUF model is: hyper-parameters, tensor types, parameters in all and per token, bits per weight, router.

>>> from blockffn.inspection import describe
>>> report = describe("model.gguf")                              # doctest: +SKIP
>>> report["parameters"]["total"], report["bits_per_weight"]     # doctest: +SKIP
(7204096, 16.01)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blockffn import gguf_contract as names
from blockffn.errors import BlockffnError
from blockffn.gguf_file import GgufFile, TensorInfo, read_gguf

LONG = 16  # arrays longer than this are shown by their length
EXAMPLE_SHARE = 0.2  # share of experts for which the active parameters are stated when nothing was measured

# Read aloud by `--measure` when no text is given.
SAMPLE_TEXT = """\
The library keeps every letter that the two sisters wrote between the spring of 1871 and the winter of 1880. Most of
them speak of the weather, the price of wool and the health of the horses, but here and there a sentence shows how much
the younger one missed the sea. "I walk to the mill each evening", she wrote in May, "and listen to the water until it
sounds like something larger."

def moving_average(values, width):
    \"\"\"Return the means of `width` neighbouring values.\"\"\"
    total = sum(values[:width])
    means = [total / width]
    for old, new in zip(values, values[width:]):
        total += new - old
        means.append(total / width)
    return means
"""


def describe(path: str | Path, measure: str | None = None) -> dict[str, Any]:
    """Return the report on a model file as plain Python values; `measure` is a text to measure the sparsity on."""
    file = read_gguf(path)
    report: dict[str, Any] = {
        "file": str(path),
        "files": len(file.paths),
        "file_bytes": sum(part.stat().st_size for part in file.paths),
        "architecture": file.architecture,
        "name": file.metadata.get("general.name"),
        "hyper_parameters": _keys(file, f"{file.architecture}."),
        "general": _keys(file, "general."),
        "tokenizer": _tokenizer(file),
        "tensor_types": _types(file.tensors),
        "parameters": _parameters(file),
        "bits_per_weight": bits_per_weight(file.tensors),
        "router": _router(file),
        "profile": read_profile(file),
    }
    if measure is not None:
        report["measured"] = _measure(path, measure, report["parameters"], _is_dense_by_nature(file))
    return report


def read_profile(file: GgufFile) -> dict[str, Any] | None:
    """Return the profile of a file as {tokens, tls, union, step_growth}; None where it has none."""
    tokens = file.get(names.PROFILE_TOKENS)
    if tokens is None:
        return None
    sizes, unions = file.get(names.PROFILE_UNION_TOKENS, []), file.get(names.PROFILE_UNION_EXPERTS, [])
    return {
        "tokens": tokens,
        "tls": file.get(names.PROFILE_TLS),
        "union": dict(zip(sizes, unions, strict=True)),
        "step_growth": file.get(names.PROFILE_STEP_GROWTH),
    }


def bits_per_weight(tensors: Sequence[TensorInfo]) -> float:
    """Return the mean bits of one weight over all tensors."""
    n_elements = sum(tensor.n_elements for tensor in tensors)
    return 8 * sum(tensor.n_bytes for tensor in tensors) / n_elements if n_elements else 0.0


def expert_tensors(file: GgufFile) -> list[TensorInfo]:
    """Return the tensors of routed experts, in either layout."""
    routed_layers = {_layer(tensor.name) for tensor in file.tensors if ".ffn_gate_inp." in tensor.name}
    dense = file.get(names.EXPERT_LAYOUT) == "dense"
    kinds = ("ffn_up", "ffn_gate", "ffn_down") if dense else ("ffn_up_exps", "ffn_gate_exps", "ffn_down_exps")
    wanted = re.compile(rf"^blk\.\d+\.({'|'.join(kinds)})\.weight$")
    return [tensor for tensor in file.tensors if wanted.match(tensor.name) and _layer(tensor.name) in routed_layers]


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _keys(file: GgufFile, prefix: str) -> dict[str, Any]:
    found = {name: value for name, value in file.metadata.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): _short(value) for name, value in found.items()}


def _short(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if len(set(map(str, value))) == 1 and len(value) > 1:
        return f"{value[0]} x {len(value)}"
    return value if len(value) <= LONG else f"{len(value)} values"


def _tokenizer(file: GgufFile) -> dict[str, Any]:
    result = {
        "model": file.metadata.get("tokenizer.ggml.model"),
        "n_tokens": len(file.metadata.get("tokenizer.ggml.tokens", [])),
        "chat_template": "tokenizer.chat_template" in file.metadata,
    }
    for name in ("bos", "eos", "padding"):
        result[f"{name}_token_id"] = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    for name in ("eot", "eom"):  # where a second and third token end a text
        if (token := file.metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            result[f"{name}_token_id"] = token
    return result


def _types(tensors: Sequence[TensorInfo]) -> dict[str, dict[str, int]]:
    result: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        row = result.setdefault(tensor.type, {"tensors": 0, "elements": 0, "bytes": 0})
        row["tensors"] += 1
        row["elements"] += tensor.n_elements
        row["bytes"] += tensor.n_bytes
    return dict(sorted(result.items(), key=lambda item: -item[1]["bytes"]))


def _parameters(file: GgufFile) -> dict[str, Any]:
    """Return the counts; what is active per token depends on the text, so it is stated as always + k * per_expert."""
    total = sum(tensor.n_elements for tensor in file.tensors)
    routed = sum(tensor.n_elements for tensor in expert_tensors(file))
    n_experts = int(file.get(names.EXPERT_COUNT, 0) or 0)
    result = {"total": total, "always_active": total - routed, "routed": routed}
    if routed and n_experts:
        result["per_expert_all_layers"] = routed // n_experts
        if not _is_dense_by_nature(file):
            result["active_at_20_percent"] = total - routed + round(EXAMPLE_SHARE * routed)
    return result


def _is_dense_by_nature(file: GgufFile) -> bool:
    """Return whether idle experts have a score too, so that every parameter works on every token."""
    return bool(file.get(names.ROUTER_NORM) == "normal")


def _router(file: GgufFile) -> dict[str, Any] | None:
    """Return the router's keys, or None for a model without routed experts."""
    layers = sorted({_layer(tensor.name) for tensor in file.tensors if ".ffn_gate_inp." in tensor.name})
    if not layers:
        return None
    wanted = {
        "experts": names.EXPERT_COUNT,
        "expert_dim": names.EXPERT_FEED_FORWARD_LENGTH,
        "layout": names.EXPERT_LAYOUT,
        "activation": names.EXPERT_ACTIVATION,
        "norm": names.ROUTER_NORM,
        "norm_epsilon": names.ROUTER_NORM_EPSILON,
        "norm_scale": names.ROUTER_NORM_SCALE,
        "scale": names.ROUTER_SCALE,
        "bias_method": names.ROUTER_BIAS_METHOD,
        "threshold": names.ROUTER_THRESHOLD,
        "shared_dim": names.EXPERT_SHARED_FEED_FORWARD_LENGTH,
    }
    found = {label: _short(file.get(key)) for label, key in wanted.items() if file.get(key) is not None}
    found["moe_layers"] = len(layers)
    found["norm_weight"] = any(".ffn_router_norm." in tensor.name for tensor in file.tensors)
    found["gated"] = any(".ffn_gate" in tensor.name for tensor in expert_tensors(file))
    return found


def _measure(path: str | Path, text: str, parameters: dict[str, Any], is_dense: bool) -> dict[str, Any]:
    """Evaluate a text and return the sparsity of the router's choices on it; is_dense: idle experts work as well."""
    import blockffn
    from blockffn.sparsity import of_activity

    llm = blockffn.Llama(path)
    try:
        tokens = llm.tokenize(text.encode(), add_bos=True, special=True)[: llm.n_ctx()]
        if not tokens:
            raise BlockffnError("the text to measure on is empty")
        found = of_activity(llm.active_experts(tokens)).to_dict()
    finally:
        llm.close()
    active = parameters["always_active"] + round((1.0 if is_dense else 1.0 - found["tls"]) * parameters["routed"])
    figures = {name: value for name, value in found.items() if not name.startswith(("n_", "layer_"))}
    counts = {name: sum(found[f"layer_{name}"]) for name in ("dead", "always_on")}
    return {
        "tokens": len(tokens),
        "token_sparsity": found["tls"],
        "active_parameters": active,
        "routed_experts": found["n_experts"] * len(found["layer_tls"]),
        **counts,
        **figures,
    }
