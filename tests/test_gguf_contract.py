"""python_bindings/gguf_contract.py names exactly what the C++ reads: keys, tensors and the names of the "
"enumerations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blockffn import gguf_contract as names

ROOT = Path(__file__).parent.parent
MODELS = "\n".join(file.read_text() for file in sorted((ROOT / "ggml-ops" / "llama").glob("blockffn-*.cpp")))
UPSTREAM_ARCH = ROOT / "build" / "pristine" / "vendor" / "llama.cpp" / "src" / "llama-arch.cpp"

NOT_KEYS = ("ARCH", "ARCH_EAGLE", "ROUTER_NORM_NORMAL")
# keys of other architectures that the loader refuses, or upstream's own that no converter of ours writes
FOREIGN = {
    "attention.causal",
    "embedding_length_out",
    "nextn_predict_layers",
    "pooling_type",
    "rope.scaling.attn_factor",
}
CONSTANTS = {name: value for name, value in vars(names).items() if name.isupper() and isinstance(value, str)}
# llama.cpp only sees how many rows the output matrix has, and nothing of what was measured
PYTHON_ONLY = {names.DRAFT_TOKENS, *(value for name, value in CONSTANTS.items() if name.startswith("PROFILE_"))}
TENSORS = {name: value for name, value in CONSTANTS.items() if value.endswith((".weight", ".bias"))}
KEYS = {name: value for name, value in CONSTANTS.items() if name not in TENSORS and name not in NOT_KEYS}


def added_lines() -> str:
    """What our patches add to upstream's files."""
    lines = []
    for patch in sorted((ROOT / "patches").glob("*.patch")):
        lines += [
            line[1:] for line in patch.read_text().splitlines() if line.startswith("+") and not line.startswith("+++")
        ]
    return "\n".join(lines)


def tables(source: str) -> tuple[dict[str, str], dict[str, str]]:
    """The two name tables of llama-arch.cpp: LLM_KV_* -> key, LLM_TENSOR_* -> tensor."""
    keys = dict(re.findall(r"\{\s*(LLM_KV_\w+),\s*\"%s\.([^\"]+)\"", source))
    tensors = dict(re.findall(r"\{\s*(LLM_TENSOR_\w+),\s*\"([^\"]+)\"", source))
    return keys, tensors


def all_tables() -> tuple[dict[str, str], dict[str, str]]:
    if not UPSTREAM_ARCH.is_file():
        pytest.skip("upstream's source is not unpacked: run `make setup`")
    keys, tensors = tables(UPSTREAM_ARCH.read_text())
    our_keys, our_tensors = tables(added_lines())
    return keys | our_keys, tensors | our_tensors


def test_keys_that_our_patches_add_are_in_the_contract() -> None:
    added, _ = tables(added_lines())
    assert added, "no key found in patches/*.patch"
    assert set(added.values()) <= set(KEYS.values())


def test_tensors_that_our_patches_add_are_in_the_contract() -> None:
    _, added = tables(added_lines())
    known = {value.replace("{i}", "%d").rpartition(".")[0] for value in TENSORS.values()}
    assert added and {name for name in added.values() if name.startswith("blk.")} <= known


def test_keys_that_the_model_reads_are_in_the_contract() -> None:
    keys, _ = all_tables()
    read = set(re.findall(r"\bLLM_KV_\w+", MODELS))
    assert len(read) > 15
    unknown = {key for key in read if keys.get(key) not in {*KEYS.values(), *FOREIGN}}
    assert not unknown


def test_tensors_that_the_model_reads_are_in_the_contract() -> None:
    _, tensors = all_tables()
    read = re.findall(r"tn\((LLM_TENSOR_\w+),\s*\"(weight|bias)\"", MODELS)
    assert len(read) > 15
    in_code = {f"{tensors[name].replace('%d', '{i}')}.{suffix}" for name, suffix in read}
    by_helper = {names.ATTN_Q, names.ATTN_K, names.ATTN_V}  # create_tensor_qkv
    assert in_code | by_helper == set(TENSORS.values())


def test_every_key_of_the_contract_exists_in_the_source() -> None:
    keys, _ = all_tables()
    assert set(KEYS.values()) - PYTHON_ONLY <= set(keys.values())


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("ROUTER_NORMS", (*names.ROUTER_NORMS, names.ROUTER_NORM_NORMAL)),
        ("ROUTER_BIASES", names.BIAS_METHODS),
        ("ACTIVATIONS", names.ACTIVATIONS),
        ("layouts", names.EXPERT_LAYOUTS),
    ],
)
def test_enumerations(table: str, expected: tuple[str, ...]) -> None:
    """Same names in the same order: the position is the value of the C++ enumeration."""
    found = re.search(rf"\b{table}\[\]\s*=\s*\{{([^}}]*)\}}", MODELS)
    assert found is not None
    assert tuple(re.findall(r"\"([^\"]*)\"", found[1])) == expected


@pytest.mark.parametrize(("entry", "name"), [("BLOCKFFN", names.ARCH), ("BLOCKFFN_EAGLE", names.ARCH_EAGLE)])
def test_architecture_names(entry: str, name: str) -> None:
    assert re.search(rf'LLM_ARCH_{entry},\s*"{name}"', added_lines())
