"""`blockffn eval`: what a model is worth, and whether a GGUF computes what its checkpoint computes.

$ blockffn eval ppl -m model.gguf -f text.txt
$ blockffn eval kld -m model-Q4_0.gguf --reference model-F16.gguf -f text.txt
$ blockffn eval sparsity -m model.gguf -f text.txt
$ blockffn eval equal -m model.gguf -f text.txt --draft ngram --exact --tokens 100000
$ blockffn eval parity -m model.gguf --checkpoint folder
$ blockffn eval spec-bench -m model.gguf --questions question.jsonl --output answers.jsonl
$ blockffn eval types model-F16.gguf -f text.txt --plot types
$ blockffn eval dial -m model.gguf -f text.txt --plot dial

Each measure is a module, imported when it is called for.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

MEASURES: dict[str, tuple[str, str]] = {
    # name: (module with add_arguments and run, one line for --help)
    "ppl": ("blockffn.eval.commands.perplexity", "perplexity on a text, by llama-perplexity's convention"),
    "kld": ("blockffn.eval.commands.divergence", "KL divergence from a reference model on a text"),
    "sparsity": ("blockffn.eval.commands.sparsity", "how sparse the router is on a text, per layer and expert"),
    "equal": ("blockffn.eval.commands.equal", "plain against speculative greedy text, token for token"),
    "parity": ("blockffn.eval.commands.parity", "logits, router and greedy text against the checkpoint in torch"),
    "lm-eval": ("blockffn.eval.harness.cli", "the command line of lm_eval, with our models among its models"),
    "spec-bench": ("blockffn.eval.spec_bench.cli", "Spec-Bench or SPEED-Bench: plain and speculative answers, speeds"),
    "types": ("blockffn.eval.types.cli", "quantization types: bits per weight, quality, speed, in one table"),
    "dial": ("blockffn.eval.dial.cli", "quality against speed for router thresholds and union budgets"),
}


class MeasureParser(argparse.ArgumentParser):
    """The parser of one measure, whose module is imported when it is called for."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Declare the arguments of the measure, then parse."""
        module = _module(self.prog.split()[-1])
        self.description = (module.__doc__ or "").split("\n\n")[0]
        module.add_arguments(self)
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the measures."""
    measures = parser.add_subparsers(
        dest="measure", metavar="MEASURE", required=True, parser_class=MeasureParser, title="measures"
    )
    for name, (_, summary) in MEASURES.items():
        child = measures.add_parser(name, help=summary, allow_abbrev=False)
        child.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback")


def run(args: argparse.Namespace) -> int:
    """Run one measure; exit code 1 when parity is outside its bounds."""
    return int(_module(args.measure).run(args))


def _module(measure: str) -> Any:
    return importlib.import_module(MEASURES[measure][0])
