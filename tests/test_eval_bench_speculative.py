"""Speculative rows of `blockffn bench` on tiny models: scripted and real drafters, plans, arithmetic, failures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_eval_bench import ROW

from blockffn import library
from blockffn.errors import BlockffnError
from blockffn.eval.bench import models as bench
from blockffn.eval.bench.models import Candidate, Phase
from blockffn.eval.bench.plans import parse_plan, plan_name
from blockffn.eval.bench.worker import Worker
from blockffn.eval.planted import files as planted_files
from blockffn.eval.planted import head as planted_head
from blockffn.eval.planted import model as planted
from blockffn.eval.planted.files import PlantedModels
from blockffn.speculative.policy import Plan


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> PlantedModels:
    return planted_files.models("tiny", "F16", folder=tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def head(models: PlantedModels) -> Path:
    return planted_head.head(models, n_draft=500)


def worker(models: PlantedModels, tokens: list[int] | None = None, **options: Any) -> Worker:
    chosen = {"draft": None, "scripted": False, "trees": False, "exact": False} | options
    args = argparse.Namespace(model=str(models.union), ffn="union", threads=1, past=16, **chosen)
    return Worker(args, tokens or planted.text(models.shape, 3000), known=True)


def test_scripted_rows(
    models: PlantedModels, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run holds plain and speculative rows; the script gives the tokens per step that the rate promises."""
    from blockffn.cli import main

    monkeypatch.setattr(planted_files, "CACHE", models.union.parent)
    arguments = ["--shape", "tiny", "--type", "F16", "--acceptance", "0,0.8", "--plans", "chain:3,tree 8,auto"]
    arguments += [
        "-t",
        "1",
        "--rounds",
        "2",
        "--verify",
        "4",
        "--prefill",
        "0",
        "--past",
        "16",
        "--tokens",
        "40",
        "--head-tokens",
        "300",
    ]
    assert main(["bench", *arguments, "--json"]) == 0
    printed = capsys.readouterr().out
    rows = json.loads(printed.splitlines()[-1])["rows"]
    plain = [row for row in rows if row["drafter"] == "none"]
    assert [(r["ffn"], r["phase"], r["n"]) for r in plain] == [
        (ffn, *phase) for ffn in ("union", "dense") for phase in (("decode", 1), ("verify", 4))
    ]
    drafted = [row for row in rows if row["drafter"] != "none"]
    names = ("scripted", "scripted+tiny-eagle-300-F16")
    assert [(r["drafter"], r["probability"], r["plan"]) for r in drafted] == [
        (name, rate, plan) for name in names for rate in (0.0, 0.8) for plan in ("chain 3", "tree 8", "auto")
    ]
    for row in drafted:
        assert set(row) >= ROW and row["phase"] == "decode" and row["acceptance"] == row["probability"]
        rate = row["probability"]
        if row["plan"] == "chain 3":
            assert row["n"] == 4
            assert row["tokens_per_step"] == pytest.approx(1 + rate + rate**2 + rate**3, abs=0.25)
        if row["plan"] == "tree 8":
            assert row["n"] == 9 and (row["tokens_per_step"] > 3.5 if rate else row["tokens_per_step"] == 1.0)
    assert "tokens/step" in printed and "/ dense" in printed


