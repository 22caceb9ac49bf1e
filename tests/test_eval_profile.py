"""The profile of a router: consistency and union by hand and against torch, pictures, the profile inside a GGUF."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import blockffn
from blockffn.cli import main
from blockffn.errors import BlockffnError
from blockffn.eval.quality import pictures
from blockffn.eval.quality.consistency import CACHES, consistency
from blockffn.eval.quality.sparsity import profile, profile_of
from blockffn.gguf_file import read_gguf
from blockffn.inspection import describe
from blockffn.profile import step_growth, write_profile
from blockffn.speculative.draft import PLAIN, Step
from blockffn.speculative.policy import Policy


def plain_srp(active: np.ndarray, length: int) -> float:
    """F1 of the best threshold, token by token, as the paper defines it."""
    best = 0.0
    for threshold in range(1, length + 1):
        right = given = wanted = 0
        for start in range(active.shape[1] - length + 1):
            segment = active[:, start : start + length]
            chosen = segment.sum(axis=1) >= threshold  # [L, E]
            right += int((segment & chosen[:, None]).sum())
            given += int(chosen.sum()) * length
            wanted += int(segment.sum())
        best = max(best, 2 * right / (given + wanted))
    return best


def plain_sch(active: np.ndarray, length: int, rho: float) -> float:
    """Hit rate of the experts of all layers that a segment needs most."""
    size = max(1, round(rho * active.sum() / active.shape[1]))
    hits = total = 0
    for start in range(active.shape[1] - length + 1):
        counts = active[:, start : start + length].sum(axis=1).ravel()
        hits, total = hits + int(np.sort(counts)[::-1][:size].sum()), total + int(counts.sum())
    return hits / total


@pytest.mark.parametrize(("n_layers", "n_tokens", "n_experts"), [(1, 9, 7), (3, 33, 42), (2, 70, 5)])
def test_consistency_against_a_plain_count(n_layers: int, n_tokens: int, n_experts: int) -> None:
    active = np.random.default_rng(n_tokens).random((n_layers, n_tokens, n_experts)) < 0.3
    found = consistency(active)
    assert list(found.srp) == [length for length in (4, 16, 64) if length <= n_tokens]
    for length in found.srp:
        assert found.srp[length] == pytest.approx(plain_srp(active, length))
        assert found.layer_srp[length] == pytest.approx([plain_srp(layer[None], length) for layer in active])
        for rho in CACHES:
            assert found.sch[length][rho] == pytest.approx(plain_sch(active, length, rho), abs=1e-4)
            each = [plain_sch(layer[None], length, rho) for layer in active]
            assert found.layer_sch[length][rho] == pytest.approx(each, abs=1e-4)


def test_a_constant_router_is_consistent() -> None:
    active = np.zeros((2, 40, 8), np.bool_)
    active[:, :, :3] = True
    found = consistency(active, (4,))
    assert found.srp == {4: 1.0} and found.sch == {4: {1.0: 1.0, 2.0: 1.0}}


def test_segments_end_at_windows() -> None:
    """Two windows whose experts are disjoint: every segment inside one is constant."""
    active = np.zeros((1, 16, 2), np.bool_)
    active[0, :8, 0] = active[0, 8:, 1] = True
    assert consistency(active, (4,), window=8).srp[4] == 1.0
    assert consistency(active, (4,)).srp[4] < 1.0


def test_equals_the_torch_reference(tmp_path: Path) -> None:
    from checkpoints import write_checkpoint

    from blockffn.training.model import ReferenceModel

    source = write_checkpoint(tmp_path / "m", n_layer=2)
    blockffn.convert.convert_checkpoint(source, tmp_path / "m.gguf", outtype="f32")
    with blockffn.Llama(tmp_path / "m.gguf", n_threads=1) as llm:
        tokens = llm.tokenize(b"for name in sorted(names):\n    print(name)\n" * 12)
        found = profile(llm, tokens, 64).to_dict()
    reference = ReferenceModel.from_checkpoint(source)
    windows = [tokens[i : i + 64] for i in range(0, len(tokens) - 63, 64)]
    active = np.concatenate([reference.forward(window).active.numpy() for window in windows], axis=1)
    expected = profile_of(active, 64).to_dict()
    assert len(windows) >= 2 and found["n_tokens"] == 64 * len(windows)
    for name in ("tls", "live_tls", "dead_share"):
        assert found[name] == pytest.approx(expected[name], abs=1e-4)
    for name in ("cls", "live_cls", "union", "srp"):
        assert found[name] == pytest.approx(expected[name], abs=1e-4)
    assert np.allclose(found["usage"], expected["usage"], atol=1e-4)
    assert found["union"]["8"] == pytest.approx(7 * (1 - found["cls"]["8"]))


def test_pictures_are_the_same_twice(tmp_path: Path) -> None:
    """Both kinds of both pictures, bit for bit; dead experts have another colour than rare ones."""
    active = np.random.default_rng(1).random((3, 70, 12)) < 0.2
    active[1, :, 4] = False
    found = profile_of(active)
    files = [*pictures.heat_map(found, tmp_path / "a-experts"), *pictures.union_curve(found, tmp_path / "a-union")]
    again = [*pictures.heat_map(found, tmp_path / "b-experts"), *pictures.union_curve(found, tmp_path / "b-union")]
    assert [Path(file).name for file in files] == [
        "a-experts.png", "a-experts.svg", "a-union.png", "a-union.svg",
    ]  # fmt: skip
    for one, two in zip(files, again, strict=True):
        assert Path(one).read_bytes() == Path(two).read_bytes()
    assert "experts needed" in Path(files[3]).read_text()
    with pytest.raises(BlockffnError, match=r"the folder .* does not exist"):
        pictures.union_curve(found, tmp_path / "no" / "x")


def test_command_draws_and_stores(capsys: pytest.CaptureFixture[str], blockffn_model: Path, tmp_path: Path) -> None:
    """The file still holds the same model; inspect shows the profile; a drafter begins with its growth."""
    model, text = tmp_path / "m.gguf", tmp_path / "text.py"
    shutil.copyfile(blockffn_model, model)
    text.write_text("for name in sorted(names):\n    print(name)\n" * 20)
    arguments = ["eval", "sparsity", "-m", str(model), "-f", str(text), "-c", "64", "-t", "1", "--json"]
    assert main([*arguments, "--plot", str(tmp_path / "p"), "--write-metadata"]) == 0
    output = capsys.readouterr()
    figures = json.loads(output.out)
    assert "profile stored" in output.err and (tmp_path / "p-union.svg").stat().st_size > 1000
    before, after = read_gguf(blockffn_model), read_gguf(model)
    assert {t.name: t.read().tobytes() for t in before.tensors} == {t.name: t.read().tobytes() for t in after.tensors}
    assert all(after.metadata[key] == value for key, value in before.metadata.items())
    stored = describe(model)["profile"]
    assert stored["tokens"] == figures["n_tokens"] and stored["tls"] == pytest.approx(figures["tls"])
    assert stored["union"] == pytest.approx({int(n): value for n, value in figures["union"].items()})
    assert main(["inspect", str(model)]) == 0
    assert "sparsity profile, stored in the file" in capsys.readouterr().out
    assert main([*arguments, "--write-metadata"]) == 0  # again: the same keys, once
    assert describe(model)["profile"] == stored and describe(blockffn_model)["profile"] is None
    with blockffn.Llama(model, n_threads=1, drafter="ngram") as llm:
        llm.loop.policy.times.add(1, 0.010)
        assert llm.loop.policy.times.predict(3) == pytest.approx(0.010 * (1 + 2 * stored["step_growth"]), rel=1e-4)


def test_growth_by_hand(blockffn_model: Path) -> None:
    """Two of seven experts for one token, three for four: the bytes of one expert more, in three tokens."""
    file = read_gguf(blockffn_model)
    sizes = {tensor.name: tensor.n_bytes for tensor in file.tensors}
    routed = sum(size for name, size in sizes.items() if "_exps." in name)
    always = sum(sizes.values()) - routed - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)
    growth = step_growth(file, {1: 2.0, 2: 2.5, 4: 3.0, 8: 7.0})
    assert growth == pytest.approx(routed / 7 / (always + 2 * routed / 7) / 3)
    assert step_growth(file, {1: 2.0}) == 0.0


def test_the_prior_ends_with_the_first_measurement() -> None:
    """A flat profile lets the policy try a chain at once; a steep one does not change what is measured."""
    for growth in (0.0, 0.9):
        policy = Policy(max_nodes=8, growth=growth)
        for _ in range(3):
            policy.plan()
            policy.learn(Step(PLAIN, complete=True, tokens=1, verify_seconds=0.010))
        assert policy.times.predict(5) == pytest.approx(0.010 * (1 + 4 * growth))
        policy.times.add(5, 0.012)
        policy.times.add(5, 0.012)
        assert policy.times.predict(5) == pytest.approx(0.012, rel=0.05)


def test_refuses_models_without_experts(stock_model: Path) -> None:
    with pytest.raises(BlockffnError, match="no layer of this model has routed experts"):
        write_profile(stock_model, {"tokens": 1, "tls": 0.5, "union": {1: 1.0}})
    assert not list(stock_model.parent.glob(".*.tmp"))
