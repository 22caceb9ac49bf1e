"""Train a decoder: language-model loss plus the router objectives of BlockFFN or DECO.

    >>> from blockffn.training.train import Trainer
    >>> trainer = Trainer(read_config(Path("examples/tiny-blockffn/train.toml")))
    >>> trainer.train()      # goes on where the last run stopped; Ctrl-C saves and returns
    >>> trainer.export(Path("examples/tiny-blockffn"))

`Trainer.train_step` and `Trainer.loss` are the whole way from a batch to optimizer.step. Weights and optimizer stay in
float32; precision bfloat16 runs the forward pass under autocast (CPU or CUDA), the router apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from blockffn.convert.save import save_checkpoint
from blockffn.errors import BlockffnError
from blockffn.sparsity import Sparsity, of_activity
from blockffn.training import objectives
from blockffn.training.checkpoint import Adaptive, Run, find_device, run_identity
from blockffn.training.config import OptimizerConfig, RunConfig, TrainConfig
from blockffn.training.controllers import AdaptiveFactor, EntropyController, update_expert_bias
from blockffn.training.data import BOS_ID, Corpus, Windows, bytes_of_pieces, prepare
from blockffn.training.model import Decoder
from blockffn.training.optim import clip_gradients, make_optimizers, set_learning_rate, wsd

DECO_ROUTER_SCALE = 0.1  # start of the learnable expert-wise scale; BlockFFN's norm weight starts at 1

Loss = Callable[[Tensor], tuple[Tensor, dict[str, float]]]


class Trainer:
    """One run of a decoder: configuration, corpus, model, optimizers and what adapts from step to step."""

    def __init__(self, config: TrainConfig, corpus: Corpus | None = None) -> None:
        self.config, run, o, t = config, config.run, config.optimizer, config.objective
        self.device = open_device(run)
        tokenizer = Path(config.corpus.tokenizer) if config.corpus.tokenizer else None
        self.corpus = corpus or prepare(Path(config.corpus.cache), config.corpus.vocab_size, tokenizer)
        self.windows = Windows(self.corpus.train, o.sequence_length, run.seed)
        self.decoder = Decoder(config.model)
        router_scale = DECO_ROUTER_SCALE if config.model.family == "deco" else 1.0
        self.decoder.initialise(o.init_std, router_scale, torch.Generator().manual_seed(run.seed))
        self.decoder.to(self.device)
        self.named = list(self.decoder.canonical())
        self.optimizers = make_optimizers(self.named, o)
        self.factor = AdaptiveFactor(
            t.chunk, t.chunk_warmup, t.chunk_stable, t.chunk_window, t.chunk_min_ratio, t.chunk_max_factor
        )
        self.entropy = EntropyController(t.entropy, t.entropy_multiplier, t.target_ratio)
        self._routed: list[tuple[list[Tensor], Tensor]] = []  # r + b' > 0 per layer, and documents, of this step
        identity = run_identity(run, o, [dataclasses.asdict(config.model)], self.corpus.fingerprint)
        adaptive: dict[str, Adaptive] = {"factor": self.factor, "entropy": self.entropy}
        self.run = Run(run, o, identity, self.decoder, self.optimizers, adaptive)

    def train(self) -> bool:
        """Run to the last step, or until Ctrl-C. Returns whether the run is complete."""
        for step in self.run.steps():
            self.run.done(self.train_step(step), self.evaluate)
        return self.run.complete

    def train_step(self, step: int) -> dict[str, Any]:
        """Batch, losses, gradients, optimizers, then what adapts; returns the figures of the step."""
        figures = optimizer_step(step, self.loss, self.windows, self.named, self.optimizers, self.config.optimizer)
        if "chunk" in figures:
            self.factor.update(figures["chunk"])
        if "entropy" in figures:
            self.entropy.update(figures["active"])
        if self._routed:
            self._move_biases()
        return figures

    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, float]]:
        """tokens [B, T + 1] -> cross-entropy plus the weighted router terms, and all parts.

        A router term is the mean over all layers; a dense layer counts as 0, as in DECO.
        """
        t, inputs, targets = self.config.objective, tokens[:, :-1].to(self.device), tokens[:, 1:].to(self.device)
        documents = (inputs == BOS_ID).cumsum(dim=-1)  # [B, T]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bfloat16"):
            hidden, routers = self.decoder(inputs)  # [B, T, h]; router logits r [B, T, E] of each layer of experts
            logits = self.decoder.logits(hidden)  # [B, T, V]
        total = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        figures = {"loss": total.item()}
        if not routers:
            return total, figures

        layers = list(zip(self.decoder.expert_layers(), routers, strict=True))
        selected = [ffn.selected(r) for ffn, r in layers]  # a = relu(r) in the active set, [B, T, E] each
        terms: dict[str, tuple[float, list[Tensor]]] = {}
        if t.locality:
            values = [objectives.activation_locality(r, documents, t.locality_beta) for r in routers]
            terms["locality"] = (t.locality, values)
        if t.chunk:
            values = [objectives.chunk_sparsification(a, documents, t.chunk_size) for a in selected]
            terms["chunk"] = (self.factor.value(), values)
        if t.entropy:
            values = [objectives.router_entropy(a, documents) for a in selected]
            terms["entropy"] = (self.entropy.value(), values)
        for name, (factor, values) in terms.items():
            term = torch.stack(values).sum() / self.config.model.n_layer
            total = total + factor * term
            figures[name], figures[f"{name}_factor"] = term.item(), factor
        figures["active"] = float(torch.stack([(a > 0).float().mean() for a in selected]).mean())
        if t.bias_rate:
            self._routed.append(([ffn.routed(r) for ffn, r in layers], documents))
        return total, figures

    def _move_biases(self) -> None:
        """Move the expert biases against the loads of the whole step."""
        t = self.config.objective
        documents = torch.cat([seen for _, seen in self._routed])  # [B, T]
        for i, ffn in enumerate(self.decoder.expert_layers()):
            assert ffn.expert_bias is not None
            routed = torch.cat([layers[i] for layers, _ in self._routed])  # [B, T, E]
            update_expert_bias(ffn.expert_bias, routed, documents, t.target_ratio, t.bias_rate)
        self._routed.clear()

    @torch.no_grad()
    def evaluate(self, sequences: int = 0) -> dict[str, Any]:
        """Validation loss and sparsity over the first windows (0: all of them): see docs/training.md for the names."""
        length = self.config.optimizer.sequence_length
        sizes = torch.from_numpy(bytes_of_pieces(self.corpus.tokenizer))  # [V]
        losses, n_bytes, active = [], 0, []
        for tokens in Windows(self.corpus.validation, length, 0).in_order(sequences):  # [1, T + 1]
            inputs, targets = tokens[:, :-1].to(self.device), tokens[0, 1:].to(self.device)
            hidden, routers = self.decoder(inputs)
            losses.append(functional.cross_entropy(self.decoder.logits(hidden)[0].float(), targets).item())
            n_bytes += int(sizes[tokens[0, 1:]].sum())
            if routers:
                active.append(torch.cat(self.decoder.active(routers)).cpu().numpy())  # [layers, T, E]
        figures: dict[str, Any] = {
            "validation": sum(losses) / len(losses),
            "bits_per_byte": sum(losses) * length / math.log(2) / max(n_bytes, 1),
        }
        return figures | (
            sparsity_figures(of_activity(np.concatenate(active, axis=1), window=length)) if active else {}
        )

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder in the layout of the published checkpoints."""
        save_checkpoint(folder, self.decoder.config, self.decoder.canonical(), self.corpus.tokenizer)


