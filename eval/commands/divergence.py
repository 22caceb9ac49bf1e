"""KL divergence of a model from a reference on a text.

$ blockffn eval kld -m model-Q4_0.gguf --reference model-F16.gguf -f text.txt
$ blockffn eval kld -m model-Q4_0.gguf --reference checkpoint-folder -f text.txt

Both evaluate one window, then the next: no file of logits is written.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from blockffn.eval.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn eval kld`."""
    common.add_arguments(parser)
    parser.add_argument("--reference", required=True, metavar="R.gguf", help="model file, or checkpoint folder")
    common.add_window(parser)
    common.add_cache_type(parser, "f32")
    common.add_output(parser, "window")


def _reference(args: argparse.Namespace, cache: dict[str, int]) -> Any:
    """Return the reference as a context: a folder is a checkpoint, evaluated in torch."""
    if Path(args.reference).is_dir():
        from blockffn.eval.quality.perplexity import TorchReference

        return contextlib.nullcontext(TorchReference(args.reference))
    return common.open_model(args.reference, args, **cache)


def run(args: argparse.Namespace) -> int:
    """Print divergence, agreement and both perplexities."""
    from blockffn.eval.progress import Shown
    from blockffn.eval.quality.perplexity import divergence

    cache = common.cache(args)
    with (
        common.open_model(args.model, args, **cache) as llm,
        _reference(args, cache) as reference,
    ):
        tokens = common.text_tokens(llm, args)
        shown = Shown("mean KL divergence", "window")
        with common.resumable(args.output):
            result = divergence(llm, reference, tokens, args.ctx_size, shown, args.output)
    lines = [
        f"KL divergence  mean {result.mean:.6f} +- {result.error:.6f}, median {result.median:.6f}, "
        f"99 % {result.percentile_99:.6f}, largest {result.largest:.6f} nats",
        f"top-1          {100 * result.top1:.2f} % agree",
        f"perplexity     {result.perplexity:.4f}, reference {result.reference_perplexity:.4f}",
        f"scored         {result.n_scored} tokens in {result.n_windows} windows of {result.n_ctx}",
    ]
    return common.print_result(args, result.to_dict(), "\n".join(lines))
