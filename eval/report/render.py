"""From the JSON of a section's commands to its tables and plots.

    >>> from blockffn.eval.report.render import body
    >>> html = body("load", results)                             # doctest: +SKIP

Each function takes the results of one section that succeeded; columns and curves are those that their rows have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from blockffn.eval.report import plots
from blockffn.eval.report.page import Column, Row, sources, table, value
from blockffn.eval.report.plots import COLORS, Lines
from blockffn.eval.report.run import Result

SPEED = Column("tokens/s", value("tokens_per_second", "{:.1f}"))
SPREAD = Column("spread", lambda row: f"{row['spread']:.0%}" if row.get("spread") else "-")  # a single round has none


def body(name: str, results: Sequence[Result]) -> str:
    """Return the HTML of a section: plot, table, commands with raw JSON."""
    kind = name.split("-")[0]
    done = [result for result in results if result.found is not None]
    shown = RENDERERS[kind](name, done) if done else ""
    return shown + "\n" + sources(results)


def _rows(result: Result) -> list[Row]:
    assert result.found is not None
    rows: list[Row] = result.found["rows"]
    return rows


def _ops(name: str, results: Sequence[Result]) -> str:
    rows = [row for result in results for row in _rows(result)]
    panels = list(dict.fromkeys((row["shape"], row["type"]) for row in rows))
    drawn = []
    for shape, kind in panels:
        panel = [row for row in rows if (row["shape"], row["type"]) == (shape, kind)]
        sizes = [row["n"] for row in panel]
        curves = [
            Lines(label, sizes, [row[key] for row in panel], color=COLORS[color])
            for label, key, color in (
                ("union FFN", "ours_ms", "union"),
                ("stock dense", "dense_ms", "dense"),
                ("stock mul_mat_id", "mul_mat_id_ms", "mul_mat_id"),
            )
        ]
        title = f"tokens at once ({shape}, {kind})"
        drawn.append(plots.lines(curves, title, "ms per layer", f"{name}-{shape}-{kind}".replace(".", "-"), True))
    columns = [
        Column("shape", value("shape")),
        Column("type", value("type")),
        Column("tokens", value("n")),
        Column("union, ms", value("ours_ms", "{:.3f}")),
        Column("dense, ms", value("dense_ms", "{:.3f}")),
        Column("ratio", lambda row: f"{row['dense_ms'] / row['ours_ms']:.2f}x"),
        Column("mul_mat_id, ms", value("mul_mat_id_ms", "{:.3f}")),
        Column("ratio", lambda row: f"{row['mul_mat_id_ms'] / row['ours_ms']:.2f}x"),
        SPREAD,
        Column("union", value("union_share", "{:.0%}")),
        Column("GB/s", value("bandwidth_gbs", "{:.1f}")),
        Column("of limit", value("fraction_of_limit", "{:.0%}")),
    ]
    return "\n".join(drawn) + table(rows, columns)


def _step(name: str, results: Sequence[Result]) -> str:
    """Stacked bars of milliseconds per token, a bar per graph, number of tokens and context."""
    rows = [row for result in results for row in _rows(result)]
    kinds = list(rows[0]["ms"])
    labels = [f"{row['ffn']}, {row['n']} after {row['past']}" for row in rows]

    def draw(axis: Any) -> None:
        left = [0.0] * len(rows)
        for kind in kinds:
            widths = [max(0.0, row["ms"][kind]) / row["n"] for row in rows]
            axis.barh(range(len(rows)), widths, left=left, height=0.65, label=kind)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axis.set_yticks(range(len(rows)), labels)
        axis.invert_yaxis()
        axis.set_xlabel("ms per token: the step over the tokens that it evaluates at once")
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -1.1 / height), ncols=5, frameon=False)

    height = 1.8 + 0.3 * len(rows)
    columns = [
        Column("FFN", value("ffn")),
        Column("tokens before", value("past")),
        Column("tokens", value("n")),
        Column("step, ms", value("step_ms", "{:.2f}")),
        SPREAD,
        *(Column(kind, lambda row, kind=kind: f"{row['ms'][kind]:.2f}") for kind in kinds),  # type: ignore[misc]
    ]
    return plots.drawing(draw, name, height) + table(rows, columns)


def _contexts(name: str, results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        assert result.found is not None
        past = result.found["environment"]["past"]
        rows += [row | {"past": past} for row in _rows(result) if row["drafter"] == "none"]
    curves = []
    for phase, n, style in (("decode", 1, "o-"), ("verify", 8, "s--")):
        for ffn in ("union", "dense"):
            found = [row for row in rows if (row["phase"], row["n"], row["ffn"]) == (phase, n, ffn)]
            label = f"{ffn}, {phase}" + (f" {n}" if n > 1 else "")
            x, y = [row["past"] for row in found], [row["tokens_per_second"] for row in found]
            curves.append(Lines(label, x, y, style, COLORS[ffn]))
    drawn = plots.lines(curves, "tokens before", "tokens/s", name.replace(".", "-"))
    return drawn + table(_beside(rows), _comparison()) + "<h3>Memory</h3>" + table(_memory(rows), MEMORY)


def _beside(rows: Sequence[Row]) -> list[Row]:
    """Return one row per context and phase, with both ways to run the FFN."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        merged = found.setdefault((row["past"], row["phase"], row["n"]), {"past": row["past"]})
        merged["phase"] = row["phase"] if row["phase"] == "decode" else f"{row['phase']} {row['n']}"
        merged[row["ffn"]], merged[f"{row['ffn']}_spread"] = row["tokens_per_second"], row["spread"]
    return list(found.values())


