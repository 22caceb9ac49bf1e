"""Answers questions with one model twice: plainly and with drafts. Each worker process has one session.

    session = Session(Settings("model.gguf", draft="ngram"))
    records = session.answer(question)          # {"baseline": {...}, "speculative": {...}}, Spec-Bench's schema

Both runs have a context of their own on the same file, so that neither finds the other's cache, and the drafter keeps
what it learned about step times. Which run comes first changes from question to question.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockffn.errors import BlockffnError
from blockffn.eval.spec_bench.prompts import Conversation, template
from blockffn.eval.spec_bench.questions import Question
from blockffn.speculative.draft import Plan

if TYPE_CHECKING:
    from blockffn.llama import Llama

Record = dict[str, Any]
RUNS = ("baseline", "speculative")
WARM_UP = 24  # tokens that both runs generate before the first question


@dataclass(frozen=True)
class Settings:
    """What the answers depend on.

    `temperature` 0 is greedy; `max_tokens` of one turn; `plain`: no chat template; `chain`: tokens of every draft, None
    lets the policy choose by the time that steps take.
    """

    model: str
    draft: str = "ngram"
    exact: bool = False
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 1024
    plain: bool = False
    ffn: str = "union"
    chain: int | None = None

    def stamp(self) -> dict[str, Any]:
        """Return the settings as they are written beside each answer: names of files without their folders."""
        drafter = self.draft if self.draft == "ngram" else Path(self.draft).name
        return {**asdict(self), "model": Path(self.model).name, "draft": drafter}


class Session:
    """Two contexts of one model. `n_ctx` and `n_threads` as in blockffn.Llama."""

    def __init__(self, settings: Settings, n_ctx: int | None = None, n_threads: int | None = None) -> None:
        import blockffn

        self.settings = settings
        self._runs: dict[str, Llama] = {}
        self._turn = 0
        try:
            for name in RUNS:
                self._runs[name] = blockffn.Llama(
                    settings.model,
                    n_ctx=n_ctx,
                    n_threads=n_threads,
                    ffn=settings.ffn,
                    exact=settings.exact,
                    drafter=settings.draft if name == "speculative" else None,
                )
            if settings.chain is not None:
                drafted = self._runs["speculative"]
                drafted.speculate(drafted.drafter, plan=Plan(settings.chain))
            self._formatter = None if settings.plain else template(self._runs["baseline"])
            self._warm_up()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free both contexts."""
        for llm in self._runs.values():
            llm.close()

    def answer(self, question: Question) -> dict[str, Record]:
        """Return one record of each run. Errors: BlockffnError for a prompt that the context cannot hold."""
        names = RUNS if self._turn % 2 == 0 else RUNS[::-1]
        self._turn += 1
        return {name: self._record(name, question) for name in names}

    def _record(self, name: str, question: Question) -> Record:
        llm, settings = self._runs[name], self.settings
        llm.reset()  # no question finds the text of another one: its answer is the same in any order
        conversation = Conversation(llm, self._formatter)
        choice: dict[str, Any] = {
            key: [] for key in ("turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths")
        }
        details: list[dict[str, Any]] = []
        for number, turn in enumerate(question.turns):
            try:
                prompt = conversation.ask(turn)
                tokens, seconds = self._generate(llm, prompt, settings.seed + number)
            except BlockffnError as error:
                raise BlockffnError(f"question {question.id}, turn {number + 1}: {error}") from error
            statistics = llm.loop.statistics
            choice["turns"].append(conversation.answered(tokens))
            choice["decoding_steps"].append(statistics.steps)
            choice["new_tokens"].append(statistics.predicted_n)
            choice["wall_time"].append(seconds)
            choice["accept_lengths"] += [1 + accepted for accepted in statistics.accepted_by_step]
            details.append(_details(llm, len(prompt), tokens))
        stamp = settings.stamp()
        drafter = stamp["draft"] if name == "speculative" else "plain"
        return {
            "question_id": question.id,
            "category": question.category,
            "answer_id": uuid.uuid4().hex[:22],
            "model_id": f"{Path(settings.model).stem}-{drafter}-temp-{settings.temperature}",
            "choices": [{"index": 0, **choice}],
            "tstamp": time.time(),
            "metrics": {"speculative_decoding": _metrics(details, choice["accept_lengths"])},
            "details": details,
            "settings": stamp,
        }

    def _generate(self, llm: Llama, prompt: list[int], seed: int) -> tuple[list[int], float]:
        """Return the answer without the token that ended it, and the seconds from the prompt to its last token."""
        import llama_cpp

        room = len(llm.input_ids) - len(prompt)
        if room < 1:
            raise BlockffnError(
                f"the prompt has {len(prompt)} tokens, the context {len(prompt) + room}: expected room for an answer; "
                "raise --ctx-size, or leave the category out with --categories"
            )
        limit = min(room, self.settings.max_tokens)
        llm.set_seed(seed)
        tokens: list[int] = []
        start = time.perf_counter()
        generation = llm.generate(prompt, temp=self.settings.temperature, top_k=0, top_p=1.0, min_p=0.0)
        for token in generation:
            if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
                break
            tokens.append(token)
            if len(tokens) >= limit:
                break
        generation.close()
        return tokens, time.perf_counter() - start

    def _warm_up(self) -> None:
        for llm in self._runs.values():
            prompt = llm.tokenize(b"One two three one two three one two", add_bos=True)[: len(llm.input_ids) // 2]
            generation = llm.generate(prompt, temp=0.0)
            for _ in zip(range(min(WARM_UP, len(prompt))), generation, strict=False):
                pass
            generation.close()
            llm.reset()


def _details(llm: Llama, n_prompt: int, tokens: list[int]) -> dict[str, Any]:
    """Return what Spec-Bench's schema has no field for, of one turn."""
    found = llm.statistics()
    return {
        "tokens": tokens,
        "prompt_tokens": n_prompt,
        "reused_tokens": found["reused_n"],
        "prompt_ms": found["prompt_ms"],
        "decode_ms": found["predicted_ms"],
        "draft_ms": found["draft_ms"],
        "steps": found["steps"],
        "steps_without_draft": found["plain_steps"],
        "drafted": found["drafted"],
        "accepted": found["accepted"],
        "union_by_size": found["union_by_size"],
    }


def _metrics(details: list[dict[str, Any]], lengths: list[int]) -> dict[str, Any]:
    """Return the engine-neutral record of speculative decoding, by the names that vLLM and AIPerf use."""
    drafted, accepted = (sum(each[key] for each in details) for key in ("drafted", "accepted"))
    steps = len(lengths)
    histogram = Counter(length - 1 for length in lengths)
    return {
        "engine": "blockffn",
        "mean_acceptance_length": 1 + accepted / steps if steps else None,
        "draft_acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_histogram": {str(size): histogram[size] for size in sorted(histogram)},
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_steps": steps,
    }
