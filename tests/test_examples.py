"""Every short script of examples/ runs as its first line says, and stays short."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"demo"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A text, two questions and a local task."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.txt").write_text("import os\n\nfor name in os.listdir():\n    print(name)\n" * 8)
    turns = ["one two three one two", "and again"]
    rows = [{"question_id": i, "category": "qa", "turns": turns} for i in range(2)]
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.jsonl").write_text('{"question": "import", "choices": [" os", " 42"], "answer": 0}\n')
    (folder / "task.yaml").write_text(
        f"task: local_choice\ntest_split: test\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {folder / 'task.jsonl'}\noutput_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n"
    )
    return {"text": str(folder / "text.txt"), "questions": str(folder / "question.jsonl"), "folder": str(folder)}


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("convert_and_chat", (), "\n"),
        ("sparsity_of_a_text", ("{model}", "{text}"), "neighbouring tokens leave out"),
        ("spec_bench", ("{model}", "{questions}"), "overall"),
        ("lm_eval_task", ("{model}", "local_choice", "{folder}"), "acc,none"),
        ("dial", ("{model}", "{text}"), "tau 0.2:"),
        ("custom_drafter", ("{model}",), " of "),
    ],
)
def test_runs(
    name: str, arguments: tuple[str, ...], expected: str, blockffn_model: Path, files: dict[str, str]
) -> None:
    words = [word.format(model=blockffn_model, **files) for word in arguments]
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *words]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert expected in result.stdout


def test_all_are_short_and_tried() -> None:
    tried = {mark.args[1][i][0] for mark in test_runs.pytestmark for i in range(len(mark.args[1]))}
    assert tried == SCRIPTS
    assert all(len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 20 for name in SCRIPTS)
