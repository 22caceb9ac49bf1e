"""The trainer on a tiny model: it learns, resumes to the bit, survives signals, exports what the converter reads."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from training_file import BLOCKFFN

from blockffn.convert.save import save_checkpoint
from blockffn.convert.tensor_map import load_canonical
from blockffn.errors import BlockffnError
from blockffn.eval.environment import ROOT
from blockffn.eval.studies import training as speed
from blockffn.sparsity import of_activity
from blockffn.training import cli, data, objectives
from blockffn.training.config import OptimizerConfig, read_config
from blockffn.training.data import Windows
from blockffn.training.eagle import read_eagle_config
from blockffn.training.model import Decoder, ReferenceModel
from blockffn.training.optim import clip_gradients, orthogonalise, wsd
from blockffn.training.train import Trainer

DECO = (
    BLOCKFFN.replace('family = "blockffn"', 'family = "deco"\nnum_dense_layers = 1\nintermediate_size = 12')
    .replace(
        "dim_expert = 4", 'dim_expert = 4\nshared_expert_size = 3\nexpert_activation = "norm_silu"\nexpert_bias = true'
    )
    .replace("tie_word_embeddings = true", 'tie_word_embeddings = false\nrouter_norm = "none"')
    .replace("q_lora_rank = 6\nkv_lora_rank = 5\nqk_nope_head_dim = 4\nqk_rope_head_dim = 2\n", "")
    .replace("scale_emb = 12.0\nscale_depth = 1.4\ndim_model_base = 8\n", "")
    .replace('kind = "muon"', 'kind = "adamw"')
    .replace(
        "locality = 2e-3\nchunk = 5e-2\nchunk_size = 8\nchunk_window = 3",
        "entropy = 1e-3\nentropy_multiplier = 1.1\nbias_rate = 1e-3",
    )
)
DENSE = (
    BLOCKFFN.split("[objective]")[0]
    .replace('family = "blockffn"', 'family = "vanilla"\nintermediate_size = 12')
    .replace("num_experts = 7\ndim_expert = 4\n", "")
)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
MODELS = {"blockffn": BLOCKFFN, "deco": DECO, "vanilla": DENSE}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    texts = [f"def function_{i}(a, b):\n    return a + {i} * b\n\n\n" * 20 for i in range(40)]
    folder = tmp_path_factory.mktemp("corpus")
    model = data.train_tokenizer(texts, folder / "tokenizer", 320)
    train, validation = (np.concatenate(list(data.encode_documents(model, part))) for part in (texts[3:], texts[:3]))
    return data.Corpus(train, validation, model, 1, 2, "test")


def config_of(folder: Path, body: str = BLOCKFFN, **overrides):
    path = folder / "train.toml"
    path.write_text(body.replace("OUT", str(folder / "run")), encoding="utf-8")
    return read_config(path, overrides)


def advance(trainer, n):
    """Take `n` steps without log or checkpoint."""
    for _ in range(n):
        trainer.train_step()
        trainer.run.step += 1


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.decoder.canonical()}


@pytest.mark.parametrize("kind", MODELS)
def test_loss_falls_and_export_reads_back(tmp_path, text, kind):
    trainer = Trainer(config_of(tmp_path, MODELS[kind]), text)
    before = trainer.evaluate()
    assert trainer.train()
    after = trainer.evaluate()
    assert after["validation"] < before["validation"] - 0.5
    trainer.export(tmp_path / "checkpoint")

    model = ReferenceModel.from_checkpoint(tmp_path / "checkpoint")
    assert model.config.family == kind
    tokens = text.validation[:17].astype(np.int64)
    with torch.no_grad():
        for _, value in trainer.decoder.canonical():
            value.copy_(value.bfloat16())
        hidden, routers = trainer.decoder(torch.from_numpy(tokens)[None])
        out = model.forward(torch.from_numpy(tokens))
        torch.testing.assert_close(out.logits, trainer.decoder.logits(hidden)[0], rtol=1e-4, atol=1e-4)
    assert len(out.active) == len(routers)
    assert not list(tmp_path.rglob("*.partial"))


ACTIVATIONS = ("silu", "relu", "gelu", "relu_squared", "norm_silu", "norm_silu_nomean", "norm_silu_norms")
NORMS = ("rms", "sum", "none", "normal")
LATENT = {"q_lora_rank": 6, "kv_lora_rank": 5, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2}
GROUPED = {**dict.fromkeys(LATENT, 0), "num_key_value_heads": 1}
SCALED = {"scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 8}
PLAIN = {"scale_emb": 1.0, "scale_depth": 0.0, "dim_model_base": 0}
SHAPES = {
    "blockffn": [LATENT | SCALED, GROUPED | PLAIN, LATENT | {"tie_word_embeddings": False}],
    "vanilla": [LATENT | SCALED, GROUPED | PLAIN],
    "deco": [
        GROUPED | PLAIN,
        GROUPED | PLAIN | {"num_dense_layers": 1, "intermediate_size": 12, "shared_expert_size": 3},
        GROUPED | PLAIN | {"expert_bias": True},
        GROUPED | PLAIN | {"expert_bias": True, "expert_bias_method": "rms", "tie_word_embeddings": False},
        LATENT | PLAIN,
    ],
}


def readable(family, activation, norm, shape):
    """What the converter reads: gated norms and a bias are DECO's, latent attention and norm sum BlockFFN's."""
    if family == "vanilla":
        return True
    if family == "blockffn":
        return not activation.startswith("norm_") and norm != "normal"
    return norm != "sum" and not shape.get("q_lora_rank")


def same_config(found, wanted):
    """Equal field by field; the three scales pass through a quotient and come back within rounding."""
    scales = ("embedding_scale", "residual_scale", "logit_scale")
    rest = [{k: v for k, v in dataclasses.asdict(c).items() if k not in scales} for c in (found, wanted)]
    return rest[0] == rest[1] and all(getattr(found, k) == pytest.approx(getattr(wanted, k)) for k in scales)


@pytest.mark.parametrize("family", SHAPES)
def test_what_can_be_trained_is_read_back(tmp_path, text, family):
    """Every accepted combination survives export and the converter; every other one is refused before training."""
    experts = {} if family == "vanilla" else {"num_experts": 7, "dim_expert": 4}
    combinations = [("silu", "rms")] if family == "vanilla" else itertools.product(ACTIVATIONS, NORMS)
    accepted = 0
    for (activation, norm), shape in itertools.product(combinations, SHAPES[family]):
        table = {
            "name": "m",
            "family": family,
            "expert_activation": activation,
            "router_norm": norm,
            **experts,
            **shape,
        }
        if not readable(family, activation, norm, shape):
            with pytest.raises(BlockffnError, match=r"\[model\]"):
                config_of(tmp_path, DENSE if family == "vanilla" else BLOCKFFN, model=table)
            continue
        config = config_of(tmp_path, DENSE if family == "vanilla" else BLOCKFFN, model=table).model
        decoder = Decoder(config)
        with torch.no_grad():
            for number, (_, value) in enumerate(decoder.canonical()):
                value.normal_(generator=torch.Generator().manual_seed(number))
        save_checkpoint(tmp_path / "m", config, decoder.canonical(), text.tokenizer)
        found, tensors = load_canonical(tmp_path / "m")
        assert same_config(found, config), (activation, norm, shape)
        written = dict(decoder.canonical())
        assert set(tensors) == set(written)
        for name, value in written.items():
            stored = value if name.endswith("expert_bias") else value.bfloat16()
            assert torch.equal(tensors[name].float(), stored.float()), name
        accepted += 1
    assert accepted == {"vanilla": 2, "blockffn": 4 * 3 * 3, "deco": 7 * 3 * 4}[family]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_run_equals_uninterrupted_run(tmp_path, text, precision):
    run, use = {"precision": precision}, {"use": 0.1, "use_low": 0.2, "use_high": 0.3}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = Trainer(config_of(tmp_path / "a", run=run, objective=use), text)
    whole.train()
    first = Trainer(config_of(tmp_path / "b", run=run, objective=use), text)
    advance(first, 6)
    first.run.save()
    second = Trainer(config_of(tmp_path / "b", run=run, objective=use), text)
    second.train()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(second)[name]), name
    assert whole.factor.state() == second.factor.state()


def test_stop_signal_saves_and_the_log_has_no_gap(tmp_path, text, monkeypatch):
    config = config_of(tmp_path)
    trainer = Trainer(config, text)
    train_step = trainer.train_step

    def interrupted():
        if trainer.run.step == 5:
            signal.raise_signal(signal.SIGINT)
        return train_step()

    monkeypatch.setattr(trainer, "train_step", interrupted)
    assert not trainer.train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = Trainer(config, text)
    assert resumed.train()
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert {"loss", "locality", "chunk", "active", "gradient", "router_gradient", "tokens_per_second"} <= set(rows[0])
    assert {"validation", "bits_per_byte", "tls", "cls_8", "dead_share", "always_on_share", "live_tls"} <= set(rows[1])


def test_micro_batches_do_not_change_the_step(tmp_path, text):
    one = Trainer(config_of(tmp_path, optimizer={"micro_sequences": 4}), text)
    two = Trainer(config_of(tmp_path, optimizer={"micro_sequences": 1}), text)
    a, b = one.train_step(), two.train_step()
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["chunk"] == pytest.approx(b["chunk"], rel=1e-5)


def test_router_terms_are_averaged_over_all_layers(tmp_path, text):
    """One of two layers is dense: the entropy of the other one counts half, and the log states that mean."""
    trainer = Trainer(config_of(tmp_path, DECO), text)
    tokens = torch.from_numpy(text.train[:25].astype(np.int64))[None]
    total, figures = trainer.loss(tokens)
    with torch.no_grad():
        _, routers = trainer.decoder(tokens[:, :-1])
        own = objectives.router_entropy(routers[0].relu(), torch.from_numpy(data.document_ids(tokens[:, :-1].numpy())))
    assert float(figures["entropy"]) == pytest.approx(float(own) / 2, rel=1e-5)
    assert total.item() == pytest.approx(float(figures["loss"]) + 1e-3 * float(own) / 2, rel=1e-6)
    assert trainer.entropy.coefficient == 1e-3
    figures = trainer.train_step()
    assert figures["active"] > 0.2 and trainer.entropy.coefficient == pytest.approx(1.1e-3)  # share of the MoE layers


@pytest.mark.parametrize("method,bound", [("base", 0.3), ("rms", 2.2)])
def test_bias_of_an_idle_expert_does_not_wind_up(tmp_path, text, method, bound):
    """Four of five experts are wanted and one in two has r > 0: the bias rises until r + b' > 0 often enough."""
    trainer = Trainer(
        config_of(
            tmp_path, DECO, model={"expert_bias_method": method}, optimizer={"learning_rate": 1e-12, "steps": 60},
            objective={"bias_rate": 0.05, "target_ratio": 0.8, "entropy": 0.0},
        ),
        text,
    )  # fmt: skip
    advance(trainer, 60)
    bias = trainer.decoder.expert_layers()[0].expert_bias
    assert 0.05 < float(bias.mean()) and float(bias.max()) < bound  # 60 steps of 0.05 would be 3


