"""Arguments and helpers that the measures share.

>>> import argparse
import contextlib
>>> parser = argparse.ArgumentParser()
>>> add_arguments(parser)
>>> parser.parse_args(["-m", "m.gguf", "-f", "text.txt"]).model
'm.gguf'
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockffn.commands.common import count
from blockffn.errors import BlockffnError

if TYPE_CHECKING:
    from blockffn.llama import Llama

CACHE_TYPES = {"f16": 1, "f32": 0}  # enum ggml_type


def add_arguments(parser: argparse.ArgumentParser, text: bool = True) -> None:
    """Add -m, -f, -n, --ffn, -t and --json; text: a file is required."""
    parser.add_argument("-m", "--model", required=True, metavar="M.gguf", help="model file")
    parser.add_argument("-f", "--file", required=text, metavar="FILE", help="text to evaluate, UTF-8")
    parser.add_argument("-n", "--max-tokens", type=count, metavar="N", help="use the first N tokens only")
    parser.add_argument("--ffn", choices=("union", "dense"), default="union", help="sparse op or every expert")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_window(parser: argparse.ArgumentParser) -> None:
    """Add -c, the window of perplexity."""
    parser.add_argument("-c", "--ctx-size", type=count, default=512, metavar="N", help="window (default: 512)")


def add_cache_type(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --cache-type: how keys and values are kept; f16 is the default of llama.cpp."""
    parser.add_argument(
        "--cache-type", choices=tuple(CACHE_TYPES), default=default, help="of keys and values (default: %(default)s)"
    )


def add_output(parser: argparse.ArgumentParser, piece: str) -> None:
    """Add --output, the file of a run that can be resumed; `piece` is what a line of it holds."""
    parser.add_argument("--output", metavar="O.jsonl", help=f"a line for each {piece}; the run can be resumed with it")


@contextlib.contextmanager
def resumable(output: str | None) -> Iterator[None]:
    """Say at Ctrl-C that what was done is kept, and where."""
    try:
        yield
    except KeyboardInterrupt:
        if output:
            print(f"\ninterrupted: {output} has what was done; repeat the command to go on", file=sys.stderr)
        raise


def cache(args: argparse.Namespace) -> dict[str, int]:
    """Return the options of a model with the cache that --cache-type names; f32 needs none, see blockffn.evaluation."""
    kind = CACHE_TYPES[args.cache_type]
    return {} if args.cache_type == "f32" else {"type_k": kind, "type_v": kind}


def open_model(path: str, args: argparse.Namespace, **options: Any) -> Llama:
    """Load a model with the arguments of `add_arguments`."""
    import blockffn

    llm: Llama = blockffn.Llama(path, ffn=args.ffn, n_threads=args.threads, **options)
    return llm


def text_tokens(llm: Llama, args: argparse.Namespace) -> list[int]:
    """Return the tokens of the text, the first --max-tokens of them where that is given."""
    tokens = llm.tokenize(read_text(args.file).encode(), add_bos=True)
    return tokens[: args.max_tokens] if args.max_tokens else tokens


def read_text(path: str) -> str:
    """Return a text file; BlockffnError where it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BlockffnError(f"{path}: expected UTF-8 text: {error}") from error


def print_result(args: argparse.Namespace, figures: dict[str, Any], text: str) -> int:
    """Print the figures as JSON or the text, as asked for; return exit code 0."""
    print(json.dumps(figures) if args.json else text)
    return 0
