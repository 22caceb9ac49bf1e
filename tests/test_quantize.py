"""Quantizing: the plan is the truth, files appear whole or not at all, bad input is one message."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import Runner
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from blockffn import BlockffnError
from blockffn.cli import main
from blockffn.commands.quantize import ranges
from blockffn.gguf_file import read_gguf
from blockffn.inspection import bits_per_weight
from blockffn.quantize import PRESETS, TILED, TYPES, Plan, Preset, bits, canonical_type, plan, quantize


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock model whose rows fit K-quants, but for ffn_down (96)."""
    from tiny_llama import write_llama

    return write_llama(tmp_path_factory.mktemp("wide") / "wide.gguf", n_embd=256, n_ff=96)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "Q2_K", "Q4_1"])
@pytest.mark.parametrize("model", ["stock_model", "wide_model", "blockffn_model"])
def test_plan_is_what_happens(model: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source, target = request.getfixturevalue(model), tmp_path / "out.gguf"
    steps = quantize(source, target, kind)
    written = read_gguf(target)
    assert {t.name: t.type for t in written.tensors} == {t.source.name: t.type for t in steps.tensors}
    assert bits_per_weight(written.tensors) == pytest.approx(steps.bits_per_weight)
    assert steps.bits_without_fallbacks <= steps.bits_per_weight + 1e-9
    for tensor in steps.tensors:
        block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.wanted]]
        assert tensor.fallback == (tensor.source.shape[0] % block != 0), tensor


def test_fallbacks_by_name(wide_model: Path) -> None:
    steps = plan(wide_model, "q4_k_m")
    assert {(t.source.name, t.wanted, t.type) for t in steps.fallbacks} == {
        ("blk.0.ffn_down.weight", "Q4_K", "Q5_0"),
        ("blk.1.ffn_down.weight", "Q6_K", "Q8_0"),
    }
    assert steps.type == "Q4_K_M" and steps.nominal_bits == 4.5
    assert steps.nominal_bits < steps.bits_without_fallbacks < steps.bits_per_weight


def test_silent_fallback_of_the_head(stock_model: Path) -> None:
    assert ("output.weight", "Q6_K", "Q8_0") in {
        (t.source.name, t.wanted, t.type) for t in plan(stock_model, "Q4_K_M").fallbacks
    }
    assert not plan(stock_model, "Q8_0").fallbacks


@pytest.mark.parametrize(("kind", "expected"), [("Q4_0", 4.5), ("Q8_0", 8.5), ("F16", 16.0), ("Q6_K", 6.5625)])
def test_bits(kind: str, expected: float) -> None:
    assert bits(kind) == expected