def test_bfloat16_autocast_keeps_router_in_float32(tmp_path, text):
    trainer = Trainer(config_of(tmp_path, run={"precision": "bfloat16"}), text)
    with torch.autocast("cpu", torch.bfloat16):
        _, routers = trainer.decoder(torch.ones(1, 4, dtype=torch.int64))
    assert routers[0].dtype == torch.float32
    assert np.isfinite(trainer.train_step()["loss"])


def test_refuses_foreign_and_damaged_checkpoints(tmp_path, text):
    trainer = Trainer(config_of(tmp_path), text)
    trainer.run.save()
    with pytest.raises(BlockffnError, match="another model, corpus, seed"):
        Trainer(config_of(tmp_path, run={"seed": 6}), text).run.resume()
    Trainer(config_of(tmp_path, optimizer={"steps": 20}), text).run.resume()  # a longer run may go on
    path = trainer.run.folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BlockffnError, match="cannot be read"):
        trainer.run.resume()


def test_not_finite_names_step_layer_and_last_checkpoint(tmp_path, text):
    trainer = Trainer(config_of(tmp_path), text)
    advance(trainer, 2)
    trainer.run.save()
    advance(trainer, 1)
    with torch.no_grad():
        trainer.decoder.layers[1].attention.o[0, 0] = math.nan
    with pytest.raises(
        BlockffnError, match=r"step 3: .*gradient is not finite.*checkpoint.pt has the state after step 2"
    ):
        trainer.train_step()
    assert all(torch.isfinite(p).all() for _, p in trainer.named if p is not trainer.decoder.layers[1].attention.o)


