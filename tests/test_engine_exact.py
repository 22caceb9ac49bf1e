"""Exact mode of the engine: a text is bit for bit what it is alone. The long form is `python tests/crowd.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import crowd
import pytest
from checkpoints import write_checkpoint
from tiny_mamba import write_mamba

import blockffn
from blockffn import Engine, GenerationParams


@pytest.fixture(scope="session")
def deco_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deco")
    write_checkpoint(folder / "source", family="deco", attention="gqa", n_embd=128, n_head=4)
    blockffn.convert.convert_checkpoint(folder / "source", folder / "deco.gguf", outtype="q8_0")
    return folder / "deco.gguf"


@pytest.mark.parametrize("kind", ["stock", "blockffn", "deco"])
@pytest.mark.parametrize("more", [{}, {"drafter": "ngram", "draft_tokens": 3}], ids=["plain", "drafts"])
def test_texts_are_those_of_the_model_alone(kind: str, more: dict[str, Any], request: pytest.FixtureRequest) -> None:
    model: Path = request.getfixturevalue(f"{kind}_model")
    found = crowd.serve(model, 2000, streams=6, seed=len(kind), n_threads=1, **more)
    assert found["different"] == found["errors"] == 0, found
    # which of them there are is a matter of timing
    assert found["preemptions"] or found["reused_tokens"] or found["cancelled"], found
    assert 0 < found["sampled"] < found["texts"], found


def test_recurrent_models_reuse_whole_texts_only(tmp_path: Path) -> None:
    """Their state knows the end of a text, and no earlier token of it."""
    params = GenerationParams(max_tokens=8, temperature=0.0)
    with Engine(write_mamba(tmp_path / "mamba.gguf"), n_parallel=2, n_ctx=256, n_threads=1) as engine:
        first = engine.submit([1, 40, 41, 42], params).wait()
        again = engine.submit([1, 40, 41, 42], params).wait()
        assert again.text == first.text and again.statistics["reused_n"] == 0
        evaluated = [1, 40, 41, 42, *(token.id for token in first.tokens)]
        longer = engine.submit([*evaluated, 50], params).wait()
        assert longer.statistics["reused_n"] == len(evaluated) - 1
        both = engine.generate_many([[*evaluated, 50], [1, 60, 61]], params)
        assert both[0].text == longer.text