def optimizer_step(
    step: int, loss: Loss, windows: Windows, named: Iterable[tuple[str, nn.Parameter]],
    optimizers: Iterable[torch.optim.Optimizer], o: OptimizerConfig,
) -> dict[str, Any]:  # fmt: skip
    """One optimizer step over batch_sequences sequences; returns the means of what `loss` told, norms and rate.

    Raises BlockffnError when a gradient is not finite.
    """
    rate = wsd(step, o)
    set_learning_rate(optimizers, rate)
    figures: dict[str, Any] = {}
    passes = windows.batch(step * o.batch_sequences, o.batch_sequences).split(o.micro_sequences)
    for tokens in passes:  # [B, T + 1]
        total, parts = loss(tokens)
        (total / len(passes)).backward()
        for name, value in parts.items():
            figures[name] = figures.get(name, 0.0) + value / len(passes)
    norms = clip_gradients(named, o.clip)
    if not all(math.isfinite(norm) for norm in norms.values()):
        raise BlockffnError(f"step {step}: the gradient is not finite; lower learning_rate or raise warmup_steps")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return figures | norms | {"rate": rate}


def open_device(run: RunConfig) -> torch.device:
    """Apply `threads` and return the device of the run. Raises BlockffnError when this machine does not have it."""
    if run.threads:
        torch.set_num_threads(run.threads)
    return find_device(run.device)


def sparsity_figures(found: Sparsity) -> dict[str, Any]:
    """The log's names: lists per layer of experts, and the shares over all of them."""
    figures: dict[str, Any] = {"tls": found.layer_tls.tolist()}
    figures |= {f"cls_{size}": layers.tolist() for size, layers in found.layer_cls.items()}
    live = {"live_tls": found.live_tls} | {f"live_cls_{size}": share for size, share in found.live_cls.items()}
    figures |= {name: share for name, share in live.items() if share is not None}
    figures |= {"dead_share": found.dead_share, "always_on_share": found.always_on_share}
    counts = {"dead": found.layer_dead, "always_on": found.layer_always_on, "sets": found.layer_sets}
    return figures | {name: layers.tolist() for name, layers in counts.items()}