def test_older_checkpoints_are_kept_and_rotate(tmp_path, text):
    trainer = Trainer(config_of(tmp_path, run={"keep": 2, "save_every": 2}), text)
    trainer.train()
    names = sorted(path.name for path in trainer.run.folder.glob("*.pt"))
    assert names == ["checkpoint-0000008.pt", "checkpoint-0000010.pt", "checkpoint.pt"]
    assert torch.load(trainer.run.folder / names[0])["step"] == 8


def test_full_disk_keeps_the_last_checkpoint(tmp_path, text, monkeypatch):
    trainer = Trainer(config_of(tmp_path), text)
    advance(trainer, 2)
    trainer.run.save()
    advance(trainer, 1)

    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(BlockffnError, match=r"cannot be written .*has the state after step 2"):
        trainer.run.save()
    assert [path.name for path in trainer.run.folder.iterdir()] == ["checkpoint.pt"]
    other = Trainer(config_of(tmp_path), text)
    other.run.resume()
    assert other.run.step == 2


@pytest.mark.parametrize("kind", ["blockffn", "deco"])
def test_a_run_goes_on_from_a_checkpoint_folder(tmp_path, text, kind):
    first = Trainer(config_of(tmp_path, MODELS[kind]), text)
    advance(first, 3)
    first.export(tmp_path / "m")
    body = MODELS[kind].split("[model]")[0] + "[model]\n" + "[optimizer]" + MODELS[kind].split("[optimizer]")[1]
    config = config_of(tmp_path, body, run={"out": str(tmp_path / "on")}, model={"checkpoint": str(tmp_path / "m")})
    assert config.corpus.tokenizer == str(tmp_path / "m/tokenizer.model")
    second = Trainer(config, text)
    for name, value in weights(first).items():
        stored = value if name.endswith("expert_bias") else value.bfloat16().float()
        assert torch.equal(weights(second)[name], stored), name
    assert second.train()
    with pytest.raises(BlockffnError, match="another model"):  # the same files from another start
        Trainer(config_of(tmp_path, MODELS[kind], run={"out": str(tmp_path / "on")}), text).run.resume()
    with pytest.raises(BlockffnError, match=r"\[model\] num_experts: the checkpoint says the shape"):
        config_of(tmp_path, body, model={"checkpoint": str(tmp_path / "m"), "num_experts": 7})
    with pytest.raises(BlockffnError, match="expected vocab_size = 330"):
        config_of(tmp_path, body, corpus={"vocab_size": 330}, model={"checkpoint": str(tmp_path / "m")})


