"""Log-likelihoods from shared prefixes and batches of sequences equal those of one text at a time."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import blockffn
from blockffn import library
from blockffn.errors import BlockffnError
from blockffn.eval.harness.scorer import NODES, Request, Scorer
from blockffn.eval.harness.tries import packs
from blockffn.eval.quality import metrics

# Contexts, endings, one of which is clearly likelier for any language model.
STORIES = (
    ("The capital of France is", ("Paris.", "seven of nine.", "blue and cold soup.", "running quickly home.")),
    ("She opened the umbrella because it started to", ("rain.", "purple.", "seventeen.", "umbrella table.")),
    ("One, two, three,", ("four, five.", "cat window.", "sorry Monday.", "river above a.")),
    ("The cat sat on the", ("mat.", "of.", "twelve o'clock of.", "is are was.")),
)


def requests_of(n_vocab: int, seed: int = 0) -> list[Request]:
    """Contexts of 1 to 80 tokens, some with beginnings in common, four continuations each, in random order."""
    rng = random.Random(seed)
    found: list[Request] = []
    for number in range(12):
        start = [1] if number % 3 == 0 else list(found[-1][0][:8])
        context = start + [rng.randrange(3, n_vocab) for _ in range(rng.randrange(0, 70))]
        found += [(context, [rng.randrange(3, n_vocab) for _ in range(rng.choice([1, 1, 3, 8]))]) for _ in range(4)]
    rng.shuffle(found)
    return [*found, ([1] + [5] * 300, [7] * 20), ([1], [rng.randrange(3, n_vocab) for _ in range(200)])]


def one_by_one(llm: blockffn.Llama, requests: list[Request]) -> list[tuple[float, bool]]:
    """Evaluate each request alone, with everything before its continuation that the context holds."""
    found = []
    for context, continuation in requests:
        text = [*context, *continuation][-(llm.n_ctx() + 1) :]
        targets = np.asarray(text[-min(len(continuation), len(text) - 1) :], np.int32)
        logits = llm.logits(text[:-1])[-len(targets) :]
        greedy = bool((logits.argmax(axis=1) == targets).all())
        found.append((float(metrics.log_likelihood(logits, targets).sum()), greedy))
    return found


@pytest.fixture(scope="module", params=["stock", "blockffn"])
def llm(request: pytest.FixtureRequest, stock_model: Path, blockffn_model: Path) -> Iterator[blockffn.Llama]:
    with blockffn.Llama({"stock": stock_model, "blockffn": blockffn_model}[request.param], n_ctx=256, n_threads=1) as m:
        yield m


@pytest.mark.parametrize("leaves", [1, 3, 32])
def test_equals_one_text_at_a_time(llm: blockffn.Llama, leaves: int) -> None:
    requests = requests_of(llm.n_vocab())
    scorer = Scorer(llm, leaves)
    for _ in range(2):  # the second time it begins with what the first one has left in the cache
        seen: dict[int, tuple[float, bool]] = {}
        found = scorer.score(requests, seen.__setitem__)
        assert [seen[number] for number in range(len(requests))] == found
        for (value, greedy), (expected, wanted) in zip(found, one_by_one(llm, requests), strict=True):
            assert value == pytest.approx(expected, abs=1e-4) and greedy == wanted
    scorer.close()


def test_evaluates_what_is_shared_once(llm: blockffn.Llama) -> None:
    """Forty continuations of one context of 100 tokens: the context once, and what no other continuation has."""
    scorer = Scorer(llm, 8)
    context = list(range(3, 103))
    scorer.score([(context, [10 + i, 5, 6]) for i in range(40)])
    assert scorer.evaluated <= 100 + 40 * 2 + 5  # five packs, each with the last token of the context
    scorer.close()
    assert Scorer(llm, 8).score([(context, [7])] * 3 + [(context, [8])])[0][0] < 0


def test_greedy(llm: blockffn.Llama) -> None:
    context = [1, 9, 12, 30]
    best: list[int] = []
    for _ in range(5):
        best.append(int(llm.logits(context + best)[-1].argmax()))
    scorer = Scorer(llm)
    (_, yes), (_, no) = scorer.score([(context, best), (context, [*best[:-1], (best[-1] + 1) % llm.n_vocab()])])
    assert yes and not no
    scorer.close()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([], [3]), "request 0: the context has no tokens"),
        (([3], []), "request 0: the continuation has no tokens"),
        (([3], [10**6]), "request 0: expected token ids in 0.."),
    ],
)
def test_bad_requests(llm: blockffn.Llama, request_: Request, message: str) -> None:
    scorer = Scorer(llm)
    with pytest.raises(BlockffnError, match=message):
        scorer.score([request_])
    scorer.close()


def test_packs_are_trees() -> None:
    """Every path through the nodes of a pack is its text; nodes are shared by exactly the texts that begin alike."""
    rng = random.Random(1)
    texts = {tuple(rng.randrange(3) for _ in range(rng.randrange(1, 9))) for _ in range(200)}
    seen = set()
    for pack in packs(sorted(texts), max_leaves=7, max_nodes=30):
        assert len(pack.texts) <= 7 and len(pack.tokens) <= 30
        for leaf, text in enumerate(pack.texts):
            path = pack.path(leaf)
            assert tuple(pack.tokens[path]) == text and list(pack.depths[path]) == list(range(len(text)))
            assert ((pack.first[path] <= leaf) & (leaf <= pack.last[path])).all()
            seen |= {text[:length] for length in range(1, len(text) + 1)}
        assert int((pack.last - pack.first + 1).sum()) == sum(map(len, pack.texts))
        assert len(pack.tokens) == len({text[: d + 1] for text in pack.texts for d in range(len(text))})
    assert texts <= seen


def choices(model: Path) -> list[int]:
    """Return our choice for each story: the largest mean log-likelihood after what all endings have in common."""
    with blockffn.Llama(model, n_ctx=512, n_threads=1) as llm:
        requests: list[Request] = []
        for context, endings in STORIES:
            texts = [
                llm.tokenize(f"{context} {ending}".encode(), add_bos=llm._model.add_bos_token()) for ending in endings
            ]
            same = next(i for i in range(NODES) if len({text[i] for text in texts}) > 1)
            requests += [(text[:same], text[same:]) for text in texts]
        scorer = Scorer(llm)
        values = [value / len(rest) for (value, _), (_, rest) in zip(scorer.score(requests), requests, strict=True)]
        scorer.close()
    return np.asarray(values).reshape(len(STORIES), 4).argmax(axis=1).tolist()


def perplexity_program(model: Path, *arguments: object) -> str:
    command = [library.program("llama-perplexity"), "-m", model, "-c", 512, "-t", 1, "-ctk", "f32", "-ctv", "f32"]
    line = [str(word) for word in (*command, "-fa", "off", *arguments)]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout + result.stderr


def final_score(output: str) -> float:
    """Return the last of the running scores, in percent."""
    rows = [line.split("\t") for line in output.splitlines() if line[:1].isdigit() and "\t" in line]
    assert rows, output[-2000:]
    return float(rows[-1][1].rstrip("%"))


def test_llama_perplexity_hellaswag(real_model: Path, tmp_path: Path) -> None:
    """Its HellaSwag mode finds every ending right that we choose, and none right when the next one is called right."""
    ours = choices(real_model)
    for shift, score in ((0, 100.0), (1, 0.0)):
        file = tmp_path / f"hellaswag-{shift}.txt"
        lines = [
            line
            for (context, endings), choice in zip(STORIES, ours, strict=True)
            for line in (context, str((choice + shift) % 4), *endings)
        ]
        file.write_text("\n".join(lines))
        output = perplexity_program(real_model, "--hellaswag", "--hellaswag-tasks", len(STORIES), "-f", file)
        assert final_score(output) == score


def test_llama_perplexity_multiple_choice(real_model: Path, tmp_path: Path) -> None:
    """The same with its multiple-choice mode, which reads a binary file."""

    def text(value: str) -> bytes:
        return struct.pack("<I", len(value.encode())) + value.encode()

    tasks = []
    for (context, endings), choice in zip(STORIES, choices(real_model), strict=True):
        answers = struct.pack("<I", 4) + b"".join(map(text, endings))
        tasks.append(
            text(context) + answers + struct.pack("<4i", *(i == choice for i in range(4))) + struct.pack("<I", 0)
        )
    offsets = np.cumsum([4 + 4 * len(tasks), *map(len, tasks[:-1])])
    file = tmp_path / "choice.bin"
    file.write_bytes(struct.pack(f"<I{len(tasks)}I", len(tasks), *offsets.tolist()) + b"".join(tasks))
    assert final_score(perplexity_program(real_model, "--multiple-choice", "-bf", file)) == 100.0
