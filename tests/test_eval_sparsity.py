"""TLS and CLS_c against a count by hand, and through a model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import blockffn
from blockffn.errors import BlockffnError
from blockffn.sparsity import of_activity


def test_by_hand() -> None:
    """One layer, five tokens, four experts: the fifth token belongs to no chunk of 2 or 4."""
    active = np.zeros((1, 5, 4), np.bool_)
    active[0, 0, 0] = active[0, 1, 0] = active[0, 2, 1] = active[0, 3, 2] = True
    active[0, 4, :] = True
    found = of_activity(active, (1, 2, 4, 5, 8))
    assert found.tls == pytest.approx(1 - 8 / 20)
    assert found.cls == pytest.approx({1: 1 - 8 / 20, 2: 1 - (1 + 2) / 8, 4: 1 - 3 / 4, 5: 0.0})
    assert 8 not in found.cls  # longer than the text


def test_dead_and_always_on_experts_by_hand() -> None:
    """Two layers of five experts, 200 tokens.

    Layer 0: expert 0 always; 1 in all tokens but two (99 %, not more); 2 in all but one; 3 in token 7 only; 4 never.
    Layer 1: nothing is ever active.
    """
    active = np.zeros((2, 200, 5), np.bool_)
    active[0, :, :3] = True
    active[0, [0, 1], 1] = active[0, 199, 2] = False
    active[0, 7, 3] = True
    found = of_activity(active, (2, 100))
    assert found.layer_dead.tolist() == [1, 5] and found.dead_share == pytest.approx(6 / 10)
    assert found.layer_always_on.tolist() == [2, 0] and found.always_on_share == pytest.approx(2 / 10)
    assert found.layer_sets.tolist() == [4, 1]  # {0 2}, {0 1 2}, {0 1 2 3}, {0 1}
    used = 200 + 198 + 199 + 1
    assert found.layer_tls.tolist() == pytest.approx([1 - used / 1000, 1.0])
    assert found.live_tls == pytest.approx(1 - used / 800)  # layer 1 has no live expert and counts for nothing
    assert found.live_cls == pytest.approx({2: 1 - (100 + 99 + 100 + 1) / 400, 100: 1 - (2 + 2 + 2 + 1) / 8})
    figures = json.loads(json.dumps(found.to_dict()))
    assert figures["layer_live_tls"] == [pytest.approx(1 - used / 800), None]
    nothing = of_activity(active[1:], (2,)).to_dict()
    assert (nothing["dead_share"], nothing["live_tls"], nothing["live_cls"]) == (1.0, None, {"2": None})


def test_chunks_end_at_windows() -> None:
    """Two texts of five tokens: chunks of 2 are tokens 0-1, 2-3 and 5-6, 7-8, never 4-5."""
    active = np.zeros((1, 10, 1), np.bool_)
    active[0, [4, 5], 0] = True
    assert of_activity(active, (2, 5, 6), 5).cls == {2: 1 - 1 / 4, 5: 0.0}
    assert of_activity(active, (2,)).cls == {2: 1 - 1 / 5}
    with pytest.raises(BlockffnError, match="windows of 4 tokens, found 10"):
        of_activity(active, (2,), 4)


def test_torch_and_llama_agree(tmp_path: Path) -> None:
    """The same figures from the router inside llama.cpp and from the torch reference, dead and constant experts too."""
    from checkpoints import write_checkpoint
    from safetensors.numpy import load_file, save_file

    from blockffn.training.model import ReferenceModel

    source = write_checkpoint(tmp_path / "m", n_layer=2)
    file = next(source.glob("*.safetensors"))
    weights = load_file(file)
    router = next(name for name in weights if "layers.1." in name and "router_proj" in name)
    weights[router][2] = 0.0  # never above 0
    save_file(weights, file, {"format": "pt"})
    blockffn.convert.convert_checkpoint(source, tmp_path / "m.gguf", outtype="f32")
    llm = blockffn.Llama(tmp_path / "m.gguf", n_threads=1)
    tokens = llm.tokenize(b"for name in sorted(names):\n    print(name)\n" * 6)
    found = blockffn.eval.sparsity(llm, tokens)
    llm.close()
    reference = ReferenceModel.from_checkpoint(source).forward(tokens)
    assert found.to_dict() == of_activity(reference.active.numpy()).to_dict()
    assert found.layer_dead[1] >= 1 and len(tokens) >= 64


@pytest.mark.parametrize(("n_layers", "n_tokens", "n_experts"), [(1, 1, 1), (2, 9, 7), (3, 33, 42), (1, 65, 77)])
def test_against_a_plain_count(n_layers: int, n_tokens: int, n_experts: int) -> None:
    active = np.random.default_rng(n_tokens).random((n_layers, n_tokens, n_experts)) < 0.2
    found = of_activity(active)
    assert found.n_tokens == n_tokens and found.n_experts == n_experts
    for size, layers in found.layer_cls.items():
        for layer in range(n_layers):
            shares = [
                np.mean([active[layer, start : start + size, e].any() for e in range(n_experts)])
                for start in range(0, n_tokens - size + 1, size)
            ]
            assert layers[layer] == pytest.approx(1 - np.mean(shares))
    assert sorted(found.cls) == [size for size in (2, 4, 8, 16, 32, 64) if size <= n_tokens]
    assert found.to_dict()["tls"] == pytest.approx(1 - active.mean())


def test_through_a_model(blockffn_model: Path) -> None:
    llm = blockffn.Llama(str(blockffn_model), n_threads=1)
    tokens = llm.tokenize(b"for name in sorted(names):\n    print(name)")
    found = blockffn.eval.sparsity(llm, tokens)
    active = llm.active_experts(tokens)
    assert found.layer_tls.shape == (2,) and found.n_experts == 7
    assert found.tls == pytest.approx(1 - active.mean())
    assert found.tls >= found.cls[2] >= found.cls[4] >= found.cls[8]
    with pytest.raises(BlockffnError, match="at least one token"):
        blockffn.eval.sparsity(llm, [])
    with pytest.raises(BlockffnError, match="chunk size: expected a positive number"):
        blockffn.eval.sparsity(llm, tokens, [0])
    llm.close()


def test_a_dense_model_is_an_error(stock_model: Path) -> None:
    llm = blockffn.Llama(str(stock_model), n_threads=1)
    with pytest.raises(BlockffnError, match="no layer of this model has routed experts"):
        blockffn.eval.sparsity(llm, [1, 2, 3])
    llm.close()
