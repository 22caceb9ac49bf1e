"""Perplexity of a model on a text, by llama-perplexity's convention.

$ blockffn eval ppl -m model.gguf -f text.txt -c 512 --output ppl.jsonl

Windows, scored half and cache are those of llama-perplexity, and so is the figure.
"""

from __future__ import annotations

import argparse

from blockffn.eval.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn eval ppl`."""
    common.add_arguments(parser)
    common.add_window(parser)
    common.add_cache_type(parser, "f16")
    common.add_output(parser, "window")


def run(args: argparse.Namespace) -> int:
    """Print the perplexity."""
    from blockffn.eval.progress import Shown
    from blockffn.eval.quality.perplexity import perplexity

    with common.open_model(args.model, args, **common.cache(args)) as llm:
        tokens = common.text_tokens(llm, args)
        with common.resumable(args.output):
            result = perplexity(llm, tokens, args.ctx_size, Shown("perplexity", "window"), args.output)
    text = f"perplexity {result.perplexity:.4f} +- {result.error:.4f}, {result.n_scored} tokens scored in "
    return common.print_result(args, result.to_dict(), text + f"{result.n_windows} windows of {result.n_ctx}")
