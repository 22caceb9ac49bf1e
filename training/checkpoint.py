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
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from tqdm import tqdm

from blockffn.errors import BlockffnError
from blockffn.training import parallel
from blockffn.training.config import OptimizerConfig, RunConfig
from blockffn.training.speed import matmul_rate

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT, LOG, CURVE = "checkpoint.pt", "log.jsonl", "curve.png"
SHOWN = ("loss", "validation", "active", "tokens_per_second", "mfu")  # of a step's figures, in the progress line
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


def fingerprint(module: nn.Module) -> str:
    """Digits that tell weights apart: the sum of all."""
    return repr(sum(float(p.detach().double().sum()) for p in module.parameters()))


class Run:
    """The state of a run that outlives the process, and what the user sees of it."""

    def __init__(
        self, run: RunConfig, optimizer: OptimizerConfig, identity: str, module: nn.Module,
        optimizers: list[torch.optim.Optimizer], adaptive: Mapping[str, Adaptive], flops_per_token: float = 0.0,
    ) -> None:  # fmt: skip
        self.config, self.optimizer, self.identity = run, optimizer, identity
        self.module, self.optimizers, self.adaptive = module, optimizers, adaptive
        self.folder = Path(run.out)
        self.flops_per_token = flops_per_token  # of a step, to tell its share of torch.mm's rate; 0: unknown
        self._peak = 0.0
        self.step = 0  # steps that are done
        self._saved = 0  # the step of checkpoint.pt, 0 for none
        self.seconds = 0.0  # spent in training steps, over all sittings
        self._began = time.perf_counter()
        self._bar: tqdm[Any] | None = None
        self._stopped: list[int] = []  # signals that this process got
        self._stopping = False  # whether a process of the run had one, at the end of the last step
        self._board: SummaryWriter | None = None

    @property
    def complete(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.optimizer.steps

    def steps(self) -> Iterator[int]:
        """Resume, then yield the number of every step that is left; Ctrl-C and SIGTERM end it after the step."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume()
        self._stopping = False
        with _stop_signals() as self._stopped, _progress(self.optimizer.steps, self.step) as self._bar:
            if self.flops_per_token:
                device = next(self.module.parameters()).device
                self._peak = parallel.size() * matmul_rate(device, self.config.precision)
            self._board = open_board(self.folder) if self.config.tensorboard and parallel.rank() == 0 else None
            while not self.complete and not self._stopping:
                self._began = time.perf_counter()
                yield self.step
            if self._board is not None:
                self._board.close()

    def done(self, figures: dict[str, Any], evaluate: Callable[[int], dict[str, Any]]) -> None:
        """Count the step that `steps` yielded last, with its figures; evaluate, log and save when it is time."""
        run, o = self.config, self.optimizer
        seconds = time.perf_counter() - self._began
        self.step, self.seconds = self.step + 1, self.seconds + seconds
        if self._bar is not None:
            self._bar.update()
        self._stopping = parallel.any_rank(bool(self._stopped), next(self.module.parameters()).device)
        if parallel.rank() > 0:
            return
        speed = o.batch_sequences * o.sequence_length / seconds
        figures = figures | {"tokens_per_second": speed}
        figures |= {"mfu": speed * self.flops_per_token / self._peak} if self._peak else {}
        if self.complete or self.step % run.eval_every == 0:
            figures |= evaluate(run.eval_sequences)
        if self.complete or self.step % run.log_every == 0 or "validation" in figures:
            self._log(figures)
        if self.complete or self._stopping or self.step % run.save_every == 0:
            self.save()

    def last_good(self) -> str:
        """Words that say from where the run can go on."""
        path = self.folder / CHECKPOINT
        if not self._saved:
            return f"{path} was not written yet"
        return f"{path} has the state after step {self._saved}, from which the same command goes on"

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
        path, partial = self.folder / CHECKPOINT, self.folder / (CHECKPOINT + ".partial")
        try:
            torch.save(state, partial)
        except (OSError, RuntimeError) as err:  # torch raises RuntimeError where the disk is full
            partial.unlink(missing_ok=True)
            raise BlockffnError(f"{path}: cannot be written ({err}); {self.last_good()}") from err
        if self.config.keep and path.is_file():
            self._keep(path)
        os.replace(partial, path)
        self._saved = self.step

    def _keep(self, path: Path) -> None:
        """Keep the last checkpoint under its step too, and remove the oldest beyond `keep`."""
        aside = path.with_stem(f"{path.stem}-{self._saved:07d}")
        aside.unlink(missing_ok=True)
        os.link(path, aside)  # checkpoint.pt itself stays until the next one takes its place
        for old in sorted(self.folder.glob(f"{path.stem}-*.pt"))[: -self.config.keep]:
            old.unlink()

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
        self.step, self.seconds, self._saved = state["step"], state["seconds"], state["step"]
        _cut_log(self.folder / LOG, self.step)

    def _log(self, figures: dict[str, Any]) -> None:
        o = self.optimizer
        tokens = self.step * o.batch_sequences * o.sequence_length
        row = {"step": self.step, "tokens": tokens, "seconds": round(self.seconds, 1), **_rounded(figures)}
        with (self.folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        shown = {k: row[k] for k in SHOWN if k in row}
        if self._bar is None or self._bar.disable:
            left = _clock((o.steps - self.step) * self.seconds / self.step)
            print(f"step {self.step}/{o.steps}", *(f"{k} {v}" for k, v in shown.items()), f"left {left}", flush=True)
        else:
            self._bar.set_postfix(shown)
        if "sample" in row:
            tqdm.write(f"sample: {row['sample']}")
        if self._board is not None:
            for tag, value in (curve for name, figure in row.items() for curve in _curves(name, figure)):
                self._board.add_scalar(tag, value, self.step)


def find_device(name: str) -> torch.device:
    """The torch device `name`. Raises BlockffnError when this machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as err:
        raise BlockffnError(f"[run] device: expected cpu or a CUDA device of this machine, found {name!r}") from err
    return device


def open_board(folder: Path) -> SummaryWriter:
    """The curves of `[run] tensorboard`, in the folder of the run. Raises BlockffnError without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as err:
        raise BlockffnError(
            "[run] tensorboard: needs a package: pip install 'blockffn[tensorboard]', or remove the key"
        ) from err
    return SummaryWriter(str(folder / "tensorboard"))


def _curves(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """A figure's curves: of a list, the mean under its name and a curve per layer; a text has none."""
    if isinstance(value, list):
        yield name, sum(value) / len(value)
        for layer, part in enumerate(value):
            yield f"{name}/layer_{layer}", float(part)
    elif not isinstance(value, str):
        yield name, float(value)


def _clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Numbers with five digits; texts as they are."""
    return {k: [_round(x) for x in v] if isinstance(v, list) else _round(v) for k, v in figures.items()}


def _round(value: Any) -> Any:
    return value if isinstance(value, str) else float(f"{value:.5g}")


def _cut_log(path: Path, step: int) -> None:
    """Drop rows that a stopped run wrote after its last checkpoint: they will be written again."""
    if path.is_file():
        rows = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")


def _progress(steps: int, done: int) -> tqdm[Any]:
    hidden = parallel.rank() > 0 or not sys.stderr.isatty()
    return tqdm(total=steps, initial=done, unit="step", disable=hidden, dynamic_ncols=True)


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
