"""The `blockffn` command.

    $ blockffn --version
    $ blockffn run -m model.gguf -p "def add(a, b):" -n 32

Exit codes: 0 done; 1 the input or the environment is at fault (one message, no traceback unless --debug); 2 wrong
usage; 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import blockffn
from blockffn.errors import BlockffnError
from blockffn.extras import missing

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module, one line for --help)
    "convert": ("blockffn.convert.cli", "checkpoint folder or hub id -> GGUF"),
    "inspect": ("blockffn.commands.inspect", "hyper-parameters, tensor types, parameters, router of a GGUF file"),
    "quantize": ("blockffn.commands.quantize", "GGUF -> smaller GGUF, with the real bits per weight"),
    "run": ("blockffn.commands.run", "continue a text"),
    "chat": ("blockffn.commands.chat", "talk to a model in the terminal"),
    "serve": ("blockffn.commands.serve", "OpenAI-compatible server, many users at once"),
    "llama-server": ("blockffn.commands.llama_server", "llama-server of the patched tree, same flags"),
    "eval": ("blockffn.eval.cli", "perplexity, KL divergence, sparsity, equality of texts, parity"),
    "verify-published": ("blockffn.eval.published.cli", "one published checkpoint: convert, compare, measure, report"),
    "bench": ("blockffn.eval.bench.cli", "dense against union against speculative, one run"),
    "train": ("blockffn.training.cli", "train a model, or a draft head for one"),
    "ablate": ("blockffn.training.ablate", "train the arms of an experiment, then one table and one plot"),
}
INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 + signal number, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(arguments), "--debug" in arguments)


def guarded(command: Callable[[], int], debug: bool = False) -> int:
    """Run a command and return its exit code; what the user can mend is one line on stderr, not a traceback."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BlockffnError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        cause = missing(error)
        if debug or cause is None:
            raise
        print(f"error: {cause}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if debug:
            raise
        return INTERRUPTED
    except BrokenPipeError:  # the reader has gone, as in `blockffn inspect m.gguf | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (OSError, MemoryError) as error:  # disk full, no permission: the environment, not a bug
        if debug:
            raise
        print(f"error: {_describe(error)}", file=sys.stderr)
        return 1


def _dispatch(arguments: list[str]) -> int:
    """Import the module of the named command only, parse, run."""
    name = next((word for word in arguments if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="blockffn",
        description="BlockFFN and DECO models in llama.cpp.",
        epilog="blockffn COMMAND --help explains a command. --debug shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"blockffn {blockffn.__version__}")
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    if name is not None and name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        parser.error(f"unknown command {name!r}: {hint}known: {', '.join(COMMANDS)}")
    module: ModuleType | None = None
    for command, (path, summary) in COMMANDS.items():
        passes_all = command == "llama-server"
        child = commands.add_parser(
            command, help=summary, description=summary, add_help=not passes_all, allow_abbrev=False
        )
        child.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback")
        if command == name:
            module = importlib.import_module(path)
            module.add_arguments(child)
    if name == "llama-server":
        args, rest = parser.parse_known_args(arguments)
        args.rest = rest
    else:
        args = parser.parse_args(arguments)
    assert module is not None
    return module.run(args) or 0


def _describe(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "out of memory"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


if __name__ == "__main__":
    sys.exit(main())
