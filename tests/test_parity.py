"""llama.cpp against torch: the same tiny checkpoint through the converter and the graph, and through the reference.

A covering set instead of the full product: every FFN kind, attention, norm, activation, layout and odd size appears,
and so does every pair that shares code (a norm with a bias, an activation with a gate, a layout with a shared expert).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint

import blockffn
from blockffn.convert.convert import convert_checkpoint
from blockffn.errors import BlockffnError
from blockffn.eval.quality import metrics, parity
from blockffn.training.model import ReferenceModel

TEXT = "import os\n\ndef main():\n    return 1902 # caf\u00e9"
N_GREEDY = 64
ODD = {"n_expert": 7, "n_layer": 1, "n_head": 1}  # the sizes that break assumptions of powers of two
EVEN = {"n_expert": 16, "n_layer": 3, "n_head": 2}

# name -> arguments of write_checkpoint; "dense" in the name: GGUF in the dense layout.
MODELS: dict[str, dict[str, Any]] = {
    # BlockFFN: router norm x attention x tied, both layouts
    "block-rms-mla-odd": {"norm": "rms", "attention": "mla", **ODD},
    "block-rms-gqa-tied-dense": {"norm": "rms", "attention": "gqa", "n_head_kv": 1, "tied": True, **EVEN},
    "block-sum-mla-tied": {"norm": "sum", "attention": "mla", "tied": True, **EVEN},
    "block-sum-gqa-dense-odd": {"norm": "sum", "attention": "gqa", **ODD},
    "block-none-mla-dense": {"norm": "none", "attention": "mla", **EVEN, "n_expert": 7},
    "block-none-gqa-relu-odd": {"norm": "none", "attention": "gqa", "hidden_act": "relu", **ODD},
    "block-rms-gqa-42x16": {"norm": "rms", "attention": "gqa", "n_expert": 42, "expert_dim": 32, "n_head": 4},
    "block-one-expert": {"norm": "rms", "attention": "mla", "n_expert": 1, "n_layer": 1},
    # the dense twin
    "vanilla-mla": {"family": "vanilla", "attention": "mla", **EVEN},
    "vanilla-gqa-tied-gelu-odd": {"family": "vanilla", "attention": "gqa", "tied": True, "hidden_act": "gelu", **ODD},
    # ReMoE: no norm, plain shared expert
    "remoe-gqa-odd": {"family": "remoe", "attention": "gqa", **ODD},
    "remoe-mla-two-shared-dense": {"family": "remoe", "attention": "mla", "n_shared": 2, **EVEN},
    # DECO: norm x activation x gate x bias x shared x dense layers x layout
    "deco-simple-normsilu": {"act": "norm_silu", "norm": "simple", **EVEN},
    "deco-simple-normsilu-gated-dense": {"act": "norm_silu", "norm": "simple", "gated": True, **EVEN},
    "deco-nomean-gated": {"act": "norm_silu_nomean", "norm": "rms", "gated": True, "bias": "base", **EVEN},
    "deco-nomean-dense": {"act": "norm_silu_nomean", "norm": "null", "n_dense": 0, **ODD},
    "deco-norms-base-odd": {"act": "norm_silu_norms", "norm": "simple", "bias": "base", "n_dense": 0, **ODD},
    "deco-norms-gated-dense": {"act": "norm_silu_norms", "norm": "rms", "gated": True, "bias": "rms", **EVEN},
    "deco-silu-rms-bias-rms": {"act": "silu", "norm": "rms", "bias": "rms", "n_dense": 2, **EVEN},
    "deco-relu-scalar-noshared": {"act": "relu", "norm": "simple", "router_scalar": True, "shared_dim": 0, **EVEN},
    "deco-sqrelu-fixed-tied": {"act": "sqrelu", "norm": "simple", "router_fixed": True, "tied": True, **EVEN},
    "deco-gelu-null-bias-dense": {"act": "gelu", "norm": "null", "bias": "base", "n_dense": 0, **ODD},
    "deco-silu-gated-gqa": {"act": "silu", "norm": "simple", "gated": True, "n_head_kv": 1, **EVEN, "n_expert": 7},
    "deco-normal": {"act": "silu", "norm": "normal", **EVEN},
}
# Half-precision weights take other kernels: one model per FFN kind, attention and layout.
HALF = (
    "block-rms-mla-odd", "block-sum-gqa-dense-odd", "vanilla-mla", "remoe-mla-two-shared-dense",
    "deco-simple-normsilu", "deco-nomean-gated", "deco-norms-gated-dense",
)  # fmt: skip
CASES = [(name, "f32") for name in MODELS] + [(name, outtype) for name in HALF for outtype in ("f16", "bf16")]


def arguments(name: str) -> dict[str, Any]:
    """Return the arguments of write_checkpoint for a model of MODELS."""
    chosen = {"attention": "gqa", "family": "deco"} if name.startswith("deco") else {}
    return {**chosen, **MODELS[name], "seed": sum(map(ord, name))}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that writes a model of MODELS once per type and returns its folder."""
    root = tmp_path_factory.mktemp("parity")

    def write(name: str, dtype: str = "f32") -> Path:
        folder = root / f"{name}-{dtype}"
        return folder if folder.exists() else write_checkpoint(folder, dtype=dtype, **arguments(name))

    return write


def to_gguf(folder: Path, name: str, outtype: str) -> Path:
    target = folder / f"{outtype}.gguf"
    if not target.exists():
        convert_checkpoint(folder, target, outtype=outtype, layout="dense" if "dense" in name else "expert")
    return target


