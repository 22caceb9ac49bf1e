"""lm_eval on our models: the numbers of its own torch path, its command line, failures that are heard."""

from __future__ import annotations

import functools
import json
import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before lm_eval is imported: its tasks here are local
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from blockffn.cli import main
from blockffn.errors import BlockffnError

ROOT = Path(__file__).resolve().parent.parent
N_CTX = 128
CHOICES = [
    {"question": "def add(a, b):\n    return", "choices": [" a + b", " None", " a"], "answer": 0},
    {"question": "import os\nimport", "choices": [" sys", " os.path", " 42"], "answer": 0},
    {"question": "for name in names:\n    print(", "choices": ["name)", "x)"], "answer": 0},
    {"question": "for name in", "choices": [" names:", " range(10):", " self.names:"], "answer": 1},
]
DOCUMENTS = ["import os\n\nfor name in os.listdir():\n    print(name)\n" * n for n in (1, 2, 9)]
PROMPTS = ["def add(a, b):\n", "import os\nimport sys\n", "class Reader:\n    def __init__(self, path):\n"]

TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "local_generation": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: ""
generation_kwargs: {until: ["\\n\\n", "zzz"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the 13,000 files of the tasks of lm_eval, and complaints of its log after pytest has closed stderr."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(logging, "raiseExceptions", False)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three local tasks: multiple choice, rolling log-likelihood, generation."""
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    data: dict[str, list[dict[str, Any]]] = {
        "local_choice": CHOICES,
        "local_rolling": [{"text": text} for text in DOCUMENTS],
        "local_generation": [{"text": text} for text in PROMPTS],
    }
    for name, text in TASKS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data[name]))
        head = f"task: {name}\ntest_split: test\ndataset_path: json\n"
        files = f"dataset_kwargs:\n  data_files:\n    test: {folder / f'{name}.jsonl'}\n"
        (folder / f"{name}.yaml").write_text(head + files + text)
    return folder


def samples(lm: Any, tasks: Path, names: list[str]) -> dict[str, list[Any]]:
    """Return what the harness logs of each request: [(arguments, answer)] by task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks))
    found = simple_evaluate(model=lm, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0)
    assert found is not None
    return {name: [(each["arguments"], each["resps"]) for each in found["samples"][name]] for name in names}


def flat(value: Any) -> list[Any]:
    """Return the leaves of nested lists and tuples."""
    return [leaf for each in value for leaf in flat(each)] if isinstance(value, list | tuple) else [value]


@pytest.fixture(scope="module", params=["tiny-blockffn", "tiny-deco"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Our class on a bundled model in F32, and lm_eval's torch class on the reference of the same checkpoint."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    from torch_harness import torch_harness

    import blockffn
    from blockffn.eval.harness.model import BlockffnLM

    checkpoint = ROOT / "examples" / request.param
    model = tmp_path_factory.mktemp("bundled") / "model.gguf"
    blockffn.convert.convert_checkpoint(checkpoint, model, outtype="f32")
    ours = BlockffnLM(str(model), n_ctx=N_CTX, n_threads=1)
    yield ours, torch_harness(checkpoint, ours.max_length)
    ours.close()


def test_numbers_of_the_torch_path(pair: tuple[Any, Any], tasks: Path) -> None:
    """Per request: multiple choice and rolling log-likelihoods within 1e-4, the same flags and texts."""
    ours, theirs = (samples(lm, tasks, list(TASKS)) for lm in pair)
    for name in TASKS:
        assert len(ours[name]) == len(theirs[name]) > 0
        for (asked, answer), (same, expected) in zip(ours[name], theirs[name], strict=True):
            assert asked == same
            for value, wanted in zip(flat(answer), flat(expected), strict=True):
                if isinstance(wanted, float):
                    assert value == pytest.approx(wanted, rel=1e-4, abs=1e-4), name
                else:
                    assert value == wanted, name
    assert any(text for _, ((text,),) in ours["local_generation"])


def command(model: Path, tasks: Path, task: str, *more: object) -> list[str]:
    line = ["eval", "lm-eval", "--model", "blockffn", "--model_args", f"pretrained={model},n_threads=1,n_ctx={N_CTX}"]
    return [str(word) for word in (*line, "--tasks", task, "--include_path", tasks, *more)]


def test_command_line(capsys: pytest.CaptureFixture[str], stock_model: Path, tasks: Path, tmp_path: Path) -> None:
    """Every argument is lm_eval's; its results say which model, with which version, has been measured."""
    assert main(command(stock_model, tasks, "local_choice", "--output_path", tmp_path, "--log_samples")) == 0
    assert "|local_choice|" in capsys.readouterr().out
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())
    assert 0 <= results["results"]["local_choice"]["acc,none"] <= 1
    assert results["config"]["model_file"] == stock_model.name and results["config"]["blockffn_version"]
    assert list(tmp_path.rglob("samples_local_choice_*.jsonl"))


