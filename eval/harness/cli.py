"""`blockffn eval lm-eval`: the command line of lm_eval, with our models among its models.

    $ blockffn eval lm-eval --model blockffn --model_args pretrained=model.gguf,n_ctx=2048 --tasks arc_easy,hellaswag
    $ blockffn eval lm-eval ls tasks
    $ blockffn eval lm-eval --help

Every argument is lm_eval's. Tasks that lie in files of their own: --include_path FOLDER.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import sqlite3
import sys

from blockffn.errors import BlockffnError

NOT_FOUND = "Tasks not found: "  # how lm_eval's message begins


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take every argument as it is."""
    parser.prefix_chars = "\0"  # no argument is an option of ours
    parser.add_argument("arguments", nargs=argparse.REMAINDER)


def run(args: argparse.Namespace) -> int:
    """Run lm_eval's command line; returns the exit code."""
    arguments = [word for word in args.arguments if word != "--debug"]
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    import blockffn.eval.harness.model  # noqa: F401  registers the model

    setup_logging()
    logging.getLogger("sqlitedict").setLevel(logging.CRITICAL + 1)  # --use_cache: what it logs, it raises as well
    command = HarnessCLI()
    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        parsed = command.parse_args()
        command.execute(parsed)
    except (BlockffnError, KeyboardInterrupt, ModuleNotFoundError):
        raise
    except ValueError as error:
        unknown = _unknown_task(error, getattr(parsed, "include_path", None))
        raise unknown or BlockffnError(f"lm_eval: {error}") from error
    except sqlite3.Error as error:
        cure = "free some space or name another file; what was answered is kept and not asked again"
        raise BlockffnError(f"--use_cache: {error}; {cure}") from error
    except OSError as error:  # a full disk, a data set that cannot be reached
        raise BlockffnError(f"lm_eval: {error}") from error
    except (AssertionError, ImportError, LookupError, NotImplementedError, TypeError) as error:
        raise BlockffnError(f"lm_eval: {type(error).__name__}: {error}") from error
    finally:
        sys.argv = before
    return 0


def _unknown_task(error: ValueError, include_path: str | None) -> BlockffnError | None:
    """Return the message for a task that does not exist, with the names that are like it; None for other errors."""
    from lm_eval.tasks import TaskManager

    text = str(error)
    if not text.startswith(NOT_FOUND):
        return None
    name = text.removeprefix(NOT_FOUND).split(",")[0].strip()
    near = difflib.get_close_matches(name, TaskManager(include_path=include_path).all_tasks, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return BlockffnError(f"--tasks: no task {name!r}; {hint}`blockffn eval lm-eval ls tasks` lists all")