def test_recomputed_activations_do_not_change_the_step(tmp_path, text):
    one, two = (Trainer(config_of(tmp_path, run={"recompute": flag}), text) for flag in (False, True))
    assert one.train_step() == two.train_step()
    assert all(torch.equal(value, weights(two)[name]) for name, value in weights(one).items())


def test_objectives_begin_late(tmp_path, text):
    trainer = Trainer(config_of(tmp_path, objective={"begin": 2}), text)
    seen = []
    for trainer.run.step in range(4):
        seen.append(trainer.train_step())
    assert ["chunk" in figures for figures in seen] == ["locality" in figures for figures in seen]
    assert ["chunk" in figures for figures in seen] == [False, False, True, True]
    assert trainer.factor.step == 2  # its warm-up and windows count from there


def test_objectives_relax(tmp_path, text):
    """`relax` scales locality and chunk from its step on, and nothing else."""
    options = {"relax": 1, "relax_factor": 0.5, "use": 0.1, "chunk_warmup": 0, "chunk_stable": 9}
    trainer = Trainer(config_of(tmp_path, objective=options), text)
    seen = []
    for trainer.run.step in range(3):
        seen.append(trainer.train_step())
    for name in ("chunk_factor", "locality_factor"):
        assert [figures[name] for figures in seen[1:]] == pytest.approx([seen[0][name] / 2] * 2)
    assert seen[1]["use_factor"] == seen[2]["use_factor"] == pytest.approx(0.1)


