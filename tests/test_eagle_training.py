"""The EAGLE head: its formula spelled out in numpy, its training, its checkpoint."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from blockffn.errors import BlockffnError
from blockffn.training import data
from blockffn.training.config import read_config
from blockffn.training.eagle import EagleReference, EagleTrainer, HeadConfig, read_eagle_config
from blockffn.training.model import ReferenceModel
from blockffn.training.train import Trainer

TARGET = """
[run]
out = "OUT/target"
seed = 2
threads = 1
[corpus]
vocab_size = 320
[model]
name = "target"
family = "blockffn"
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
max_position_embeddings = 64
tie_word_embeddings = true
num_experts = 5
dim_expert = 4
scale_emb = 12.0
dim_model_base = 8
[optimizer]
kind = "adamw"
learning_rate = 1e-2
steps = 30
warmup_steps = 2
decay_steps = 4
sequence_length = 24
batch_sequences = 4
micro_sequences = 4
"""
HEAD = """
[run]
out = "OUT/head"
seed = 2
threads = 1
[corpus]
vocab_size = 320
[eagle]
name = "head"
target = "OUT/checkpoint"
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
intermediate_size = 12
[optimizer]
kind = "adamw"
learning_rate = 1e-2
steps = 30
warmup_steps = 2
decay_steps = 4
sequence_length = 24
batch_sequences = 4
micro_sequences = 2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a trained target and the text it was trained on."""
    folder = tmp_path_factory.mktemp("eagle")
    texts = [f"def function_{i}(a, b):\n    return a + {i} * b\n\n\n" * 20 for i in range(40)]
    model = data.train_tokenizer(texts, folder / "tokenizer", 320)
    streams = [np.concatenate(list(data.encode_documents(model, part))) for part in (texts[3:], texts[:3])]
    text = data.Corpus(*streams, model, 1, 2, "test")
    (folder / "target.toml").write_text(TARGET.replace("OUT", str(folder)))
    target = Trainer(read_config(folder / "target.toml"), text)
    target.train()
    target.export(folder / "checkpoint")
    return folder, text


def trainer_of(place, tmp_path, **overrides):
    folder, text = place
    path = tmp_path / "head.toml"
    path.write_text(HEAD.replace("OUT/head", str(tmp_path / "run")).replace("OUT", str(folder)))
    return EagleTrainer(read_eagle_config(path, overrides), text)


def norm(x, weight, eps):
    return x / np.sqrt(np.mean(x**2) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def rotate(x, position, base):
    half = len(x) // 2
    angle = position * base ** (-2 * np.arange(half) / len(x))
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])


def literal_head(w, config, embedded, features, heads, kv_heads):
    """f' of all rows, from the published tensors alone."""
    eps, rows = config.rms_eps, []
    for e, f in zip(embedded, features, strict=True):
        left = w["fc.weight"][:, :16] @ norm(e, w["input_norm1.weight"], eps) + w["fc.bias"]
        rows.append(left + w["fc.weight"][:, 16:] @ norm(f, w["input_norm2.weight"], eps))
    for layer in range(2):
        p = f"layers.{layer}."
        inputs = [norm(x, w[p + "input_layernorm.weight"], eps) for x in rows] if layer else rows
        q, k, v = ([w[f"{p}self_attn.{n}_proj.weight"] @ x for x in inputs] for n in "qkv")
        for t in range(len(rows)):
            mixed = []
            for head in range(heads):
                group = head // (heads // kv_heads)
                query = rotate(np.split(q[t], heads)[head], t, config.rope_base)
                keys = [rotate(np.split(k[s], kv_heads)[group], s, config.rope_base) for s in range(t + 1)]
                score = np.exp([query @ key / math.sqrt(len(key)) for key in keys])
                values = [np.split(v[s], kv_heads)[group] for s in range(t + 1)]
                mixed.append(sum(a * b for a, b in zip(score / score.sum(), values, strict=True)))
            x = rows[t] + w[p + "self_attn.o_proj.weight"] @ np.concatenate(mixed)
            y = norm(x, w[p + "post_attention_layernorm.weight"], eps)
            hidden = silu(w[p + "mlp.gate_proj.weight"] @ y) * (w[p + "mlp.up_proj.weight"] @ y)
            rows[t] = x + w[p + "mlp.down_proj.weight"] @ hidden
    return np.stack(rows)


