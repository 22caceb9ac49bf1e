"""The report of `blockffn verify-published` as Markdown, ready for an issue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Report = dict[str, Any]
STEPS = ("checkpoint", "convert", "parity", "sparsity", "speed")
CONFIG_KEYS = 40  # of config.json; more are cut


def markdown(report: Report) -> str:
    """Return the report as text.

    >>> failed = {"status": "failed", "reason": "config.json: file not found"}
    >>> print(markdown({"source": "x", "verdict": "failed", "checkpoint": failed}).splitlines()[0])
    # x: failed
    """
    lines = [f"# {report['source']}: {report['verdict']}", ""]
    where = report.get("environment", {})
    if where:
        commit = f", commit {where['commit']}" if where.get("commit") else ""
        lines += [
            f"blockffn {where['version']}{commit}, {where.get('date', '')}, Python {where['python']}, "
            f"{where['cpu']}, {where['threads']} threads, profile {where.get('profile')}.",
            "",
        ]
    lines += ["| step | status | |", "|---|---|---|"]
    for name in STEPS:
        step = report.get(name)
        if step is not None:
            lines.append(
                f"| {name} | {step['status']} | {_cell(step.get('reason') or _summary(name, step['result']))} |"
            )
    for name, show in (("parity", _parity), ("sparsity", _sparsity), ("speed", _speed), ("checkpoint", _config)):
        result = report.get(name, {}).get("result")
        if result:
            lines += ["", *show(result)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _summary(name: str, result: Report) -> str:
    if name == "checkpoint":
        size = sum(result["files"].values())
        return f"{len(result['files'])} weight files, {result['n_tensors']} tensors, {size / 1e6:.0f} MB"
    if name == "convert":
        total, active = result["parameters"]["total"], result["router"]
        experts = f", {active['n_experts']} experts" if active and "n_experts" in active else ""
        notes = "".join(f"; {note}" for note in result["notes"])
        return f"{result['family']}, {result['outtype']}, {total / 1e6:.1f} M parameters{experts}{notes}"
    if name == "parity":
        return f"NMSE {result['nmse']:.2e} against {result['against']}"
    if name == "sparsity":
        return f"TLS {100 * result['tls']:.1f} %" if "tls" in result else "no routed experts"
    return f"{result['type']}, {result['threads']} threads"


def _parity(result: Report) -> Iterator[str]:
    yield f"## Parity against {result['against']}"
    yield ""
    if "authors_code" in result:
        yield f"The authors' code was not run: {result['authors_code']}."
        yield ""
    yield "| figure | value |"
    yield "|---|---|"
    for key, value in result.items():
        if key not in ("against", "authors_code", "passed"):
            yield f"| {key} | {value:.3g} |" if isinstance(value, float) else f"| {key} | {value} |"


def _sparsity(result: Report) -> Iterator[str]:
    yield "## Sparsity"
    yield ""
    if "tls" not in result:
        yield "The model has no routed experts."
        return
    sizes = list(result["cls"])
    yield f"{result['n_tokens']} tokens of {result['text']}, {result['n_experts']} experts, in percent."
    yield ""
    yield "| layer | TLS | " + " | ".join(f"CLS_{size}" for size in sizes) + " |"
    yield "|---|---|" + "---|" * len(sizes)
    rows = [("mean", result["tls"], [result["cls"][size] for size in sizes])]
    rows += [
        (str(layer), tls, [result["layer_cls"][size][layer] for size in sizes])
        for layer, tls in enumerate(result["layer_tls"])
    ]
    for name, tls, rest in rows:
        yield f"| {name} | {100 * tls:.1f} | " + " | ".join(f"{100 * value:.1f}" for value in rest) + " |"


def _speed(result: Report) -> Iterator[str]:
    yield "## Speed"
    yield ""
    yield f"{result['type']}, {result['threads']} threads, {result['rounds']} rounds, after {result['past']} tokens."
    yield "Dense: the same weights in the dense layout, in stock operations. Without speculation."
    yield ""
    yield "| phase | union, tokens/s | dense, tokens/s | union / dense |"
    yield "|---|---|---|---|"
    rows = {(row["ffn"], row["phase"], row["n"]): row for row in result["rows"]}
    for (ffn, phase, n), row in rows.items():
        if ffn == "union":
            other = rows["dense", phase, n]
            cells = [f"{each['tokens_per_second']:.1f} (spread {each['spread']:.0%})" for each in (row, other)]
            ratio = row["tokens_per_second"] / other["tokens_per_second"]
            yield f"| {phase if n == 1 else f'{phase} {n}'} | {cells[0]} | {cells[1]} | {ratio:.2f}x |"
    peaks = {row["ffn"]: row["peak_rss_mb"] for row in result["rows"]}
    yield f"| peak memory, MB | {peaks['union']:.0f} | {peaks['dense']:.0f} | |"


def _config(result: Report) -> Iterator[str]:
    yield "## config.json"
    yield ""
    yield "| key | value |"
    yield "|---|---|"
    entries = list(result["config"].items())
    for key, value in entries[:CONFIG_KEYS]:
        yield f"| {_cell(str(key))} | {_cell(str(value))[:80]} |"
    if len(entries) > CONFIG_KEYS:
        yield f"| ... {len(entries) - CONFIG_KEYS} more, in the JSON file | |"
