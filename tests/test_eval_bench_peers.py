"""The contenders of blockffn.eval.bench.peers: what they answer, how failures are told, what is read from llama-cli."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from blockffn import library
from blockffn.cli import main
from blockffn.errors import BlockffnError
from blockffn.eval.bench import peer_program
from blockffn.eval.bench import peers as bench_peers
from blockffn.eval.bench.peers import Contender, Entry
from blockffn.eval.bench.process import Channel

LOG = """
0.05.6 I slot print_timing: id  0 | task 0 | prompt eval time =    1108.03 ms /    14 tokens (   79.14 ms per token)
0.01.8 I slot print_timing: id  0 | task 0 |        eval time =     802.88 ms /    64 tokens (   12.74 ms per token)
0.01.8 I slot print_timing: id 0 | task 0 | draft acceptance = 0.16129 (   35 accepted /   217 generated), mean len
"""
TEXT = "".join(f"line {i} of a text that goes on\n" for i in range(40))


def test_all_contenders(blockffn_model: Path, stock_model: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """Ours, the stock class and (where it is built) llama-cli continue the same prompts alike; rows are as promised."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    chosen = bench_peers.contenders(str(blockffn_model))
    if not (library.directory() / peer_program.NAME).is_file():
        chosen = [contender for contender in chosen if contender.program != "llama-cli"]
    monkeypatch.setattr(bench_peers, "contenders", lambda draft: chosen)
    arguments = ["bench", "peers", "-m", blockffn_model, "--draft", blockffn_model, "-f", text, "--prompts", "2"]
    arguments += ["--length", "60", "--tokens", "12", "--rounds", "1", "-t", "1", "--json"]
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(printed.splitlines()[-1])["rows"]
    assert [(row["program"], row["drafter"]) for row in rows] == [(c.program, c.drafter) for c in chosen]
    for row in rows:
        assert row["failure"] is None and row["prompts"] == row["samples"] == 2
        assert row["tokens_per_second"] > 0 and row["peak_rss_mb"] > 10
        assert row["same_text"] == 2 or row["program"] == "llama-cli"  # which prints random bytes in its own way
    fixed = rows[3]
    assert fixed["tokens_per_step"] > 2.5 and fixed["acceptance"] > 0.7  # it drafts for itself
    assert "2 of 2" in printed and "tokens/step" in printed


def test_who_takes_part() -> None:
    assert all("model" not in contender.drafter for contender in bench_peers.contenders(None))
    names = [contender.drafter for contender in bench_peers.contenders("a/draft.gguf")]
    assert names.count("draft, chain 3") == 2 and names.count("prompt lookup") == 1


def test_a_failure_is_a_result(blockffn_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    chosen = [Contender("blockffn", "none", ()), Contender("blockffn", "broken", ("--draft", str(broken)))]
    rows = bench_peers.measure(str(blockffn_model), chosen, ["some text to go on with"], 8, 1, 1)
    assert rows[0]["failure"] is None and "broken.gguf" in rows[1]["failure"]
    assert "failed: " in bench_peers.table(rows) and "tokens_per_second" not in rows[1]


def test_a_crash_is_a_result() -> None:
    channel = Channel("peer", [sys.executable, "-c", "import os; input(); os._exit(3)"])
    entry = Entry(Contender("peer", "none", ()), bench_peers.Worker(channel), {})
    entry.run(0, "text", 8)
    assert entry.failure == "peer: the benchmark process ended with code 3: no message"
    entry.run(0, "text", 8)  # it takes no further part
    channel.close()


def test_the_log_of_llama_cli() -> None:
    assert peer_program.parse(LOG) == {
        "tokens": 64, "seconds": 0.80288, "steps": 29, "drafted": 217, "accepted": 35,
    }  # fmt: skip
    assert peer_program.parse("nothing") == dict.fromkeys(("tokens", "seconds", "steps", "drafted", "accepted"), 0)


def test_llama_cli_fails_with_its_words(tmp_path: Path) -> None:
    assert (library.directory() / peer_program.NAME).is_file(), "llama-cli is missing: run `make build`"
    with pytest.raises(BlockffnError, match=r"llama-cli ended with code 1: .*model"):
        peer_program.Program(str(tmp_path / "none.gguf"), 1, None, ()).generate("text", 4)


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BlockffnError, match="no such program"):
        peer_program.Program("model.gguf", 1, tmp_path, ())


def test_prompts_start_lines() -> None:
    found = bench_peers.prompts(TEXT, 3, 50)
    assert len(set(found)) == 3 and all(prompt.startswith("line ") and len(prompt) <= 50 for prompt in found)
    assert found[0].startswith("line 0 ")
    with pytest.raises(BlockffnError, match="expected 3 lines with 5000 after each"):
        bench_peers.prompts(TEXT, 3, 5000)
    with pytest.raises(BlockffnError, match="expected 99 lines"):
        bench_peers.prompts(TEXT, 99, 50)


@pytest.mark.parametrize("name", ["--model", "--draft", "--file"])
def test_missing_files(name: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    there = tmp_path / "there"
    there.write_text("x")
    files = {"--model": there, "--draft": there, "--file": there, name: "missing.gguf"}
    assert main(["bench", "peers", *(str(word) for pair in files.items() for word in pair)]) == 1
    assert capsys.readouterr().err == "error: missing.gguf: no such file\n"
