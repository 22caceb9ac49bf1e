"""`blockffn bench`: union against dense and speculative decoding, the same weights in one run; or everything at once.

    $ blockffn bench --report report.html                  # every figure that the claims rest on, in one page
    $ blockffn bench --shape 1.2b                          # a random model of a published shape, made when missing
    $ blockffn bench --shape 1.2b --acceptance 0.6,0.8     # speculation at these rates beside it
    $ blockffn bench -m model-Q4_0.gguf --dense model-dense-Q4_0.gguf --json
    $ blockffn bench -m model-Q4_0.gguf --draft ngram --draft head.gguf --tree -f code.py
    $ blockffn bench --ops                                 # where a step goes, by kind of node
    $ blockffn bench choice --shape 1.2b                   # a study of its own; `blockffn bench --help` lists them

The honest dense baseline is a file of the dense layout (`blockffn convert --layout dense`), which stock llama.cpp runs
with plain matrix products in its best buffers. Without --dense the expert-layout file itself runs densely, which is
slower than that and says so. A model of another architecture runs on our kernels and on ggml's own ("dense").
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blockffn.commands.common import count
from blockffn.errors import BlockffnError
from blockffn.threads import default_threads

STUDIES = {
    "ops": ("blockffn.eval.bench.ops", "the operations alone: what `make bench-ops` runs"),
    "peers": ("blockffn.eval.bench.peers", "speculation beside llama_cpp.Llama and llama-cli on the same prompts"),
    "load": ("blockffn.eval.bench.load", "from the start of a process to the first token, and the memory then held"),
    "convert": ("blockffn.eval.bench.convert", "time and memory of conversion"),
    "activation": ("blockffn.eval.bench.activation", "NormSiLU against SiLU"),
    "choice": ("blockffn.eval.studies.choice", "the automatic draft length against the best fixed one"),
    "exact": ("blockffn.eval.studies.exact", "exact mode against the default mode"),
    "temperature": ("blockffn.eval.studies.temperature", "sampled text: what is accepted at which temperature"),
    "harness": ("blockffn.eval.studies.harness", "requests of lm_eval: together, one by one, beside llama-server"),
    "streams": ("blockffn.eval.studies.streams", "many texts at once, in Python and over HTTP, beside llama-server"),
    "loop": ("blockffn.eval.studies.loop", "the time of the Python loop of speculative decoding"),
    "training": ("blockffn.eval.studies.training", "the trainer beside a plain torch loop, and torch.mm"),
    "differences": ("blockffn.eval.studies.differences", "greedy text: plain against speculative decoding"),
}


class StudyParser(argparse.ArgumentParser):
    """The parser of one study, which is imported when it is called for."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Declare the arguments of the study, then parse."""
        study = importlib.import_module(STUDIES[self.prog.split()[-1]][0])
        self.description = (study.__doc__ or "").splitlines()[0]
        study.add_arguments(self)
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench` and its studies."""
    from blockffn.eval.report import cli as report

    report.add_arguments(parser)
    _add_comparison(parser)
    _add_speculation(parser)
    studies = parser.add_subparsers(
        dest="study", metavar="STUDY", parser_class=StudyParser, title="studies, each with --help of its own"
    )
    for name, (_, summary) in STUDIES.items():
        study = studies.add_parser(name, help=summary, allow_abbrev=False)
        study.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback")


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    from blockffn.eval.bench import models as bench
    from blockffn.eval.bench import nodes
    from blockffn.eval.environment import PROFILES
    from blockffn.eval.planted.model import SHAPES

    models = parser.add_mutually_exclusive_group()
    models.add_argument("-m", "--model", metavar="M.gguf", help="model in the expert layout")
    models.add_argument("--shape", choices=tuple(SHAPES), help="random model of this shape (default: 1.2b)")
    parser.add_argument("--dense", metavar="D.gguf", help="the same weights in the dense layout")
    parser.add_argument("--type", default="Q4_0", metavar="TYPE", help="weight type with --shape (default: Q4_0)")
    parser.add_argument("-f", "--file", metavar="FILE", help="text to run through the model of -m")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")
    parser.add_argument("--profile", choices=PROFILES, help="libraries of build/<profile> (default: BLOCKFFN_LIB_DIR)")
    parser.add_argument("--rounds", type=count, metavar="N", help=f"default: {bench.ROUNDS}; with --ops {nodes.ROUNDS}")
    parser.add_argument(
        "--verify",
        metavar="N,N",
        help=f"tokens at once (default: {_listed(bench.VERIFY)}; with --ops {_listed(nodes.SIZES)})",
    )
    parser.add_argument(
        "--prefill", type=int, default=bench.PREFILL, metavar="N", help="0 leaves it out (default: 512)"
    )
    parser.add_argument(
        "--past", metavar="N", help=f"tokens before (default: {bench.PAST}; with --ops N,N: {_listed(nodes.PASTS)})"
    )
    parser.add_argument("--ops", action="store_true", help="where a step goes, by kind of node: a table and a plot")
    parser.add_argument(
        "--plot", type=Path, default=Path("bench-nodes"), metavar="STEM", help="with --ops: STEM.png and STEM.svg"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def _add_speculation(parser: argparse.ArgumentParser) -> None:
    from blockffn.eval.bench import models as bench
    from blockffn.eval.planted import head as planted_head

    drafts = parser.add_argument_group("speculative decoding")
    drafts.add_argument("--acceptance", metavar="P,P", help="with --shape: first guesses right with this probability")
    drafts.add_argument(
        "--head-tokens",
        type=count,
        default=planted_head.DRAFT_TOKENS,
        metavar="N",
        help="with --acceptance: draft vocabulary of the head that runs beside the script (default: %(default)s)",
    )
    drafts.add_argument("--draft", action="append", metavar="ngram|FILE", help="with -m: a drafter; may be repeated")
    drafts.add_argument("--tree", action="store_true", help="let the EAGLE heads of --draft draft trees")
    drafts.add_argument("--plans", default="auto", metavar="PLAN,..", help='"auto" (default), "chain 4", "tree 8"')
    drafts.add_argument(
        "--tokens", type=count, default=bench.TOKENS, metavar="N", help="per text (default: %(default)s)"
    )
    drafts.add_argument("--exact", action="store_true", help="kernels whose result does not depend on the batch")


def run(args: argparse.Namespace) -> int:
    """Run a study, or make the models if needed, time them, print the tables."""
    if args.study:
        code: int = importlib.import_module(STUDIES[args.study][0]).run(args)
        return code
    from blockffn.eval.report import cli as report

    if args.report is not None or _is_bare(args):
        return report.run(args)
    from blockffn.eval.bench import models as bench
    from blockffn.eval.bench import report as bench_report
    from blockffn.eval.bench.plans import plan_names
    from blockffn.eval.environment import environment, profile_directory

    if args.ops:
        return _run_ops(args)
    directory = profile_directory(args.profile)
    _check(args)
    args.past, args.rounds = _tokens_before(args.past or str(bench.PAST))[0], args.rounds or bench.ROUNDS
    candidates, text = _planted(args) if args.model is None else _given(args)
    threads = args.threads or default_threads()
    timed = bench.phases(_sizes(args.verify or _listed(bench.VERIFY)), args.prefill)
    if args.acceptance or args.draft:
        timed = bench.speculative_phases(timed, plan_names(args.plans), _rates(args.acceptance), args.tokens)
    result = bench.run(candidates, text, threads, args.rounds, timed, args.past, directory, _say, args.exact)
    where: dict[str, Any] = environment(directory) | {"threads": threads, "past": args.past, "rounds": args.rounds}
    where |= {"type": args.type if args.model is None else None, "exact": args.exact, "buffers": result.buffers}
    where |= result.activity
    _print_environment(where)
    print(bench_report.table(result))
    if args.acceptance or args.draft:
        print("\n" + bench_report.speculation_table(result))
    if args.draft:
        print("\n" + bench_report.position_table(result))
    if args.json:
        print(json.dumps({"environment": where, "rows": result.rows}))
    return 0


def _run_ops(args: argparse.Namespace) -> int:
    from blockffn.eval.bench import nodes
    from blockffn.eval.environment import environment, headline, profile_directory

    _check(args)
    if args.acceptance or args.draft or args.exact:
        raise BlockffnError("--ops: times plain steps; --acceptance, --draft and --exact do not go with it")
    sizes, pasts = _sizes(args.verify or _listed(nodes.SIZES)), _tokens_before(args.past or _listed(nodes.PASTS))
    directory, threads, rounds = profile_directory(args.profile), args.threads or default_threads(), args.rounds
    args.past = max(pasts)
    candidates, text = _planted(args) if args.model is None else _given(args)
    rows = nodes.measure(candidates, text, threads, rounds or nodes.ROUNDS, sizes, pasts, directory, _say)
    where: dict[str, Any] = environment(directory) | {"threads": threads, "rounds": rounds or nodes.ROUNDS}
    where["type"] = args.type if args.model is None else None
    print(headline(where, threads))
    print(nodes.table(rows))
    for file in nodes.plot(rows, args.plot, f"{Path(candidates[0].path).stem}, {headline(where, threads)}"):
        _say(f"wrote {file}")
    if args.json:
        print(json.dumps({"environment": where, "rows": rows}))
    return 0


def _is_bare(args: argparse.Namespace) -> bool:
    """Return whether nothing was said but the size of a report."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    said = {name: value for name, value in vars(parser.parse_args([])).items() if name != "size"}
    return all(getattr(args, name) == value for name, value in said.items())


def _print_environment(where: dict[str, Any]) -> None:
    from blockffn.eval.environment import headline

    print(headline(where, where["threads"]))
    for label, buffers in where["buffers"].items():
        print(f"{label:<6} weights in " + ", ".join(f"{name} {size:.0f} MiB" for name, size in buffers.items()))
    if "tls" in where:
        share = ", ".join(f"CLS_{size} {100 * value:.1f} %" for size, value in where["cls"].items())
        print(f"text   TLS {100 * where['tls']:.1f} %, {share}")


def _check(args: argparse.Namespace) -> None:
    from blockffn.eval.bench import models as bench

    if args.model is None and (args.dense or args.file):
        raise BlockffnError("--dense and --file: these go with -m; --shape makes both files and the text itself")
    if args.model is None and args.draft:
        raise BlockffnError("--draft: goes with -m; --shape drafts by a script, see --acceptance")
    if args.model is not None and args.acceptance:
        raise BlockffnError("--acceptance: goes with --shape, whose text is known; -m takes real drafters with --draft")
    if not args.ops and args.past and "," in args.past:
        raise BlockffnError("--past: takes several numbers only with --ops")
    if args.tree and not args.draft:
        raise BlockffnError("--tree: needs --draft with an EAGLE head")
    if not 8 <= args.tokens <= bench.LONGEST:
        raise BlockffnError(f"--tokens: expected 8 to {bench.LONGEST}, found {args.tokens}")


def _planted(args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    from blockffn.eval.bench.models import Candidate
    from blockffn.eval.planted import files as planted_files
    from blockffn.eval.planted import head as planted_head
    from blockffn.eval.planted import model as planted

    files = planted_files.models(args.shape or "1.2b", args.type, say=_say)
    tokens = planted.text(files.shape, 4096 + args.past)
    union = str(files.union)
    candidates = [Candidate(union, "union"), Candidate(str(files.dense), "dense")]
    if args.acceptance:
        head = str(planted_head.head(files, args.head_tokens, _say))
        drafts = ("scripted", head)  # at no cost, and beside a head that takes its time
        candidates += [Candidate(union, "union", draft, scripted=True, trees=True) for draft in drafts]
    return candidates, {"tokens": tokens}


def _given(args: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    from blockffn.eval.bench.models import Candidate
    from blockffn.gguf_contract import ARCH
    from blockffn.gguf_file import read_gguf
    from blockffn.inspection import SAMPLE_TEXT

    drafts = args.draft or []
    for path in (args.model, args.dense, *(draft for draft in drafts if draft != "ngram")):
        if path is not None and not Path(path).is_file():
            raise BlockffnError(f"{path}: no such file")
    text = SAMPLE_TEXT if args.file is None else Path(args.file).read_text(encoding="utf-8")
    if args.dense is None and read_gguf(args.model).metadata["general.architecture"] == ARCH:
        _say("note: dense runs the expert-layout file; give --dense a file of `blockffn convert --layout dense`")
    candidates = [Candidate(args.model, "union"), Candidate(args.dense or args.model, "dense")]
    candidates += [Candidate(args.model, "union", draft, trees=args.tree and _is_head(draft)) for draft in drafts]
    return candidates, {"text": text}


def _is_head(draft: str) -> bool:
    from blockffn import _capi, gguf_contract

    return draft != "ngram" and _capi.read_header(draft).architecture == gguf_contract.ARCH_EAGLE


def _rates(value: str | None) -> list[float | None]:
    try:
        rates: list[float | None] = [float(part) for part in (value or "").split(",") if part]
    except ValueError:
        rates = [-1.0]
    if any(rate is None or not 0 <= rate <= 1 for rate in rates):
        raise BlockffnError(f"--acceptance: expected probabilities from 0 to 1 with commas between, found {value!r}")
    return rates or [None]


def _sizes(value: str) -> list[int]:
    try:
        sizes = [int(part) for part in value.split(",") if part]
    except ValueError:
        sizes = [0]
    if any(not 1 < size <= 256 for size in sizes):
        raise BlockffnError(f"--verify: expected numbers of tokens from 2 to 256 with commas between, found {value!r}")
    return sizes


def _tokens_before(value: str) -> list[int]:
    try:
        pasts = [int(part) for part in value.split(",") if part]
    except ValueError:
        pasts = [0]
    if not pasts or any(past < 1 for past in pasts):
        raise BlockffnError(f"--past: expected numbers of tokens from 1 on, found {value!r}")
    return pasts


def _listed(values: Iterable[int]) -> str:
    return ",".join(map(str, values))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
