"""``blockffn train CONFIG``: train, resume, export.

blockffn train examples/tiny-blockffn/train.toml
blockffn train examples/tiny-blockffn/train.toml --export examples/tiny-blockffn
torchrun --nproc-per-node 2 -m blockffn train examples/tiny-blockffn/train.toml
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockffn.errors import BlockffnError

if TYPE_CHECKING:
    from blockffn.training.eagle import EagleTrainer
    from blockffn.training.train import Trainer

COUNTS = ("dead", "always_on", "sets")  # figures per layer that are whole numbers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``blockffn train``."""
    parser.add_argument("config", type=Path, help="training file (TOML), see docs/training.md")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="replace one value")
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="write a checkpoint folder when the run is complete"
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate the saved state on the whole validation text"
    )
    parser.add_argument("--json", action="store_true", help="print the final figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Carry out ``blockffn train``; returns the exit code. Raises BlockffnError for anything wrong with the input."""
    from blockffn.training import parallel

    try:
        return _run(args, _trainer(args.config, overrides(args.set)))
    finally:
        parallel.close_world()


def _run(args: argparse.Namespace, trainer: Trainer | EagleTrainer) -> int:
    from blockffn.training import parallel
    from blockffn.training.checkpoint import CHECKPOINT, CURVE, LOG

    if args.eval_only:
        checkpoint = trainer.run.folder / CHECKPOINT
        if not checkpoint.is_file():
            raise BlockffnError(f"{checkpoint}: no such file; train first, or correct [run] out")
        trainer.run.resume()
    elif not trainer.train():
        print(f"stopped after step {trainer.run.step}; the same command goes on from there")
        return 0
    if parallel.rank() > 0:
        return 0
    figures = {"steps": trainer.run.step, "seconds": round(trainer.run.seconds), **trainer.evaluate()}
    if args.export is not None:
        trainer.export(args.export)
    from blockffn.training.plots import plot_curve

    plot_curve({args.config.resolve().parent.name: trainer.run.folder / LOG}, trainer.run.folder / CURVE)
    print(json.dumps(figures) if args.json else summary(figures))
    return 0


def _trainer(path: Path, overrides: dict[str, dict[str, object]]) -> Trainer | EagleTrainer:
    """The trainer that the file asks for: of a draft head where it has a table [eagle], else of a model."""
    from blockffn.training.config import read_config, read_tables

    if "eagle" in read_tables(path, overrides):
        from blockffn.training.eagle import EagleTrainer, read_eagle_config

        return EagleTrainer(read_eagle_config(path, overrides))
    from blockffn.training.train import Trainer

    return Trainer(read_config(path, overrides))


def summary(figures: dict[str, Any]) -> str:
    """Lines for people: validation loss, then each figure with its value, or its mean and the values per layer."""
    lines = [f"steps {figures['steps']}, {figures['seconds']} s, validation loss {figures['validation']:.4f}"]
    for name, value in figures.items():
        if name in ("steps", "seconds", "validation") or name.startswith("document_"):
            continue
        if isinstance(value, list):
            digits = 0 if name in COUNTS else 3
            layers = " ".join(f"{v:.{digits}f}" for v in value)
            lines.append(f"{name:15} {sum(value) / len(value):.3f}  per layer {layers}")
        else:
            lines.append(f"{name:15} {value:.3f}")
    return "\n".join(lines)


def overrides(settings: list[str]) -> dict[str, dict[str, object]]:
    """Return the tables that `--set` names; values are TOML values, a bare word is a string.

    >>> overrides(["run.seed=1"])
    {'run': {'seed': 1}}
    """
    from blockffn.training.config import parse_value

    tables: dict[str, dict[str, object]] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        table, dot, key = name.partition(".")
        if not (equals and dot and key):
            raise BlockffnError(f"--set {setting}: expected TABLE.KEY=VALUE, for example optimizer.steps=100")
        tables.setdefault(table, {})[key] = parse_value(value)
    return tables
