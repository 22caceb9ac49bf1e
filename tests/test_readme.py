"""The commands and the Python of README.md do what they say, on the bundled model."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

ROOT = Path(__file__).resolve().parent.parent
FFNS = ("dense", "union")
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the code blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the shell commands of the README were run, but for those that set up or do not end."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "examples").symlink_to(ROOT / "examples")
    for line in "".join(blocks("")).splitlines():
        if line.startswith(".venv/bin/blockffn ") and " serve " not in line:
            command = [sys.executable, "-m", "blockffn", *shlex.split(line)[1:]]
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            assert result.returncode == 0, f"{line}\n{result.stderr}"
    return folder


def test_commands_make_the_files(folder: Path) -> None:
    assert {path.name for path in folder.glob("*.gguf")} == {"tiny.gguf", "tiny-q4.gguf"}


def test_python_runs(folder: Path) -> None:
    (code,) = blocks("python")
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "'drafted'" in result.stdout


def test_every_path_in_the_layout_exists() -> None:
    layout = README.split("## Layout")[1]
    for name in re.findall(r"^([\w-]+)/ ", layout, flags=re.MULTILINE):
        assert (ROOT / name).is_dir(), name


def test_every_command_is_listed() -> None:
    from blockffn.cli import COMMANDS

    for name in COMMANDS:
        assert re.search(rf"`{name}[ `]", README), name


@pytest.mark.parametrize(
    "document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_lead_somewhere(document: Path) -> None:
    """Files exist, and so do the headings that are named."""
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name) if name else document
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, target


def test_pictures_are_drawn_from_the_committed_figures(tmp_path: Path) -> None:
    """Every picture of docs/figures.py is committed, and can be drawn again."""
    spec = importlib.util.spec_from_file_location("blockffn_figures", ROOT / "docs" / "figures.py")
    assert spec is not None and spec.loader is not None
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    for name in ("idea", "loop", "speed"):
        getattr(figures, name)(tmp_path / f"{name}.png")
        drawn, committed = (matplotlib.image.imread(folder / f"{name}.png") for folder in (tmp_path, ROOT / "docs"))
        assert drawn.shape == committed.shape


def test_speeds_of_the_readme_are_those_of_the_raw_files() -> None:
    def rows(stem: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((ROOT / "docs" / f"{stem}.json").read_text())["rows"]
        return found

    def ratios(stem: str) -> list[str]:
        rates = {(row["ffn"], row["phase"], row["n"]): row["tokens_per_second"] for row in rows(stem)}
        phases = (("decode", 1), ("verify", 8), ("prefill", 512))
        return [f"{rates[('union', *phase)] / rates[('dense', *phase)]:.1f}" for phase in phases]

    text = " ".join(README.split())
    decode, verify, prefill = ratios("bench-1.2b-portable")
    assert (
        f"decoding {decode} times as fast as dense, verifying 8 tokens {verify} times, prefill of 512 {prefill}" in text
    )
    assert "DECO-1.2B: {}, {} and {} times".format(*ratios("bench-deco-1.2b-portable")) in text
    run = [row for row in rows("bench-speculative-1.2b-16384") if row["phase"] == "decode"]
    dense, plain = (next(r["tokens_per_second"] for r in run if r["ffn"] == f and r["drafter"] == "none") for f in FFNS)
    assert f"| plain | {plain / dense:.1f} times | 1 |" in text
    for words, drafter in (("nothing", "scripted"), ("tokens", "scripted+1.2b-eagle-16384-Q4_0")):
        rate = next(r["tokens_per_second"] for r in run if r["drafter"] == drafter and r["plan"] == "chain 3")
        assert f"{words} | {rate / dense:.1f} times | {rate / plain:.1f} times |" in text
