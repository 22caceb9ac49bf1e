"""The commands and the Python of README.md do what they say, on the bundled model."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
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
