"""DECO in llama.cpp against torch, over everything that its configuration can vary.

Every pair of two factors' values appears in the models tested here. All combinations, which take some minutes, run with

    BLOCKFFN_SWEEP=full pytest -q tests/test_parity_deco.py -s      # prints the worst figures of every weight type
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

from blockffn.convert.convert import convert_checkpoint
from blockffn.eval import parity

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


def bound_of(values: dict[str, Any]) -> float:
    """The bound of the type, doubled where the type itself is that coarse.

    BF16 keeps 8 bits of what a matrix multiplies, and gated squared ReLU multiplies three such values: torch with
    inputs rounded like that is itself 0.9e-4 off in the worst of these models, and llama.cpp 1.0e-4.
    """
    cubic = (values["outtype"], values["gated"], values["act"]) == ("bf16", True, "sqrelu")
    return 2e-4 if cubic else BOUNDS[str(values["outtype"])]


def name_of(case: Case) -> str:
    values = dict(zip(FACTORS, case, strict=True))
    return "-".join(f"{key}={value}" if isinstance(value, int) else str(value) for key, value in values.items())


def arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Arguments of write_checkpoint: 2 layers of experts, after `n_dense` dense ones."""
    norm, _, kind = values["router"].partition("-")
    chosen = {key: values[key] for key in ("gated", "act", "bias", "shared_dim", "n_dense")}
    chosen |= {"norm": norm, "router_scalar": kind == "scalar", "router_fixed": kind == "fixed"}
    sizes = {"n_layer": 2 + values["n_dense"], "n_head": 2, "n_head_kv": 1, "n_expert": N_EXPERT, "n_ff": 80}
    return {"family": "deco", "attention": "gqa", "seed": sum(map(ord, str(values))), **sizes, **chosen}


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
    report = parity.verify(tmp_path / "model.gguf", source, TEXT, N_GREEDY, n_threads=1)

    figures = worst.setdefault(outtype, dict.fromkeys(("models", "nmse", "nmse_own", "flipped", "greedy_ties"), 0.0))
    figures["models"] += 1
    figures["nmse"] = max(figures["nmse"], report.nmse)
    figures["nmse_own"] = max(figures["nmse_own"], report.nmse_own)
    figures["flipped"] = max(figures["flipped"], report.router_differences / report.router_choices)
    figures["greedy_ties"] += report.greedy_equal < N_GREEDY and report.greedy_tie

    assert report.weight_type == outtype.upper() and report.nmse <= bound_of(values), str(report)
    assert [failure for failure in report.failures if not failure.startswith("NMSE")] == [], str(report)
    assert report.router_choices == 2 * report.n_tokens * N_EXPERT
    if outtype == "f32":
        assert report.router_differences == 0 and not report.given, str(report)
        assert report.greedy_equal == N_GREEDY or report.greedy_tie, str(report)


def test_every_pair_is_there() -> None:
    """Count the pairs again, another way: project all combinations and all cases on every two factors."""
    names = list(FACTORS)
    for first, second in itertools.combinations(names, 2):
        wanted = set(itertools.product(FACTORS[first], FACTORS[second]))
        i, j = names.index(first), names.index(second)
        assert {(case[i], case[j]) for case in CASES} == wanted, (first, second)
