"""`blockffn bench` without a model, or with --report: everything that the claims rest on, in one HTML file.

$ blockffn bench --report report.html                       # small shapes, few rounds
$ blockffn bench --report report.html --size full -m M.gguf --dense D.gguf -f text.txt
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

from blockffn.errors import BlockffnError
from blockffn.eval.report.sections import SIZES, Subject, sections
from blockffn.whole_file import write_text

DEFAULT = Path("bench-report.html")
EXAMPLE = "tiny-blockffn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the report, beside those of `blockffn bench`."""
    report = parser.add_argument_group("report: every figure in one HTML file, where neither -m nor --shape is given")
    report.add_argument("--report", type=Path, metavar="FILE", help=f"default: {DEFAULT}; with -m: of that model")
    report.add_argument("--size", choices=SIZES, default="quick", help="quick: small shapes, few rounds (default)")


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, write the page; exit code 1 where a command failed."""
    from blockffn.eval.environment import environment
    from blockffn.eval.report import page, render
    from blockffn.eval.report.run import run_section

    for name in ("shape", "threads", "profile", "draft", "acceptance"):
        if getattr(args, name) is not None:
            raise BlockffnError(f"--report: goes without --{name}; every section chooses its own, see --size")
    target = args.report or DEFAULT
    if not target.resolve().parent.is_dir():
        raise BlockffnError(f"{target}: no such folder {target.resolve().parent}")
    parts = target.with_name(target.name + ".parts")
    parts.mkdir(exist_ok=True)
    subject = _given(args, parts) if args.model else _example(parts)
    blocks, failed = [], 0
    plan = sections(args.size, subject)
    n_commands, begun = sum(len(section.words) for section in plan), itertools.count(1)
    for section in plan:
        results = run_section(section, parts, lambda line: _say(f"{next(begun)} of {n_commands}: {line}"))
        if results is None:
            _say(f"{section.title}: left out, this version has no such command")
            continue
        failed += sum(bool(result.failure) for result in results)
        blocks.append(page.Block(section.name, section.title, section.about, render.body(section.name, results)))
    where = environment() | {"model": Path(subject.model).name, "size": args.size}
    _write(target, page.page("blockffn: measured on this machine", where, blocks))
    _say(f"{target}: {len(blocks)} sections" + (f", {failed} commands failed: see the page" if failed else ""))
    return 1 if failed else 0


def _given(args: argparse.Namespace, parts: Path) -> Subject:
    from blockffn import _capi
    from blockffn.quantize import is_unquantized

    if not args.file:
        raise BlockffnError("--file: expected the text to run through the model of -m")
    for path in filter(None, (args.model, args.dense, args.file)):
        if not Path(path).is_file():
            raise BlockffnError(f"{path}: no such file")
    n_ctx = _capi.read_header(args.model).context_length or 512
    dense = str(Path(args.dense).resolve()) if args.dense else None
    model, text = str(Path(args.model).resolve()), str(Path(args.file).resolve())
    return Subject(model, dense, text, n_ctx, str(parts.resolve()), model if is_unquantized(model) else None)


def _example(parts: Path) -> Subject:
    """Convert and quantize the bundled model in both layouts."""
    from blockffn.convert.convert import convert_checkpoint
    from blockffn.eval.environment import ROOT
    from blockffn.quantize import canonical_type, quantize

    source = ROOT / "examples" / EXAMPLE
    if not source.is_dir():
        raise BlockffnError("no bundled model beside the package: give a model with -m, and its text with -f")
    made: dict[str, Path] = {}
    for layout, suffix in (("expert", ""), ("dense", "-dense")):
        made[layout] = parts / f"{EXAMPLE}{suffix}-Q4_0.gguf"
        if not made[layout].exists():
            plain = parts / f"{EXAMPLE}{suffix}-F16.gguf"
            convert_checkpoint(source, plain, outtype="f16", layout=layout)
            quantize(plain, made[layout], canonical_type("Q4_0"))
    text: Any = argparse.__file__  # code that the model did not see: a module of the standard library
    files = [str(path.resolve()) for path in (made["expert"], made["dense"], parts / f"{EXAMPLE}-F16.gguf", parts)]
    return Subject(files[0], files[1], str(text), 1024, files[3], files[2])


def _write(target: Path, text: str) -> None:
    try:
        write_text(target, text)
    except OSError as error:
        raise BlockffnError(f"{target}: cannot be written: {error.strerror}") from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
