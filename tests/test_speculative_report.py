"""What `--stats` shows of speculation, live on a terminal and at the end."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_llama import N_VOCAB

import blockffn
from blockffn import cli
from blockffn.commands.speculation import lines, summary
from blockffn.speculative import Context, Draft, ScriptedDrafter, drafter
from blockffn.speculative.draft import Plan, Step
from blockffn.speculative.stats import Statistics


def figures(*steps: tuple[int, int, bool], **changes: Any) -> dict[str, Any]:
    """Statistics of steps given as (drafted, accepted, chain)."""
    statistics = Statistics()
    for drafted, accepted, chain in steps:
        parents = np.arange(drafted) - 1 if chain else np.minimum(np.arange(drafted) - 1, 0)  # a tree of two levels
        draft = Draft(np.zeros(drafted, np.int32), parents, chain, "ngram" if chain else "eagle")
        statistics.add(Step(Plan(drafted, not chain), drafted, draft, path=list(range(accepted))))
    return statistics.as_dict() | changes


def test_report_of_chains_and_trees() -> None:
    found = lines(figures((0, 0, True), (4, 3, True), (4, 0, True), (8, 2, False)))
    assert found[0] == "5 of 16 tokens accepted (31 %); by position 67, 67, 50, 0 %"
    assert found[1] == "2.25 tokens per step; 4 steps: 1 plain, 2 chains, 1 trees, 5.3 tokens in a draft"
    assert found[2].startswith("a step takes 0.00 ms of drafting")
    assert found[3:] == ["drafts by ngram 2, eagle 1"]


def test_report_of_long_drafts_is_cut() -> None:
    assert ", ... %" in lines(figures((16, 16, True)))[0]


def test_report_without_drafts() -> None:
    assert lines(figures((0, 0, True))) == ["none made in 1 steps"]
    given_up = lines(figures((0, 0, True), switched_off=2))
    assert given_up == ["none made in 1 steps; given up 2 times: plain decoding was faster"]
    assert lines(figures((2, 0, True), switched_off=1))[-1] == "given up 1 time: plain decoding was faster"


def test_summary_before_the_first_step() -> None:
    assert summary(figures()) == "0 of 0 drafted tokens accepted"
    assert summary(figures((3, 1, True))) == "2.00 tokens per step, 1 of 3 drafted tokens accepted (33 %)"


@pytest.mark.skipif(sys.platform == "win32", reason="terminals of POSIX")
@pytest.mark.parametrize("stats", [True, False])
def test_live_line_on_a_terminal(stock_model: Path, stats: bool) -> None:
    """The last row is reserved, filled, and given back; without --stats no control code is written."""
    import pty

    command = [sys.executable, "-m", "blockffn.cli", "run", "-m", str(stock_model), "-p", "abc", "-n", "60"]
    command += ["-c", "128", "-t", "1", "--temp", "0", "--draft", "ngram", *(["--stats"] if stats else [])]
    ours, theirs = pty.openpty()
    environment = os.environ | {"LINES": "24", "COLUMNS": "80"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # how Linux reports that the other side was closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait(60) == 0
    if not stats:
        assert b"\x1b" not in shown
        return
    assert b"\x1b[1;23r" in shown and shown.index(b"\x1b[r") > shown.index(b"\x1b[1;23r")
    assert re.search(rb"\x1b\[24;1H\x1b\[7m[^\x1b]*drafted tokens accepted", shown)
    assert b"drafts " in shown.split(b"\x1b[r")[1]


class Slow(ScriptedDrafter):
    """Always wrong, and dear."""

    def propose(self, context: Context, n: int) -> Draft:
        time.sleep(0.02)
        return super().propose(context, n)


@pytest.mark.parametrize("command", ["run", "chat"])
def test_switching_off_is_said_by_default(
    command: str, stock_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drafter, "open_drafter", lambda *_: Slow([1], 0.0, N_VOCAB))
    monkeypatch.setattr(sys, "stdin", io.StringIO("12345\n"))
    arguments = ["-m", stock_model, "--draft", "ngram", "-n", 60, "--temp", 0, "-c", 256, "-t", 1]
    arguments += ["-p", "12345"] if command == "run" else []
    assert cli.main([command, *map(str, arguments)]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: speculation off")]
    assert len(notes) == 1 and "tokens" in notes[0]


def test_switching_off_is_in_the_result(stock_model: Path) -> None:
    with blockffn.Llama(stock_model, drafter=Slow([1], 0.0, N_VOCAB), n_ctx=256, n_threads=1) as llm:
        out = llm.create_completion("ab", max_tokens=60, temperature=0.0, logit_bias={2: -1000.0})["speculation"]
        assert out["switched_off"] >= 1 and out["switched_off_reason"].startswith("speculation off: ")
