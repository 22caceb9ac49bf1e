"""Is speculative greedy text the plain one? Counted token for token, with any drafter, on a real draft and verify loop.

    >>> from blockffn.eval.quality.equal import equal
    >>> equal(llm, tokens, "ngram", n_tokens=100_000, exact=True).differences      # doctest: +SKIP
    0

Prompts are pieces of a text, evenly spread over it. Each is continued plainly by the likeliest token. A speculative run
then goes the same way: at every token its choice, made in the batch that verified a draft, is compared with the plain
one, and the plain one is taken, so that a difference counts once and the tokens after it are compared as well. Up to
its first difference that is the speculative text itself. A text that has one is generated once more freely, for
Spec-Bench's rule: a text counts as equal when the whole of it is, as decoded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from blockffn.errors import BlockffnError
from blockffn.eval.journal import Journal, fingerprint, text_fingerprint
from blockffn.speculative.drafter import Drafter, open_drafter
from blockffn.speculative.loop import Sampling
from blockffn.speculative.policy import Plan
from blockffn.speculative.target import end_of_text

if TYPE_CHECKING:
    from blockffn.llama import Llama

TURN = 8  # texts that are generated plainly, then followed with drafts: each change of drafter costs a little
Progress = Callable[[int, int, float], None]  # tokens done, tokens in all, differences so far


@dataclass(frozen=True)
class Equality:
    """The comparison: sums over the texts."""

    exact: bool
    drafter: str
    tokens: int  # compared
    differences: int  # tokens whose choice is another one after the same text
    texts: int
    texts_that_part: int  # with at least one difference: our rule asks for none
    texts_equal: int  # equal as decoded text: Spec-Bench's rule
    largest_lead: float | None  # of the plain choice over the next likeliest, where they differ; in logits
    steps: int
    drafted: int
    accepted: int

    @property
    def per_thousand(self) -> float:
        """Differences in a thousand tokens."""
        return 1000 * self.differences / self.tokens if self.tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain Python values, for JSON."""
        share = self.texts_equal / self.texts if self.texts else None
        return asdict(self) | {"differences_per_thousand": self.per_thousand, "share_of_texts_equal": share}


@dataclass
class Plain:
    """A plain greedy text: its tokens after the prompt, and the lead of each over the next likeliest."""

    number: int
    prompt: list[int]
    tokens: list[int]
    leads: list[float]


