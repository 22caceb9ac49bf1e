"""`blockffn chat`: a conversation in the terminal, with the chat template of the model.

    $ blockffn chat -m model.gguf --system "Answer briefly."

/clear forgets the conversation, /exit or end of input leaves; Ctrl-C stops an answer.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from blockffn.commands import common
from blockffn.commands.speculation import Live, report_given_up, summary
from blockffn.errors import BlockffnError

if TYPE_CHECKING:
    from blockffn.llama import Llama

Message = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn chat`."""
    common.add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument("-n", "--max-tokens", type=common.count, default=512, metavar="N", help="per answer")
    common.add_sampling_arguments(parser)
    parser.add_argument("--stats", action="store_true", help="show speed and acceptance of drafts, live")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    llm = common.open_model(args)
    try:
        if "tokenizer.chat_template" not in llm.metadata:
            print("note: this model has no chat template: answers are mere continuations", file=sys.stderr)
        start: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
        messages = list(start)
        while (text := _ask()) is not None:
            if text == "/exit":
                break
            if text == "/clear":
                messages = list(start)
            elif text:
                messages.append({"role": "user", "content": text})
                messages.append({"role": "assistant", "content": _answer(llm, messages, args)})
    finally:
        llm.close()
    return 0


def _ask() -> str | None:
    """Return one line of the user, None at the end of the input."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history for input()
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(llm: Llama, messages: list[Message], args: argparse.Namespace) -> str:
    """Stream the answer to the last message to stdout and return it; Ctrl-C ends it early."""
    parts: list[str] = []
    given_up = llm.statistics()["switched_off"]
    chunk: dict[str, Any] = {}
    try:
        with Live(lambda: summary(llm.statistics()), wanted=args.stats and llm.drafter is not None) as live:
            for chunk in _chunks(llm, messages, args):
                part = chunk["choices"][0]["delta"].get("content") or ""
                parts.append(part)
                sys.stdout.write(part)
                sys.stdout.flush()
                live.update()
    except KeyboardInterrupt:
        parts.append("")
    except ValueError as error:
        raise BlockffnError(f"{error}; /clear forgets the conversation, --ctx-size raises the context") from error
    sys.stdout.write("\n")
    sys.stdout.flush()
    report_given_up(llm.statistics(), given_up)
    if args.stats and llm.drafter is not None:
        print(f"[{summary(llm.statistics())}]", file=sys.stderr)
    return "".join(parts)


def _chunks(llm: Llama, messages: list[Message], args: argparse.Namespace) -> Any:
    options = common.sampling(args)
    options["temperature"] = options.pop("temp")
    return llm.create_chat_completion(
        messages=messages,
        stream=True,
        max_tokens=args.max_tokens,
        seed=args.seed,
        **options,
    )
