"""DECO in llama.cpp against torch, over everything that its configuration can vary.

Every pair of two factors' values appears in the models tested here. All combinations, which take some minutes, run with

    BLOCKFFN_SWEEP=full pytest -q tests/test_parity_deco.py -s      # prints the worst figures of every weight type

Two checks of every F16 and BF16 model: the bound of its type, and that llama.cpp is as near to torch as torch with the
inputs of matrix products rounded to that type (tests/rounding.py), whatever that costs the model at hand.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DTYPES, write_checkpoint
from rounding import rounded_inputs

import blockffn
from blockffn.convert.convert import convert_checkpoint
from blockffn.eval.quality import metrics, parity
from blockffn.training.model import ReferenceModel

TEXT = "import os\n\ndef main():\n    return 1902 # caf\u00e9"
N_GREEDY = 48
# With few experts some tokens have almost none active; a router norm then divides by little more than its eps, and the
# model itself enlarges BF16's rounding (11 experts: NMSE up to 3e-3, all of it in such tokens).
N_EXPERT = 37
Value = str | int | bool

FACTORS: dict[str, tuple[Value, ...]] = {
    "outtype": ("f32", "f16", "bf16"),
    "layout": ("expert", "dense"),
    "gated": (False, True),
    "act": ("silu", "relu", "gelu", "sqrelu", "norm_silu", "norm_silu_nomean", "norm_silu_norms"),
    "router": ("simple", "simple-scalar", "simple-fixed", "rms", "rms-scalar", "rms-fixed", "null", "normal"),
    "bias": ("none", "base", "rms"),
    "shared_dim": (0, 40),
    "n_dense": (0, 1),
}
BOUNDS = {"f32": 1e-6, "f16": 1e-4, "bf16": 1e-4}
MARGIN = 1.25  # of llama.cpp over torch with rounded inputs: a rounding that falls the other way changes what follows
FIGURES = ("models", "nmse", "ideal", "nmse/ideal", "nmse_own", "flipped", "greedy_ties")
Case = tuple[Value, ...]


def pairs_of(case: Case) -> set[tuple[int, Value, int, Value]]:
    """All pairs of values, with the positions of their factors, in one case."""
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(case), 2)}


def every_pair(factors: dict[str, tuple[Value, ...]], tries: int = 40) -> list[Case]:
    """Cases in which every pair of values of two factors appears: greedily, the best of a few random ones each time."""
    source, values = random.Random(0), list(factors.values())
    positions = itertools.combinations(range(len(values)), 2)
    missing = {(i, a, j, b) for i, j in positions for a in values[i] for b in values[j]}
    cases: list[Case] = []
    while missing:
        i, a, j, b = min(missing, key=repr)
        drawn = [[source.choice(known) for known in values] for _ in range(tries)]
        for case in drawn:
            case[i], case[j] = a, b
        cases.append(max(map(tuple, drawn), key=lambda case: len(pairs_of(case) & missing)))
        missing -= pairs_of(cases[-1])
    return cases


FULL = os.environ.get("BLOCKFFN_SWEEP") == "full"
CASES = list(itertools.product(*FACTORS.values())) if FULL else every_pair(FACTORS)


def name_of(case: Case) -> str:
    values = dict(zip(FACTORS, case, strict=True))
    return "-".join(f"{key}={value}" if isinstance(value, int) else str(value) for key, value in values.items())


def arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Arguments of write_checkpoint: 2 layers of experts, after `n_dense` dense ones."""
    norm, _, kind = values["router"].partition("-")
    chosen = {key: values[key] for key in ("gated", "act", "bias", "shared_dim", "n_dense")}
    chosen |= {"norm": norm, "router_scalar": kind == "scalar", "router_fixed": kind == "fixed"}
    sizes = {"n_layer": 2 + values["n_dense"], "n_head": 2, "n_head_kv": 1, "n_expert": N_EXPERT, "n_ff": 80}
    # unit variance everywhere: what enters the residual stream weighs as much as what each block adds. With 0.5 the
    # blocks outweigh it and enlarge each other's rounding: torch with inputs rounded to BF16 then has an NMSE of 0.9e-4
    # in the worst variant (gated squared ReLU, router norm normal, a dense layer), and above 1e-4 for 13 seeds of 60.
    sizes |= {"embed_std": 1.0, "seed": sum(map(ord, str(values)))}
    return {"family": "deco", "attention": "gqa", **sizes, **chosen}