def equal(
    llm: Llama,
    tokens: Sequence[int],
    drafter: Any,
    n_tokens: int,
    exact: bool | None = None,
    plan: Plan | None = None,
    length: int = 256,
    prompt: int = 32,
    output: str | None = None,
    progress: Progress | None = None,
) -> Equality:
    """Compare `n_tokens` greedy tokens or a few more, in texts of `length` that continue `prompt` tokens of a text.

    drafter: as for Llama.speculate; exact: None keeps the mode of the model; plan: of every step, None chooses.
    output: a file that takes the result of each text; the same call goes on with it after an interruption.

    Errors: BlockffnError for a text with fewer pieces than texts are needed, and for a file of another run.
    """
    exact = llm.exact if exact is None else exact
    opened = open_drafter(drafter)
    if opened is None:
        raise BlockffnError("drafter: expected one to compare with plain decoding, found None")
    _check_room(llm, prompt + length)
    starts = _starts(len(tokens), prompt, -(-n_tokens // length))
    settings = {
        "model": fingerprint(llm.model_path), "text": text_fingerprint(tokens), "drafter": _named(drafter, opened),
        "exact": exact, "plan": str(plan), "tokens": n_tokens, "length": length, "prompt": prompt,
    }  # fmt: skip
    with Journal(output, settings) as journal:
        told = progress or (lambda done, total, value: None)
        told(min(_sum(journal, "tokens"), n_tokens), n_tokens, _sum(journal, "differences"))
        while (done := _sum(journal, "tokens")) < n_tokens:
            first = len(journal.records)
            turn = range(first, first + min(TURN, -(-(n_tokens - done) // length)))
            while turn.stop > len(starts):
                starts = _starts(len(tokens), prompt, 2 * len(starts), known=starts)
            prompts = [list(tokens[starts[i] : starts[i] + prompt]) for i in turn]
            for record in _turn(llm, prompts, opened, exact, plan, length, first):
                journal.add(record)
                told(min(_sum(journal, "tokens"), n_tokens), n_tokens, _sum(journal, "differences"))
        return _result(journal, exact, opened.name)


def _check_room(llm: Llama, needed: int) -> None:
    if needed > llm.n_ctx():
        raise BlockffnError(
            f"prompt and text need {needed} tokens, the context has {llm.n_ctx()}: load the model with "
            f"n_ctx={needed} or more, or take shorter texts"
        )


def _starts(n: int, prompt: int, texts: int, known: Sequence[int] = ()) -> list[int]:
    """Return where the prompts begin: `known` first, then pieces of the text that are evenly spread over it."""
    places = n - prompt + 1
    if places < texts:
        raise BlockffnError(
            f"the text has {n} tokens: {texts} prompts of {prompt} need {texts + prompt - 1}; give a longer text or "
            "compare fewer tokens"
        )
    used = set(known)
    spread = [place for place in (i * places // texts for i in range(texts)) if place not in used]
    return [*known, *spread]


def _turn(
    llm: Llama, prompts: Sequence[list[int]], drafter: Drafter, exact: bool, plan: Plan | None, length: int, first: int
) -> Iterator[dict[str, Any]]:
    """Yield the record of each prompt: plain texts first, then the same with drafts."""
    llm.speculate(None, exact)
    plain = [_generate(llm, prompt, length, first + i) for i, prompt in enumerate(prompts)]
    llm.speculate(drafter, exact, plan)
    for text in plain:
        yield _follow(llm, text)


def _generate(llm: Llama, prompt: list[int], length: int, number: int = 0) -> Plain:
    """Return the greedy text that follows a prompt, up to its end token."""
    leads: list[float] = []

    def choose(_row: int, logits: Any) -> int:
        second, first = np.partition(logits, -2)[-2:].tolist()
        leads.append(first - second)
        return int(logits.argmax())

    is_end = end_of_text(llm)
    tokens: list[int] = []
    for token in itertools.islice(llm.loop.run(prompt, Sampling(choose)), length):
        tokens.append(token)
        if is_end(token):
            break
    return Plain(number, prompt, tokens, leads)


def _follow(llm: Llama, text: Plain) -> dict[str, Any]:
    """Return what a speculative run along `text` chose otherwise."""
    chosen: list[int] = []

    def compare(_row: int, logits: Any) -> int:
        chosen.append(int(logits.argmax()))
        return text.tokens[len(chosen) - 1]

    for _ in itertools.islice(llm.loop.run(text.prompt, Sampling(compare)), len(text.tokens)):
        pass
    statistics = llm.statistics()
    places = [i for i, (found, wanted) in enumerate(zip(chosen, text.tokens, strict=True)) if found != wanted]
    same = not places
    if places:
        free = _generate(llm, text.prompt, len(text.tokens)).tokens
        same = llm.detokenize(free) == llm.detokenize(text.tokens)
    return {
        "text": text.number,
        "tokens": len(text.tokens),
        "differences": len(places),
        "places": places,
        "leads": [text.leads[i] for i in places],
        "same_text": same,
        **{name: statistics[name] for name in ("steps", "drafted", "accepted")},
    }


def _result(journal: Journal, exact: bool, drafter: str) -> Equality:
    records = journal.records
    leads = [lead for record in records for lead in record["leads"]]
    return Equality(
        exact=exact,
        drafter=drafter,
        tokens=_sum(journal, "tokens"),
        differences=_sum(journal, "differences"),
        texts=len(records),
        texts_that_part=sum(record["differences"] > 0 for record in records),
        texts_equal=sum(record["same_text"] for record in records),
        largest_lead=max(leads, default=None),
        steps=_sum(journal, "steps"),
        drafted=_sum(journal, "drafted"),
        accepted=_sum(journal, "accepted"),
    )


def _sum(journal: Journal, name: str) -> int:
    return sum(record[name] for record in journal.records)


def _named(given: Any, opened: Drafter) -> str:
    """Return a name for the settings: that of the file where the drafter is one."""
    return fingerprint(given) if isinstance(given, str) and given != "ngram" else opened.name
