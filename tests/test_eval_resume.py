"""`eval ppl`, `kld` and `sparsity` with --output: a kill, Ctrl-C or a full disk loses at most the window in work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blockffn.cli import main
from blockffn.eval import journal

MEASURES = ("ppl", "kld", "sparsity")
# Ends the process, as `kill -9` does, before the third record is kept.
KILLED = """
import os, signal, sys
from blockffn.cli import main
from blockffn.eval.journal import Journal
add = Journal.add
def dying(self, record):
    if len(self.records) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, record)
Journal.add = dying
main(sys.argv[1:])
"""
# Files may not grow beyond so many bytes, as on a disk that is full.
FULL = """
import resource, sys
from blockffn.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.py"
    file.write_text("".join(f"def f{i}(x):\n    return x + {i * 37 % 11}\n" for i in range(30)))
    return file


def command(measure: str, model: Path, text: Path, *more: object) -> list[str]:
    """Return a command line whose text has six windows."""
    line = ["eval", measure, "-m", model, "-f", text, "-c", 64, "-n", 400, "-t", 1, "--json", *more]
    reference = ["--reference", model, "--cache-type", "f16"] if measure == "kld" else []
    return [str(word) for word in (*line, *reference)]


def figures(capsys: pytest.CaptureFixture[str], line: list[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(line) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def program(source: str, line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", source, *line], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("measure", MEASURES)
def test_kill_and_resume(
    capsys: pytest.CaptureFixture[str], blockffn_model: Path, text: Path, tmp_path: Path, measure: str
) -> None:
    """Two windows are kept, four are measured after the kill, and the figures are those of one run, bit for bit."""
    output = tmp_path / "run.jsonl"
    assert program(KILLED, command(measure, blockffn_model, text, "--output", output)).returncode == -9
    kept = output.read_bytes()
    assert kept.count(b"\n") == 1 + 2
    resumed = figures(capsys, command(measure, blockffn_model, text, "--output", output))
    assert output.read_bytes().startswith(kept) and output.read_bytes().count(b"\n") == 1 + 6
    assert resumed == figures(capsys, command(measure, blockffn_model, text))
    assert resumed == figures(capsys, command(measure, blockffn_model, text, "--output", output))  # nothing left


def test_interrupt_says_where_the_work_is(
    capsys: pytest.CaptureFixture[str], blockffn_model: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    add = journal.Journal.add

    def stop(self: journal.Journal, record: Any) -> None:
        if len(self.records) == 1:
            raise KeyboardInterrupt
        add(self, record)

    monkeypatch.setattr(journal.Journal, "add", stop)
    output = tmp_path / "ppl.jsonl"
    assert main(command("ppl", blockffn_model, text, "--output", output)) == 130
    assert f"{output} has what was done; repeat the command to go on" in capsys.readouterr().err


@pytest.mark.parametrize(("measure", "room"), [("ppl", 2500), ("kld", 6000), ("sparsity", 600)])
def test_full_disk(
    capsys: pytest.CaptureFixture[str], blockffn_model: Path, text: Path, tmp_path: Path, measure: str, room: int
) -> None:
    output = tmp_path / "run.jsonl"
    line = command(measure, blockffn_model, text, "--output", output)
    ended = program(FULL, [str(room), *line])
    assert ended.returncode == 1 and "what was done before is kept; make room and repeat" in ended.stderr
    assert ended.stderr.count("error:") == 1 and "Traceback" not in ended.stderr
    assert output.read_bytes().endswith(b"\n") and 200 < output.stat().st_size <= room
    assert figures(capsys, line) == figures(capsys, command(measure, blockffn_model, text))


def test_another_run_is_refused(
    capsys: pytest.CaptureFixture[str], blockffn_model: Path, text: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run.jsonl"
    figures(capsys, command("ppl", blockffn_model, text, "--output", output))
    assert main(command("kld", blockffn_model, text, "--output", output)) == 1
    assert "was begun with measure 'ppl', this run has 'kld'" in capsys.readouterr().err
    assert main([*command("ppl", blockffn_model, text, "--output", output), "-c", "32"]) == 1
    assert "was begun with window 64, this run has 32" in capsys.readouterr().err
