"""The question files of Spec-Bench and SPEED-Bench: one JSON object a line.

    {"question_id": 81, "category": "writing", "turns": ["Compose a blog post ...", "Rewrite it ..."]}

SPEED-Bench has the same three keys beside others (sub_category, source, difficulty, multiturn), which are kept as they
are; its ids are strings. A turn may also be a list of token ids: then it is used as it is, without chat template and
begin-of-text token, so that the drift of a template or of a tokenizer cannot change the prompt.

    >>> parse('{"question_id": 1, "category": "qa", "turns": ["Why?"]}').turns
    ('Why?',)
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockffn.errors import BlockffnError

Turn = str | tuple[int, ...]

MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
SPEC_BENCH = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")  # its tasks, in its order


@dataclass(frozen=True)
class Question:
    """One question: its turns are texts, or token ids that are already a prompt."""

    id: int | str
    category: str
    turns: tuple[Turn, ...]


def read_questions(path: str | Path) -> list[Question]:
    """Read a question file; BlockffnError names the line and the reason where one is broken."""
    found: list[Question] = []
    first: dict[int | str, int] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise BlockffnError(f"{path}: expected UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            question = parse(line)
        except ValueError as error:
            raise BlockffnError(f"{path}, line {number}: {error}") from error
        if question.id in first:
            raise BlockffnError(
                f"{path}, line {number}: question_id {question.id!r} stands on line {first[question.id]} already"
            )
        first[question.id] = number
        found.append(question)
    if not found:
        raise BlockffnError(f"{path}: no question: expected one JSON object a line")
    return found


def parse(line: str) -> Question:
    """Return the question of one line; ValueError says what is wrong with it."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    for key in ("question_id", "category", "turns"):
        if key not in value:
            near = difflib.get_close_matches(key, value, n=1)
            raise ValueError(f"key {key} is missing" + (f" (found {near[0]!r})" if near else ""))
    name, category, turns = value["question_id"], value["category"], value["turns"]
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise ValueError(f"question_id: expected a number or a string, found {name!r}")
    if not isinstance(category, str) or not category:
        raise ValueError(f"category: expected a string, found {category!r}")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"turns: expected a list of at least one turn, found {turns!r}")
    return Question(name, category, tuple(_turn(i, turn) for i, turn in enumerate(turns)))


def _turn(i: int, value: Any) -> Turn:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value):
        return tuple(value)
    raise ValueError(f"turns[{i}]: expected a text or a list of token ids, found {str(value)[:40]!r}")


def select(
    questions: Sequence[Question], categories: Sequence[str] = (), limit: int | None = None, each: int | None = None
) -> list[Question]:
    """Return the questions of some categories or groups (all without any), the first `each` of each category, and the
    first `limit` of what is left; BlockffnError for a category that no question has."""
    known = sorted({question.category for question in questions} | {group(question.category) for question in questions})
    for name in categories:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise BlockffnError(f"--categories: no question has {name!r}; {hint}the file has {', '.join(known)}")
    count: Counter[str] = Counter()
    found = []
    for question in questions:
        if categories and not {question.category, group(question.category)} & set(categories):
            continue
        count[question.category] += 1
        if each is None or count[question.category] <= each:
            found.append(question)
    return found[:limit]


def group(category: str) -> str:
    """Return the group that a category is reported in: Spec-Bench's eight of MT-bench are one, any other is its own."""
    return "mt_bench" if category in MT_BENCH else category


def groups(categories: Sequence[str]) -> list[str]:
    """Return the groups of some categories: Spec-Bench's tasks in its order, then the others as they come."""
    found = dict.fromkeys(map(group, categories))
    return [name for name in SPEC_BENCH if name in found] + [name for name in found if name not in SPEC_BENCH]
