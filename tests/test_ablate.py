"""Tables of training runs: every arm with every seed, kept when complete, refused when its file has changed."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
from training_file import BLOCKFFN

from blockffn.errors import BlockffnError
from blockffn.training import ablate

CORPUS = 'vocab_size = 300\nsources = ["TEXT"]\nvalidation = ["TEXT/0.txt"]\ncache = "CACHE"'
BASE = BLOCKFFN.split("[objective]")[0].replace("vocab_size = 320", CORPUS).replace("steps = 12", "steps = 6")


@pytest.fixture
def arms(tmp_path):
    """Two arms over one base file: without objectives, and with chunk sparsification."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(6):
        (text / f"{i}.txt").write_text("".join(f"value_{i}_{j} = compute({j * i})\n" for j in range(60)))
    body = BASE.replace("TEXT", str(text)).replace("CACHE", str(tmp_path / "cache"))
    (tmp_path / "base.toml").write_text(body)
    for name, objective in (("none", ""), ("chunk", "[objective]\nchunk = 0.1\n")):
        (tmp_path / f"{name}.toml").write_text(f'extends = "base.toml"\n{objective}')
    return [tmp_path / "none.toml", tmp_path / "chunk.toml"]


def options(arms, out, *more):
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    return parser.parse_args([*map(str, arms), "--out", str(out), *more])


def test_two_arms_are_trained_once(arms, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert ablate.run(options(arms, out, "--jobs", "2")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| arm | loss | TLS | CLS_8 |") and lines[2].startswith("| none |")
    rows = json.loads((out / "results.json").read_text())
    assert [(row["arm"], row["seed"]) for row in rows] == [("none", 1), ("chunk", 1)]
    assert len({row["validation"] for row in rows}) == 2 and all(len(row["tls"]) == 2 for row in rows)
    assert (out / "table.md").read_text().splitlines() == lines
    assert (out / "frontier.png").stat().st_size > 1000
    monkeypatch.setattr(ablate.subprocess, "Popen", lambda *_, **__: pytest.fail("a complete run was trained again"))
    assert ablate.run(options(arms, out, "--json")) == 0
    assert json.loads(capsys.readouterr().out) == rows


def test_table_has_means_over_seeds_and_half_their_range():
    same = {"document_tokens": [1, 2], "document_nats": [3.0, 5.0]}
    rows = [
        {"arm": "a", "validation": 4.0, "tls": [0.5, 0.7], "fewest_sets": 30, **same},
        {"arm": "a", "validation": 4.2, "tls": [0.7, 0.9], "fewest_sets": 10, **same},
        {"arm": "dense", "validation": 4.5, **same, "document_nats": [3.6, 6.0]},
        {"arm": "other text", "validation": 4.5, "document_tokens": [3], "document_nats": [9.0]},
        {"arm": "head", "validation": 0.5},
    ]
    assert ablate.table(rows).splitlines() == [
        "| arm | loss | TLS | fewest sets | loss / a (95 %) |",
        "|---|---|---|---|---|",
        "| a | 4.100 +- 0.100 | 70.0 +- 10.0 | 20 +- 10 | 1 |",
        "| dense | 4.500 | - | - | 1.200 (1.200 to 1.200) |",
        "| other text | 4.500 | - | - | - |",
        "| head | 0.500 | - | - | - |",
    ]


def test_interval_of_a_paired_ratio():
    """Documents differ far more than models do on one document: the interval is that of the pairs."""
    random = np.random.default_rng(3)
    base = random.uniform(100, 10_000, size=200)
    nats = base * random.normal(1.02, 0.02, size=200)
    ratio, low, high = ablate.paired_ratio(nats, base)
    assert low < ratio < high and ratio == nats.sum() / base.sum()
    assert 0.002 < high - low < 0.012  # 2 * 1.96 * 0.02 / sqrt(200) = 0.0055, wider as long documents weigh more
    assert ablate.paired_ratio(base, base) == (1, 1, 1)


def test_seeds_are_runs_of_their_own(arms, tmp_path):
    runs = ablate.plan(arms, [1, 7], tmp_path / "out")
    assert [one.folder.name for one in runs] == ["none-1", "none-7", "chunk-1", "chunk-7"]
    assert "run.seed=7" in runs[1].words() and f'run.out="{runs[1].folder}"' in runs[1].words()


def test_a_changed_arm_is_refused(arms, tmp_path):
    ablate.plan(arms, [1], tmp_path / "out")
    arms[1].write_text(arms[1].read_text().replace("0.1", "0.2"))
    with pytest.raises(BlockffnError, match="chunk-1: was begun with another training file"):
        ablate.plan(arms, [1], tmp_path / "out")


def test_a_failing_run_says_which_and_why(arms, tmp_path):
    (tmp_path / "text/bad.txt").write_bytes(b"\xff")
    with pytest.raises(BlockffnError, match=r"none, seed 1: exit code 1: error: .*expected UTF-8 text"):
        ablate.run(options(arms, tmp_path / "out"))


@pytest.mark.parametrize(
    "more,message",
    [(["--seeds", "a"], "--seeds: expected whole numbers"), (["--jobs", "0"], "--jobs: expected 1 or more")],
)
def test_bad_options(arms, tmp_path, more, message):
    with pytest.raises(BlockffnError, match=message):
        ablate.run(options(arms, tmp_path / "out", *more))


def test_two_arms_of_one_name(arms, tmp_path):
    (tmp_path / "b").mkdir()
    twin = tmp_path / "b" / "none.toml"
    twin.write_text('extends = "../base.toml"\n')
    with pytest.raises(BlockffnError, match="none: two arms of one name"):
        ablate.plan([*arms, twin], [1], tmp_path / "out")