def test_head_learns_and_its_checkpoint_gives_the_literal_formula(place, tmp_path):
    trainer = trainer_of(place, tmp_path)
    before = trainer.evaluate()
    assert trainer.train()
    after = trainer.evaluate()
    assert after["validation"] < 0.8 * before["validation"]
    assert after["agreement"] > before["agreement"]
    frozen = load_file(place[0] / "checkpoint/model.safetensors")["model.norm.weight"].float()
    assert torch.equal(trainer.target.output_norm, frozen)

    trainer.export(tmp_path / "head")
    target = ReferenceModel.from_checkpoint(place[0] / "checkpoint", torch.float64)
    reference = EagleReference.from_checkpoint(tmp_path / "head", target, torch.float64)
    tokens = place[1].validation[:10].astype(np.int64)
    hidden = target.forward(tokens[:-1]).hidden
    logits = reference.draft_logits(hidden, torch.from_numpy(tokens))
    w = {name: value.double().numpy() for name, value in load_file(tmp_path / "head/model.safetensors").items()}
    embed = target.decoder.embed.numpy()
    guess = literal_head(w, target.config, embed[tokens[1:]] * 12.0, hidden.numpy(), 2, 1)
    np.testing.assert_allclose(logits.numpy(), guess * 0.5 @ embed.T, rtol=1e-9, atol=1e-9)
    config = json.loads((tmp_path / "head/config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"], config["head_dim"]) == (2, 12, 8)


def test_loss_is_smooth_l1_plus_weighted_cross_entropy(place, tmp_path):
    trainer = trainer_of(place, tmp_path, eagle={"noise": 0.0, "token_weight": 0.3})
    tokens = torch.from_numpy(place[1].train[:25].astype(np.int64))[None]
    total, figures = trainer.loss(tokens)
    with torch.no_grad():
        f, _ = trainer.target(tokens[:, :24])
        guess = trainer.head(trainer.target.embed[tokens[0, 1:24]][None] * 12.0, f[:, :23])
        off = (guess - f[:, 1:]).abs()
        smooth = torch.where(off < 1, 0.5 * off**2, off - 0.5).mean()
        p, q = (trainer.target.logits(x).softmax(-1) for x in (f[:, 1:], guess))
        cross = -(p * q.log()).sum(-1).mean()
    assert figures["features"] == pytest.approx(float(smooth), rel=1e-5)
    assert total.item() == pytest.approx(float(smooth + 0.3 * cross), rel=1e-5)
    noisy = trainer_of(place, tmp_path, eagle={"noise": 0.5})
    assert noisy.loss(tokens)[1]["features"] != pytest.approx(figures["features"], rel=1e-5)


def test_resumed_head_equals_uninterrupted_head(place, tmp_path):
    whole, first = trainer_of(place, tmp_path), trainer_of(place, tmp_path)
    for whole.run.step in range(6):
        whole.train_step()
    for first.run.step in range(3):
        first.train_step()
    first.run.step = 3
    first.run.save()
    second = trainer_of(place, tmp_path)
    second.run.resume()
    for step in range(second.run.step, 6):
        second.run.step = step
        second.train_step()
    for (name, a), (_, b) in zip(whole.head.named_parameters(), second.head.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "table,key,value,message",
    [
        ("eagle", "num_key_value_heads", 3, "expected a divisor of 2 heads"),
        ("eagle", "intermediate_size", 0, "intermediate_size: expected a positive number"),
        ("eagle", "num_attention_heads", 3, "divisor"),
        ("eagle", "nois", 0.1, "did you mean 'noise'"),
        ("corpus", "vocab_size", 300, "expected 320 as the target has, found 300"),
        ("eagle", "target", "nowhere", "nowhere"),
    ],
)
def test_bad_configuration(place, tmp_path, table, key, value, message):
    with pytest.raises(BlockffnError, match=message):
        trainer_of(place, tmp_path, **{table: {key: value}})


def test_checkpoint_with_a_missing_tensor_is_refused(place, tmp_path):
    trainer = trainer_of(place, tmp_path)
    trainer.export(tmp_path / "head")
    config = json.loads((tmp_path / "head/config.json").read_text())
    target = ReferenceModel.from_checkpoint(place[0] / "checkpoint")
    (tmp_path / "head/config.json").write_text(json.dumps({**config, "intermediate_size": 13}))
    with pytest.raises(BlockffnError, match=r"mlp\.\w+_proj\.weight: expected shape"):
        EagleReference.from_checkpoint(tmp_path / "head", target)
    del config["num_key_value_heads"]
    (tmp_path / "head/config.json").write_text(json.dumps(config))
    with pytest.raises(BlockffnError, match="num_key_value_heads: expected a value"):
        EagleReference.from_checkpoint(tmp_path / "head", target)
    assert HeadConfig("", "", 1, 2, 2, 3).noise == 0.1