def test_type_names() -> None:
    assert canonical_type("q4_k") == "Q4_K_M" and canonical_type("bf16") == "BF16"
    with pytest.raises(BlockffnError, match=r"unknown type 'Q4_KM': did you mean Q4_K_M\? known: F32"):
        canonical_type("Q4_KM")


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "3"), ([1, 0], "{0-1}"), ([0, 1, 2, 5, 7, 8], "{0-2,5,7-8}"), ([2, 4], "{2,4}")]
)
def test_layers_in_short_form(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_every_type_is_known_to_llama_quantize(stock_model: Path) -> None:
    for kind in TYPES:
        assert plan(stock_model, kind).bits_per_weight > 0


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("model", ["wide_model", "blockffn_model"])
def test_presets_are_what_happens(model: str, name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Every matrix has a type with a fast kernel, and the file is what the plan says."""
    source, target = request.getfixturevalue(model), tmp_path / "out.gguf"
    steps = quantize(source, target, name.lower())
    assert steps.type == name and not steps.untiled
    assert {t.name: t.type for t in read_gguf(target).tensors} == {t.source.name: t.type for t in steps.tensors}


def test_rules_of_a_preset_choose_tensors(stock_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "OURS", Preset("Q8_0", (("ffn_down", "Q4_1"), ("ffn", "Q5_0")), "a test"))
    types = {tensor.source.name: tensor.type for tensor in plan(stock_model, "ours").tensors}
    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("Q4_1", "Q5_0")
    assert types["blk.0.attn_q.weight"] == "Q8_0"


def test_fast_types_are_those_of_the_kernels() -> None:
    """Each type with a `case` in the tables of the tile kernels, and no other."""
    cpu = Path(__file__).resolve().parent.parent / "ggml-ops" / "cpu"
    found = {
        kind
        for name in ("tile-blocks-32.cpp", "tile-blocks-256.cpp")
        for kind in re.findall(r"case GGML_TYPE_(\w+):", (cpu / name).read_text())
    }
    assert found == set(TILED)


def test_slow_types_are_named(stock_model: Path, wide_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(plan(wide_model, "Q3_K_M").untiled) == {"Q3_K"} and not plan(stock_model, "Q4_0").untiled
    assert main(["quantize", str(wide_model), "none.gguf", "Q3_K_M", "--dry-run"]) == 0
    assert re.search(r"note: Q3_K \(\d+% of the weights\) has no fast kernel", capsys.readouterr().out)


def test_list_of_types(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["quantize", "--list-types"])
    output = capsys.readouterr().out
    assert stop.value.code == 0 and all(name in output for name in [*TYPES, *PRESETS])
    assert re.search(r"^Q4_K_M +4\.50 +on x86 and ARM$", output, re.MULTILINE)
    assert re.search(r"^Q2_K .*nowhere$", output, re.MULTILINE)


def failing(source: Path, target: Path, kind: str = "Q8_0", **options: object) -> str:
    folder_before = sorted(target.parent.iterdir()) if target.parent.is_dir() else None
    with pytest.raises(BlockffnError) as caught:
        quantize(source, target, kind, **options)  # type: ignore[arg-type]
    assert folder_before is None or sorted(target.parent.iterdir()) == folder_before
    return str(caught.value)


def test_bad_input_leaves_no_file(stock_model: Path, wide_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "out.gguf"
    out.parent.mkdir()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(stock_model.read_bytes()[:-5000])
    assert "truncated" in failing(cut, out)
    assert "no such file" in failing(tmp_path / "missing.gguf", out)
    assert "not a GGUF" in failing(Path(__file__), out)
    assert "unknown type" in failing(stock_model, out, "Q9_0")
    assert "needs an importance matrix" in failing(wide_model, out, "IQ2_XXS")
    assert "no such importance matrix" in failing(stock_model, out, imatrix=tmp_path / "none")
    assert "does not exist" in failing(stock_model, tmp_path / "nowhere" / "x.gguf")
    assert "same file" in failing(stock_model, stock_model)
    assert "is a directory" in failing(stock_model, tmp_path)
    (tmp_path / "bad.imatrix").write_text("no matrix")
    assert "llama-quantize failed" in failing(stock_model, out, imatrix=tmp_path / "bad.imatrix")


def test_existing_output_survives_a_failure(stock_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    quantize(stock_model, out, "Q8_0")
    before = out.read_bytes()
    assert "is Q8_0 already" in failing(out, tmp_path / "again.gguf", "Q4_0")
    (tmp_path / "bad.imatrix").write_text("no matrix")
    failing(stock_model, out, imatrix=tmp_path / "bad.imatrix")
    assert out.read_bytes() == before


def test_interrupted_while_writing(stock_model: Path, tmp_path: Path) -> None:
    def stop(_i: int, _n: int, _name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(stock_model, tmp_path / "out.gguf", "Q8_0", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_announced_before_anything_is_written(stock_model: Path, tmp_path: Path) -> None:
    seen: list[tuple[Plan, int]] = []
    quantize(
        stock_model,
        tmp_path / "out.gguf",
        "Q4_K_M",
        announce=lambda steps: seen.append((steps, len(list(tmp_path.iterdir())))),
    )
    assert len(seen) == 1 and seen[0][1] == 0


def test_command(wide_model: Path, tmp_path: Path, blockffn_cli: Runner) -> None:
    out = tmp_path / "out.gguf"
    result = blockffn_cli("quantize", wide_model, out, "Q4_K_M")
    assert result.returncode == 0, result.stderr
    assert "nominal 4.50 bits per weight, actual 5." in result.stdout
    assert re.search(r"blk\.0\.ffn_down\.weight +rows of +96 do not fit Q4_K: Q5_0", result.stdout)
    report = json.loads(blockffn_cli("quantize", wide_model, out, "Q4_K_M", "--json").stdout)
    assert report["file_bytes"] == out.stat().st_size and len(report["fallbacks"]) == 2
    out.unlink()
    dry = json.loads(blockffn_cli("quantize", wide_model, out, "Q4_K_M", "--json", "--dry-run").stdout)
    assert dry["bits_per_weight"] == report["bits_per_weight"] and not out.exists()
    failed = blockffn_cli("quantize", wide_model, out, "Q4_K_X")
    assert failed.returncode == 1 and failed.stderr.startswith("error: unknown type") and not out.exists()
