"""Train a decoder: language-model loss plus the router objectives of BlockFFN or DECO.

    >>> from blockffn.training.train import Trainer
    >>> trainer = Trainer(read_config(Path("examples/tiny-blockffn/train.toml")))
    >>> trainer.train()      # goes on where the last run stopped; Ctrl-C saves and returns
    >>> trainer.export(Path("examples/tiny-blockffn"))

Weights and optimizer stay in float32; precision bfloat16 runs the forward pass under autocast (CPU or CUDA), the
router apart.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from blockffn.convert.save import save_checkpoint
from blockffn.training import controllers, objectives
from blockffn.training.checkpoint import TrainingLoop
from blockffn.training.config import TrainConfig
from blockffn.training.data import Corpus, Windows, document_ids, prepare
from blockffn.training.model import Decoder

DECO_ROUTER_SCALE = 0.1  # start of the learnable expert-wise scale; BlockFFN's norm weight starts at 1


class Trainer(TrainingLoop):
    """One run of a decoder: configuration, corpus, model and the adaptive factors of its objectives."""

    def __init__(self, config: TrainConfig, corpus: Corpus | None = None) -> None:
        self.config, o, t = config, config.optimizer, config.objective
        tokenizer = Path(config.corpus.tokenizer) if config.corpus.tokenizer else None
        corpus = corpus or prepare(Path(config.corpus.cache), config.corpus.vocab_size, tokenizer)
        self.decoder = Decoder(config.model)
        router_scale = DECO_ROUTER_SCALE if config.model.family == "deco" else 1.0
        self.decoder.initialise(o.init_std, router_scale, torch.Generator().manual_seed(config.run.seed))
        super().__init__(config.run, o, corpus, self.decoder, self.decoder.canonical())
        self.factor = controllers.AdaptiveFactor(
            t.chunk, t.chunk_warmup, t.chunk_stable, t.chunk_window, t.chunk_min_ratio, t.chunk_max_factor
        )
        self.entropy = controllers.EntropyController(t.entropy, t.entropy_multiplier, t.target_ratio)
        self._seen: list[
            tuple[list[Tensor], Tensor]
        ] = []  # routed sets and documents of this step, for the expert bias

    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, float]]:
        """tokens [B, T + 1] -> cross-entropy plus the weighted router terms, and all parts."""
        t = self.config.objective
        inputs, targets = tokens[:, :-1], tokens[:, 1:]  # [B, T]
        documents = torch.from_numpy(document_ids(inputs.cpu().numpy())).to(tokens.device)  # [B, T]
        with self.autocast():
            hidden, routers = self.decoder(inputs)
            logits = self.decoder.logits(hidden)  # [B, T, V]
        total = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        figures = {"loss": total.item()}
        if not routers:
            return total, figures
        layers = self.decoder.expert_layers()
        selected = [ffn.selected(r) for ffn, r in zip(layers, routers, strict=True)]  # [B, T, E] each
        for name, (factor, term) in self._router_terms(routers, selected, documents).items():
            total = total + factor * term
            figures[name], figures[f"{name}_factor"] = term.item(), factor
        active = [a > 0 for a in selected]
        figures["active"] = float(torch.stack([a.float().mean() for a in active]).mean())
        if t.bias_rate:
            self._seen.append(([ffn.routed(r) for ffn, r in zip(layers, routers, strict=True)], documents))
        return total, figures

    def _router_terms(
        self, routers: list[Tensor], selected: list[Tensor], documents: Tensor
    ) -> dict[str, tuple[float, Tensor]]:
        """(factor, mean over layers) of each objective that is switched on; a dense layer counts as 0, as in DECO."""
        t, n_layer = self.config.objective, self.config.model.n_layer
        terms: dict[str, tuple[float, Tensor]] = {}
        if t.locality:
            values = [objectives.activation_locality(r, documents, t.locality_beta) for r in routers]
            terms["locality"] = (t.locality, torch.stack(values).sum() / n_layer)
        if t.chunk:
            values = [objectives.chunk_sparsification(a, documents, t.chunk_size) for a in selected]
            terms["chunk"] = (self.factor.value(), torch.stack(values).sum() / n_layer)
        if t.entropy:
            values = [objectives.router_entropy(a, documents) for a in selected]
            terms["entropy"] = (self.entropy.value(), torch.stack(values).sum() / n_layer)
        return terms

    def adapt(self, figures: dict[str, float]) -> None:
        """Tell the schedulers what this step gave, and move the expert biases against the loads of the whole step."""
        if "chunk" in figures:
            self.factor.update(figures["chunk"])
        if "entropy" in figures:
            self.entropy.update(figures["active"])
        t, layers = self.config.objective, self.decoder.expert_layers()
        for i, ffn in enumerate(layers if self._seen else []):
            routed = torch.cat([chosen[i] for chosen, _ in self._seen])  # [B, T, E]
            documents = torch.cat([seen for _, seen in self._seen])  # [B, T]
            assert ffn.expert_bias is not None
            controllers.update_expert_bias(ffn.expert_bias, routed, documents, t.target_ratio, t.bias_rate)
        self._seen.clear()

    @torch.no_grad()
    def evaluate(self, sequences: int = 0) -> dict[str, Any]:
        """Validation loss per token, and TLS and CLS per layer, over the first windows (0: all of them)."""
        losses, active = [], []
        for window in Windows(self.corpus.validation, self.optimizer.sequence_length, 0).in_order(sequences):
            tokens = window.to(self.device)
            hidden, routers = self.decoder(tokens[:, :-1])
            losses.append(functional.cross_entropy(self.decoder.logits(hidden)[0].float(), tokens[0, 1:]).item())
            active.append([a.cpu() for a in self.decoder.active(routers)])  # per layer [1, T, E]
        figures: dict[str, Any] = {"validation": sum(losses) / len(losses)}
        if active[0]:
            layers = [torch.cat(parts) for parts in zip(*active, strict=True)]  # [windows, T, E] per layer
            figures |= objectives.sparsity_report(layers)
        return figures

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder in the layout of the published checkpoints."""
        save_checkpoint(folder, self.decoder.config, self.decoder.canonical(), self.corpus.tokenizer)

    def shaping(self) -> list[object]:
        """The model; objectives may be changed on resume."""
        return [dataclasses.asdict(self.config.model)]

    def state(self) -> dict[str, Any]:
        """Schedulers of the chunk and entropy factors."""
        return {"factor": self.factor.state(), "entropy": self.entropy.state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.factor = controllers.AdaptiveFactor(**state["factor"])
        self.entropy = controllers.EntropyController(**state["entropy"])
