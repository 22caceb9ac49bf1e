"""The command line: dispatch, exit codes, messages, run and chat."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Runner

from blockffn import cli
from blockffn.commands import serve

CLI = [sys.executable, "-m", "blockffn.cli"]


def test_help_lists_every_command_without_importing_them() -> None:
    code = """
import sys
from blockffn import cli
try:
    cli.main(["--help"])
except SystemExit as error:
    print("exit", error.code)
print([m for m in ("torch", "numpy", "llama_cpp", "blockffn.convert", "blockffn.eval") if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    assert all(f"    {command} " in out for command in cli.COMMANDS)
    assert out.endswith("exit 0\n[]\n")


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(command: str, blockffn_cli: Runner) -> None:
    result = blockffn_cli(command, "--help")
    assert result.returncode == 0 and "usage" in result.stdout.lower(), result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["qantize"], "did you mean 'quantize'"),
        (["frobnicate"], "known: convert, inspect"),
        (["run", "-p", "x"], "-m/--model"),
        (["run", "-m", "x.gguf"], "-p/--prompt"),
        (["run", "-m", "x", "-p", "a", "-f", "b"], "not allowed with"),
        (["run", "-m", "x", "-p", "a", "-n", "0"], "expected a positive number"),
        (["run", "-m", "x", "-p", "a", "-n", "many"], "invalid count value"),
        (["run", "-m", "x", "-p", "a", "--ffn", "both"], "invalid choice"),
        (["inspect"], "M.gguf"),
        (["inspect", "a", "--wrong"], "unrecognized arguments"),
        (["quantize", "a", "b"], "TYPE"),
    ],
)
def test_wrong_usage_is_two(arguments: list[str], message: str, blockffn_cli: Runner) -> None:
    result = blockffn_cli(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["run", "chat", "inspect", "serve"])
@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "foreign", "cut"])
def test_bad_model_is_one_message(
    command: str, kind: str, tmp_path: Path, stock_model: Path, blockffn_cli: Runner
) -> None:
    path = tmp_path / "model.gguf"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        data = {"empty": b"", "foreign": b"PK\3\4 zip", "cut": stock_model.read_bytes()[:4000]}[kind]
        path.write_bytes(data)
    if command == "serve" and kind not in ("missing", "directory"):
        pytest.skip("llama-server reads the file itself")
    arguments = {"run": ["-p", "x", "-m"], "chat": ["-m"], "inspect": [], "serve": ["-m"]}[command]
    result = blockffn_cli(command, *arguments, path)
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert str(path) in result.stderr


def test_debug_shows_the_traceback(blockffn_cli: Runner) -> None:
    for arguments in (["--debug", "inspect", "nowhere.gguf"], ["inspect", "nowhere.gguf", "--debug"]):
        result = blockffn_cli(*arguments)
        assert result.returncode == 1 and "Traceback" in result.stderr and "BlockffnError" in result.stderr


def test_operating_system_errors_are_messages(blockffn_cli: Runner) -> None:
    result = blockffn_cli("run", "-m", "x.gguf", "-f", "nowhere.txt")
    assert result.returncode == 1 and result.stderr == "error: nowhere.txt: No such file or directory\n"


def test_run_streams_text(stock_model: Path, blockffn_cli: Runner) -> None:
    arguments = ["run", "-m", stock_model, "-p", "abc", "-n", "12", "--temp", "0", "-t", "1"]
    plain = blockffn_cli(*arguments)
    assert plain.returncode == 0 and plain.stderr == "" and len(plain.stdout) > 3
    assert blockffn_cli(*arguments).stdout == plain.stdout
    echoed = blockffn_cli(*arguments, "--echo")
    assert echoed.stdout == "abc" + plain.stdout
    stats = blockffn_cli(*arguments, "--stats")
    assert stats.stdout == plain.stdout
    assert "tokens/s" in stats.stderr and "prompt" in stats.stderr and "decoding" in stats.stderr
    report = json.loads(blockffn_cli(*arguments, "--json").stdout)
    assert report["text"] + "\n" == plain.stdout and report["prompt"] == "abc"
    assert report["generated_tokens"] == 12 and report["decode_tokens_per_second"] > 0


def test_run_takes_prompts_from_stdin_and_files(tmp_path: Path, stock_model: Path, blockffn_cli: Runner) -> None:
    common = ["run", "-m", stock_model, "-n", "6", "--temp", "0", "-t", "1"]
    (tmp_path / "p.txt").write_text("abc")
    outputs = {
        blockffn_cli(*common, "-p", "abc").stdout,
        blockffn_cli(*common, "-p", "-", input="abc").stdout,
        blockffn_cli(*common, "-f", tmp_path / "p.txt").stdout,
    }
    assert len(outputs) == 1
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    result = blockffn_cli(*common, "-f", tmp_path / "latin.txt")
    assert result.returncode == 1 and "not UTF-8" in result.stderr