def test_use_wakes_a_dead_expert(tmp_path, text):
    """An expert whose logit is never above 0 has no gradient; the pull gives it one until it is used."""
    idle = []
    for use in (0.0, 0.5):
        objective = {"locality": 0.0, "chunk": 0.0, "use": use, "use_low": 0.2, "use_high": 0.9}
        trainer = Trainer(config_of(tmp_path, objective=objective, optimizer={"steps": 60}), text)
        with torch.no_grad():
            trainer.decoder.expert_layers()[0].router[2] = 0.0
        advance(trainer, 60)
        idle.append(trainer.evaluate()["dead"][0])
    assert idle == [1.0, 0.0]


def test_baselines_route_as_they_say(tmp_path, text):
    top = Trainer(
        config_of(tmp_path, objective={"locality": 0.0, "chunk": 0.0, "top_k": 3, "load_balance": 0.01}), text
    )
    figures = top.train_step()
    assert figures["active"] == pytest.approx(3 / 7) and figures["load_balance"] >= 0.99
    with pytest.raises(BlockffnError, match="no published layout"):
        top.export(tmp_path / "m")
    options = {"locality": 0.0, "chunk": 0.0, "l1": 1e-3, "l1_multiplier": 1.5}
    remoe = Trainer(config_of(tmp_path, objective=options), text)
    active = [remoe.train_step()["active"] for _ in range(3)]
    assert active[0] > 0.2 and remoe.l1.coefficient > 1e-3


def test_samples_and_tensorboard_are_written(tmp_path, text):
    pytest.importorskip("tensorboard")
    options = {"sample_tokens": 5, "sample_prompt": "def f", "tensorboard": True}
    trainer = Trainer(config_of(tmp_path, run=options), text)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    samples = [row["sample"] for row in rows if "sample" in row]
    assert len(samples) == 3 and all(sample.startswith("def f") for sample in samples)
    assert 0 < rows[-1]["mfu"] < 1
    (events,) = (tmp_path / "run/tensorboard").iterdir()
    assert events.stat().st_size > 500


def test_speed_is_measured_beside_a_plain_loop(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr("blockffn.training.train.prepare", lambda _: text)
    config_of(tmp_path)
    parser = argparse.ArgumentParser()
    speed.add_arguments(parser)
    assert speed.run(parser.parse_args([str(tmp_path / "train.toml"), "--steps", "1", "--rounds", "2"])) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["loop"] for row in found["rows"]] == ["trainer", "plain"]
    assert all(0 < row["low"] <= row["rate"] <= row["high"] and 0 < row["of_mm"] < 1 for row in found["rows"])


def test_the_plain_loop_does_the_trainers_work(tmp_path, text):
    """Without routers nothing is left out: the same weights to the bit."""
    trainer = Trainer(config_of(tmp_path, DENSE), text)
    plain = speed.PlainLoop(trainer)
    for _ in range(3):
        plain.step()
    advance(trainer, 3)
    for (name, ours), (_, theirs) in zip(trainer.decoder.canonical(), plain.decoder.canonical(), strict=True):
        assert torch.equal(ours, theirs), name


def test_recipe_of_a_mid_size_model_runs(text):
    """The published 0.1B shape, twenty short steps; the vocabulary apart nothing of the model is smaller."""
    short = {"steps": 20, "warmup_steps": 4, "decay_steps": 4, "sequence_length": 16, "batch_sequences": 1}
    overrides = {
        "run": {"device": "cpu", "compile": False},
        "corpus": {"vocab_size": 320},
        "optimizer": short | {"micro_sequences": 1},
        "objective": {"begin": 4, "chunk_warmup": 4, "chunk_stable": 8},
    }
    trainer = Trainer(read_config(ROOT / "examples/recipes/blockffn-0.1b.toml", overrides), text)
    assert 110e6 < sum(p.numel() for _, p in trainer.named) < 125e6
    losses = []
    for trainer.run.step in range(20):
        figures = trainer.train_step()
        losses.append(figures["loss"])
    assert np.mean(losses[-5:]) < losses[0] - 0.5 and {"locality", "chunk"} <= set(figures)


def test_every_training_file_of_the_examples_is_read():
    files = [f for f in sorted((ROOT / "examples").rglob("*.toml")) if f.stem not in ("base", "corpus")]
    files = [f for f in files if f.parent.name != "base"]
    assert len(files) > 20
    for file in files:
        config = read_eagle_config(file) if "eagle" in file.parent.name else read_config(file)
        assert "package:sympy" in config.corpus.sources, file


