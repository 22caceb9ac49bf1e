"""One run on disk and on the terminal: where it stands, checkpoint.pt, log.jsonl, the progress line, stop signals.

    >>> run = Run(config.run, config.optimizer, identity, module, optimizers, {"factor": factor})
    >>> for step in run.steps():          # resumes; ends after the last step, or at Ctrl-C
    ...     run.done(train_step(step), evaluate)      # counts it; evaluates, logs and saves when it is time

What a step sees depends on seed and step number alone, so that a resumed run repeats the uninterrupted one to the bit.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from blockffn.errors import BlockffnError
from blockffn.training.config import OptimizerConfig, RunConfig

CHECKPOINT, LOG, CURVE = "checkpoint.pt", "log.jsonl", "curve.png"
SHOWN = ("loss", "validation", "active", "tokens_per_second")  # of a step's figures, in the progress line
SCHEDULE = ("steps", "decay_steps", "final_ratio", "micro_sequences")  # may change when a run is resumed


class Adaptive(Protocol):
    """What moves between steps and has to survive a stop."""

    def state(self) -> dict[str, Any]:
        """Everything needed to go on."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""


def run_identity(run: RunConfig, optimizer: OptimizerConfig, shape: Sequence[object], fingerprint: str) -> str:
    """Hash of all that shapes the run's result; the schedule's length may change on resume and is left out.

    shape: the model in JSON types; fingerprint: the corpus. The objectives may be changed on resume.
    """
    kept = {k: v for k, v in dataclasses.asdict(optimizer).items() if k not in SCHEDULE}
    return hashlib.sha256(json.dumps([kept, list(shape), run.seed, run.precision, fingerprint]).encode()).hexdigest()


class Run:
    """The state of a run that outlives the process, and what the user sees of it."""

    def __init__(
        self, run: RunConfig, optimizer: OptimizerConfig, identity: str, module: nn.Module,
        optimizers: list[torch.optim.Optimizer], adaptive: Mapping[str, Adaptive],
    ) -> None:  # fmt: skip
        self.config, self.optimizer, self.identity = run, optimizer, identity
        self.module, self.optimizers, self.adaptive = module, optimizers, adaptive
        self.folder = Path(run.out)
        self.step = 0  # steps that are done
        self.seconds = 0.0  # spent in training steps, over all sittings
        self._began = time.perf_counter()
        self._bar: tqdm[Any] | None = None
        self._stopped: list[int] = []

    @property
    def complete(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.optimizer.steps

    def steps(self) -> Iterator[int]:
        """Resume, then yield the number of every step that is left; Ctrl-C and SIGTERM end it after the step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        with _stop_signals() as self._stopped, _progress(self.optimizer.steps, self.step) as self._bar:
            while not self.complete and not self._stopped:
                self._began = time.perf_counter()
                yield self.step

    def done(self, figures: dict[str, Any], evaluate: Callable[[int], dict[str, Any]]) -> None:
        """Count the step that `steps` yielded last, with its figures; evaluate, log and save when it is time."""
        run, o = self.config, self.optimizer
        seconds = time.perf_counter() - self._began
        self.step, self.seconds = self.step + 1, self.seconds + seconds
        figures = figures | {"tokens_per_second": o.batch_sequences * o.sequence_length / seconds}
        if self.complete or self.step % run.eval_every == 0:
            figures |= evaluate(run.eval_sequences)
        if self._bar is not None:
            self._bar.update()
        if self.complete or self.step % run.log_every == 0 or "validation" in figures:
            self._log(figures)
        if self.complete or self._stopped or self.step % run.save_every == 0:
            self.save()

    def save(self) -> None:
        """Write checkpoint.pt whole or not at all."""
        state = {
            "identity": self.identity,
            "step": self.step,
            "seconds": self.seconds,
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "adaptive": {name: part.state() for name, part in self.adaptive.items()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / (CHECKPOINT + ".partial")
        torch.save(state, partial)
        os.replace(partial, self.folder / CHECKPOINT)

    def resume(self) -> None:
        """Load checkpoint.pt if there is one. Raises BlockffnError when it belongs to another run or is damaged."""
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return
        device = next(self.module.parameters()).device
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except Exception as err:  # torch raises a handful of kinds for a damaged file
            raise BlockffnError(f"{path}: cannot be read ({err}); remove it to start again") from err
        if state["identity"] != self.identity:
            raise BlockffnError(
                f"{path}: belongs to a run with another model, corpus, seed or optimizer; "
                "remove it to start again, or give another folder in [run] out"
            )
        self.module.load_state_dict(state["module"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, part in self.adaptive.items():
            part.load(state["adaptive"][name])
        self.step, self.seconds = state["step"], state["seconds"]
        _cut_log(self.folder / LOG, self.step)

    def _log(self, figures: dict[str, Any]) -> None:
        o = self.optimizer
        tokens = self.step * o.batch_sequences * o.sequence_length
        row = {"step": self.step, "tokens": tokens, "seconds": round(self.seconds, 1), **_rounded(figures)}
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        shown = {k: row[k] for k in SHOWN if k in row}
        if self._bar is None or self._bar.disable:
            print(f"step {self.step}/{o.steps}", *(f"{k} {v}" for k, v in shown.items()), flush=True)
        else:
            self._bar.set_postfix(shown)


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
