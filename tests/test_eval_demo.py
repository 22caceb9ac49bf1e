"""examples/demo.py on the bundled model, with shorter texts: every step runs, and a second run does the same."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import matplotlib.image
import pytest

ROWS = [{"ffn": ffn, "step_ms": float(n)} for ffn in ("union", "dense") for n in (1, 2, 8)]
FILE = Path(__file__).resolve().parent.parent / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("blockffn_demo", FILE)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_demo(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "OUT", tmp_path)
    monkeypatch.setattr(demo, "N_TOKENS", 24)
    monkeypatch.setattr(demo, "N_CODE", 24)
    monkeypatch.setattr(demo, "N_PROMPTS", 2)
    monkeypatch.setattr(demo, "SIZES", (1, 2, 8))
    monkeypatch.setattr(demo.bench, "run", lambda *_, **__: SimpleNamespace(rows=ROWS))
    outputs = []
    for _ in range(2):
        assert demo.main([]) == 0
        outputs.append(capsys.readouterr().out)
    for output in outputs:
        assert "verdict  passed" in output and "DIFFERS" not in output
        assert "def read_lines(path" in output and "n-grams, automatic" in output
        plain, head = (re.search(rf"^{name}.*x +([\d.]+) ", output, re.MULTILINE) for name in ("plain", "EAGLE"))
        assert plain is not None and float(plain[1]) == 1.0
        assert head is not None and float(head[1]) > 2.0  # of at most 4: it was trained for this model
        shares = {name: float(value) for name, value in re.findall(r"(TLS|CLS_8) +([\d.]+) %", output)}
        assert shares["TLS"] >= 70 and 0 < shares["CLS_8"] <= shares["TLS"]  # what the model was trained for
    assert matplotlib.image.imread(tmp_path / "union.png").shape[:2] == (408, 1080)
    texts = ["\n".join(line for line in output.splitlines() if line.startswith("  |")) for output in outputs]
    assert texts[0] == texts[1] and len(texts[0].splitlines()) > 8


def test_a_failing_command_ends_the_demo(demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.call("convert", tmp_path / "missing", "--outfile", tmp_path / "x.gguf")
    assert stop.value.code == 1
    output = capsys.readouterr()
    assert output.out.startswith("$ blockffn convert ") and "error: " in output.err
