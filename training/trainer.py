"""Train a decoder: language-model loss plus the router objectives, resumable to the bit.

    >>> from blockffn.training.trainer import Trainer
    >>> trainer = Trainer(read_config(Path("examples/tiny-blockffn/train.toml")))
    >>> trainer.train()      # goes on where the last run stopped; Ctrl-C saves and returns

Weights and optimizer stay in float32; precision bfloat16 runs the forward pass under autocast (CPU or CUDA). The run
folder holds checkpoint.pt (replaced atomically), log.jsonl and curve.png. What a step sees depends on seed and step
alone, so a resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from blockffn.errors import BlockffnError
from blockffn.training import objectives
from blockffn.training.config import TrainConfig
from blockffn.training.corpus import Corpus, document_ids, prepare
from blockffn.training.optim import make_optimizers, set_learning_rate, wsd
from blockffn.training.reference import Decoder

CHECKPOINT, LOG, CURVE = "checkpoint.pt", "log.jsonl", "curve.png"


class Windows:
    """Stretches of `length` + 1 tokens of a stream, in an order that changes every epoch."""

    def __init__(self, stream: NDArray[np.uint16], length: int, seed: int) -> None:
        self.stream, self.length, self.seed = stream, length, seed
        self.count = (len(stream) - 1) // length
        if self.count < 1:
            raise BlockffnError(f"corpus: {len(stream)} tokens are too few for sequences of {length}; use shorter ones")
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def batch(self, first: int, n: int) -> Tensor:
        """Windows number `first` to `first + n` of the endless order: int64 [n, length + 1]."""
        rows = [self._window(i) for i in range(first, first + n)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _window(self, index: int) -> NDArray[np.uint16]:
        epoch, place = divmod(index, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.count)
        start = int(self._order[place]) * self.length
        return self.stream[start : start + self.length + 1]


class Trainer:
    """One run: configuration, corpus, model, optimizers and the adaptive factors."""

    def __init__(self, config: TrainConfig, corpus: Corpus | None = None) -> None:
        self.config = config
        run, o = config.run, config.optimizer
        if run.threads:
            torch.set_num_threads(run.threads)
        self.device = _device(run.device)
        self.folder = Path(run.out)
        tokenizer = Path(config.corpus.tokenizer) if config.corpus.tokenizer else None
        self.corpus = corpus or prepare(Path(config.corpus.cache), config.corpus.vocab_size, tokenizer)
        self.windows = Windows(self.corpus.train, o.sequence_length, run.seed)
        self.decoder = Decoder(config.model)
        router_scale = 0.1 if config.model.family == "deco" else 1.0
        self.decoder.initialise(o.init_std, router_scale, torch.Generator().manual_seed(run.seed))
        self.decoder.to(self.device)
        self.optimizers = make_optimizers(self.decoder.canonical(), o)
        t = config.objective
        self.factor = objectives.AdaptiveFactor(
            t.chunk, t.chunk_warmup, t.chunk_stable, t.chunk_window, t.chunk_min_ratio, t.chunk_max_factor
        )
        self.entropy = objectives.EntropyController(t.entropy, t.entropy_multiplier, t.target_ratio)
        self.step = 0
        self.seconds = 0.0  # spent in training steps, over all sittings

    def train(self) -> bool:
        """Run to the last step, or until Ctrl-C. Returns whether the run is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        run, steps = self.config.run, self.config.optimizer.steps
        with _stop_signals() as stopped, _progress(steps, self.step) as bar:
            while self.step < steps and not stopped:
                figures = self.train_step()
                bar.update()
                last = self.step == steps
                if last or self.step % run.eval_every == 0:
                    figures |= self.evaluate(run.eval_sequences)
                if last or self.step % run.log_every == 0 or "validation" in figures:
                    self._log(figures, bar)
                if last or stopped or self.step % run.save_every == 0:
                    self.save()
        return self.step >= steps

    def train_step(self) -> dict[str, float]:
        """One optimizer step over batch_sequences sequences; returns its figures."""
        began, o = time.perf_counter(), self.config.optimizer
        rate = wsd(self.step, o)
        set_learning_rate(self.optimizers, rate)
        totals: dict[str, float] = {}
        batch = self.windows.batch(self.step * o.batch_sequences, o.batch_sequences)  # [B, T + 1]
        parts = batch.split(o.micro_sequences)
        for part in parts:
            loss, figures = self.loss(part.to(self.device))
            (loss / len(parts)).backward()
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + value / len(parts)
        totals["gradient"] = float(torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), o.clip))
        if not np.isfinite(totals["gradient"]):
            raise BlockffnError(f"step {self.step}: the gradient is not finite; lower learning_rate or raise warmup_steps")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        totals["rate"] = rate
        self._adapt(totals)
        self.step += 1
        spent = time.perf_counter() - began
        self.seconds += spent
        totals["tokens_per_second"] = o.batch_sequences * o.sequence_length / spent
        return totals

    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, float]]:
        """tokens [B, T + 1] -> the total loss and its parts."""
        t = self.config.objective
        inputs, targets = tokens[:, :-1], tokens[:, 1:]  # [B, T]
        documents = torch.from_numpy(document_ids(inputs.cpu().numpy())).to(tokens.device)  # [B, T]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bfloat16"):
            hidden, routers = self.decoder(inputs)
            logits = self.decoder.logits(hidden)  # [B, T, V]
        total = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        figures = {"loss": total.item()}
        if not routers:
            return total, figures
        layers = self.decoder.expert_layers()
        selected = [ffn.selected(r) for ffn, r in zip(layers, routers, strict=True)]  # [B, T, E] each
        terms: dict[str, tuple[float, Tensor]] = {}
        if t.locality:
            terms["locality"] = (t.locality, _mean([objectives.activation_locality(r, documents, t.locality_beta) for r in routers]))
        if t.chunk:
            terms["chunk"] = (self.factor.value(), _mean([objectives.chunk_sparsification(a, documents, t.chunk_size) for a in selected]))
        if t.entropy:
            terms["entropy"] = (self.entropy.value(), _mean([objectives.router_entropy(a, documents) for a in selected]))
        for name, (factor, term) in terms.items():
            total = total + factor * term
            figures[name], figures[f"{name}_factor"] = term.item(), factor
        active = [a > 0 for a in selected]
        figures["active"] = float(torch.stack([a.float().mean() for a in active]).mean())
        if t.bias_rate:
            for ffn, chosen in zip(layers, active, strict=True):
                assert ffn.expert_bias is not None
                objectives.update_expert_bias(ffn.expert_bias, chosen, documents, t.target_ratio, t.bias_rate)
        return total, figures

    def _adapt(self, figures: dict[str, float]) -> None:
        if "chunk" in figures:
            self.factor.update(figures["chunk"])
        if "entropy" in figures:
            self.entropy.update(figures["active"])

    @torch.no_grad()
    def evaluate(self, sequences: int = 0) -> dict[str, Any]:
        """Validation loss per token and per-layer sparsity over the first `sequences` windows (0: all of them)."""
        length = self.config.optimizer.sequence_length
        windows = Windows(self.corpus.validation, length, 0)
        count = min(sequences, windows.count) if sequences else windows.count
        starts = [i * length for i in range(count)]
        total, active = 0.0, []
        for start in starts:
            tokens = torch.from_numpy(self.corpus.validation[start : start + length + 1].astype(np.int64)).to(self.device)
            hidden, routers = self.decoder(tokens[None, :-1])
            total += float(functional.cross_entropy(self.decoder.logits(hidden)[0].float(), tokens[1:]))
            active.append([a.cpu() for a in self.decoder.active(routers)])  # per layer [1, T, E]
        figures: dict[str, Any] = {"validation": total / count}
        if active and active[0]:
            layers = [torch.cat(parts) for parts in zip(*active, strict=True)]  # [count, T, E] per layer
            figures |= objectives.sparsity_report(layers)
        return figures

    def identity(self) -> str:
        """Hash of all that shapes the run's result, `steps` and its schedule apart: those may change on resume."""
        o = dataclasses.asdict(self.config.optimizer)
        shaping = {k: v for k, v in o.items() if k not in ("steps", "decay_steps", "final_ratio", "micro_sequences")}
        parts = [shaping, dataclasses.asdict(self.config.model), self.config.run.seed, self.config.run.precision]
        return hashlib.sha256(json.dumps([parts, self.corpus.fingerprint]).encode()).hexdigest()

    def save(self) -> None:
        """Write checkpoint.pt whole or not at all."""
        state = {
            "identity": self.identity(),
            "step": self.step,
            "seconds": self.seconds,
            "decoder": self.decoder.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "factor": self.factor.state(),
            "entropy": self.entropy.state(),
            "rng": torch.get_rng_state(),
        }
        partial = self.folder / (CHECKPOINT + ".partial")
        torch.save(state, partial)
        os.replace(partial, self.folder / CHECKPOINT)

    def resume(self) -> None:
        """Load checkpoint.pt if there is one. Raises BlockffnError when it belongs to another run or is damaged."""
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as err:  # torch raises a handful of kinds for a damaged file
            raise BlockffnError(f"{path}: cannot be read ({err}); remove it to start again") from err
        if state["identity"] != self.identity():
            raise BlockffnError(
                f"{path}: belongs to a run with another model, corpus, seed or optimizer; "
                "remove it to start again, or give another folder in [run] out"
            )
        self.decoder.load_state_dict(state["decoder"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        # The saved progress goes on under the factors of the configuration, which may have been changed.
        self.factor = objectives.AdaptiveFactor(**state["factor"])
        self.entropy = objectives.EntropyController(**state["entropy"])
        torch.set_rng_state(state["rng"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]
        _cut_log(self.folder / LOG, self.step)

    def _log(self, figures: dict[str, Any], bar: tqdm[Any]) -> None:
        o = self.config.optimizer
        tokens = self.step * o.batch_sequences * o.sequence_length
        row = {"step": self.step, "tokens": tokens, "seconds": round(self.seconds, 1), **_rounded(figures)}
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        shown = {k: row[k] for k in ("loss", "validation", "active", "chunk_factor", "tokens_per_second") if k in row}
        if bar.disable:
            print(f"step {self.step}/{o.steps}", *(f"{k} {v}" for k, v in shown.items()), flush=True)
        else:
            bar.set_postfix(shown)


def _mean(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).mean()


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: [float(f"{x:.5g}") for x in v] if isinstance(v, list) else float(f"{v:.5g}") for k, v in figures.items()}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as err:
        raise BlockffnError(f"[run] device: expected cpu or a CUDA device of this machine, found {name!r}") from err
    return device


def _cut_log(path: Path, step: int) -> None:
    """Drop rows that a stopped run wrote after its last checkpoint: they will be written again."""
    if path.is_file():
        rows = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")


def _progress(steps: int, done: int) -> tqdm[Any]:
    return tqdm(total=steps, initial=done, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list that is empty until the first one; a second SIGINT interrupts at once."""
    caught: list[int] = []

    def remember(number: int, _frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    previous = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