def test_run_seed_decides(stock_model: Path, blockffn_cli: Runner) -> None:
    common = ["run", "-m", stock_model, "-p", "abc", "-n", "16", "--temp", "1.5", "-t", "1", "--seed"]
    first, again, other = (blockffn_cli(*common, seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other


def test_run_prompt_longer_than_the_context(stock_model: Path, blockffn_cli: Runner) -> None:
    result = blockffn_cli("run", "-m", stock_model, "-p", "x" * 600, "-c", "256", "-t", "1")
    assert result.returncode == 1 and "601 tokens" in result.stderr and "--ctx-size" in result.stderr


def test_run_stops_at_the_end_of_the_context(stock_model: Path, blockffn_cli: Runner) -> None:
    result = blockffn_cli(
        "run", "-m", stock_model, "-p", "x" * 240, "-c", "256", "-n", "99", "--temp", "0", "-t", "1", "--json"
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["generated_tokens"] <= 256 - 241


def test_run_speculates(stock_model: Path, blockffn_cli: Runner) -> None:
    common = ["run", "-m", stock_model, "-p", "abcabcabcabc", "-n", "12", "--temp", "0", "-t", "1"]
    plain = blockffn_cli(*common)
    ngram = blockffn_cli(*common, "--draft", "ngram", "--stats")
    assert ngram.returncode == 0, ngram.stderr
    assert ngram.stdout == plain.stdout and "tokens accepted" in ngram.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tree"], "--tree: needs --draft"),
        (["--tree", "--draft", "ngram"], "n-gram drafts are chains"),
        (["--draft", "nowhere.gguf"], "nowhere.gguf: no such file"),
    ],
)
def test_run_bad_drafts(arguments: list[str], message: str, stock_model: Path, blockffn_cli: Runner) -> None:
    result = blockffn_cli("run", "-m", stock_model, "-p", "x", "-t", "1", *arguments)
    assert result.returncode == 1 and message in result.stderr


def test_run_prints_sparsity(blockffn_model: Path, blockffn_cli: Runner) -> None:
    common = ["run", "-m", blockffn_model, "-p", "def add", "-n", "8", "--temp", "0", "-t", "1"]
    result = blockffn_cli(*common, "--stats")
    assert result.returncode == 0 and "sparsity (TLS)" in result.stderr
    report = json.loads(blockffn_cli(*common, "--json").stdout)
    assert 0 < report["token_sparsity"] < 1 and 0 < report["union_share"] < 1
    dense = json.loads(blockffn_cli(*common, "--json", "--ffn", "dense").stdout)
    assert dense["text"] == report["text"]


def test_closed_pipe_is_quiet(stock_model: Path) -> None:
    command = [*CLI, "run", "-m", str(stock_model), "-p", "abc", "-n", "400", "--temp", "0", "-t", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_interrupt_is_quiet(stock_model: Path) -> None:
    command = [*CLI, "run", "-m", str(stock_model), "-p", "abc", "-n", "4000", "--temp", "0", "-t", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in errors


def test_chat_keeps_the_history(stock_model: Path, blockffn_cli: Runner) -> None:
    common = ["chat", "-m", stock_model, "-n", "5", "--temp", "0", "-t", "1", "-c", "1024"]
    two = blockffn_cli(*common, input="hello\nhello\n")
    assert two.returncode == 0, two.stderr
    assert "no chat template" in two.stderr
    cleared = blockffn_cli(*common, input="hello\n/clear\nhello\n/exit\nnever\n")
    answers = cleared.stdout.rstrip("\n")
    half = len(answers) // 2
    assert answers[:half] == answers[half + 1 :]  # the same answer twice: nothing was remembered
    assert two.stdout != cleared.stdout


def test_chat_context_is_full(stock_model: Path, blockffn_cli: Runner) -> None:
    result = blockffn_cli("chat", "-m", stock_model, "-n", "5", "-t", "1", "-c", "256", input="x" * 400 + "\n")
    assert result.returncode == 1 and "--ctx-size" in result.stderr and "Traceback" not in result.stderr


def test_serve_passes_everything_on(stock_model: Path) -> None:
    parser_words = ["serve", "-m", str(stock_model), "--port", "8081", "-c", "512", "--ffn", "dense", "--jinja"]
    seen: list[list[str]] = []
    real = os.execv

    def record(_path: str, line: list[str]) -> None:
        seen.append(line)
        raise SystemExit(0)

    os.execv = record  # type: ignore[assignment]
    try:
        with pytest.raises(SystemExit):
            cli.main(parser_words)
    finally:
        os.execv = real
    program, *rest = seen[0]
    assert Path(program).name == "llama-server"
    assert rest == [
        *["--model", str(stock_model), "--override-kv", "blockffn.ffn_dense=bool:true"],
        *["--port", "8081", "-c", "512", "--jinja"],
    ]
    assert serve.__doc__ is not None


def test_start_is_quick() -> None:
    subprocess.run([*CLI, "--version"], check=True, capture_output=True)
    start = time.perf_counter()
    subprocess.run([*CLI, "--version"], check=True, capture_output=True)
    assert time.perf_counter() - start < 2.0  # 0.07 s on a quiet machine
