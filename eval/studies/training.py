"""The trainer's speed: its step beside a plain torch loop of the same model, and the share of torch.mm's rate.

    $ blockffn bench training examples/tiny-blockffn/train.toml --set run.threads=2

The plain loop is what anybody would write: forward, cross-entropy, backward, clipping, optimizer, with the trainer's
model, batches, optimizers, type and threads, and none of its objectives, figures and controllers. The two take turns in
blocks of steps, in alternating order; speeds are medians over the blocks, with the lowest and the highest. `of mm`: the
arithmetic of the step, all experts counted, over what torch.mm reaches on square matrices in the same type, measured
before every block. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blockffn.commands.common import count

HEADER = "loop     tokens/s (range)              of mm"
LINE = "{loop:<8} {rate:8.0f} ({low:.0f} to {high:.0f})   {of_mm:10.1%}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench training`."""
    parser.add_argument("config", type=Path, help="training file (TOML); its run is not touched")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="replace one value")
    parser.add_argument("--steps", type=count, default=4, metavar="N", help="steps of a block (default: 4)")
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="blocks of each loop (default: 5)")


def run(args: argparse.Namespace) -> int:
    """Measure both loops and print the table."""
    import torch

    from blockffn.training.cli import overrides
    from blockffn.training.config import read_config
    from blockffn.training.speed import flops_per_token, matmul_rate
    from blockffn.training.train import Trainer

    config = read_config(args.config, overrides(args.set))
    trainer = Trainer(config)
    loops: dict[str, Callable[[], Any]] = {"trainer": _advancing(trainer), "plain": PlainLoop(trainer).step}
    o, precision = config.optimizer, config.run.precision
    tokens = args.steps * o.batch_sequences * o.sequence_length
    flops = flops_per_token(trainer.decoder, o.sequence_length)
    rates: dict[str, list[float]] = {name: [] for name in loops}
    shares: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(args.rounds + 1):  # the first round warms up
        for name in loops if number % 2 else reversed(loops):
            peak = matmul_rate(trainer.device, precision)
            started = time.perf_counter()
            for _ in range(args.steps):
                loops[name]()
            rate = tokens / (time.perf_counter() - started)
            if number:
                rates[name].append(rate)
                shares[name].append(rate * flops / peak)
    rows = [
        {"loop": name, "rate": statistics.median(found), "low": min(found), "high": max(found)}
        | {"of_mm": statistics.median(shares[name])}
        for name, found in rates.items()
    ]
    print(HEADER)
    for row in rows:
        print(LINE.format(**row))
    print(json.dumps({"config": str(args.config), "threads": torch.get_num_threads(), "type": precision, "rows": rows}))
    return 0


def _advancing(trainer: Any) -> Callable[[], None]:
    """The trainer's step, which it counts as `train` does."""

    def step() -> None:
        trainer.train_step()
        trainer.run.step += 1

    return step


class PlainLoop:
    """A loop around the same model, with weights, optimizers and batches of its own."""

    def __init__(self, trainer: Any) -> None:
        import copy

        from blockffn.training.optim import make_optimizers

        self.trainer, self.o = trainer, trainer.config.optimizer
        self.decoder = copy.deepcopy(trainer.decoder)
        self.optimizers = make_optimizers(self.decoder.canonical(), self.o)
        self.steps = 0

    def step(self) -> None:
        """One optimizer step."""
        import torch
        from torch.nn import functional

        from blockffn.training.optim import set_learning_rate, wsd

        o, device = self.o, self.trainer.device
        autocast = self.trainer.config.run.precision == "bfloat16"
        set_learning_rate(self.optimizers, wsd(self.steps, o))
        passes = self.trainer.windows.batch(self.steps * o.batch_sequences, o.batch_sequences).split(o.micro_sequences)
        self.steps += 1
        for tokens in passes:
            inputs, targets = tokens[:, :-1].to(device), tokens[:, 1:].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits = self.decoder.logits(self.decoder(inputs)[0])
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) / len(passes)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), o.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
