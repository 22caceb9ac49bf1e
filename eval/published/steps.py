"""The steps of `blockffn verify-published`; each returns the figures that the report shows.

>>> from blockffn.eval.published.steps import Options, verify_published
>>> report = verify_published("SparseLLM/DECO-0.1B", Options(Path("build/published")))    # doctest: +SKIP
>>> report["parity"]["result"]["nmse"]                                                     # doctest: +SKIP
3.1e-06

A step that fails is part of the report, with its message, and the steps that need nothing of it still run: a report is
most useful where something is wrong.
"""

from __future__ import annotations

import argparse as sample_module  # its source is the text when none is given
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import blockffn
from blockffn.errors import BlockffnError
from blockffn.eval.environment import environment
from blockffn.eval.published import authors
from blockffn.extras import missing
from blockffn.gguf_contract import ARCH_EAGLE
from blockffn.threads import default_threads

ORGANISATION = "SparseLLM"  # on the hub; a bare name is looked for there
PUBLISHED = (
    "BlockFFN-Small",
    "BlockFFN-Medium",
    "BlockFFN-Large",
    "BlockFFN-XLarge",
    "BlockFFN-3B-SFT",
    "DECO-0.1B",
    "DECO-0.2B",
    "DECO-0.5B",
    "DECO-1.2B",
)
N_SPARSITY = 1024  # tokens
VERIFY = (8,)
PREFILL = 512
OK, FAILED, SKIPPED = "ok", "failed", "skipped"

Result = dict[str, Any]
Say = Callable[[str], None]


@dataclass
class Options:
    """What is done with the checkpoint, and where its files go."""

    folder: Path
    text: str | None = None  # to measure sparsity and parity's second text on; None: a module of the standard library
    quantize: str = "Q4_0"
    threads: int | None = None
    rounds: int = 3
    trust_remote_code: bool = False
    keep: bool = False
    say: Say = field(default=lambda line: None)


def verify_published(source: str, options: Options) -> Result:
    """Convert, compare, measure; return {"source", "verdict", "environment", and one entry per step}.

    Errors: BlockffnError when the checkpoint cannot be found, fetched or opened; then there is nothing to report.
    """
    where = locate(source)
    options.say(f"checkpoint: {where}")
    opened = checkpoint(where)
    options.folder.mkdir(parents=True, exist_ok=True)
    report: Result = {"source": source, "checkpoint": {"status": OK, "result": opened}}
    model = options.folder / f"{opened['name']}.gguf"
    report["convert"] = _step(lambda: convert(where, model, "expert"), options)
    converted = report["convert"]["status"] == OK
    report["parity"] = _step(lambda: parity(where, model, options), options, converted)
    report["sparsity"] = _step(lambda: sparsity(model, options), options, converted)
    report["speed"] = _step(lambda: speed(where, model, options), options, converted)
    if converted and not options.keep:
        model.unlink()
    steps = [entry for entry in report.values() if isinstance(entry, dict)]
    report["verdict"] = OK if all(step["status"] == OK for step in steps) else FAILED
    report["environment"] = environment() | {
        "threads": options.threads or default_threads(),
        "python": platform.python_version(),
    }
    return report


def locate(source: str) -> str:
    """Return the folder or hub id that is meant: the name of a published checkpoint stands for its hub id."""
    if source in PUBLISHED and not Path(source).is_dir():
        return f"{ORGANISATION}/{source}"
    return source


def _step(work: Callable[[], Result], options: Options, possible: bool = True) -> Result:
    """Run one step; its failure is a result too."""
    if not possible:
        return {"status": SKIPPED, "reason": "the conversion failed"}
    try:
        result = work()
    except ModuleNotFoundError as error:
        cause = missing(error)
        if cause is None:
            raise
        return {"status": FAILED, "reason": str(cause)}
    except BlockffnError as error:
        options.say(f"failed: {error}")
        return {"status": FAILED, "reason": str(error)}
    failures = result.pop("failures", [])
    for failure in failures:
        options.say(f"failed: {failure}")
    outcome = {"status": FAILED, "reason": "; ".join(failures)} if failures else {"status": OK}
    return outcome | {"result": result}


