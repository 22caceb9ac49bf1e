"""The command line: dispatch, exit codes, messages, run and chat."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Runner

from blockffn import cli
from blockffn.speculative.policy import Plan, Policy

Main = Callable[..., tuple[int, str, str]]
CLI = [sys.executable, "-m", "blockffn.cli"]


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Main:
    """Run a command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    return call


def test_help_lists_every_command_without_importing_them() -> None:
    """The start is quick: 0.07 s, where torch alone would take seconds."""
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
    assert all(f"    {command}" in out for command in cli.COMMANDS)
    assert out.endswith("exit 0\n[]\n")


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(command: str, main: Main) -> None:
    if command == "llama-server":
        pytest.skip("its help is llama.cpp's: see test_server.py")
    code, out, errors = main(command, "--help")
    assert code == 0 and f"usage: blockffn {command}" in out, errors


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
def test_wrong_usage_is_two(arguments: list[str], message: str, main: Main) -> None:
    code, out, errors = main(*arguments)
    assert code == 2 and out == "" and message in errors


@pytest.mark.parametrize("command", ["run", "chat", "inspect", "serve", "llama-server"])
@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "foreign", "cut"])
def test_bad_model_is_one_message(command: str, kind: str, tmp_path: Path, stock_model: Path, main: Main) -> None:
    path = tmp_path / "model.gguf"
    if kind == "directory":
        path.mkdir()
    elif kind != "missing":
        data = {"empty": b"", "foreign": b"PK\3\4 zip", "cut": stock_model.read_bytes()[:4000]}[kind]
        path.write_bytes(data)
    if command == "llama-server" and kind not in ("missing", "directory"):
        pytest.skip("llama-server reads the file itself")
    arguments = {
        "run": ["-p", "x", "-m"],
        "chat": ["-m"],
        "inspect": [],
        "serve": ["--port", "0", "-m"],
        "llama-server": ["-m"],
    }[command]
    code, _, errors = main(command, *arguments, path)
    assert code == 1
    assert errors.startswith("error: ") and errors.count("\n") == 1 and str(path) in errors


def test_debug_shows_the_traceback(blockffn_cli: Runner) -> None:
    for arguments in (["--debug", "inspect", "nowhere.gguf"], ["inspect", "nowhere.gguf", "--debug"]):
        result = blockffn_cli(*arguments)
        assert result.returncode == 1 and "Traceback" in result.stderr and "BlockffnError" in result.stderr


def test_operating_system_errors_are_messages(main: Main) -> None:
    assert main("run", "-m", "x.gguf", "-f", "nowhere.txt") == (
        1,
        "",
        "error: nowhere.txt: No such file or directory\n",
    )


def test_run_streams_text(stock_model: Path, main: Main) -> None:
    arguments = ["run", "-m", stock_model, "-p", "abc", "-n", "12", "--temp", "0", "-t", "1"]
    code, text, errors = main(*arguments)
    assert code == 0 and errors == "" and len(text) > 3
    assert main(*arguments) == (0, text, "")
    assert main(*arguments, "--echo")[1] == "abc" + text
    _, same, stats = main(*arguments, "--stats")
    assert same == text and "tokens/s" in stats and "prompt" in stats and "decoding" in stats
    report = json.loads(main(*arguments, "--json")[1])
    assert report["text"] + "\n" == text and report["prompt"] == "abc"
    assert report["generated_tokens"] == 12 and report["decode_tokens_per_second"] > 0


