"""`blockffn eval spec-bench`: questions, prompts, schema, resuming after a kill, workers, Ray, the table."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from killing import run_until_killed

from blockffn.cli import main
from blockffn.errors import BlockffnError
from blockffn.eval.spec_bench.questions import parse, read_questions, select
from blockffn.eval.spec_bench.report import summarize, table
from blockffn.eval.spec_bench.workers import core_sets

CATEGORIES = ("writing", "translation", "qa", "rag", "coding", "math_reasoning")
SCHEMA = {"question_id", "category", "answer_id", "model_id", "choices", "tstamp"}
CHOICE = {"index", "turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths"}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions of six categories, two turns in every third."""
    file = tmp_path_factory.mktemp("questions") / "question.jsonl"
    lines = []
    for number in range(12):
        turns = [f"one two three {number} one two three"] + ["and again one two"] * (number % 3 == 0)
        lines.append(json.dumps({"question_id": number, "category": CATEGORIES[number % 6], "turns": turns}))
    file.write_text("\n".join(lines) + "\n")
    return file


def arguments(model: Path, questions: Path, output: Path, *more: object) -> list[str]:
    """Return a command line; the model is its own draft model, whose drafts are right."""
    line = [
        "eval",
        "spec-bench",
        "-m",
        model,
        "--questions",
        questions,
        "--output",
        output,
        "--draft",
        model,
        "--chain",
        3,
    ]
    return [str(word) for word in (*line, "--plain", "-n", 48, "-t", 1, *more)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def baseline(path: Path) -> Path:
    return path.with_name(f"{path.stem}-baseline.jsonl")


def texts(path: Path) -> dict[int, list[str]]:
    """Return the answers by question; a question that stands twice fails."""
    found = {record["question_id"]: record["choices"][0]["turns"] for record in lines(path)}
    assert len(found) == len(lines(path))
    return found


@pytest.fixture(scope="module")
def whole(stock_model: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of an undisturbed run in exact mode."""
    output = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    assert main(arguments(stock_model, questions, output, "--exact")) == 0
    return output


def test_schema(whole: Path) -> None:
    for path in (whole, baseline(whole)):
        records = lines(path)
        assert [record["question_id"] for record in records] == list(range(12))
        for record in records:
            assert set(record) >= SCHEMA and set(record["choices"][0]) == CHOICE
            choice, number = record["choices"][0], record["question_id"]
            assert len(choice["turns"]) == len(choice["wall_time"]) == 1 + (number % 3 == 0)
            assert sum(choice["decoding_steps"]) == len(choice["accept_lengths"])
            metrics = record["metrics"]["speculative_decoding"]
            assert sum(metrics["acceptance_histogram"].values()) == metrics["num_spec_steps"]
            if metrics["num_spec_steps"]:
                mean = sum(choice["accept_lengths"]) / len(choice["accept_lengths"])
                assert mean == pytest.approx(metrics["mean_acceptance_length"])
    assert {size for r in lines(baseline(whole)) for size in r["choices"][0]["accept_lengths"]} == {1}
    drafted = sum(r["metrics"]["speculative_decoding"]["num_draft_tokens"] for r in lines(whole))
    assert drafted > 0 and texts(whole) == texts(baseline(whole))  # exact mode: the same text
    assert max(size for r in lines(whole) for size in r["choices"][0]["accept_lengths"]) == 4


def test_table_and_json(
    capsys: pytest.CaptureFixture[str], stock_model: Path, questions: Path, whole: Path, tmp_path: Path
) -> None:
    """The same command again answers nothing anew, prints the table and draws the chart."""
    before = whole.read_bytes()
    chart = tmp_path / "chart.svg"
    assert main(arguments(stock_model, questions, whole, "--exact", "--plot", chart)) == 0
    output = capsys.readouterr()
    assert whole.read_bytes() == before and "12 of 12 questions were done before" in output.err
    assert "the bonus token included" in output.out and "speedup: ratio of the two means" in output.out
    names = [line.split()[0] for line in output.out.splitlines() if line.endswith("100.0%")]
    assert names == ["mt_bench", "translation", "qa", "math_reasoning", "rag", "overall"]
    assert "<svg" in chart.read_text()
    assert main(arguments(stock_model, questions, whole, "--exact", "--json")) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["groups"]["mt_bench"]["questions"] == 4 and figures["overall"]["equal_share"] == 1.0


def test_figures_are_spec_benchs() -> None:
    """Speeds are means of questions, their ratio is the speedup; accepted tokens are means of steps."""

    def record(tokens: int, seconds: float, accepted: list[int], text: str) -> dict[str, Any]:
        drafted = 2 * len(accepted)
        return {
            "category": "qa",
            "choices": [{"turns": [text], "new_tokens": [tokens], "wall_time": [seconds]}],
            "details": [{"decode_ms": 1e3 * seconds / 2}],
            "metrics": {
                "speculative_decoding": {
                    "acceptance_histogram": {str(k): accepted.count(k) for k in set(accepted)},
                    "num_spec_steps": len(accepted),
                    "num_draft_tokens": drafted,
                    "num_accepted_draft_tokens": sum(accepted),
                }
            },
        }

    pairs = {
        1: {"baseline": record(10, 1.0, [0] * 9, "a"), "speculative": record(10, 0.5, [2, 2, 2], "a")},
        2: {"baseline": record(30, 1.0, [0] * 29, "b"), "speculative": record(30, 1.0, [1] * 14, "c")},
    }
    found = summarize(pairs)["overall"]
    assert found["tokens_per_second"] == (20 + 30) / 2 and found["baseline_tokens_per_second"] == (10 + 30) / 2
    assert found["speedup"] == 25 / 20 and found["equal_share"] == 0.5
    assert found["mean_acceptance_length"] == pytest.approx(1 + 20 / 17)
    assert found["draft_acceptance_rate"] == pytest.approx(20 / 34)
    assert found["acceptance_histogram"] == {"1": 14, "2": 3}
    assert found["decode_tokens_per_second"] == pytest.approx((9 + 29) / 0.75)
    assert "1.25" in table({"groups": {}, "overall": found})


def test_kill_and_resume(stock_model: Path, questions: Path, whole: Path, tmp_path: Path) -> None:
    """Killed twice in the middle, then finished: every question once, with the answers of the undisturbed run."""
    output = tmp_path / "answers.jsonl"
    for calls in (5, 7):  # two a question: the first kill falls between a baseline and its partner
        words = arguments(stock_model, questions, output, "--exact")
        run_until_killed(words, "blockffn.eval.spec_bench.answers:_append", calls)
    for path in (output, baseline(output)):
        with path.open("a") as stream:
            stream.write('{"question_id": 11, "categ')  # a kill in the middle of a write
    assert output.read_bytes().count(b"\n") == 5
    assert main(arguments(stock_model, questions, output, "--exact")) == 0
    assert texts(output) == texts(whole) and texts(baseline(output)) == texts(baseline(whole))


def test_a_baseline_without_its_partner_is_answered_again(
    stock_model: Path, questions: Path, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text("".join(whole.read_text().splitlines(True)[:10]))
    baseline(output).write_text("".join(baseline(whole).read_text().splitlines(True)[:11]))
    assert main(arguments(stock_model, questions, output, "--exact")) == 0
    assert texts(output) == texts(whole) and texts(baseline(output)) == texts(baseline(whole))


def test_disk_full(stock_model: Path, questions: Path, whole: Path, tmp_path: Path) -> None:
    """No room for the fourth answer: one message, three whole lines, and the run goes on where there is room."""
    output = tmp_path / "answers.jsonl"
    size = sum(len(line) for line in baseline(whole).read_bytes().splitlines(True)[:3]) + 700
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))
from blockffn.cli import main
sys.exit(main({arguments(stock_model, questions, output, "--exact")!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "File too large; the " in result.stderr and "questions before are kept" in result.stderr
    kept = output.read_bytes()
    assert kept.endswith(b"\n") and 2 <= kept.count(b"\n") <= 4
    assert main(arguments(stock_model, questions, output, "--exact")) == 0
    assert output.read_bytes().startswith(kept) and texts(output) == texts(whole)


@pytest.mark.parametrize("more", [(), ("--workers", "2")])
def test_ctrl_c(stock_model: Path, questions: Path, whole: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    output = tmp_path / "answers.jsonl"
    command = [sys.executable, "-m", "blockffn.cli", *arguments(stock_model, questions, output, "--exact", *more)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    while not output.exists() or not output.read_bytes().count(b"\n"):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to every process of the command
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, 0) and "Traceback" not in errors
    assert main(arguments(stock_model, questions, output, "--exact", *more)) == 0
    assert texts(output) == texts(whole)


def test_workers(stock_model: Path, questions: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    assert main(arguments(stock_model, questions, output, "--exact", "--workers", 2)) == 0
    assert texts(output) == texts(whole) and texts(baseline(output)) == texts(whole)


def test_cores_of_workers() -> None:
    assert core_sets([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3]]
    assert core_sets([2], 3) == [[2], [2], [2]]


def test_a_worker_that_dies_is_an_error(stock_model: Path, questions: Path, tmp_path: Path) -> None:
    """The process that answers is killed: the command says so, and keeps what it has."""
    output = tmp_path / "answers.jsonl"
    command = [sys.executable, "-m", "blockffn.cli", *arguments(stock_model, questions, output, "--workers", 2)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    children: list[int] = []
    while len(children) < 2:
        assert process.poll() is None
        found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        children = [int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in children:  # Ctrl-C is the parent's: blocked from the first instruction
        blocked = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        assert blocked is not None and int(blocked[1], 16) >> signal.SIGINT - 1 & 1
    os.kill(children[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "ended with code -9" in errors and "Traceback" not in errors


def test_temperature(stock_model: Path, questions: Path, whole: Path, tmp_path: Path) -> None:
    """Both runs sample with one seed: the same text in exact arithmetic, another one than greedy."""
    output = tmp_path / "answers.jsonl"
    more = ("--exact", "--temp", "1.5", "--seed", "3", "--limit", "4")
    assert main(arguments(stock_model, questions, output, *more)) == 0
    assert texts(output) == texts(baseline(output)) and len(texts(output)) == 4
    assert all(texts(output)[key] != texts(whole)[key] for key in texts(output))


def test_token_ids_as_prompts(stock_model: Path, tmp_path: Path) -> None:
    """A turn of token ids is used as it is: no template, no begin-of-text token, the answer before it kept."""
    import blockffn

    first, second = [5, 9, 14, 20, 5, 9, 14], [7, 7, 8]
    file, output = tmp_path / "speed.jsonl", tmp_path / "answers.jsonl"
    extra = {"sub_category": "x", "source": "y", "difficulty": "easy", "multiturn": True}
    file.write_text(json.dumps({"question_id": "a1", "category": "low_entropy", "turns": [first, second], **extra}))
    assert main(arguments(stock_model, file, output, "--exact")) == 0
    (record,) = lines(output)
    answers = [turn["tokens"] for turn in record["details"]]
    assert [turn["prompt_tokens"] for turn in record["details"]] == [7, 7 + len(answers[0]) + 3]
    with blockffn.Llama(stock_model, exact=True, n_threads=1) as llm:
        prompt = [*first, *answers[0], *second]
        found = [token for token, _ in zip(llm.generate(prompt, temp=0.0), answers[1], strict=False)]
    assert found == answers[1]


def test_chat_template(tmp_path: Path, stock_model: Path) -> None:
    """The model's own template, with the answer of the first turn in the prompt of the second."""
    import blockffn
    from blockffn.eval.spec_bench.prompts import Conversation, template

    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    with blockffn.Llama(stock_model, n_threads=1) as llm:
        with pytest.raises(BlockffnError, match="no chat template"):
            template(llm)
        llm.metadata["tokenizer.chat_template"] = source
        conversation = Conversation(llm, template(llm))
        assert llm.detokenize(conversation.ask("abc")) == b"<user>abc<assistant>"
        text = conversation.answered(llm.tokenize(b"de", add_bos=False))
        assert text == "de"
        assert llm.detokenize(conversation.ask("f")) == b"<user>abc<assistant>de<user>f<assistant>"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question_id": 1, "category": "qa", "turns": ["a"]', "not JSON: Expecting"),
        ("[1]", "expected a JSON object, found list"),
        ('{"question_id": 1, "category": "qa", "turn": ["a"]}', "key turns is missing (found 'turn')"),
        ('{"question_id": 1, "category": "qa", "turns": []}', "expected a list of at least one turn"),
        ('{"question_id": 1, "category": "qa", "turns": ["a", 3]}', "turns[1]: expected a text or a list of token ids"),
        ('{"question_id": 1, "category": "", "turns": ["a"]}', "category: expected a string"),
        ('{"question_id": 1.5, "category": "qa", "turns": ["a"]}', "question_id: expected a number or a string"),
        ('{"question_id": 0, "category": "qa", "turns": ["a"]}', "question_id 0 stands on line 1 already"),
    ],
)
def test_broken_line(
    capsys: pytest.CaptureFixture[str], stock_model: Path, questions: Path, tmp_path: Path, line: str, reason: str
) -> None:
    file = tmp_path / "broken.jsonl"
    file.write_text(questions.read_text() + "\n" + line + "\n")
    assert main(arguments(stock_model, file, tmp_path / "answers.jsonl")) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}, line 14: ") and reason in error and error.count("\n") == 1
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--categories", "writting"], "did you mean 'writing'?"),
        (["--draft", "missing.gguf"], "--draft missing.gguf: no such file"),
        (["--output", "nowhere/answers.jsonl"], "nowhere/answers-baseline.jsonl: No such file"),
        (["-c", "16"], "raise --ctx-size"),
        (["--ray", "127.0.0.1:1"], "--ray 127.0.0.1:1: no cluster answers there"),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str],
    stock_model: Path,
    questions: Path,
    tmp_path: Path,
    more: list[str],
    message: str,
) -> None:
    assert main(arguments(stock_model, questions, tmp_path / "answers.jsonl", *more)) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and "Traceback" not in error


