"""The report of `blockffn bench`: sections, resuming, failures, and the page in a real browser."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from blockffn.cli import main
from blockffn.eval import cli as eval_cli
from blockffn.eval.bench import cli as bench_cli
from blockffn.eval.report import run as report_run
from blockffn.eval.report.sections import SIZES, Subject, sections

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SUBJECT = Subject("model.gguf", "dense.gguf", "text.py", 512, "parts", "model.gguf")
FFNS = ("union", "dense")
WHERE = {"cpu": "a CPU <quoted>", "past": 128, "threads": 2}
DIAL = {"kld_mean": 0.01, "perplexity": 3.2, "decode_tokens_per_second": 50.0, "verify8_tokens_per_second": 90.0}


def fake_rows(words: list[str]) -> list[dict[str, Any]]:
    """Rows such as each command gives, with made-up figures."""
    speed = {"drafter": "none", "tokens_per_second": 50.0, "spread": 0.02, "peak_rss_mb": 900.0, "acceptance": None}
    model = speed | {"model": "<m>.gguf", "anonymous_mb": 500.0, "file_mb": 400.0, "tokens_per_step": 1.0}
    if words[:2] == ["bench", "ops"]:
        row = {"shape": "1.2B", "type": "q4_0", "ours_ms": 0.1, "dense_ms": 0.4, "mul_mat_id_ms": 0.2, "spread": 0.01}
        return [row | {"n": n, "union_share": 0.2, "bandwidth_gbs": 20.0, "fraction_of_limit": 0.7} for n in (1, 8)]
    if words[:2] == ["bench", "peers"]:
        failed = {"program": "llama-cli", "drafter": "none", "failure": "<it> & broke"}
        return [model | {"program": "blockffn", "same_text": 2, "failure": None}, failed]
    if words[:2] == ["bench", "load"]:
        stages = {"import_seconds": 0.2, "load_seconds": 0.1, "first_token_seconds": 0.01, "file_size_mb": 900.0}
        return [model | stages]
    if words[:2] == ["eval", "types"]:
        return [DIAL | {"type": kind, "bits_per_weight": b} for kind, b in (("Q8_0", 8.5), ("Q4_0", 5.0))]
    if words[:2] == ["eval", "dial"]:
        return [DIAL | {"threshold": t, "budget": b, "union8": 9.0} for t, b in ((0.0, 0), (0.1, 0), (0.0, 8))]
    if "--ops" in words:
        step = {"past": 128, "n": 1, "step_ms": 5.0, "spread": 0.01, "ms": {"head": 2.0, "rest": 3.0}}
        return [step | {"ffn": f} for f in FFNS]
    if "--plans" in words or "--draft" in words:
        plain = model | {"ffn": "union", "phase": "decode", "n": 1, "plan": "plain"}
        return [plain, plain | {"drafter": "ngram", "plan": "auto", "acceptance": 0.5, "tokens_per_second": 80.0}]
    if "--past" in words:
        phases = (("decode", 1), ("verify", 4), ("verify", 8))
        return [model | {"ffn": f, "phase": p, "n": n} for f in FFNS for p, n in phases]
    return [{"name": "a", "figure": 1.5}]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replaces the processes of the commands; returns the commands that were run."""
    called: list[list[str]] = []

    def run(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        if command[:3] != [sys.executable, "-m", "blockffn"]:
            return subprocess.CompletedProcess(command, 0, "", "")  # git
        words = command[3:]
        called.append(words)
        past = int(words[words.index("--past") + 1].split(",")[0]) if "--past" in words else 128
        found = {"environment": WHERE | {"past": past}, "rows": fake_rows(words)}
        return subprocess.CompletedProcess(command, 0, "some table\n" + json.dumps(found) + "\n", "")

    monkeypatch.setattr(report_run.subprocess, "run", run)
    return called


def write(target: Path, *arguments: str) -> int:
    """Write a report about three files that need not be models: the commands are not run."""
    for name in ("model.gguf", "dense.gguf"):
        (target.parent / name).write_bytes(b"")
    model = ["-m", str(target.parent / "model.gguf"), "--dense", str(target.parent / "dense.gguf")]
    return main(["bench", "--report", str(target), *model, "-f", __file__, *arguments])


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> None:
    from blockffn import _capi, quantize

    monkeypatch.setattr(_capi, "read_header", lambda _path: _capi.Header("blockffn", 512))
    monkeypatch.setattr(quantize, "is_unquantized", lambda _path: True)


class Checker(HTMLParser):
    """Collects what a page refers to, and sees that elements are closed in order."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, text in attrs:
            if name == "id":
                self.ids.append(text or "")
            if name in ("href", "src", "xlink:href"):
                self.links.append(text or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.usefixtures("context")
@pytest.mark.parametrize("size", SIZES)
def test_page(size: str, commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "report.html"
    assert write(target, "--size", size) == 0
    assert "left out" not in capsys.readouterr().err
    text = target.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert not checker.open and len(checker.ids) == len(set(checker.ids))
    names = [section.name for section in sections(size, SUBJECT)]
    assert {"ops", "step", "speculation", "types", "dial", "peers", "load"} < set(names)
    assert all(name in checker.ids for name in names)
    assert all(link == "data:," or link[1:] in checker.ids for link in checker.links)  # nothing outside the page
    assert "<script" not in text and "@import" not in text and "url(http" not in text
    for words in commands:
        assert "$ blockffn " + words[0] in text
    assert text.count("raw JSON") == len(commands)
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == len(names)
    assert "&lt;it&gt; &amp; broke" in text and "<it>" not in text
    assert "4.00x" in text and "1.60x" in text  # dense 0.4 ms over union 0.1 ms; 80 over 50 tokens/s


@pytest.mark.usefixtures("context")
def test_an_interrupted_report_goes_on(
    commands: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, whole = tmp_path / "report.html", report_run.subprocess.run

    def broken(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[3:5] == ["eval", "dial"]:
            return subprocess.CompletedProcess(command, 1, "", "warming up\nerror: <no> room\n")
        if command[3:5] == ["bench", "load"]:
            return subprocess.CompletedProcess(command, 0, "not JSON\n", "")
        return whole(command, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(report_run.subprocess, "run", broken)
    assert write(target) == 1
    text = target.read_text()
    assert "exit code 1: error: &lt;no&gt; room" in text and "expected a last line of JSON" in text
    before = len(commands)
    capsys.readouterr()
    monkeypatch.setattr(report_run.subprocess, "run", whole)
    assert write(target) == 0  # only what failed, or was not there, is run again
    assert [words[:2] for words in commands[before:]] == [["eval", "dial"], ["bench", "load"]]
    assert "error" not in re.sub(r"kld_error", "", target.read_text())
    said, total = capsys.readouterr().err.splitlines(), before + 2  # the commands that failed were not counted above
    assert said[0] == f"1 of {total}: The operation alone: 1.2B q4_0, kept from before"
    assert said[-2] == f"{total} of {total}: Load time and memory: load"


@pytest.mark.usefixtures("context", "commands")
def test_a_command_that_this_version_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = report_run.subprocess.run

    def older(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[3:5] == ["eval", "types"]:
            return subprocess.CompletedProcess(command, 2, "", "invalid choice: types")
        return whole(command, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(report_run.subprocess, "run", older)
    assert write(tmp_path / "report.html") == 0
    assert "Types: left out, this version has no such command" in capsys.readouterr().err
    assert 'id="types"' not in (tmp_path / "report.html").read_text()


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--report", str(tmp_path / "none" / "r.html")], "no such folder"),
        (["--report", str(tmp_path / "r.html"), "--shape", "tiny"], "--report: goes without --shape"),
        (["--report", str(tmp_path / "r.html"), "-m", "m.gguf"], "--file: expected the text"),
        (["--report", str(tmp_path / "r.html"), "-m", "m.gguf", "-f", "t.py"], "m.gguf: no such file"),
    ):
        assert main(["bench", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_commands_are_ours() -> None:
    """Each command of each size parses, so that none is left out by a wrong option of ours."""
    modules = {"bench": bench_cli, "eval": eval_cli}
    for size in SIZES:
        for section in sections(size, SUBJECT):
            for words in section.words.values():
                parser = argparse.ArgumentParser(prog=words[0])
                modules[words[0]].add_arguments(parser)
                parser.parse_args(words[1:])


def test_types_need_unquantized_weights() -> None:
    """A quantized model has no such section: there is nothing to compare its types with."""
    quantized = Subject("model.gguf", None, "text.py", 512, "parts")
    assert "types" not in [section.name for section in sections("quick", quantized)]


def console(page: Path, profile: Path) -> tuple[list[str], str]:
    """Open a page without a network; return what the console says, and the document that the browser made of it."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    environment = os.environ | {"HOME": str(profile)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stdout


@pytest.mark.usefixtures("context", "commands")
def test_browser_finds_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if BROWSER is None:
        pytest.skip("no Chromium here (Debian and Ubuntu: apt-get install chromium)")
    assert write(tmp_path / "report.html") == 0
    monkeypatch.undo()
    messages, document = console(tmp_path / "report.html", tmp_path / "profile")
    assert messages == []
    assert document.count("<svg") == 8 and document.count("<table") > 7
    broken = tmp_path / "broken.html"
    broken.write_text("<p>text</p><script>undefined_function()</script>")
    assert console(broken, tmp_path / "profile")[0]  # it would have seen one
