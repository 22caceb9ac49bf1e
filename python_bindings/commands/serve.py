"""`blockffn serve`: an OpenAI-compatible server for many users at once, with drafts and exact mode.

    $ blockffn serve -m model.gguf --parallel 8 --port 8080

http://127.0.0.1:8080/ is a page to chat on; docs/serving.md is the guide. llama-server of the patched tree is
`blockffn llama-server`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from blockffn.commands.common import count

DEFAULT_PORT = 8080


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn serve`."""
    parser.add_argument("-m", "--model", required=True, metavar="M.gguf", help="model file")
    parser.add_argument("--alias", metavar="NAME", help="name of the model in answers (default: the file's)")
    parser.add_argument(
        "--draft", action="append", metavar="ngram|PATH", help="speculate; given twice: the first that has a proposal"
    )
    parser.add_argument("--exact", action="store_true", help="a greedy text is the same whoever else is served")
    parser.add_argument("--parallel", type=count, default=8, metavar="N", help="answers at the same time (default: 8)")
    parser.add_argument("-c", "--ctx", type=count, metavar="N", help="tokens in the cache, of all answers together")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")
    parser.add_argument("--ffn", choices=("union", "dense"), default="union", help="sparse op or every expert")
    parser.add_argument("--chat-format", metavar="NAME", help="llama_cpp's name of one (default: the file's template)")
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, metavar="P", help="port, 0: any (default: 8080)")
    parser.add_argument("--api-key-file", type=Path, metavar="F", help="keys, one a line; needed for other addresses")
    parser.add_argument("-v", "--verbose", action="store_true", help="show requests, and the log of llama.cpp")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-queue", type=count, default=64, metavar="N", help="answers that wait (default: 64)")
    limits.add_argument(
        "--max-body", type=count, default=4 << 20, metavar="BYTES", help="of a request (default: 4 MiB)"
    )
    limits.add_argument("--max-prompts", type=count, default=32, metavar="N", help="texts in a request (default: 32)")
    limits.add_argument("--max-n", type=count, default=8, metavar="N", help="answers per text (default: 8)")
    limits.add_argument("--max-tokens", type=count, metavar="N", help="per answer (default: what the context holds)")
    limits.add_argument("--max-seconds", type=seconds, default=600.0, metavar="S", help="per answer (default: 600)")
    limits.add_argument("--stop-seconds", type=seconds, default=10.0, metavar="S", help="after SIGTERM (default: 10)")


def seconds(text: str) -> float:
    """Argument type: a positive, finite number of seconds."""
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, found {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from blockffn.server.run import serve

    return serve(args)