@pytest.mark.parametrize(("name", "outtype"), CASES)
def test_matrix(checkpoint: Any, name: str, outtype: str) -> None:
    """Logits, router choices and 64 greedy tokens of every kind of model."""
    folder = checkpoint(name, outtype)
    report = parity.verify(to_gguf(folder, name, outtype), folder, TEXT, N_GREEDY, n_threads=1)
    assert report.weight_type == outtype.upper()
    assert report.bound == {"f32": 1e-6, "f16": 1e-4, "bf16": 1e-4}[outtype]
    assert report.nmse <= report.bound, str(report)
    assert report.failures == [], str(report)
    assert report.greedy_tokens == N_GREEDY and report.n_tokens > 2 * N_GREEDY - 40
    assert (report.router_choices == 0) == name.startswith("vanilla")
    if outtype == "f32":
        assert report.router_differences == 0 and report.top1 == 1.0, str(report)
        assert report.greedy_equal == N_GREEDY or report.greedy_tie, str(report)


UNION = [name for name in MODELS if "dense" not in name and not name.startswith("vanilla")]


@pytest.mark.parametrize("name", UNION)
def test_union_graph_equals_dense_graph(checkpoint: Any, name: str) -> None:
    """The sparse op and stock ops on the same expert-layout file."""
    gguf = to_gguf(checkpoint(name), name, "f32")
    union = blockffn.Llama(str(gguf), n_ctx=128, n_threads=1)
    dense = blockffn.Llama(str(gguf), n_ctx=128, ffn="dense", n_threads=1)
    tokens = union.tokenize(TEXT.encode())
    assert metrics.nmse(union.logits(tokens), dense.logits(tokens)) <= 1e-6
    assert np.array_equal(union.active_experts(tokens), dense.active_experts(tokens))
    union.close()
    dense.close()


@pytest.mark.parametrize("use_mmap", [True, False])
@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_the_sparse_op_runs_on_plain_rows(
    checkpoint: Any, outtype: str, use_mmap: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not only on packed rows: its graph has fewer nodes than the dense one, which computes the same."""
    name = "block-rms-gqa-42x16"
    gguf, nodes = to_gguf(checkpoint(name), name, outtype), {}
    for ffn in ("union", "dense"):
        blockffn.Llama(gguf, n_ctx=64, ffn=ffn, n_threads=1, use_mmap=use_mmap, verbose=True).close()
        nodes[ffn] = int(re.findall(r"graph: nodes = (\d+)", capfd.readouterr().err)[-1])
    assert nodes["union"] < nodes["dense"]


def test_both_layouts_of_one_checkpoint_agree(checkpoint: Any) -> None:
    """The dense baseline holds the same weights."""
    folder = checkpoint("deco-nomean-gated")
    results = []
    for layout in ("expert", "dense"):
        convert_checkpoint(folder, folder / f"{layout}.gguf", outtype="f32", layout=layout)
        llm = blockffn.Llama(str(folder / f"{layout}.gguf"), n_ctx=128, n_threads=1)
        results.append(llm.logits(list(range(3, 40))))
        llm.close()
    assert metrics.nmse(results[0], results[1]) <= 1e-9


def test_q8_0_has_a_bound_of_its_own(checkpoint: Any) -> None:
    folder = checkpoint("block-rms-gqa-42x16")
    report = parity.verify(to_gguf(folder, "block-rms-gqa-42x16", "q8_0"), folder, TEXT, 8, n_threads=1)
    assert report.weight_type == "Q8_0" and report.bound == 1e-2
    assert 1e-7 < report.nmse <= 1e-2 and report.passed, str(report)


@pytest.fixture(scope="module")
def pair(checkpoint: Any) -> Iterator[tuple[Any, ReferenceModel, list[int]]]:
    """A model in llama.cpp, the same in torch, and a text."""
    folder = checkpoint("block-rms-mla-odd")
    llm = blockffn.Llama(str(to_gguf(folder, "block-rms-mla-odd", "f32")), n_ctx=256, n_threads=1, type_k=0, type_v=0)
    yield llm, ReferenceModel.from_checkpoint(folder), llm.tokenize(TEXT.encode())
    llm.close()


@pytest.mark.parametrize(
    ("tensor", "failure"),
    [
        ("layers.0.up_exps", "NMSE of the logits: expected at most 1e-06"),
        ("layers.0.router", r"router: \d+ of \d+ choices differ"),
        ("lm_head", r"greedy text differs after \d+ of 8 tokens"),
    ],
)
def test_a_wrong_weight_is_noticed(pair: Any, tensor: str, failure: str) -> None:
    llm, reference, tokens = pair
    values = dict(reference.decoder.canonical())[tensor]
    kept = values.clone()
    values.copy_(kept.flip(0))
    try:
        report = parity.compare(llm, reference, tokens, 8)
    finally:
        values.copy_(kept)
    assert not report.passed
    assert any(re.search(failure, found) for found in report.failures), report.failures
    assert "FAILED" in str(report)


def test_another_vocabulary_is_refused(pair: Any) -> None:
    llm, reference, tokens = pair
    other = ReferenceModel.__new__(ReferenceModel)
    other.config = dataclasses.replace(reference.config, n_vocab=500)
    with pytest.raises(BlockffnError, match="has 512 tokens, expected the 500"):
        parity.compare(llm, other, tokens)
