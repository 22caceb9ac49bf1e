"""Perplexity and KL divergence: llama-perplexity's own figures, bounded memory, bad input."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from peer_perplexity import peer_perplexity

import blockffn
from blockffn.errors import BlockffnError
from blockffn.eval.quality.perplexity import divergence, perplexity

TEXT = "".join(f"def f{i}(x):\n    return x + {i * 37 % 11}  # caf\u00e9\n" for i in range(40))


@pytest.fixture(scope="module")
def llm(blockffn_model: Path) -> blockffn.Llama:
    return blockffn.Llama(str(blockffn_model), n_ctx=256, n_threads=1)


def test_equals_llama_perplexity(llm: blockffn.Llama, blockffn_model: Path, tmp_path: Path) -> None:
    """The same windows, the same scored half: the same figure."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    found = perplexity(llm, llm.tokenize(TEXT.encode(), add_bos=True), n_ctx=64)
    assert found.perplexity == pytest.approx(peer_perplexity(blockffn_model, file, 64, "-t", "1"), rel=1e-3)


def test_by_hand(llm: blockffn.Llama) -> None:
    """Two windows of 8: tokens 5, 6 and 7 of each are scored; the incomplete third is dropped."""
    tokens = list(range(10, 30))
    likely = []
    for start in (0, 8):
        window = [llm.token_bos(), *tokens[start + 1 : start + 8]]
        rows = llm.logits(window).astype(np.float64)
        for i in (4, 5, 6):
            likely.append(rows[i, window[i + 1]] - np.log(np.exp(rows[i]).sum()))
    found = perplexity(llm, tokens, n_ctx=8)
    assert (found.n_windows, found.n_scored) == (2, 6)
    assert found.perplexity == pytest.approx(math.exp(-np.mean(likely)), rel=1e-6)


def test_divergence(llm: blockffn.Llama, blockffn_model: Path, tmp_path: Path) -> None:
    """From itself none; from its 8-bit copy a little; from its 4-bit copy more."""
    from blockffn.quantize import quantize

    tokens = llm.tokenize(TEXT.encode())
    seen: list[tuple[int, int]] = []
    own = divergence(llm, llm, tokens, 64, lambda done, total, value: seen.append((done, total)))
    assert own.mean == pytest.approx(0, abs=1e-9) and own.top1 == 1.0
    assert own.perplexity == own.reference_perplexity
    assert seen == [(i + 1, own.n_windows) for i in range(own.n_windows)]
    means = []
    for kind in ("Q8_0", "Q4_0"):
        quantize(blockffn_model, tmp_path / f"{kind}.gguf", kind)
        other = blockffn.Llama(str(tmp_path / f"{kind}.gguf"), n_ctx=256, n_threads=1, ffn="dense")
        found = divergence(other, llm, tokens, 64)
        other.close()
        assert found.reference_perplexity == pytest.approx(own.perplexity)
        assert 0 <= found.median <= found.percentile_99 <= found.largest
        means.append(found.mean)
    assert 0 < means[0] < means[1] < 1


def test_bad_input(llm: blockffn.Llama, stock_model: Path) -> None:
    with pytest.raises(BlockffnError, match="the text has 5 tokens, one window needs 64"):
        perplexity(llm, [3, 4, 5, 6, 7], n_ctx=64)
    with pytest.raises(BlockffnError, match="window: expected at least 4 tokens, found 2"):
        perplexity(llm, [3, 4, 5, 6, 7], n_ctx=2)
    stock = blockffn.Llama(str(stock_model), n_threads=1)
    if stock.n_vocab() != llm.n_vocab():
        with pytest.raises(BlockffnError, match=f"expected a vocabulary of {stock.n_vocab()}"):
            divergence(llm, stock, list(range(100)), 64)
    stock.close()
