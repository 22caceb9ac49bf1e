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
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.nn import functional

from blockffn.convert.save import save_checkpoint
from blockffn.convert.tensor_map import load_canonical
from blockffn.errors import BlockffnError
from blockffn.sparsity import Sparsity, of_activity
from blockffn.training import objectives, parallel
from blockffn.training.checkpoint import Adaptive, Run, find_device, fingerprint, run_identity
from blockffn.training.config import RunConfig, TrainConfig
from blockffn.training.controllers import AdaptiveFactor, ExpertUse, SparsityController, update_expert_bias
from blockffn.training.data import BOS_ID, EOS_ID, Corpus, Windows, bytes_of_pieces, document_ids, prepare
from blockffn.training.model import Decoder
from blockffn.training.optim import clip_gradients, make_optimizers, set_learning_rate, wsd
from blockffn.training.speed import flops_per_token

DECO_ROUTER_SCALE = 0.1  # start of the learnable expert-wise scale; BlockFFN's norm weight starts at 1

Loss = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


class Trainer:
    """One run of a decoder: configuration, corpus, model, optimizers and what adapts from step to step."""

    def __init__(self, config: TrainConfig, corpus: Corpus | None = None) -> None:
        self.config, run, o, t = config, config.run, config.optimizer, config.objective
        self.device = open_device(run)
        self.corpus = corpus or prepare(config.corpus)
        self.windows = Windows(self.corpus.train, o.sequence_length, run.seed)
        parallel.check_passes(o.batch_sequences // o.micro_sequences)
        self.decoder = Decoder(config.model)
        if config.checkpoint:
            self.decoder.load(load_canonical(config.checkpoint)[1])
        else:
            router_scale = DECO_ROUTER_SCALE if config.model.family == "deco" else 1.0
            self.decoder.initialise(o.init_std, router_scale, torch.Generator().manual_seed(run.seed))
        self.decoder.to(self.device)
        self.named = list(self.decoder.canonical())
        self.optimizers = make_optimizers(self.named, o)
        self.factor = AdaptiveFactor(
            t.chunk, t.chunk_warmup, t.chunk_stable, t.chunk_window, t.chunk_min_ratio, t.chunk_max_factor
        )
        self.entropy = SparsityController(t.entropy, t.entropy_multiplier, t.target_ratio)
        self.l1 = SparsityController(t.l1, t.l1_multiplier, t.target_ratio)
        self.use = ExpertUse(t.use_low, t.use_high)
        for layer in self.decoder.expert_layers():
            layer.top_k = t.top_k
        self.decoder.recompute = run.recompute
        if run.compile:
            self.decoder.compile()
        shape: list[object] = [dataclasses.asdict(config.model)]
        shape += [fingerprint(self.decoder)] if config.checkpoint else []
        identity = run_identity(run, o, shape, self.corpus.fingerprint)
        adaptive: dict[str, Adaptive] = {
            "factor": self.factor, "entropy": self.entropy, "l1": self.l1, "use": self.use,
        }  # fmt: skip
        flops = flops_per_token(self.decoder, o.sequence_length)
        self.run = Run(run, o, identity, self.decoder, self.optimizers, adaptive, flops)

    def train(self) -> bool:
        """Run to the last step, or until Ctrl-C. Returns whether the run is complete."""
        for _ in self.run.steps():
            self.run.done(self.train_step(), self._look)
        return self.run.complete

    def train_step(self) -> dict[str, Any]:
        """Batch, losses, gradients, optimizers, then what adapts; returns the figures of the step."""
        figures = optimizer_step(self.run, self.loss, self.windows, self.named)
        self._adapt(figures)
        return {name: float(value) for name, value in figures.items()}

    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens [B, T + 1] -> cross-entropy plus the weighted router terms, and all parts.

        A router term is the mean over all layers; a dense layer counts as 0, as in DECO.
        """
        inputs, targets = tokens[:, :-1].to(self.device), tokens[:, 1:].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bfloat16"):
            hidden, routers = self.decoder(inputs)  # [B, T, h]; router logits r [B, T, E] of each layer of experts
            logits = self.decoder.logits(hidden)  # [B, T, V]
        total = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        figures = {"loss": total.detach()}
        if not routers:
            return total, figures
        documents = (inputs == BOS_ID).cumsum(dim=-1)  # [B, T]
        layers = self.decoder.expert_layers()
        selected = [ffn.selected(r) for ffn, r in zip(layers, routers, strict=True)]  # a, [B, T, E] each
        for name, (factor, values) in self._terms(routers, selected, documents).items():
            term = torch.stack(values).sum() / self.config.model.n_layer
            total = total + factor * term
            figures |= {name: term.detach(), f"{name}_factor": torch.tensor(factor)}
        figures["used"] = torch.stack([(a > 0).float().mean(dim=(0, 1)) for a in selected])  # [layers, E]
        if self.config.objective.bias_rate:
            routed = [ffn.routed(r) for ffn, r in zip(layers, routers, strict=True)]
            figures["routed"] = torch.stack([chosen.float().mean(dim=(0, 1)) for chosen in routed])  # [layers, E]
        return total, figures

    def _terms(
        self, routers: list[Tensor], selected: list[Tensor], documents: Tensor
    ) -> dict[str, tuple[float, list[Tensor]]]:
        """The objectives that act in this step: factor, and a value per layer of experts."""
        t = self.config.objective
        terms: dict[str, tuple[float, list[Tensor]]] = {}
        eased = t.relax_factor if t.relax and self.run.step >= t.relax else 1.0
        if t.locality and self.run.step >= t.begin:
            values = [objectives.activation_locality(r, documents, t.locality_beta) for r in routers]
            terms["locality"] = (eased * t.locality, values)
        if t.chunk and self.run.step >= t.begin:
            values = [objectives.chunk_sparsification(a, documents, t.chunk_size) for a in selected]
            terms["chunk"] = (eased * self.factor.value(), values)
        if t.entropy:
            terms["entropy"] = (self.entropy.value(), [objectives.router_entropy(a, documents) for a in selected])
        if t.l1:
            terms["l1"] = (self.l1.value(), [objectives.l1(a, documents, t.target_ratio) for a in selected])
        if t.load_balance:
            pairs = zip(routers, selected, strict=True)
            values = [objectives.load_balance(r, a, documents) for r, a in pairs]
            terms["load_balance"] = (t.load_balance, values)
        if t.use and (pull := self.use.pull()) is not None:
            pairs = zip(routers, pull, strict=True)
            terms["use"] = (t.use, [objectives.use_pull(r, documents, toward) for r, toward in pairs])
        return terms

    def _adapt(self, figures: dict[str, Any]) -> None:
        """Move what adapts by the means of the whole step, and put ``active`` in the place of the shares per expert."""
        t, used = self.config.objective, figures.pop("used", None)  # [layers, E]
        if used is None:
            return
        figures["active"] = used.mean()
        self.use.update(used)
        if "chunk" in figures:
            self.factor.update(float(figures["chunk"]))
        for name, controller in (("entropy", self.entropy), ("l1", self.l1)):
            if name in figures:
                controller.update(float(figures["active"]))
        if t.bias_rate:
            for ffn, share in zip(self.decoder.expert_layers(), figures.pop("routed"), strict=True):
                assert ffn.expert_bias is not None
                update_expert_bias(ffn.expert_bias, share, t.target_ratio, t.bias_rate)

    @torch.no_grad()
    def evaluate(self, sequences: int = 0) -> dict[str, Any]:
        """Validation loss and sparsity over the first windows (0: all of them): see docs/training.md for the names."""
        length = self.config.optimizer.sequence_length
        stream = self.corpus.validation
        losses, active = [], []
        for tokens in Windows(stream, length, 0).in_order(sequences):  # [1, T + 1]
            inputs, targets = tokens[:, :-1].to(self.device), tokens[0, 1:].to(self.device)
            hidden, routers = self.decoder(inputs)
            logits = self.decoder.logits(hidden)[0].float()  # [T, V]
            losses.append(functional.cross_entropy(logits, targets, reduction="none").cpu().numpy())  # [T]
            if routers:
                active.append(torch.cat(self.decoder.active(routers)).cpu().numpy())  # [layers, T, E]
        nats = np.concatenate(losses).astype(np.float64)  # [n], of the tokens 1 to n of the stream
        predicted = stream[1 : 1 + nats.size]
        n_bytes = int(bytes_of_pieces(self.corpus.tokenizer)[predicted].sum())
        figures: dict[str, Any] = {
            "validation": float(nats.mean()),
            "bits_per_byte": float(nats.sum()) / math.log(2) / max(n_bytes, 1),
        }
        if not sequences:
            document = document_ids(predicted)
            figures["document_nats"] = np.bincount(document, nats).tolist()
            figures["document_tokens"] = np.bincount(document).tolist()
        if active:
            figures |= sparsity_figures(of_activity(np.concatenate(active, axis=1), window=length))
        return figures

    @torch.no_grad()
    def sample(self, prompt: str, n_predict: int, temperature: float = 0.8) -> str:
        """Return `prompt` and what the model writes after it; the same in every run of one seed and step."""
        pieces = SentencePieceProcessor(model_file=str(self.corpus.tokenizer))
        random = torch.Generator().manual_seed(self.config.run.seed + self.run.step)
        ids = [BOS_ID, *pieces.encode(prompt)]
        for _ in range(n_predict):
            hidden, _ = self.decoder(torch.tensor([ids], device=self.device))
            odds = (self.decoder.logits(hidden[0, -1]).float().cpu() / temperature).softmax(dim=-1)  # [V]
            ids.append(int(torch.multinomial(odds, 1, generator=random)))
            if ids[-1] == EOS_ID:
                break
        return str(pieces.decode(ids))

    def _look(self, sequences: int) -> dict[str, Any]:
        """What the log says now and then: the validation figures, and a sample where one is wanted."""
        run, figures = self.config.run, self.evaluate(sequences)
        return figures | ({"sample": self.sample(run.sample_prompt, run.sample_tokens)} if run.sample_tokens else {})

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder in the layout of the published checkpoints.

        Raises BlockffnError for top-k routing, which no published layout has.
        """
        if self.config.objective.top_k:
            raise BlockffnError("--export: [objective] top_k is there to compare with; no published layout has it")
        save_checkpoint(folder, self.decoder.config, self.decoder.canonical(), self.corpus.tokenizer)


def optimizer_step(run: Run, loss: Loss, windows: Windows, named: Sequence[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    """One optimizer step over batch_sequences sequences; returns the means of what `loss` told, norms and rate.

    With several processes each takes every n-th forward pass. Raises BlockffnError when a gradient is not finite.
    """
    o, rate = run.optimizer, wsd(run.step, run.optimizer)
    set_learning_rate(run.optimizers, rate)
    means: dict[str, Any] = {}
    passes = windows.batch(run.step * o.batch_sequences, o.batch_sequences).split(o.micro_sequences)
    for tokens in passes[parallel.rank() :: parallel.size()]:  # [B, T + 1]
        total, parts = loss(tokens)
        (total / len(passes)).backward()
        for name, value in parts.items():
            means[name] = means.get(name, 0) + value / len(passes)
    parallel.sum_over_ranks([p.grad for _, p in named if p.grad is not None] + list(means.values()))
    norms = clip_gradients(named, o.clip)
    if bad := [name for name, norm in norms.items() if not math.isfinite(norm)]:
        raise BlockffnError(
            f"step {run.step}: {bad[0]} is not finite{_not_finite(named)}; lower learning_rate or raise warmup_steps; "
            + run.last_good()
        )
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return means | norms | {"rate": rate}


def _not_finite(named: Iterable[tuple[str, nn.Parameter]]) -> str:
    """Where the trouble is: the first parameters of the model with such a gradient are the last to get it."""
    bad = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
    return f", from {bad[-1]} on" if bad else ""


def open_device(run: RunConfig) -> torch.device:
    """Apply `threads` and return the device of the run. Raises BlockffnError when this machine does not have it."""
    if run.threads:
        torch.set_num_threads(run.threads)
    local = os.environ.get("LOCAL_RANK")
    device = find_device(f"cuda:{local}" if run.device == "cuda" and local else run.device)
    parallel.open_world(device)
    return device


def sparsity_figures(found: Sparsity) -> dict[str, Any]:
    """The log's names: lists per layer of experts, and the shares over all of them."""
    figures: dict[str, Any] = {"tls": found.layer_tls.tolist()}
    figures |= {f"cls_{size}": layers.tolist() for size, layers in found.layer_cls.items()}
    live = {"live_tls": found.live_tls} | {f"live_cls_{size}": share for size, share in found.live_cls.items()}
    figures |= {name: share for name, share in live.items() if share is not None}
    figures |= {"dead_share": found.dead_share, "always_on_share": found.always_on_share}
    counts = {"dead": found.layer_dead, "always_on": found.layer_always_on, "sets": found.layer_sets}
    return figures | {name: layers.tolist() for name, layers in counts.items()}
