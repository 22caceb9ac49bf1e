"""`blockffn run`: continue a text, streaming it to stdout."""

from __future__ import annotations

import argparse
import codecs
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockffn.commands import common
from blockffn.commands.speculation import Live, lines, report_given_up, summary
from blockffn.errors import BlockffnError

if TYPE_CHECKING:
    from blockffn.llama import Llama


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn run`."""
    common.add_model_arguments(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("-p", "--prompt", metavar="TEXT", help="text to continue; - reads it from stdin")
    prompt.add_argument("-f", "--file", metavar="FILE", help="file with the text to continue")
    parser.add_argument("-n", "--max-tokens", type=common.count, default=128, metavar="N", help="default: 128")
    common.add_sampling_arguments(parser)
    parser.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    parser.add_argument("--stats", action="store_true", help="show speed, sparsity and acceptance on stderr, live")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    text = _prompt(args)
    llm = common.open_model(args)
    try:
        llm.set_seed(args.seed)
        tokens = llm.tokenize(text.encode(), add_bos=True, special=True)
        _check_length(tokens, llm.n_ctx())
        meter = common.Meter(llm, len(tokens))
        pieces = _generate(llm, tokens, min(args.max_tokens, llm.n_ctx() - len(tokens)), args, meter)
        if args.json:
            _print_json(text, "".join(pieces), meter)
            return 0
        with Live(lambda: summary(llm.statistics()), wanted=args.stats and llm.drafter is not None) as live:
            _stream(text if args.echo else "", pieces, live)
        report_given_up(llm.statistics())
        if args.stats:
            print_report(meter.report())
    finally:
        llm.close()
    return 0


def _prompt(args: argparse.Namespace) -> str:
    try:
        if args.file is not None:
            return Path(args.file).read_text(encoding="utf-8")
        return sys.stdin.read() if args.prompt == "-" else str(args.prompt)
    except UnicodeDecodeError as error:
        raise BlockffnError(f"{args.file or 'stdin'}: the prompt is not UTF-8 text: {error}") from error


def _check_length(tokens: list[int], n_ctx: int) -> None:
    if not tokens:
        raise BlockffnError("the prompt is empty, and this model has no begin-of-text token; give some text with -p")
    if len(tokens) >= n_ctx:
        raise BlockffnError(f"the prompt has {len(tokens)} tokens, the context {n_ctx}; shorten it or raise --ctx-size")


def _generate(
    llm: Llama, tokens: list[int], limit: int, args: argparse.Namespace, meter: common.Meter
) -> Iterator[str]:
    """Yield the text of up to `limit` tokens, whole characters at a time."""
    import llama_cpp

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    meter.start()
    for token in llm.generate(tokens, **common.sampling(args)):
        meter.token()
        if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
            break
        yield decoder.decode(llm.detokenize([token]))
        if meter.n_tokens >= limit:
            break
    yield decoder.decode(b"", final=True)


def _stream(first: str, pieces: Iterator[str], live: Live) -> None:
    sys.stdout.write(first)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        live.update()
    sys.stdout.write("\n")


def _print_json(prompt: str, text: str, meter: common.Meter) -> None:
    print(json.dumps({"prompt": prompt, "text": text, **meter.report()}, ensure_ascii=False))


def print_report(report: dict[str, Any]) -> None:
    """Print the figures of `Meter.report` to stderr, one line per subject."""

    def line(name: str, text: str) -> None:
        print(f"{name:<10} {text}", file=sys.stderr)

    print(file=sys.stderr)
    line("prompt", f"{report['prompt_tokens']} tokens, {_number(report['prompt_tokens_per_second'])} tokens/s")
    line("decoding", f"{report['generated_tokens']} tokens, {_number(report['decode_tokens_per_second'])} tokens/s")
    if report["token_sparsity"] is not None:
        line(
            "experts",
            f"sparsity (TLS) {100 * report['token_sparsity']:.1f} % of {report['experts']}; "
            f"{100 * report['union_share']:.1f} % loaded per evaluation",
        )
    if report.get("speculation") is not None:
        for number, text in enumerate(lines(report["speculation"])):
            line("" if number else "drafts", text)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
