"""`blockffn llama-server`: llama-server of the patched tree; every other argument is passed on as it is.

$ blockffn llama-server -m model.gguf --port 8080
$ blockffn llama-server --help                # the help of llama-server
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from blockffn import gguf_contract, library
from blockffn.errors import BlockffnError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the two arguments that are ours; the rest goes to llama-server."""
    parser.add_argument("-m", "--model", metavar="M.gguf")
    parser.add_argument("--ffn", choices=("union", "dense"), default="union")


def command(args: argparse.Namespace) -> list[str]:
    """Return the command line of llama-server."""
    if args.model is not None and not Path(args.model).is_file():
        raise BlockffnError(f"{args.model}: no such file")
    line = [str(library.program("llama-server"))]
    if args.model is not None:
        line += ["--model", args.model]
    if args.ffn == "dense":
        line += ["--override-kv", f"{gguf_contract.key(gguf_contract.FFN_DENSE)}=bool:true"]
    return line + list(args.rest)


def run(args: argparse.Namespace) -> int:
    """Replace this process by llama-server."""
    line = command(args)
    os.execv(line[0], line)