def checkpoint(where: str) -> Result:
    """Fetch the checkpoint if it is a hub id; return what it consists of."""
    from blockffn.convert.checkpoint import open_checkpoint

    opened = open_checkpoint(where)
    files = {file.name: file.stat().st_size for file in opened.files}
    name = Path(opened.folder if Path(where).is_dir() else where).name
    return {"name": name, "files": files, "n_tensors": len(opened.tensors), "config": opened.config}


def convert(where: str, target: Path, layout: str) -> Result:
    """Convert as stored; return the report of the conversion and what the file holds."""
    from blockffn.inspection import describe

    done = blockffn.convert.convert_checkpoint(where, target, layout=layout)
    held = describe(target)
    if held["architecture"] == ARCH_EAGLE:
        raise BlockffnError(f"{where}: a draft head has nothing to be compared with; convert it with --target")
    kept = ("architecture", "hyper_parameters", "tensor_types", "parameters", "bits_per_weight", "router")
    return {
        "outtype": done.outtype,
        "family": done.family,
        "notes": done.notes,
        "seconds": round(done.seconds, 1),
        "sha256": done.sha256,
        "file_bytes": held["file_bytes"],
        **{key: held[key] for key in kept},
    }


def parity(where: str, model: Path, options: Options) -> Result:
    """Compare with the authors' code where it may and can run, else with the torch reference of this project."""
    from blockffn.eval.quality.parity import verify

    reason = "needs --trust-remote-code, which runs Python from the checkpoint"
    if options.trust_remote_code:
        try:
            return {"against": "the authors' code", **authors.compare(model, where, options.threads)}
        except authors.CannotRun as error:
            reason = str(error)
            options.say(f"the authors' code does not run: {reason}")
    options.say("comparing with the torch reference")
    found = verify(model, where, n_threads=options.threads)
    rest = found.to_dict()
    failures = rest.pop("failures")
    return {
        "against": "the torch reference of blockffn",
        "authors_code": reason,
        **{key: value for key, value in rest.items() if key not in ("gguf", "source")},
        "failures": failures,
    }


def sparsity(model: Path, options: Options) -> Result:
    """Measure TLS and CLS_c on the text."""
    content, name = _text(options)
    llm = blockffn.Llama(model, n_threads=options.threads)
    try:
        if llm.n_moe_layers == 0:
            return {"text": name, "n_experts": 0}
        tokens = llm.tokenize(content.encode())[:N_SPARSITY]
        found = blockffn.eval.sparsity(llm, tokens).to_dict()
    finally:
        llm.close()
    return {"text": name, **found}


def speed(where: str, model: Path, options: Options) -> Result:
    """Time the quantized model by the union and, in the dense layout, by stock operations, in one run."""
    from blockffn.eval.bench import models as bench
    from blockffn.quantize import canonical_type, quantize

    kind = canonical_type(options.quantize)
    union, dense = (model.with_name(f"{model.stem}-{part}{kind}.gguf") for part in ("", "dense-"))
    whole = model.with_name(f"{model.stem}-dense.gguf")
    made = [union, dense, whole]
    try:
        quantize(model, union, kind)
        blockffn.convert.convert_checkpoint(where, whole, layout="dense")
        quantize(whole, dense, kind)
        whole.unlink()
        pair = [bench.Candidate(str(union), "union"), bench.Candidate(str(dense), "dense")]
        threads = options.threads or default_threads()
        timed = bench.phases(VERIFY, PREFILL)
        text = {"text": _text(options)[0]}
        found = bench.run(pair, text, threads, options.rounds, timed, say=options.say)
        return {"type": kind, "threads": threads, "rounds": options.rounds, "past": bench.PAST, "rows": found.rows}
    finally:
        for path in made if not options.keep else made[2:]:
            path.unlink(missing_ok=True)


def _text(options: Options) -> tuple[str, str]:
    """Return the text that is measured, and its name."""
    if options.text is not None:
        return options.text, "as given"
    file = Path(str(sample_module.__file__))
    return file.read_text(encoding="utf-8"), f"{file.name} of Python {'.'.join(map(str, sys.version_info[:3]))}"
