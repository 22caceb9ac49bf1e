"""The figures of a run: by group of tasks and overall, as a table and as plain values for JSON.

figures = summarize(files.records)
print(table(figures))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from blockffn.eval.spec_bench.questions import group, groups
from blockffn.eval.spec_bench.session import RUNS, Record

OVERALL = "overall"
HEAD = """\
tokens/step  mean accepted tokens: tokens per evaluation of the model after the prompt, the bonus token included; an
             evaluation without a draft counts as 1
accepted     of the drafted tokens that were verified
tokens/s     new tokens over wall time, prompt included, mean over the questions; speedup: ratio of the two means
             (Spec-Bench's rule)
decoding     speedup without the prompt: tokens over the time after it, all questions together
equal        questions whose answers are the same text, all turns (Spec-Bench's rule)"""


def summarize(records: Mapping[Any, Mapping[str, Record]]) -> dict[str, Any]:
    """Return {"groups": {name: figures}, "overall": figures} of the questions in `records`."""
    pairs = list(records.values())
    names = groups([pair["speculative"]["category"] for pair in pairs])
    by_group = {
        name: _figures([pair for pair in pairs if group(pair["speculative"]["category"]) == name]) for name in names
    }
    return {"groups": by_group, OVERALL: _figures(pairs)}


def _figures(pairs: list[Mapping[str, Record]]) -> dict[str, Any]:
    choices = {name: [pair[name]["choices"][0] for pair in pairs] for name in RUNS}
    metrics = [pair["speculative"]["metrics"]["speculative_decoding"] for pair in pairs]
    histogram: Counter[int] = Counter()
    for each in metrics:
        histogram.update({int(size): steps for size, steps in each["acceptance_histogram"].items()})
    steps, drafted, accepted = (
        sum(each[key] for each in metrics)
        for key in ("num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens")
    )
    speed = {name: _mean(_ratio(sum(c["new_tokens"]), sum(c["wall_time"])) for c in choices[name]) for name in RUNS}
    decoding = {name: _decoding(pairs, name) for name in RUNS}
    equal = sum(a["turns"] == b["turns"] for a, b in zip(*choices.values(), strict=True))
    return {
        "questions": len(pairs),
        "turns": sum(len(choice["turns"]) for choice in choices["speculative"]),
        "new_tokens": sum(sum(choice["new_tokens"]) for choice in choices["speculative"]),
        "mean_acceptance_length": 1 + accepted / steps if steps else None,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_histogram": {str(size): histogram[size] for size in sorted(histogram)},
        "num_spec_steps": steps,
        "num_draft_tokens": drafted,
        "num_accepted_draft_tokens": accepted,
        "tokens_per_second": speed["speculative"],
        "baseline_tokens_per_second": speed["baseline"],
        "speedup": _ratio(speed["speculative"], speed["baseline"]),
        "decode_tokens_per_second": decoding["speculative"],
        "baseline_decode_tokens_per_second": decoding["baseline"],
        "decode_speedup": _ratio(decoding["speculative"], decoding["baseline"]),
        "equal": equal,
        "equal_share": _ratio(equal, len(pairs)),
    }


def _decoding(pairs: list[Mapping[str, Record]], name: str) -> float | None:
    """Return tokens per second after the prompt; the first token comes with the prompt."""
    turns = [
        (count, turn["decode_ms"])
        for pair in pairs
        for count, turn in zip(pair[name]["choices"][0]["new_tokens"], pair[name]["details"], strict=True)
    ]
    return _ratio(1e3 * sum(count - 1 for count, _ in turns), sum(ms for _, ms in turns))


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def table(figures: dict[str, Any]) -> str:
    """Return the definitions, a line for each group and the histogram of accepted tokens."""
    titles = ("questions", "tokens/step", "accepted", "plain tok/s", "tok/s", "speedup", "decoding", "equal")
    lines = [HEAD, "", f"{'group':<16}" + "".join(title.rjust(max(9, len(title) + 2)) for title in titles)]
    for name, row in [*figures["groups"].items(), (OVERALL, figures[OVERALL])]:
        cells = (
            str(row["questions"]),
            _number(row["mean_acceptance_length"], ".2f"),
            _number(row["draft_acceptance_rate"], ".1%"),
            _number(row["baseline_tokens_per_second"], ".1f"),
            _number(row["tokens_per_second"], ".1f"),
            _number(row["speedup"], ".2f"),
            _number(row["decode_speedup"], ".2f"),
            _number(row["equal_share"], ".1%"),
        )
        lines.append(
            f"{name:<16}" + "".join(cell.rjust(max(9, len(t) + 2)) for cell, t in zip(cells, titles, strict=True))
        )
    return "\n".join([*lines, "", *histogram_lines(figures[OVERALL]["acceptance_histogram"])])


def histogram_lines(histogram: Mapping[str, int], width: int = 40) -> list[str]:
    """Return one line for each number of drafted tokens that a step accepted."""
    total = sum(histogram.values())
    lines = ["accepted in a step   steps"]
    for size, steps in histogram.items():
        share = steps / total
        lines.append(f"{size:>18} {steps:>7} {share:6.1%} {'#' * round(width * share)}".rstrip())
    return lines


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