def test_real_drafters(models: PlantedModels, blockffn_cli: Callable[..., Any], head: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(planted.pieces(models.shape)[500:800]).replace("\u2581", " "))
    arguments = ["-m", models.union, "--dense", models.dense, "-f", text, "-t", 1, "--rounds", 1, "--verify", "2"]
    arguments += ["--draft", "ngram", "--draft", head, "--draft", models.union, "--tree", "--plans", "chain 2,tree 8"]
    result = blockffn_cli("bench", *arguments, "--prefill", 0, "--past", 17, "--tokens", 24, "--exact", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["environment"]["exact"] is True
    drafted = {(row["drafter"], row["plan"]): row for row in report["rows"] if row["drafter"] != "none"}
    assert set(drafted) == {
        ("ngram", "chain 2"),
        (head.stem, "chain 2"),
        (head.stem, "tree 8"),
        (models.union.stem, "chain 2"),
    }
    itself = drafted[models.union.stem, "chain 2"]  # a model that drafts for itself is always right
    assert itself["acceptance"] == 1.0 and itself["acceptance_by_position"] == [1.0, 1.0]
    assert itself["tokens_per_step"] == 3.0
    assert drafted[head.stem, "tree 8"]["tree_steps"] > 0
    assert "accepted at position" in result.stdout


def test_the_cache_is_not_trusted_after_other_phases(models: PlantedModels) -> None:
    """Verification and prefill go past the record of the cache; the text generated after them is still right."""
    used = worker(models)
    for request in (Phase("verify", 4, 2), Phase("decode", 1, 10, "plain"), Phase("prefill", 600, 1)):
        used.answer(request.request())
    answer = used.answer(Phase("decode", 1, 10, "plain").request())
    assert answer["statistics"]["measured_tokens"] == answer["statistics"]["measured_steps"] == 10
    used.llm.close()


def test_only_whole_steps_are_measured(models: PlantedModels) -> None:
    used = worker(models, draft="scripted", scripted=True)
    answer = used.answer(Phase("decode", 1, 31, "chain 4", 1.0).request())
    statistics = answer["statistics"]
    assert statistics["measured_tokens"] == 5 * statistics["measured_steps"] >= 25
    assert len(answer["seconds"]) == 1
    used.llm.close()


def test_the_head_beside_a_script_really_runs(models: PlantedModels, head: Path, monkeypatch: Any) -> None:
    """A chain of 3 costs three evaluations of the head in every step that drafts."""
    calls: list[int] = []
    low_level = library.load()
    native = low_level.llama_decode
    monkeypatch.setattr(low_level, "llama_decode", lambda ctx, batch: (calls.append(ctx), native(ctx, batch))[1])
    used = worker(models, draft=str(head), scripted=True)
    calls.clear()
    statistics = used.answer(Phase("decode", 1, 24, "chain 3", 0.8).request())["statistics"]
    of_the_head = sum(ctx != used.target.ctx for ctx in calls)
    assert of_the_head >= 3 * statistics["steps"] and len(calls) - of_the_head >= statistics["steps"]
    used.llm.close()


def test_a_text_that_is_not_the_models(models: PlantedModels) -> None:
    used = worker(models, tokens=list(range(1500, 500, -1)), draft="scripted", scripted=True)
    with pytest.raises(BlockffnError, match="its greedy text is not the text given"):
        used.answer(Phase("decode", 1, 10, "chain 2", 0.5).request())
    used.llm.close()


def test_head_is_made_once(models: PlantedModels, head: Path) -> None:
    before = head.stat().st_mtime_ns
    assert planted_head.head(models, n_draft=500) == head and head.stat().st_mtime_ns == before
    assert not list(head.parent.glob("*checkpoint*")) and not list(head.parent.glob("*half*"))
    ids = planted_head.draft_tokens(models.shape, 500)
    assert len(ids) == 500 and planted.text(models.shape, 1)[0] in ids
    assert len(planted_head.draft_tokens(models.shape, 10**6)) == models.shape.n_vocab - planted.FIRST_TOKEN


@pytest.mark.parametrize(
    ("words", "plan"),
    [("plain", Plan()), ("auto", None), ("chain 1", Plan(1)), ("tree 31", Plan(31, True))],
)
def test_plans(words: str, plan: Plan | None) -> None:
    assert parse_plan(words) == plan
    assert plan is None or plan_name(plan) == words


@pytest.mark.parametrize("words", ["chain", "chain 0", "tree 32", "bush 3", "chain -1", "4"])
def test_bad_plans(words: str) -> None:
    with pytest.raises(BlockffnError, match="plan: expected auto, chain N or tree N"):
        parse_plan(words)


def test_which_candidate_runs_what() -> None:
    given, plain, auto = Phase("verify", 4, 1), Phase("decode", 1, 8, "plain"), Phase("decode", 1, 8, "auto")
    tree, scripted = Phase("decode", 1, 8, "tree 8"), Phase("decode", 1, 8, "chain 2", 0.5)
    every = [given, plain, auto, tree, scripted]

    def runs(candidate: Candidate) -> list[Phase]:
        return [phase for phase in every if phase.suits(candidate)]

    assert runs(Candidate("m.gguf", "dense")) == [given, plain]
    assert runs(Candidate("m.gguf", "union", "ngram")) == [auto]
    assert runs(Candidate("m.gguf", "union", "head.gguf", trees=True)) == [auto, tree]
    assert runs(Candidate("m.gguf", "union", "scripted", scripted=True, trees=True)) == [scripted]
    assert Candidate("m.gguf", "union", "a/head.gguf", scripted=True).label == "union+scripted+head"
    assert [phase.plan for phase in bench.speculative_phases([given, Phase("decode", 1, 9)], ["auto"], [None], 8)] == [
        "plain", "auto", "",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "missing.gguf", "--draft", "ngram"], "missing.gguf: no such file"),
        (["-m", __file__, "--draft", "missing.gguf"], "missing.gguf: no such file"),
        (["--shape", "tiny", "--draft", "ngram"], "--draft: goes with -m"),
        (["-m", "x.gguf", "--acceptance", "0.5"], "--acceptance: goes with --shape"),
        (["--shape", "tiny", "--acceptance", "0.5,1.5"], "--acceptance: expected probabilities from 0 to 1"),
        (["--shape", "tiny", "--acceptance", "many"], "found 'many'"),
        (["--shape", "tiny", "--acceptance", "0.5", "--plans", "forest"], "found 'forest'"),
        (["--shape", "tiny", "--acceptance", "0.5", "--plans", "plain"], "plain decoding is measured anyway"),
        (["--shape", "tiny", "--acceptance", "0.5", "--tokens", "4"], "--tokens: expected 8 to 512, found 4"),
        (["-m", "x.gguf", "--tree"], "--tree: needs --draft"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any, models: PlantedModels
) -> None:
    from blockffn.cli import main

    monkeypatch.setattr(planted_files, "CACHE", models.union.parent)
    assert main(["bench", "--type", "F16", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
