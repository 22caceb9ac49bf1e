"""`blockffn convert` as a user runs it: the written files load in llama.cpp and compute what the checkpoint "
"computes."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_checkpoint

import blockffn
from blockffn.cli import main
from blockffn.convert import cli
from blockffn.eval.quality import parity
from blockffn.eval.quality.parity import verify


def run(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def logits(path: Path) -> np.ndarray:
    llm = blockffn.Llama(str(path), n_ctx=64, verbose=False)
    found = llm.logits([1, 300, 301, 302, 303])
    llm.close()
    return found


def test_verify_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "m", n_layer=1)
    assert run(source, "--outfile", tmp_path / "m.gguf", "--outtype", "f32", "--verify") == 0
    printed = capsys.readouterr().out
    assert "NMSE" in printed and "top-1 agreement" in printed and "verdict  passed" in printed


def test_verify_fails_for_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of one model beside the checkpoint of another."""
    monkeypatch.setattr(parity, "verify", functools.partial(verify, text="def f(x):", n_greedy=2))
    source = write_checkpoint(tmp_path / "m", n_layer=1)
    assert run(source, "--outfile", tmp_path / "m.gguf", "--outtype", "f32") == 0
    shutil.rmtree(source)
    write_checkpoint(source, n_layer=1, seed=1)
    with pytest.raises(blockffn.BlockffnError, match="does not compute what"):
        cli._verify(str(tmp_path / "m.gguf"), str(source))


def test_split_files_compute_the_same(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m")
    assert run(source, "--outfile", tmp_path / "whole.gguf") == 0
    assert run(source, "--outfile", tmp_path / "part.gguf", "--split-max-size", "150K") == 0
    first = min(tmp_path.glob("part-*.gguf"))
    np.testing.assert_array_equal(logits(first), logits(tmp_path / "whole.gguf"))


def test_layouts_compute_the_same(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m")
    for layout in ("expert", "dense"):
        assert run(source, "--outfile", tmp_path / f"{layout}.gguf", "--layout", layout) == 0
    np.testing.assert_allclose(logits(tmp_path / "expert.gguf"), logits(tmp_path / "dense.gguf"), atol=1e-5)


@pytest.mark.parametrize("norm", ["rms", "normal", "simple"])
def test_fixed_factor_of_deco(tmp_path: Path, norm: str) -> None:
    """With router_norm_fixed there is no tensor; the constant travels as a key, with every norm."""
    shape = {"family": "deco", "attention": "gqa", "n_head": 2, "norm": norm, "router_fixed": True}
    source = write_checkpoint(tmp_path / "m", **shape)  # type: ignore[arg-type]
    assert run(source, "--outfile", tmp_path / "m.gguf", "--outtype", "f32") == 0
    assert verify(tmp_path / "m.gguf", source, text="def f(x): return x", n_greedy=4).nmse <= 1e-6


@pytest.mark.parametrize(("text", "size"), [("2G", 2 * 10**9), ("500M", 5 * 10**8), ("7k", 7000), ("12", 12)])
def test_sizes(text: str, size: int) -> None:
    assert cli.parse_size(text) == size
