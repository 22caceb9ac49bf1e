"""The loop that every kind of training shares: schedule, accumulation, log, atomic checkpoints, resuming, signals.

A subclass builds its module and says what a batch costs (`loss`) and how good the module is (`evaluate`). The run
folder holds checkpoint.pt, log.jsonl and, at the end, curve.png. What a step sees depends on seed and step alone, so
a resumed run repeats the uninterrupted one to the bit.
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
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from blockffn.errors import BlockffnError
from blockffn.training.config import OptimizerConfig, RunConfig
from blockffn.training.data import Corpus, Windows
from blockffn.training.optim import clip_gradients, make_optimizers, set_learning_rate, wsd

CHECKPOINT, LOG, CURVE = "checkpoint.pt", "log.jsonl", "curve.png"
SHOWN = ("loss", "validation", "active", "tokens_per_second")  # of a step's figures, in the progress line
SCHEDULE = ("steps", "decay_steps", "final_ratio", "micro_sequences")  # may change when a run is resumed


class TrainingLoop(ABC):
    """One run of `module` over the training split of `corpus`."""

    def __init__(
        self, run: RunConfig, optimizer: OptimizerConfig, corpus: Corpus, module: nn.Module,
        named: Iterable[tuple[str, nn.Parameter]],
    ) -> None:  # fmt: skip
        if run.threads:
            torch.set_num_threads(run.threads)
        self.run, self.optimizer, self.corpus = run, optimizer, corpus
        self.device = find_device(run.device)
        self.folder = Path(run.out)
        self.windows = Windows(corpus.train, optimizer.sequence_length, run.seed)
        self.module, self.named = module.to(self.device), list(named)
        self.optimizers = make_optimizers(self.named, optimizer)
        self.random = torch.Generator()  # seeded anew in each step, from seed and step alone
        self.step = 0
        self.seconds = 0.0  # spent in training steps, over all sittings

    @abstractmethod
    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, float]]:
        """tokens [B, T + 1] -> the loss to minimise and its parts, ``loss`` among them."""

    @abstractmethod
    def evaluate(self, sequences: int = 0) -> dict[str, Any]:
        """Figures over the first `sequences` validation windows (0: all of them), ``validation`` among them."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the trained module as a checkpoint folder that ``blockffn convert`` reads."""

    @abstractmethod
    def shaping(self) -> list[object]:
        """What shapes the result beside optimizer, seed, precision and corpus, in JSON types."""

    @abstractmethod
    def adapt(self, figures: dict[str, float]) -> None:
        """Called after each step with its figures, to move adaptive factors."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What `adapt` has changed, for the checkpoint."""

    @abstractmethod
    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()` of an earlier sitting."""

    def train(self) -> bool:
        """Run to the last step, or until Ctrl-C. Returns whether the run is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        run, steps = self.run, self.optimizer.steps
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

    def train_step(self) -> dict[str, Any]:
        """One optimizer step over batch_sequences sequences; returns its figures."""
        began, o = time.perf_counter(), self.optimizer
        rate = wsd(self.step, o)
        self.random.manual_seed(self.run.seed * 1_000_003 + self.step)
        set_learning_rate(self.optimizers, rate)
        totals: dict[str, Any] = {}
        batch = self.windows.batch(self.step * o.batch_sequences, o.batch_sequences)  # [B, T + 1]
        parts = batch.split(o.micro_sequences)
        for part in parts:
            loss, figures = self.loss(part.to(self.device))
            (loss / len(parts)).backward()
            for name, value in figures.items():
                totals[name] = totals.get(name, 0.0) + value / len(parts)
        norms = clip_gradients(self.named, o.clip)
        if not all(np.isfinite(norm) for norm in norms.values()):
            raise BlockffnError(
                f"step {self.step}: the gradient is not finite; lower learning_rate or raise warmup_steps"
            )
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        totals |= norms
        self.adapt(totals)
        self.step += 1
        spent = time.perf_counter() - began
        self.seconds += spent
        return totals | {"rate": rate, "tokens_per_second": o.batch_sequences * o.sequence_length / spent}

    def identity(self) -> str:
        """Hash of all that shapes the run's result, the schedule's length apart: that may change on resume."""
        optimizer = {k: v for k, v in dataclasses.asdict(self.optimizer).items() if k not in SCHEDULE}
        parts = [optimizer, self.shaping(), self.run.seed, self.run.precision, self.corpus.fingerprint]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def save(self) -> None:
        """Write checkpoint.pt whole or not at all."""
        state = {
            "identity": self.identity(),
            "step": self.step,
            "seconds": self.seconds,
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "adaptive": self.state(),
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
        self.module.load_state_dict(state["module"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.set_state(state["adaptive"])
        self.step, self.seconds = state["step"], state["seconds"]
        _cut_log(self.folder / LOG, self.step)

    def autocast(self) -> torch.autocast:
        """bfloat16 forward passes where the run asks for them."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bfloat16")

    def _log(self, figures: dict[str, Any], bar: tqdm[Any]) -> None:
        o = self.optimizer
        tokens = self.step * o.batch_sequences * o.sequence_length
        row = {"step": self.step, "tokens": tokens, "seconds": round(self.seconds, 1), **_rounded(figures)}
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        shown = {k: row[k] for k in SHOWN if k in row}
        if bar.disable:
            print(f"step {self.step}/{o.steps}", *(f"{k} {v}" for k, v in shown.items()), flush=True)
        else:
            bar.set_postfix(shown)


def find_device(name: str) -> torch.device:
    """The torch device `name`. Raises BlockffnError when this machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as err:
        raise BlockffnError(f"[run] device: expected cpu or a CUDA device of this machine, found {name!r}") from err
    return device


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    return {k: [float(f"{x:.5g}") for x in v] if isinstance(v, list) else float(f"{v:.5g}") for k, v in figures.items()}


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
