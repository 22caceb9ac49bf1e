"""`blockffn verify-published` on local folders in the published layouts: reports, failures, the authors' code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from checkpoints import write_checkpoint

from blockffn.cli import main
from blockffn.eval.published import authors, steps
from blockffn.eval.published.report import markdown
from blockffn.training.model import ReferenceModel

Run = Callable[..., tuple[int, dict[str, Any], str]]
QUICK = ("--rounds", "1", "-t", "1", "--type", "Q8_0")


@pytest.fixture
def verify(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command: (exit code, report as read from the JSON file, Markdown)."""
    monkeypatch.setattr(steps, "VERIFY", (2,))
    monkeypatch.setattr(steps, "PREFILL", 8)
    monkeypatch.setattr("blockffn.eval.bench.models.DECODE_STEPS", 4)

    def run(folder: Path, *more: str) -> tuple[int, dict[str, Any], str]:
        out = tmp_path / "reports"
        code = main(["verify-published", str(folder), "--output", str(out), *QUICK, *more])
        assert "Traceback" not in capsys.readouterr().err
        stem = out / folder.name
        return code, json.loads(stem.with_suffix(".json").read_text()), stem.with_suffix(".md").read_text()

    return run


@pytest.fixture
def no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the speeds out, which start two processes."""
    rows = [
        {"ffn": ffn, "phase": "decode", "n": 1, "tokens_per_second": speed, "spread": 0.1, "peak_rss_mb": 9.0}
        for ffn, speed in (("union", 30.0), ("dense", 10.0))
    ]
    result = {"type": "Q8_0", "threads": 1, "rounds": 1, "past": 128, "rows": rows}
    monkeypatch.setattr(steps, "speed", lambda *_: result)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in the layout of the published BlockFFN models."""
    folder = tmp_path_factory.mktemp("published") / "BlockFFN-Mini"
    return write_checkpoint(folder, layout="block_linear", dtype="bf16", fmt="safetensors_sharded", n_ctx=1024)


def test_blockffn(published: Path, verify: Run, tmp_path: Path) -> None:
    code, report, text = verify(published)
    assert code == 0 and report["verdict"] == "ok"
    assert report["checkpoint"]["result"]["config"]["ffn_type"] == "block_linear"
    assert len(report["checkpoint"]["result"]["files"]) == 3
    assert (
        report["convert"]["result"]["outtype"] == "bf16" and report["convert"]["result"]["parameters"]["total"] > 1000
    )
    parity = report["parity"]["result"]
    assert 0 < parity["nmse"] <= parity["bound"] and "trust-remote-code" in parity["authors_code"]
    sparsity = report["sparsity"]["result"]
    assert sparsity["n_tokens"] == steps.N_SPARSITY and sparsity["n_experts"] == 7
    rows = report["speed"]["result"]["rows"]
    assert {(row["ffn"], row["phase"]) for row in rows} == {
        (ffn, phase) for ffn in ("union", "dense") for phase in ("decode", "verify", "prefill")
    }
    assert text.startswith(f"# {published}: ok\n")
    for words in ("| parity | ok |", "CLS_8", "union / dense", "| ffn_type | block_linear |", "was not run"):
        assert words in text
    assert sorted(path.suffix for path in (tmp_path / "reports").iterdir()) == [".json", ".md"]


def test_deco_and_files_that_are_kept(verify: Run, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "DECO-Mini", family="deco", attention="gqa", n_ctx=1024)
    (tmp_path / "text.txt").write_text("some text of the user's own " * 20)
    code, report, text = verify(folder, "--keep", "-f", str(tmp_path / "text.txt"))
    assert code == 0 and report["convert"]["result"]["family"] == "deco" and "as given" in text
    names = {path.name for path in (tmp_path / "reports").glob("*.gguf")}
    assert names == {"DECO-Mini.gguf", "DECO-Mini-Q8_0.gguf", "DECO-Mini-dense-Q8_0.gguf"}


def test_a_conversion_that_fails_is_reported(verify: Run, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "odd", config={"num_experts": 9, "hidden_size": 96})
    code, report, text = verify(folder)
    assert code == 1 and report["verdict"] == "failed"
    assert report["convert"]["status"] == "failed" and "config.json" in report["convert"]["reason"]
    assert {report[name]["status"] for name in ("parity", "sparsity", "speed")} == {"skipped"}
    assert "| convert | failed | " in text and "| speed | skipped | the conversion failed |" in text