def test_requests_are_cached_one_by_one(
    capsys: pytest.CaptureFixture[str], stock_model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was answered before an interruption is not asked again with --use_cache."""
    from blockffn.eval.harness import scorer

    line = command(stock_model, tasks, "local_choice", "--use_cache", tmp_path / "cache")
    score, asked = scorer.Scorer.score, []

    def interrupted(self: Any, requests: Any, done: Any) -> Any:
        asked.append(len(requests))
        if len(asked) > 1:
            return score(self, requests, done)

        def stop(number: int, result: Any) -> None:
            done(number, result)
            if number == 5:
                raise KeyboardInterrupt

        return score(self, requests, stop)

    monkeypatch.setattr(scorer.Scorer, "score", interrupted)
    assert main(line) == 130
    assert main(line) == 0 and "|local_choice|" in capsys.readouterr().out
    assert asked[0] == 11 and 0 < asked[1] < 11


def test_full_disk_under_the_cache(
    capsys: pytest.CaptureFixture[str], stock_model: Path, tasks: Path, tmp_path: Path
) -> None:
    """No file may grow beyond one page of the cache: one message, and the same command goes on where there is room."""
    line = command(stock_model, tasks, "local_choice", "--use_cache", tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert main(line) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "error: --use_cache: " in error and "free some space" in error and "Traceback" not in error
    assert main(line) == 0 and "|local_choice|" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("local_chioce", (), "no task 'local_chioce'; did you mean 'local_choice'"),
        ("local_choice", ("--apply_chat_template",), "no chat template (key tokenizer.chat_template); leave out"),
        ("local_generation", ("--gen_kwargs", "max_gen_toks=500"), "max_gen_toks 500 leaves no room"),
        ("local_generation", ("--gen_kwargs", "beams=3"), "generation argument 'beams' is not known"),
    ],
)
def test_failures_are_heard(
    capsys: pytest.CaptureFixture[str],
    stock_model: Path,
    tasks: Path,
    task: str,
    more: tuple[str, ...],
    message: str,
) -> None:
    assert main(command(stock_model, tasks, task, *more)) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_bad_model_arguments(stock_model: Path) -> None:
    pytest.importorskip("lm_eval")
    from blockffn.eval.harness.model import BlockffnLM

    with pytest.raises(BlockffnError, match=r"unknown argument 'n_thread'; did you mean 'n_threads'\?"):
        BlockffnLM(str(stock_model), n_thread=2)
    with pytest.raises(BlockffnError, match="no such file"):
        BlockffnLM("missing.gguf")


def test_chat_template(real_model: Path, tasks: Path) -> None:
    """The template of the file, which the results keep; stop words and sampling of a real model."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from blockffn.eval.harness.model import BlockffnLM

    lm = BlockffnLM(str(real_model), n_ctx=256, n_threads=1)
    history = [{"role": "user", "content": "Say hello."}]
    text = lm.apply_chat_template(history)
    assert text.endswith("<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n")
    assert not lm.apply_chat_template(history, add_generation_prompt=False).endswith("assistant\n")
    assert "im_start" in (lm.chat_template(True) or "") and lm.chat_template(False) is None
    assert lm.tok_encode("<|im_start|>user") == lm.llm.tokenize(b"<|im_start|>user", add_bos=False, special=True)
    arguments = {"until": ["!"], "max_gen_toks": 12, "do_sample": False}
    request = Instance("generate_until", {}, (text, arguments), 0)
    (answer,) = lm.generate_until([request], disable_tqdm=True)
    assert answer and "!" not in answer and "<|im_end|>" not in answer
    lm.close()