def _run_whole(command: list[str]) -> None:
    """Run a command that starts others; what is left of them after two minutes is ended with it."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            _, errors = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, errors


def test_two_processes_make_the_step_of_one(tmp_path, text):
    """torchrun on the loopback address: weights after three steps equal those of one process, to 1e-6."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"def function_{i}(a, b):\n    return a + {i} * b\n\n\n" * 20)
    options = {
        "run": {"threads": 1},
        "optimizer": {"steps": 3, "warmup_steps": 1, "decay_steps": 1, "micro_sequences": 1},
        "corpus": {
            "sources": [str(folder)],
            "validation": [str(folder / "1.txt")],
            "tokenizer": str(text.tokenizer),
            "cache": str(tmp_path / "cache"),
        },
    }
    one = Trainer(config_of(tmp_path, DECO, **options))
    one.train()
    words = [f"{table}.{key}={json.dumps(value)}" for table, values in options.items() for key, value in values.items()]
    words.append(f"run.out={tmp_path / 'two'}")
    command = [sys.executable, *TORCHRUN, "-m", "blockffn", "train", str(tmp_path / "train.toml")]
    _run_whole([*command, *(part for word in words for part in ("--set", word))])
    two = torch.load(tmp_path / "two/checkpoint.pt")
    assert two["step"] == 3
    for name, value in one.decoder.state_dict().items():
        torch.testing.assert_close(two["module"][name], value, rtol=1e-5, atol=1e-6)
    assert two["adaptive"]["entropy"] == one.entropy.state()


