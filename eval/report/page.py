"""The report as one HTML file that needs nothing else: no script, no font, no link to anywhere.

>>> from blockffn.eval.report.page import Block, page
>>> text = page("blockffn", {"cpu": "x"}, [Block("ops", "The operation", "About it.", "<p>none</p>")])
>>> "<h2 id=\\"ops\\">The operation" in text and "http" not in text.split("</style>")[1]
True
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from blockffn.eval.report.run import Result

Row = dict[str, Any]
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2329; margin: 0 auto; max-width: 74rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; border-top: 1px solid #d8dde2; padding-top: 1.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
nav a { margin-right: 1rem; white-space: nowrap; }
a { color: #1f6fb4; }
pre { background: #f4f6f8; padding: .5rem .7rem; font-size: 12.5px; margin: .5rem 0;
      white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; margin: .6rem 0; }
th, td { padding: .22rem .55rem; text-align: right; border-bottom: 1px solid #e4e8ec; }
th { font-weight: 600; border-bottom: 1.5px solid #9aa4ae; }
th:first-child, td:first-child, .text { text-align: left; }
.wide { overflow-x: auto; }
svg { max-width: 100%; height: auto; }
details { margin: .4rem 0; } summary { cursor: pointer; color: #55606b; font-size: 13px; }
.failure { border-left: 4px solid #b3261e; background: #fdf0ef; padding: .5rem .8rem; }
.quiet { color: #55606b; }
"""


@dataclass(frozen=True)
class Column:
    """One column of a table: its head, and how a row's cell is written."""

    head: str
    cell: Callable[[Row], str]


@dataclass(frozen=True)
class Block:
    """One section of the page; `body` is HTML."""

    name: str
    title: str
    about: str
    body: str


def value(key: str, form: str = "{}", factor: float = 1.0) -> Callable[[Row], str]:
    """Return a function that writes one figure of a row; a dash where it is missing."""

    def write(row: Row) -> str:
        found = row.get(key)
        if found is None:
            return "-"
        return form.format(found if factor == 1 else found * factor)

    return write


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Return an HTML table; columns without any figure are left out."""
    shown = [column for column in columns if any(column.cell(row) != "-" for row in rows)]
    head = "".join(f"<th>{escape(column.head)}</th>" for column in shown)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(column.cell(row))}</td>" for column in shown) + "</tr>\n" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def sources(results: Sequence[Result]) -> str:
    """Return the commands of a section, their raw JSON and what failed, as HTML."""
    parts = []
    for result in results:
        parts.append(f"<pre>{escape(result.shown)}</pre>")
        if result.failure:
            parts.append(f'<p class="failure">{escape(result.label)}: {escape(result.failure)}</p>')
            continue
        raw = escape(json.dumps(result.found, indent=1))
        summary = f"raw JSON: {escape(result.label)}, {result.seconds:.0f} s"
        parts.append(f"<details><summary>{summary}</summary><pre>{raw}</pre></details>")
    return "\n".join(parts)


def environment_table(where: dict[str, Any]) -> str:
    """Return the environment as an HTML table."""
    rows = [{"name": name, "value": str(found)} for name, found in where.items() if found is not None]
    return table(rows, [Column("", value("name")), Column("this machine", value("value"))])


def page(title: str, where: dict[str, Any], blocks: Sequence[Block]) -> str:
    """Return the whole document."""
    links = "".join(f'<a href="#{block.name}">{escape(block.title)}</a> ' for block in blocks)
    sections = "\n".join(
        f'<section>\n<h2 id="{block.name}">{escape(block.title)}</h2>\n<p>{escape(block.about)}</p>\n{block.body}\n'
        "</section>"
        for block in blocks
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<nav>{links}</nav>\n<h2 id="environment">Environment</h2>\n{environment_table(where)}\n{sections}\n'
        "</body>\n</html>\n"
    )
