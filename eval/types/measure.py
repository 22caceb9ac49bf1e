"""One model in many quantization types: bits per weight, quality against the unquantized file, speed.

    >>> from blockffn.eval.types.measure import types
    >>> rows = types("model-F16.gguf", text, ["Q8_0", "Q4_0"], output="types.jsonl")        # doctest: +SKIP
    >>> rows[2]["type"], rows[2]["kld_mean"]                                                # doctest: +SKIP
    ('Q4_0', 0.0121)

Each type is quantized once into a folder of its own, which goes when everything is measured. Quality comes first, type
by type. Then the types are timed in turn, round after round, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from blockffn.eval.bench.report import median_and_spread
from blockffn.eval.journal import Journal, fingerprint, text_fingerprint
from blockffn.quantize import PRESETS, canonical_type, main_type, plan, quantize

TYPES = (
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "MXFP4_MOE", *PRESETS,
)  # fmt: skip
ROUNDS = 5
PAST = 128  # tokens in the cache before decoding and verification
PHASES = (("decode", 1, 16), ("verify8", 8, 4), ("prefill", 512, 1))  # name, tokens at once, steps of a round
Row = dict[str, Any]
Progress = Callable[[int, int, str], None]  # measurements done, in all, what the last one was


def types(
    model: str | Path,
    text: str,
    kinds: Sequence[str] = TYPES,
    *,
    n_ctx: int = 512,
    max_tokens: int | None = None,
    threads: int | None = None,
    rounds: int = ROUNDS,
    output: str | Path | None = None,
    progress: Progress = lambda done, total, what: None,
) -> list[Row]:
    """Return a row for the unquantized `model` (GGUF, or checkpoint to convert), then one for each type.

    n_ctx: window of quality, on the first `max_tokens` tokens of the text. rounds: of timing, 0 for none. output: a
    file that takes each result; the same call goes on with it after an interruption.

    Errors: BlockffnError for a quantized model, an unknown type, a short text, another run's file, a full disk.
    """
    from blockffn.threads import default_threads

    threads = threads or default_threads()
    wanted = list(dict.fromkeys(canonical_type(kind) for kind in kinds))
    with _folder(output) as folder:
        source = _source(Path(model), folder)
        name = main_type(source)
        files = {name: source} | {kind: folder / f"{kind}.gguf" for kind in wanted if kind != name}
        tokens = _tokens(source, text, max_tokens)
        settings = {
            "model": fingerprint(source), "text": text_fingerprint(tokens), "window": n_ctx, "threads": threads,
            "past": PAST,
        }  # fmt: skip
        with Journal(output, settings) as journal:
            todo = _missing(journal, list(files), rounds)
            total = len(files) * (1 + rounds)
            progress(total - len(todo), total, "")
            for done, (kind, number) in enumerate(todo, total - len(todo) + 1):
                path = _file(kind, files[kind], source)
                if number:
                    journal.add({"type": kind, "round": number, "seconds": _seconds(path, text, threads)})
                else:
                    journal.add(
                        {"type": kind, **_size(kind, path, source), **_quality(path, source, tokens, n_ctx, threads)}
                    )
                progress(done, total, f"{kind}, round {number} of speed" if number else f"{kind}, quality")
            return _rows(journal, list(files))


@contextlib.contextmanager
def _folder(output: str | Path | None) -> Iterator[Path]:
    """Yield where quantized files lie: beside `output`, from where an interrupted run takes them again."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="blockffn-types-") as name:
            yield Path(name)
        return
    folder = Path(f"{output}.files")
    folder.mkdir(exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def _source(model: Path, folder: Path) -> Path:
    """Return the unquantized GGUF: the model itself, or a checkpoint converted to F32."""
    if model.is_file():
        return model
    from blockffn.convert.convert import convert_checkpoint

    target = folder / f"{model.name}-F32.gguf"
    if not target.exists():
        convert_checkpoint(model, target, outtype="f32")
    return target


def _tokens(source: Path, text: str, max_tokens: int | None) -> list[int]:
    import blockffn

    with blockffn.Llama(source, n_ctx=64) as llm:
        tokens: list[int] = llm.tokenize(text.encode(), add_bos=True)
    return tokens[:max_tokens] if max_tokens else tokens


def _file(kind: str, path: Path, source: Path) -> Path:
    if not path.exists():
        quantize(source, path, kind)
    return path


def _missing(journal: Journal, kinds: Sequence[str], rounds: int) -> list[tuple[str, int]]:
    """Return what the journal lacks, (type, round): quality is round 0, rounds go in alternating order."""
    done = {(record["type"], record.get("round", 0)) for record in journal.records}
    wanted = [
        (kind, number) for number in range(rounds + 1) for kind in (kinds if number % 2 or not number else kinds[::-1])
    ]
    return [piece for piece in wanted if piece not in done]


def _size(kind: str, path: Path, source: Path) -> Row:
    steps = plan(source, kind)
    return {
        "nominal_bits": steps.nominal_bits,
        "bits_per_weight": steps.bits_per_weight,
        "fallbacks": len(steps.fallbacks),
        "file_mb": path.stat().st_size / 1e6,
    }


def _quality(path: Path, source: Path, tokens: Sequence[int], n_ctx: int, threads: int) -> Row:
    import blockffn
    from blockffn.eval.quality.perplexity import divergence

    options: dict[str, Any] = {"n_ctx": n_ctx, "n_threads": threads}
    with blockffn.Llama(path, **options) as llm, blockffn.Llama(source, **options) as reference:
        return divergence(llm, reference, tokens, n_ctx).figures()


def _seconds(path: Path, text: str, threads: int) -> dict[str, list[float]]:
    """Return the seconds of every step by phase, from a model that was loaded for it and warmed up."""
    from blockffn.eval.dial.measure import open_worker

    worker = open_worker(os.fspath(path), threads, PAST, [0], known=False)
    try:
        worker.set_text(text)
        for _, n, _ in PHASES[:2]:
            worker.steps(n, 1)
        return {name: worker.prefill(n) if name == "prefill" else worker.steps(n, steps) for name, n, steps in PHASES}
    finally:
        worker.llm.close()


def _rows(journal: Journal, kinds: Sequence[str]) -> list[Row]:
    rows = {record["type"]: dict(record) for record in journal.records if "kld_mean" in record}
    for kind in kinds:
        timed = [record["seconds"] for record in journal.records if record["type"] == kind and "round" in record]
        for name, n, _ in PHASES if timed else ():
            middle, spread = median_and_spread([value for seconds in timed for value in seconds[name]])
            rows[kind] |= {f"{name}_tokens_per_second": n / middle, f"{name}_spread": spread}
    return [rows[kind] for kind in kinds]
