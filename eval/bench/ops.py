"""Run the benchmark of the ops and write its table, its figures and a plot.

    blockffn bench ops --build build/native            # what `make bench-ops` calls
    blockffn bench ops --build build/native --shapes 1.2B --types q4_0 --tokens 1,8 --no-files
    blockffn bench ops --active 0.6 --no-files         # where most experts are active
    blockffn bench ops --subject attention             # over the cache, after 128 to 8192 tokens; --subject products

The program build/<profile>/bin/bench-ops measures; this module only shows. Last comes one line of JSON:
{"environment": {...}, "rows": [...]}. Times are milliseconds per layer, medians; spread is half the distance between
the quartiles over the median. Run it with nothing else on the machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import textwrap
from pathlib import Path
from typing import Any

from blockffn.errors import BlockffnError
from blockffn.eval.environment import ROOT, environment, headline

Row = dict[str, Any]
DOCS = ROOT / "docs"
OPTIONS = ("threads", "shapes", "types", "tokens", "active", "reps")  # the program's
SUBJECTS = ("ffn", "attention", "products")
AT_ONCE = "1,4,8,32"  # tokens, of the other subjects than the FFN
PASTS = "128,1024,4096,8192"  # tokens before, of attention


def measure(program: Path, arguments: list[str], subject: str = "ffn") -> list[Row]:
    """Run bench-ops and return its rows, showing each as it comes."""
    if not program.is_file():
        raise BlockffnError(
            f"{program} is missing: build it with `make build` (BUILD_PROFILE={program.parent.parent.name})"
        )
    rows: list[Row] = []
    print(header(subject), flush=True)
    with subprocess.Popen([str(program), *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            rows.append(json.loads(line))
            print(table_line(rows[-1]), flush=True)
    if process.returncode != 0:
        raise BlockffnError(f"{program.name} failed with exit code {process.returncode}: its message is above")
    return rows


def header(subject: str = "ffn") -> str:
    """Return the head of the table, in Markdown."""
    if subject != "ffn":
        names = ["subject", "shape", "type", "after", "n", "ours ms", "best stock ms (path)", "ratio", "spread", "GB/s"]
        return f"| {' | '.join([*names, 'of limit'])} |\n|{'---|' * (len(names) + 1)}"
    names = ["shape", "type", "n", "ours ms", "dense ms (buffer)", "ratio", "mul_mat_id ms (buffer)", "ratio"]
    names += ["spread", "union", "active", "GB/s", "of limit"]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def table_line(row: Row) -> str:
    """Return one row of the table, in Markdown; a ratio above 1 means that ours is faster."""
    if "subject" in row:
        return _subject_line(row)
    ours = row["ours_ms"]
    cells = [
        row["shape"],
        row["type"],
        str(row["n"]),
        f"{ours:.3f}",
        f"{row['dense_ms']:.3f} ({row['dense_buffer']})",
        f"{row['dense_ms'] / ours:.2f}x",
        f"{row['mul_mat_id_ms']:.3f} ({row['mul_mat_id_buffer']})",
        f"{row['mul_mat_id_ms'] / ours:.2f}x",
        f"{row['spread']:.0%}",
        f"{row['union_share']:.1%}",
        f"{row['active_share']:.1%}",
        f"{row['bandwidth_gbs']:.1f}",
        f"{row['fraction_of_limit']:.0%}",
    ]
    return f"| {' | '.join(cells)} |"


def _subject_line(row: Row) -> str:
    """Return one row of a subject other than the FFN."""
    if row["subject"] == "attention":
        stock, path = min((row["flash_ms"], "flash attention"), (row["products_ms"], "products"))
    else:
        stock, path = row["stock_ms"], row["stock_buffer"]
    ours = row["ours_ms"]
    cells = [row["subject"], row["shape"], row.get("type", "f16"), str(row.get("past", "-")), str(row["n"])]
    cells += [f"{ours:.3f}", f"{stock:.3f} ({path})", f"{stock / ours:.2f}x", f"{row['spread']:.0%}"]
    cells += [f"{row['bandwidth_gbs']:.1f}", f"{row['fraction_of_limit']:.0%}"]
    return f"| {' | '.join(cells)} |"


def plot(rows: list[Row], target: Path, title: str) -> None:
    """Draw milliseconds per layer over n, one panel per (shape, type), both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row["shape"], row["type"]) for row in rows))
    columns = min(3, len(panels))
    size = (4 * columns, 3 * -(-len(panels) // columns) + 0.5)
    figure, axes = pyplot.subplots(-(-len(panels) // columns), columns, figsize=size, squeeze=False)
    for axis, (shape, kind) in zip(axes.flat, panels, strict=False):
        panel = [row for row in rows if row["shape"] == shape and row["type"] == kind]
        tokens = [row["n"] for row in panel]
        for key, label in [
            ("dense_ms", "stock dense"),
            ("mul_mat_id_ms", "stock mul_mat_id"),
            ("ours_ms", "union FFN"),
        ]:
            axis.loglog(tokens, [row[key] for row in panel], marker="o", markersize=3, label=label)
        axis.set_title(f"{shape}, {kind}", fontsize=9)
        axis.set_xticks(tokens, [str(n) for n in tokens])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    axes[0][0].legend(fontsize=8)
    axes[-1][0].set_xlabel("tokens at once")
    axes[-1][0].set_ylabel("ms per layer")
    figure.suptitle(textwrap.fill(title, 14 * int(size[0])), fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def write_files(result: dict[str, Any], folder: Path, subject: str = "ffn") -> None:
    """Write bench-ops-<profile>.json, .md and .png to `folder`; no plot of the other subjects, bench-<subject>-*."""
    place = result["environment"]
    stem = f"bench-{'ops' if subject == 'ffn' else subject}-{place['profile']}"
    title = headline(place, result["rows"][0]["threads"])
    table = "\n".join([header(subject), *(table_line(row) for row in result["rows"])])
    (folder / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    command = "make bench-ops" if subject == "ffn" else f"blockffn bench ops --subject {subject}"
    (folder / f"{stem}.md").write_text(f"# {command}\n\n{title}, {place['date']}.\n\n{table}\n")
    if subject == "ffn":
        plot(result["rows"], folder / f"{stem}.png", title)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench ops`."""
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "native", help="build folder of the profile")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder of the files (default: docs)")
    parser.add_argument("--no-files", action="store_true", help="print only")
    parser.add_argument("--subject", choices=SUBJECTS, default="ffn", help="default: %(default)s")
    parser.add_argument("--past", default=PASTS, help="of attention: tokens before (default: %(default)s)")
    for name in OPTIONS:
        parser.add_argument(f"--{name}", help="passed to the program")


def run(options: argparse.Namespace) -> int:
    """Measure, print the table as it comes, write the files, print one line of JSON."""
    passed = [
        part for name in OPTIONS if getattr(options, name) is not None for part in (f"--{name}", getattr(options, name))
    ]
    if options.subject != "ffn":
        passed += ["--attention", options.past] if options.subject == "attention" else ["--subject", "products"]
        passed += [] if options.tokens else ["--tokens", AT_ONCE]
    binaries = options.build.resolve() / "bin"
    rows = measure(binaries / "bench-ops", passed, options.subject)
    result = {
        "environment": environment(binaries),
        "rows": [{**row, "profile": binaries.parent.name} for row in rows],
    }
    if not options.no_files:
        write_files(result, options.output, options.subject)
    print(json.dumps(result))
    return 0
