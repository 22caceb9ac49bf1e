"""Journals survive kills and full disks; progress tells the time left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from blockffn.errors import BlockffnError
from blockffn.eval import progress
from blockffn.eval.journal import Journal, fingerprint
from blockffn.eval.progress import Progress, Shown, duration


def test_goes_on_after_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Journal(path, {"model": "m", "n": 3}) as journal:
        journal.add({"text": 0})
        journal.add({"text": 1})
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with Journal(path, {"model": "m", "n": 3}) as journal:
            for text in range(len(journal.records), 2):
                journal.add({"text": text})
        assert path.read_bytes() == whole, cut


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.jsonl"
    write = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) > 20:
            return write(file, data[:20])
        raise OSError(28, "No space left on device")

    with Journal(path, {}) as journal:
        journal.add({"text": 0})
        before = path.read_bytes()
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(BlockffnError, match="No space left on device: what was done before is kept"):
            journal.add({"text": 1, "words": "far more than fits"})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello\n", "line 1 is not JSON"),
        (b"some notes", "expected a file that this command wrote"),
        (b'{"a": 1}\n', "expected the settings of a run"),
        (b'{"settings": {"n": 4}}\n', "was begun with n 4, this run has 3"),
    ],
)
def test_another_file_is_not_touched(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(BlockffnError, match=message):
        Journal(path, {"n": 3})
    assert path.read_bytes() == content


def test_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Journal(path, {}), pytest.raises(BlockffnError, match="another run is writing it"):
        Journal(path, {})


def test_fingerprints_differ(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"a" * 10)
    first = fingerprint(path)
    path.write_bytes(b"a" * 9 + b"b")
    assert fingerprint(path) != first and first.startswith("m.gguf, 10 bytes, ")


def test_plain_lines_tell_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds for each of the 50 pieces that are left after the first 50: a line every ten seconds."""
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    shown = Shown("perplexity", "window")
    for done in range(50, 101):
        shown(done, 100, 7.25)
        clock[0] += 2.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "50 of 100 windows were done before"
    fresh = Shown("perplexity", "window")
    fresh(1, 2, 7.25)
    assert capsys.readouterr().err == ""
    assert lines[1] == "56/100 windows, perplexity 7.25, 88 s left" and len(lines) == 9


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress(3, "question") as shown:
        for _ in range(3):
            shown.step(note="speed 2")
    assert "\r" in capsys.readouterr().err
    assert duration(125) == "2 min"