def _comparison() -> list[Column]:
    def ratio(row: Row) -> str:
        return f"{row['union'] / row['dense']:.2f}x" if "union" in row and "dense" in row else "-"

    return [
        Column("tokens before", value("past")),
        Column("phase", value("phase")),
        Column("union, tokens/s", value("union", "{:.1f}")),
        Column("spread", value("union_spread", "{:.0%}")),
        Column("dense, tokens/s", value("dense", "{:.1f}")),
        Column("spread", value("dense_spread", "{:.0%}")),
        Column("ratio", ratio),
    ]


MEMORY = [
    Column("model", value("model")),
    Column("FFN", value("ffn")),
    Column("tokens before", value("past")),
    Column("peak resident, MB", value("peak_rss_mb", "{:.0f}")),
    Column("anonymous, MB", value("anonymous_mb", "{:.0f}")),
    Column("file pages, MB", value("file_mb", "{:.0f}")),
]


def _memory(rows: Sequence[Row]) -> list[Row]:
    return list({(row["model"], row["ffn"], row["past"]): row for row in rows}.values())


def _speculation(name: str, results: Sequence[Result]) -> str:
    rows: list[Row] = []
    for result in results:
        plain = next((row for row in _rows(result) if row.get("plan") == "plain" and row["ffn"] == "union"), None)
        for row in _rows(result):
            if row["phase"] == "decode":
                speed = row["tokens_per_second"] / plain["tokens_per_second"] if plain else None
                rows.append(row | {"of": result.label, "over_plain": speed})
    drafted = [row for row in rows if row["drafter"] != "none"]
    labels = [
        f"{row['drafter']}, {row['plan']}" + (f", {row['acceptance']:.0%}" if row["acceptance"] is not None else "")
        for row in drafted
    ]
    drawn = plots.bars(labels, [row["over_plain"] or 0 for row in drafted], "speed, plain decoding = 1", name)
    columns = [
        Column("text", value("of")),
        Column("FFN", value("ffn")),
        Column("drafter", value("drafter")),
        Column("plan", value("plan")),
        Column("accepted", value("acceptance", "{:.0%}")),
        Column("tokens/step", value("tokens_per_step", "{:.2f}")),
        SPEED,
        SPREAD,
        Column("over plain", value("over_plain", "{:.2f}x")),
    ]
    return (drawn if drafted else "") + table(rows, columns)