BAD = {
    "unknown key": (("optimizer", "learning_rat", 1.0), "unknown key 'learning_rat'; did you mean 'learning_rate'"),
    "type": (("optimizer", "steps", 1.5), r"\[optimizer\] steps: expected int, found 1.5"),
    "bool": (("run", "seed", True), r"\[run\] seed: expected int, found True"),
    "optimizer": (("optimizer", "kind", "sgd"), "expected one of adamw, muon"),
    "family": (("model", "family", "gpt"), "expected one of blockffn, deco, vanilla"),
    "precision": (("run", "precision", "fp8"), "expected one of float32, bfloat16"),
    "heads": (("model", "num_attention_heads", 3), "expected a multiple of 3 heads, found 16"),
    "batch": (("optimizer", "micro_sequences", 3), "no multiple of micro_sequences"),
    "schedule": (("optimizer", "decay_steps", 11), "exceed steps 12"),
    "experts": (("model", "num_experts", 0), "num_experts: expected a positive number"),
    "rank": (("model", "kv_lora_rank", 0), "kv_lora_rank: expected a positive number"),
    "zero": (("optimizer", "steps", 0), "steps: expected a positive number"),
    "bias": (("objective", "bias_rate", 1e-3), "bias_rate needs expert_bias"),
    "shared": (("model", "shared_expert_size", 4), "need family deco"),
    "activation": (("model", "expert_activation", "silo"), r"expected one of silu, relu, .* did you mean 'silu'"),
    "norm": (("model", "router_norm", "normal"), "router_norm: expected one of rms, sum, none for family blockffn"),
    "bias method": (("model", "expert_bias_method", "RMS"), "expert_bias_method: expected one of base, rms"),
    "groups": (("model", "num_key_value_heads", 1), "latent attention has no groups"),
    "divisor": (("model", "num_key_value_heads", 3), "a divisor of num_attention_heads = 2"),
    "odd": (("model", "qk_rope_head_dim", 3), "qk_rope_head_dim: expected an even number, found 3"),
    "scale": (("model", "scale_emb", 0.0), "scale_emb: expected a positive number"),
    "negative": (("model", "scale_depth", -1.0), "scale_depth: expected 0 or more"),
    "window": (("objective", "chunk_window", 0), "chunk_window: expected a positive number, found 0"),
    "target": (("objective", "target_ratio", 20.0), "target_ratio: expected a share between 0 and 1"),
    "multiplier": (("objective", "entropy_multiplier", 0.9), "entropy_multiplier: expected 1 or more"),
    "warm-up": (("objective", "chunk_warmup", 5), "chunk_warmup: expected at most chunk_stable = 0"),
    "factor": (("objective", "chunk", -0.1), "chunk: expected 0 or more"),
    "range": (("objective", "use_low", 0.7), "use_low: expected at most use_high = 0.5"),
    "top": (("objective", "top_k", 8), "top_k: expected at most the 7 experts"),
    "balance": (("objective", "load_balance", 0.1), "load_balance needs top_k"),
    "sources": (("corpus", "sources", "stdlib"), r"\[corpus\] sources: expected a list of strings"),
    "dense": (("model", "family", "vanilla"), "intermediate_size: expected a positive number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configuration(tmp_path, case):
    (table, key, value), message = BAD[case]
    with pytest.raises(BlockffnError, match=message):
        config_of(tmp_path, **{table: {key: value}})


def test_missing_key_bad_file_and_unknown_table(tmp_path):
    with pytest.raises(BlockffnError, match=r"\[optimizer\] kind: expected a value"):
        config_of(tmp_path, BLOCKFFN.replace('kind = "muon"\n', ""))
    with pytest.raises(BlockffnError, match="not a TOML file"):
        config_of(tmp_path, "[run")
    with pytest.raises(BlockffnError, match="unknown key 'modle'; did you mean 'model'"):
        config_of(tmp_path, BLOCKFFN + "[modle]\n")
    with pytest.raises(BlockffnError, match="cannot be read"):
        read_config(tmp_path / "absent.toml")
    (tmp_path / "arm.toml").write_text('extends = "train.toml"\n[optimizer]\nsteps = 77\n')
    assert config_of(tmp_path).optimizer.steps == 12
    arm = read_config(tmp_path / "arm.toml")
    assert (arm.optimizer.steps, arm.optimizer.kind, arm.model.n_embd) == (77, "muon", 16)
    (tmp_path / "arm.toml").write_text('extends = "other.toml"\n')
    (tmp_path / "other.toml").write_text('extends = "arm.toml"\n')
    with pytest.raises(BlockffnError, match="extends: expected the path of another training file"):
        read_config(tmp_path / "arm.toml")
    with pytest.raises(BlockffnError, match="but family vanilla has none"):
        config_of(tmp_path, DENSE + "[objective]\nchunk = 0.1\n")


def test_evaluation_states_what_eval_sparsity_states(tmp_path, text):
    """The figures of blockffn.sparsity on the router's choices, dead experts too, and the loss per byte of text."""
    trainer = Trainer(config_of(tmp_path), text)
    with torch.no_grad():
        trainer.decoder.expert_layers()[1].router[3] = 0.0  # never above 0
    figures = trainer.evaluate(4)
    windows = list(data.Windows(text.validation, 24, 0).in_order(4))
    with torch.no_grad():
        chosen = [torch.cat(trainer.decoder.active(trainer.decoder(w[:, :-1])[1])) for w in windows]
    found = of_activity(torch.cat(chosen, dim=1).numpy(), window=24)
    assert found.layer_dead[1] >= 1
    for name in ("dead_share", "always_on_share", "live_tls"):
        assert figures[name] == getattr(found, name)
    assert (figures["tls"], figures["cls_8"]) == (found.layer_tls.tolist(), found.layer_cls[8].tolist())
    assert "cls_32" not in figures and figures["live_cls_8"] == found.live_cls[8]
    assert (figures["dead"], figures["sets"]) == (found.layer_dead.tolist(), found.layer_sets.tolist())
    pieces = SentencePieceProcessor(model_file=str(text.tokenizer))
    n_bytes = len(pieces.decode(text.validation[1 : 4 * 24 + 1].tolist()).encode())
    assert figures["bits_per_byte"] == pytest.approx(figures["validation"] * 96 / math.log(2) / n_bytes, rel=1e-6)


def test_validation_loss_by_document(tmp_path, text):
    trainer = Trainer(config_of(tmp_path), text)
    figures = trainer.evaluate()
    n = sum(figures["document_tokens"])
    assert n == data.Windows(text.validation, 24, 0).count * 24
    assert sum(figures["document_nats"]) / n == pytest.approx(figures["validation"])
    starts = np.flatnonzero(text.validation == data.BOS_ID)
    assert figures["document_tokens"][:2] == [starts[1] - 1, starts[2] - starts[1]]
    assert "document_nats" not in trainer.evaluate(2)


def test_bad_device_and_short_corpus(tmp_path, text):
    with pytest.raises(BlockffnError, match="expected cpu or a CUDA device"):
        Trainer(config_of(tmp_path, run={"device": "abacus"}), text)
    with pytest.raises(BlockffnError, match="too few for sequences"):
        Windows(text.train[:10], 24, 0)


def test_windows_cover_the_stream_once_per_epoch():
    windows = Windows(np.arange(101, dtype=np.uint16), 10, seed=1)
    starts = windows.batch(0, 10)[:, 0].tolist()
    assert sorted(starts) == list(range(0, 100, 10)) and starts != sorted(starts)
    assert windows.batch(10, 10)[:, 0].tolist() != starts
    assert windows.batch(3, 2)[:, 0].tolist() == starts[3:5]
    assert windows.batch(0, 1).shape == (1, 11)


def test_schedule_warms_up_stays_and_decays():
    config = OptimizerConfig("adamw", 1.0, 100, 10, 20, 8, 1, 1, final_ratio=0.01)
    assert wsd(0, config) == pytest.approx(0.1)
    assert {wsd(step, config) for step in range(10, 80)} == {1.0}
    assert wsd(89, config) == pytest.approx(0.1)
    assert wsd(99, config) == pytest.approx(0.01)


def test_router_matrices_are_clipped_by_themselves():
    router, inner, norm = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    router.grad, inner.grad, norm.grad = torch.tensor([30.0, 40.0]), torch.tensor([0.3, 0.0]), torch.tensor([0.0, 0.4])
    named = [("layers.0.router", router), ("layers.0.o", inner), ("layers.0.router_norm", norm)]
    norms = clip_gradients(named, 1.0)
    assert norms == pytest.approx({"router_gradient": 50.0, "gradient": 0.5})
    assert router.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert (inner.grad.tolist(), norm.grad.tolist()) == ([pytest.approx(0.3), 0.0], [0.0, pytest.approx(0.4)])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_groups_have_rates_of_their_own(tmp_path, text, kind):
    """One step at rate 0.01: what is not a router moves as without the factor, the router a thousandth of it."""
    rates = {"router_rate": 1e-3, "table_rate": 0.5, "vector_rate": 2.0}
    options = {"kind": kind, "weight_decay": 0.0, "learning_rate": 0.01}
    moved = []
    for factors in ({}, rates):
        trainer = Trainer(config_of(tmp_path, optimizer={**options, **factors}), text)
        before = weights(trainer)
        trainer.train_step()
        moved.append({name: (value - before[name]).abs().max().item() for name, value in weights(trainer).items()})
    for name, plain in moved[0].items():
        last = name.rpartition(".")[2]
        factor = 1e-3 if last == "router" else 0.5 if last == "embed" else 2.0 if "norm" in last else 1.0
        assert moved[1][name] == pytest.approx(factor * plain, rel=1e-2, abs=1e-7), name


@pytest.mark.parametrize("shape", [(8, 8), (5, 3), (3, 4, 9)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.5 and values.max() < 1.3


def test_cli_trains_and_exports(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr("blockffn.training.train.prepare", lambda _: text)
    config_of(tmp_path)
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    arguments = [str(tmp_path / "train.toml"), "--set", "optimizer.steps=6", "--export", str(tmp_path / "m"), "--json"]
    assert cli.run(parser.parse_args(arguments)) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["steps"] == 6 and len(figures["tls"]) == 2
    assert (tmp_path / "run/curve.png").stat().st_size > 1000
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "model.safetensors",
    }
    only = [str(tmp_path / "train.toml"), "--set", "optimizer.steps=6", "--eval-only"]
    assert cli.run(parser.parse_args(only)) == 0
    lines = capsys.readouterr().out
    assert "bits_per_byte" in lines and "dead_share" in lines and f"loss {figures['validation']:.4f}" in lines
    with pytest.raises(BlockffnError, match=r"checkpoint\.pt: no such file; train first"):
        cli.run(parser.parse_args([*only, "--set", f"run.out={tmp_path}/nowhere"]))
    with pytest.raises(BlockffnError, match=r"expected TABLE\.KEY=VALUE"):
        cli.run(parser.parse_args([str(tmp_path / "train.toml"), "--set", "steps=6"]))
