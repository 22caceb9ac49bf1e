"""Plain against speculative greedy text: what is counted, how it is resumed, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killing import run_until_killed

import blockffn
from blockffn.cli import main
from blockffn.errors import BlockffnError
from blockffn.eval.quality.equal import equal
from blockffn.speculative.draft import Draft
from blockffn.speculative.drafter import Context, Drafter
from blockffn.speculative.policy import Plan

CODE = b"for name in sorted(names):\n    print(name, values[name])\n" * 12


class Guess(Drafter):
    """Proposes the tokens that came after the last but two."""

    name = "guess"
    max_nodes = max_chain = 3

    def propose(self, context: Context, n: int) -> Draft:
        return Draft.chain(np.asarray(context.tokens[-n:], np.int32), self.name)


@pytest.fixture(scope="module")
def llm(blockffn_model: Path) -> Iterator[blockffn.Llama]:
    with blockffn.Llama(blockffn_model, n_ctx=128, n_threads=1) as found:
        yield found


@pytest.fixture(scope="module")
def tokens(llm: blockffn.Llama) -> list[int]:
    return llm.tokenize(CODE)


def test_exact_mode_has_no_difference_with_a_drafter_of_ones_own(llm: blockffn.Llama, tokens: list[int]) -> None:
    found = equal(llm, tokens, Guess(), 120, exact=True, plan=Plan(3), length=40, prompt=16)
    assert (found.tokens, found.texts, found.differences) == (120, 3, 0)
    assert found.texts_that_part == 0 and found.texts_equal == 3 and found.largest_lead is None
    assert found.drafted > 50 and found.drafter == "guess"
    assert found == equal(llm, tokens, Guess(), 120, exact=True, plan=Plan(3), length=40, prompt=16)


def test_a_difference_counts_once(llm: blockffn.Llama, tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are disturbed at the fourth batch of each speculative text: one token of each differs."""
    decoder = type(llm.loop.target)
    logits, batches = decoder.logits, [0]

    def disturbed(self: Any, rows: int) -> Any:
        found = logits(self, rows)
        if llm.drafter is None or rows == 1:
            batches[0] = 0
            return found
        batches[0] += 1
        if batches[0] != 4:
            return found
        found = found.copy()
        found[0, int(found[0].argmin())] = found[0].max() + 1.0
        return found

    monkeypatch.setattr(decoder, "logits", disturbed)
    found = equal(llm, tokens, Guess(), 60, exact=True, plan=Plan(3), length=30, prompt=16)
    assert (found.tokens, found.texts) == (60, 2)
    assert found.differences == 2 == found.texts_that_part
    assert found.texts_equal == 0 and found.per_thousand == pytest.approx(1000 / 30)
    assert found.largest_lead is not None and found.largest_lead > 0


def test_resumes_where_it_was(llm: blockffn.Llama, tokens: list[int], tmp_path: Path) -> None:
    """Stopped after five of ten texts, and a torn line added: the rest is done, nothing twice, the same figures."""
    file = str(tmp_path / "equal.jsonl")

    def stop(done: int, total: int, value: float) -> None:
        if done == 100:
            raise KeyboardInterrupt

    whole = equal(llm, tokens, "ngram", 200, True, Plan(3), 20, 16)
    with pytest.raises(KeyboardInterrupt):
        equal(llm, tokens, "ngram", 200, True, Plan(3), 20, 16, file, stop)
    with Path(file).open("a") as stream:
        stream.write('{"text": 5, "tok')
    told: list[int] = []
    again = equal(llm, tokens, "ngram", 200, True, Plan(3), 20, 16, file, lambda done, *_: told.append(done))
    assert again == whole and told[0] == 100 and len(told) == 6
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    assert [line["text"] for line in lines[1:]] == list(range(10))
    with pytest.raises(BlockffnError, match="was begun with length 20, this run has 21"):
        equal(llm, tokens, "ngram", 200, True, Plan(3), 21, 16, file)


def test_more_than_the_context_holds(llm: blockffn.Llama, tokens: list[int]) -> None:
    with pytest.raises(BlockffnError, match="prompt and text need 516 tokens, the context has"):
        equal(llm, tokens, "ngram", 10, True, None, 500, 16)


def test_survives_a_kill(blockffn_model: Path, tmp_path: Path) -> None:
    """Killed in mid-run, then repeated by the same command: every text once."""
    text, output = tmp_path / "text.py", tmp_path / "equal.jsonl"
    text.write_bytes(CODE)
    arguments = ["eval", "equal", "-m", blockffn_model, "-f", text, "--tokens", 400, "--length", 20, "--prompt", 16]
    arguments += ["-t", 1, "--exact", "--output", output]
    run_until_killed(arguments, "blockffn.eval.journal:Journal._append", 4)
    before = output.read_bytes()
    assert before.count(b"\n") == 4
    command = [sys.executable, "-m", "blockffn.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    figures = json.loads(done.stdout)
    assert figures["differences"] == 0 and figures["texts"] == 20 and "were done before" in done.stderr
    after = output.read_bytes()
    assert after.startswith(before[: before.rfind(b"\n") + 1])
    assert [json.loads(line)["text"] for line in after.splitlines()[1:]] == list(range(20))


def test_command(capsys: pytest.CaptureFixture[str], blockffn_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_bytes(CODE)
    arguments = ["eval", "equal", "-m", str(blockffn_model), "-f", str(text), "--tokens", "40", "--length", "20"]
    assert main([*arguments, "--prompt", "16", "-t", "1", "--exact"]) == 0
    output = capsys.readouterr().out
    assert "exact mode, drafts by ngram: 0 of 40 tokens differ" in output and "2 of 2 equal token for token" in output


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--tokens", "90000"], "prompts of 16 need"),
        (["--draft", "missing.gguf"], "missing.gguf: no such file"),
        (["--plan", "tower 3"], "plan: expected auto, chain N or tree N"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], blockffn_model: Path, tmp_path: Path, extra: list[str], message: str
) -> None:
    text = tmp_path / "text.py"
    text.write_bytes(CODE)
    base = ["eval", "equal", "-m", str(blockffn_model), "-f", str(text), "-t", "1", "--length", "20", "--prompt", "16"]
    assert main([*base, *extra]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.startswith("error: ")