def test_run_takes_prompts_from_stdin_and_files(
    tmp_path: Path, stock_model: Path, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["run", "-m", stock_model, "-n", "6", "--temp", "0", "-t", "1"]
    (tmp_path / "p.txt").write_text("abc")
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc"))
    outputs = [main(*common, "-p", "abc"), main(*common, "-p", "-"), main(*common, "-f", tmp_path / "p.txt")]
    assert outputs[0] == outputs[1] == outputs[2]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    code, _, errors = main(*common, "-f", tmp_path / "latin.txt")
    assert code == 1 and "not UTF-8" in errors


def test_run_seed_decides(stock_model: Path, main: Main) -> None:
    common = ["run", "-m", stock_model, "-p", "abc", "-n", "16", "--temp", "1.5", "-t", "1", "--seed"]
    first, again, other = (main(*common, seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_run_prompt_longer_than_the_context(stock_model: Path, main: Main) -> None:
    code, _, errors = main("run", "-m", stock_model, "-p", "x" * 600, "-c", "256", "-t", "1")
    assert code == 1 and "601 tokens" in errors and "--ctx-size" in errors


def test_run_stops_at_the_end_of_the_context(stock_model: Path, main: Main) -> None:
    arguments = ["-p", "x" * 240, "-c", "256", "-n", "99", "--temp", "0", "-t", "1", "--json"]
    code, out, errors = main("run", "-m", stock_model, *arguments)
    assert code == 0, errors
    assert json.loads(out)["generated_tokens"] <= 256 - 241


def test_run_speculates(stock_model: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fixed plan: what the policy chooses depends on how busy the machine is."""
    monkeypatch.setattr(Policy, "plan", lambda self: Plan(4))
    common = ["run", "-m", stock_model, "-p", "abcabcabcabc", "-n", "12", "--temp", "0", "-t", "1"]
    _, text, _ = main(*common)
    code, same, stats = main(*common, "--draft", "ngram", "--stats")
    assert code == 0 and same == text and "tokens accepted" in stats


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tree"], "--tree: needs --draft"),
        (["--tree", "--draft", "ngram"], "n-gram drafts are chains"),
        (["--draft", "nowhere.gguf"], "nowhere.gguf: no such file"),
    ],
)
def test_run_bad_drafts(arguments: list[str], message: str, stock_model: Path, main: Main) -> None:
    code, _, errors = main("run", "-m", stock_model, "-p", "x", "-t", "1", *arguments)
    assert code == 1 and message in errors


def test_run_prints_sparsity(blockffn_model: Path, main: Main) -> None:
    common = ["run", "-m", blockffn_model, "-p", "def add", "-n", "8", "--temp", "0", "-t", "1"]
    code, _, stats = main(*common, "--stats")
    assert code == 0 and "sparsity (TLS)" in stats
    report = json.loads(main(*common, "--json")[1])
    assert 0 < report["token_sparsity"] < 1 and 0 < report["union_share"] < 1
    dense = json.loads(main(*common, "--json", "--ffn", "dense")[1])
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


def chat(main: Main, monkeypatch: pytest.MonkeyPatch, text: str, *arguments: str | Path) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main("chat", "-t", "1", "-n", "5", *arguments)


def test_chat_keeps_the_history(stock_model: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    common = ["-m", stock_model, "--temp", "0", "-c", "1024"]
    code, two, notes = chat(main, monkeypatch, "hello\nhello\n", *common)
    assert code == 0 and "no chat template" in notes
    _, cleared, _ = chat(main, monkeypatch, "hello\n/clear\nhello\n/exit\nnever\n", *common)
    _, once, _ = chat(main, monkeypatch, "hello\n", *common)
    assert cleared == once + once  # nothing was remembered
    assert two.startswith(once) and two != cleared


def test_chat_uses_the_template(tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    from checkpoints import write_checkpoint

    import blockffn

    source = write_checkpoint(tmp_path / "source")
    settings = source / "tokenizer_config.json"
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    model = tmp_path / "chat.gguf"
    blockffn.convert.convert_checkpoint(source, model, outtype="f32")
    common = ["-m", model, "--temp", "0"]
    code, answer, notes = chat(main, monkeypatch, "hello\n", *common, "--system", "be brief")
    assert code == 0 and notes == ""
    prompt = "[system] be brief\n[user] hello\n[assistant] "
    expected = main("run", "-t", "1", "-n", "5", *common, "-p", prompt)[1]
    assert answer.replace("\ufffd", "") == expected.replace("\ufffd", "")


def test_chat_context_is_full(stock_model: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, errors = chat(main, monkeypatch, "x" * 400 + "\n", "-m", stock_model, "-c", "256")
    assert code == 1 and "--ctx-size" in errors


def test_llama_server_gets_everything(stock_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parser_words = ["llama-server", "-m", str(stock_model), "--port", "8081", "-c", "512", "--ffn", "dense", "--jinja"]
    seen: list[list[str]] = []

    def record(_path: str, line: list[str]) -> None:
        seen.append(line)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", record)
    with pytest.raises(SystemExit):
        cli.main(parser_words)
    program, *rest = seen[0]
    assert Path(program).name == "llama-server"
    assert rest == [
        *["--model", str(stock_model), "--override-kv", "blockffn.ffn_dense=bool:true"],
        *["--port", "8081", "-c", "512", "--jinja"],
    ]