@pytest.mark.usefixtures("no_timing")
def test_logits_that_differ_fail(published: Path, verify: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference gets another checkpoint's weights: the report says so, and the other steps still run."""
    other = write_checkpoint(published.parent / "other", layout="block_linear", n_ctx=1024, seed=1)
    right = ReferenceModel.from_checkpoint
    monkeypatch.setattr(ReferenceModel, "from_checkpoint", lambda _src: right(other))
    code, report, text = verify(published)
    assert code == 1 and report["parity"]["status"] == "failed" and report["speed"]["status"] == "ok"
    assert "NMSE of the logits: expected at most 0.0001" in text
    assert "| decode | 30.0 (spread 10%) | 10.0 (spread 10%) | 3.00x |" in text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such-folder", "no such folder, and not a hub id"),
        ("--type=Q3_X", "Q3_X"),
        ("-f=missing.txt", "missing.txt"),
    ],
)
def test_bad_input(source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = source.split("=") if source.startswith("-") else []
    where = str(tmp_path) if arguments else source
    assert main(["verify-published", where, "--output", str(tmp_path / "out"), *arguments]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_names_of_published_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert steps.locate("DECO-0.1B") == "SparseLLM/DECO-0.1B"
    assert steps.locate("someone/DECO-0.1B") == "someone/DECO-0.1B"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DECO-0.1B").mkdir()
    assert steps.locate("DECO-0.1B") == "DECO-0.1B"  # a folder of that name comes first


class Transformers(ModuleType):
    """Stands for transformers: the "authors' code" is the torch reference, or something that breaks."""

    def __init__(self, folder: Path, change: float = 0.0, error: Exception | None = None) -> None:
        super().__init__("transformers")
        self.seen: dict[str, Any] = {}
        reference = ReferenceModel.from_checkpoint(folder)

        class Model:
            def eval(self) -> Model:
                return self

            def __call__(self, input_ids: Any, use_cache: bool) -> Any:
                return SimpleNamespace(logits=(1 + change) * reference.forward(input_ids[0].tolist()).logits[None])

        def from_pretrained(where: str, **options: Any) -> Model:
            self.seen = {"where": where, **options}
            if error is not None:
                raise error
            return Model()

        self.AutoModelForCausalLM = SimpleNamespace(from_pretrained=from_pretrained)


@pytest.mark.usefixtures("no_timing")
def test_the_authors_code_is_the_yardstick(published: Path, verify: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Transformers(published)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    code, report, text = verify(published, "--trust-remote-code")
    assert code == 0 and report["parity"]["result"]["against"] == "the authors' code"
    assert fake.seen["where"] == str(published) and fake.seen["trust_remote_code"] is True
    assert 0 < report["parity"]["result"]["nmse"] < 1e-4 and "## Parity against the authors' code" in text


@pytest.mark.usefixtures("no_timing")
def test_the_authors_code_may_disagree(published: Path, verify: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", Transformers(published, change=0.1))
    code, report, _ = verify(published, "--trust-remote-code")
    assert code == 1 and "expected at most 0.0001" in report["parity"]["reason"]


@pytest.mark.usefixtures("no_timing")
def test_authors_code_that_does_not_run(published: Path, verify: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our reference takes over, and the report says why."""
    broken = Transformers(published, error=ImportError("needs triton\nand more"))
    monkeypatch.setitem(sys.modules, "transformers", broken)
    code, report, text = verify(published, "--trust-remote-code")
    assert code == 0 and report["parity"]["result"]["authors_code"] == "ImportError: needs triton"
    assert "The authors' code was not run: ImportError: needs triton." in text


@pytest.mark.usefixtures("no_timing")
def test_code_from_the_checkpoint_runs_only_when_trusted(
    published: Path, verify: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_where: str) -> Any:
        raise AssertionError("remote code without leave")

    monkeypatch.setattr(authors, "load", load)
    assert verify(published)[0] == 0


def test_markdown_holds_no_broken_cell() -> None:
    failed = {"status": "failed", "reason": "config.json: expected a|b\nfound c"}
    text = markdown({"source": "x", "verdict": "failed", "convert": failed})
    assert "| convert | failed | config.json: expected a\\|b found c |" in text