def compare(gguf: Path, source: Path, dtype: torch.dtype, biased: bool) -> tuple[parity.ParityReport, float]:
    """The comparison of a GGUF with its source, and the NMSE of torch with inputs rounded to `dtype` on the same text.

    With an expert bias, both follow llama.cpp's choices, as `parity` does where they differ: scores jump there.
    """
    llm = blockffn.Llama(str(gguf), type_k=0, type_v=0, flash_attn=False, n_threads=1)  # float32 but for the weights
    reference = ReferenceModel.from_checkpoint(source)
    tokens = llm.tokenize(TEXT.encode(), add_bos=True)
    report = parity.compare(llm, reference, tokens, N_GREEDY, source=str(source))
    text = [*tokens, *parity.greedy(llm, tokens, N_GREEDY)]
    chosen = llm.active_experts(text) if biased else None
    llm.close()
    expected = reference.forward(text, chosen).logits.numpy()
    with rounded_inputs(reference, dtype):
        ideal = metrics.nmse(reference.forward(text, chosen).logits.numpy(), expected)
    return report, ideal


@pytest.fixture(scope="module")
def worst() -> Iterator[dict[str, dict[str, float]]]:
    """Largest figures per weight type, printed at the end."""
    figures: dict[str, dict[str, float]] = {}
    yield figures
    for outtype, found in figures.items():
        print(f"\n{outtype}: " + ", ".join(f"{key} {value:.3g}" for key, value in found.items()))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_parity(case: Case, tmp_path: Path, worst: dict[str, dict[str, float]]) -> None:
    values = dict(zip(FACTORS, case, strict=True))
    outtype = str(values["outtype"])
    source = write_checkpoint(tmp_path / "source", dtype=outtype, **arguments(values))
    convert_checkpoint(source, tmp_path / "model.gguf", outtype=outtype, layout=str(values["layout"]))
    report, ideal = compare(tmp_path / "model.gguf", source, DTYPES[outtype], biased=values["bias"] != "none")

    figures = worst.setdefault(outtype, dict.fromkeys(FIGURES, 0.0))
    figures["models"] += 1
    figures["nmse"] = max(figures["nmse"], report.nmse)
    figures["ideal"] = max(figures["ideal"], ideal)
    figures["nmse/ideal"] = max(figures["nmse/ideal"], report.nmse / ideal if ideal else 0.0)
    figures["nmse_own"] = max(figures["nmse_own"], report.nmse_own)
    figures["flipped"] = max(figures["flipped"], report.router_differences / report.router_choices)
    figures["greedy_ties"] += report.greedy_equal < N_GREEDY and report.greedy_tie

    assert report.weight_type == outtype.upper() and report.bound == BOUNDS[outtype]
    assert report.failures == [], str(report)
    assert outtype == "f32" or report.nmse <= MARGIN * ideal, f"torch, rounded: {ideal:.2e}; {report}"
    assert report.router_choices == 2 * report.n_tokens * N_EXPERT
    if outtype == "f32":
        assert report.router_differences == 0 and not report.given, str(report)
        assert report.greedy_equal == N_GREEDY or report.greedy_tie, str(report)


def test_rounded_inputs_are_those_of_the_products(tmp_path: Path) -> None:
    """The yardstick itself: the first router sees nothing rounded but what attention did, the head rounded inputs."""
    source = write_checkpoint(tmp_path, family="deco", attention="gqa", n_layer=1, n_dense=0)
    reference = ReferenceModel.from_checkpoint(source)
    plain = reference.forward([1, 5, 9])
    for weight in (reference.decoder.layers[0].attention.o, reference.decoder.layers[0].ffn.down_exps):
        weight.zero_()  # neither attention nor experts reach the residual stream
    reference.decoder.layers[0].ffn.shared_down.zero_()
    still = reference.forward([1, 5, 9])
    with rounded_inputs(reference, torch.bfloat16):
        found = reference.forward([1, 5, 9])
    assert torch.equal(found.router_logits, still.router_logits) and torch.equal(found.hidden, still.hidden)
    assert torch.equal(found.logits, still.hidden.bfloat16().float() @ reference.decoder.lm_head.T)
    assert not torch.equal(found.logits, still.logits) and not torch.equal(still.logits, plain.logits)


def test_every_pair_is_there() -> None:
    """Count the pairs again, another way: project all combinations and all cases on every two factors."""
    names = list(FACTORS)
    for first, second in itertools.combinations(names, 2):
        wanted = set(itertools.product(FACTORS[first], FACTORS[second]))
        i, j = names.index(first), names.index(second)
        assert {(case[i], case[j]) for case in CASES} == wanted, (first, second)