def _types(name: str, results: Sequence[Result]) -> str:
    from blockffn.eval.types.report import COLUMNS

    rows = [row for result in results for row in _rows(result)]
    shown = [row for row in rows if row["kld_mean"] > 0]  # not the reference itself
    labels, bits, divergence = zip(
        *((row["type"], row["bits_per_weight"], row["kld_mean"]) for row in shown), strict=True
    )
    drawn = plots.points(labels, bits, divergence, "bits per weight, whole file", "mean KL divergence, nats", name)
    return drawn + table(rows, [Column("type", value("type")), *(Column(head, value(k, f)) for k, head, f in COLUMNS)])


def _dial(name: str, results: Sequence[Result]) -> str:
    from blockffn.eval.dial.points import Point
    from blockffn.eval.dial.report import COLUMNS, SPEEDS

    rows = [row | {"name": Point(row["threshold"], row["budget"]).name} for result in results for row in _rows(result)]
    plain, curves = rows[0], []
    for (speed, label), color in zip(SPEEDS, (COLORS["union"], COLORS["mul_mat_id"]), strict=True):
        for kind, style in (("threshold", "o-"), ("budget", "^--")):
            shown = [row for row in rows if bool(row["budget"]) == (kind == "budget") and "kld_mean" in row]
            y = [row[speed] / plain[speed] for row in shown]
            curves.append(Lines(f"{label}, {kind}", [row["kld_mean"] for row in shown], y, style, color))
    drawn = plots.lines(curves, "mean KL divergence, nats", "speed, plain model = 1", name)
    return drawn + table(rows, [Column("dial", value("name")), *(Column(head, value(k, f)) for k, head, f in COLUMNS)])


def _peers(name: str, results: Sequence[Result]) -> str:
    rows = [row | {"who": f"{row['program']}, {row['drafter']}"} for result in results for row in _rows(result)]
    done = [row for row in rows if row.get("tokens_per_second")]
    drawn = plots.bars([row["who"] for row in done], [row["tokens_per_second"] for row in done], "tokens/s", name)
    columns = [
        Column("program, drafter", value("who")),
        SPEED,
        SPREAD,
        Column("tokens/step", value("tokens_per_step", "{:.2f}")),
        Column("accepted", value("acceptance", "{:.0%}")),
        Column("peak resident, MB", value("peak_rss_mb", "{:.0f}")),
        Column("texts of the first", value("same_text")),
        Column("failed", value("failure")),
    ]
    return (drawn if done else "") + table(rows, columns)


def _load(name: str, results: Sequence[Result]) -> str:
    rows = [row for result in results for row in _rows(result)]
    drawn = plots.bars([row["model"] for row in rows], [1e3 * row["load_seconds"] for row in rows], "load, ms", name)
    columns = [
        Column("model", value("model")),
        Column("file, MB", value("file_size_mb", "{:.1f}")),
        Column("import, ms", value("import_seconds", "{:.0f}", 1e3)),
        Column("load, ms", value("load_seconds", "{:.0f}", 1e3)),
        SPREAD,
        Column("first token, ms", value("first_token_seconds", "{:.1f}", 1e3)),
        Column("peak resident, MB", value("peak_rss_mb", "{:.0f}")),
        Column("anonymous, MB", value("anonymous_mb", "{:.0f}")),
    ]
    return drawn + table(rows, columns)


RENDERERS: dict[str, Callable[[str, Sequence[Result]], str]] = {
    "ops": _ops,
    "step": _step,
    "contexts": _contexts,
    "speculation": _speculation,
    "types": _types,
    "dial": _dial,
    "peers": _peers,
    "load": _load,
}