def test_no_chat_template(
    capsys: pytest.CaptureFixture[str], stock_model: Path, questions: Path, tmp_path: Path
) -> None:
    line = [word for word in arguments(stock_model, questions, tmp_path / "a.jsonl") if word != "--plain"]
    assert main(line) == 1
    assert "this model has no chat template (key tokenizer.chat_template); --plain" in capsys.readouterr().err


def test_other_settings_are_refused(
    capsys: pytest.CaptureFixture[str], stock_model: Path, questions: Path, whole: Path
) -> None:
    before = whole.read_bytes()
    assert main(arguments(stock_model, questions, whole)) == 1
    assert "holds answers with exact True, this run has False" in capsys.readouterr().err
    assert whole.read_bytes() == before


def test_selection(questions: Path) -> None:
    found = read_questions(questions)
    assert [q.id for q in select(found, limit=3)] == [0, 1, 2]
    assert [q.id for q in select(found, ["mt_bench"])] == [0, 4, 6, 10]
    assert [q.id for q in select(found, ["qa", "rag"], each=1)] == [2, 3]
    assert parse('{"question_id": "x", "category": "c", "turns": [[1, 2], "a"]}').turns == ((1, 2), "a")


def test_ray(stock_model: Path, questions: Path, whole: Path, tmp_path: Path) -> None:
    """A local cluster of two nodes, one actor of one thread on each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    output = tmp_path / "answers.jsonl"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        more = ("--exact", "--ray", cluster.address, "--workers", 2)
        assert main(arguments(stock_model, questions, output, *more)) == 0
    finally:
        cluster.shutdown()
    assert texts(output) == texts(whole) and texts(baseline(output)) == texts(whole)
