"""The steps of an engine: who is served, what one evaluation holds, and what becomes of its rows.

A step evaluates the last token of every running text, with its draft, and pieces of the prompts of those that start,
in one llama_decode. One thread calls `step`; nothing here is locked.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from blockffn import library
from blockffn.engine.batch import Part, SharedBatch
from blockffn.engine.budget import Budget
from blockffn.engine.cache import SharedCache
from blockffn.engine.job import NOTHING, Job, Slot
from blockffn.speculative.decoder import Floats, Views, address_function
from blockffn.speculative.draft import Plan, Step, Tokens
from blockffn.speculative.drafter import Context, Drafter

PIECE = 32  # tokens of prompts in a step that also continues texts, where no more texts start than go on
GROWTH = 32  # tokens that each running text must have room for before another one starts
Parts = list[tuple[Slot, Part, Step]]


@dataclass(frozen=True)
class Shape:
    """Sizes: of the vocabulary, of hidden states, and of the largest batch."""

    n_vocab: int
    n_embd: int
    n_batch: int


class Outputs(NamedTuple):
    """What an evaluation gives: logits float32 [outputs, n_vocab], the best token of each, states [tokens, n_embd]."""

    logits: Floats
    best: list[int]
    states: Floats


class Scheduler:
    """Serves jobs in the order of their arrival. `drafters`: none, or one for each place."""

    def __init__(
        self,
        cache: SharedCache,
        shape: Shape,
        budget: Budget,
        drafters: Sequence[Drafter] = (),
        union: Callable[[], float] | None = None,
    ) -> None:
        self.cache, self.shape, self.budget, self.union = cache, shape, budget, union
        self.batch = SharedBatch(shape.n_batch)
        self.slots = [Slot(index) for index in range(cache.n_seq)]
        for slot, drafter in zip(self.slots, drafters, strict=False):
            slot.drafter = drafter
        self.waiting: list[Job] = []  # a heap by arrival
        self.steps = self.tokens = self.drafted = self.accepted = self.preemptions = 0
        self.seconds = self.loop_seconds = 0.0  # of steps, and of these outside evaluation, drafters and samplers
        self._union_total = 0.0
        self._cell = 0  # number of the next cell
        self._read_states = any(drafter.wants_hidden for drafter in drafters)
        self._views = Views()
        self._set_outputs()

    def _set_outputs(self) -> None:
        """Ask for hidden states where drafters want them, and find the places of the outputs."""
        api = library.load()
        from llama_cpp import llama_cpp_ext

        llama_cpp_ext.llama_set_embeddings_nextn(self.cache.ctx, self._read_states, False)
        self._logits_address = address_function(api.llama_get_logits)
        self._states_address = address_function(llama_cpp_ext.llama_get_embeddings_nextn)
        self._synchronize = api.llama_synchronize

    @property
    def running(self) -> list[Slot]:
        """The slots with a text, the earliest first."""
        return sorted((slot for slot in self.slots if slot.job is not None), key=lambda slot: slot.job)  # type: ignore[arg-type, return-value]

    @property
    def idle(self) -> bool:
        """Is there nothing to do?"""
        return not self.waiting and all(slot.job is None for slot in self.slots)

    def step(self) -> None:
        """Serve everyone once."""
        began = perf_counter()
        self._cancel()
        self._admit()
        while running := self.running:
            drafting = self._propose(running)
            parts = self._fill(running)
            evaluated = perf_counter()
            if self.cache.evaluate(self.batch.native):
                outputs = self._outputs()
                seconds = perf_counter() - evaluated
                sampling = self._finish_step(parts, outputs, seconds, drafting)
                took = perf_counter() - began
                self.seconds += took
                self.loop_seconds += took - seconds - drafting - sampling
                return
            self._make_room(running)

    def _cancel(self) -> None:
        for slot in self.running:
            if slot.job is not None and slot.job.stream.cancelled:
                self._end(slot, "cancelled")
        if any(job.stream.cancelled for job in self.waiting):
            for job in [job for job in self.waiting if job.stream.cancelled]:
                self.waiting.remove(job)
                job.stream.finish("cancelled", job.summary())
            heapq.heapify(self.waiting)

    def _admit(self) -> None:
        """Give free slots to those who wait."""
        while self.waiting:
            free = [slot for slot in self.slots if slot.job is None]
            if not free or not self._fits(self.waiting[0]):
                return
            self._place(heapq.heappop(self.waiting), free)

    def _fits(self, job: Job) -> bool:
        """Is there room for this text beside those that run, and for a while of their growth?

        Old texts make room, so only what runs counts. A text that runs alone is always served.
        """
        running = [slot for slot in self.slots if slot.job is not None]
        if not running:
            return True
        used = len(set[int]().union(*(slot.cells for slot in running)))
        coming = sum(len(slot.waiting) + GROWTH for slot in running)
        shared = max(_common(slot.held, job.text.tokens) for slot in running)
        return used + coming + job.text.n - shared + GROWTH <= self.cache.n_cells

    def _place(self, job: Job, free: list[Slot]) -> None:
        """Give a job one of the free slots: what the cache already holds of its text is not evaluated again."""
        text = job.text.tokens
        common = {slot.index: self._reusable(slot, text) for slot in self.slots}
        slot = max(free, key=lambda slot: (common[slot.index], -slot.cached, -slot.used))
        source = max(self.slots, key=lambda other: common[other.index])
        reuse = common[source.index]
        drafter = slot.drafter
        if drafter is not None:
            drafter.begin(text)
            if drafter.wants_hidden:  # what it has not read must be evaluated again
                source, reuse = slot, min(common[slot.index], drafter.known_states())
        if source is not slot and reuse > common[slot.index]:
            self._forget(slot, 0)
            self.cache.share(source.index, slot.index, reuse)
        else:
            self._forget(slot, reuse)
        slot.held, slot.cells = text[:reuse], source.cells[:reuse]
        slot.job, slot.used = job, self.steps
        job.started = job.started or perf_counter()
        job.statistics.reused_n += reuse

    def _reusable(self, slot: Slot, text: Tokens) -> int:
        """Return how many tokens of a text need no evaluation after those that a slot holds: all but the last."""
        return self.cache.reusable(slot.index, _common(slot.held, text[:-1]), slot.cached)

    def _propose(self, running: list[Slot]) -> float:
        """Let the texts that go on draft; return the seconds that it took."""
        began = perf_counter()
        going = [slot for slot in running if len(slot.waiting) == 1]
        jobs = [slot.job for slot in going if slot.job is not None]
        room = self.batch.capacity - len(running)
        lengths = self.budget.plan([job.record for job in jobs]) if self.slots[0].drafter else [0] * len(jobs)
        for slot, job, planned in zip(going, jobs, lengths, strict=True):
            asked = min(planned, job.text.room, room)
            slot.step = step = Step(Plan(planned), asked, position=slot.cached)
            if asked > 0 and slot.drafter is not None:
                started = perf_counter()
                context = Context(job.text.tokens, False, job.draw)
                step.draft = slot.drafter.propose(context, asked).first(asked)
                step.draft_seconds = perf_counter() - started
                room -= step.nodes
        return perf_counter() - began

    def _fill(self, running: list[Slot]) -> Parts:
        """Fill the batch: first the texts that go on, with their drafts, then pieces of prompts."""
        batch, parts = self.batch, []
        batch.clear()
        for slot in running:
            waiting = slot.waiting
            if len(waiting) == 1:
                tokens = waiting.tolist() + slot.step.draft.tokens.tolist()
                parts.append((slot, batch.add_text(tokens, slot.cached, slot.index, len(tokens)), slot.step))
        room = batch.room
        if parts:  # the more texts wait for each that goes on, the longer may this one wait
            room = min(room, PIECE * math.ceil((len(running) - len(parts)) / len(parts)))
        for slot in running:
            tokens = slot.waiting
            if len(tokens) > 1 and room > 0:
                piece = tokens[:room].tolist()
                last = int(len(piece) == len(tokens))
                part = batch.add_text(piece, slot.cached, slot.index, last)
                parts.append((slot, part, Step(None, position=slot.cached)))
                room -= len(piece)
        batch.close()
        return parts

    def _outputs(self) -> Outputs:
        """Return what the evaluation gives, once it has ended."""
        ctx, batch, shape = self.cache.ctx, self.batch, self.shape
        self._synchronize(ctx)
        logits = self._views.at(self._logits_address(ctx), batch.n_outputs, shape.n_vocab)
        states = self._views.at(self._states_address(ctx), batch.n * self._read_states, shape.n_embd)
        return Outputs(logits, logits.argmax(axis=1).tolist(), states)

    def _finish_step(self, parts: Parts, outputs: Outputs, seconds: float, drafting: float) -> float:
        """Let every text take its tokens from the rows of the evaluation; return the seconds of sampling."""
        union = None
        if self.union is not None:
            total = self.union()
            union, self._union_total = total - self._union_total, total
        self.steps += 1
        for slot, part, step in parts:
            job = slot.job
            assert job is not None
            self._count_cells(slot, part.n)
            if step.plan is None:
                job.statistics.prompt_n += part.n
                job.statistics.prompt_seconds += seconds
            else:
                step.verify_seconds, step.union = seconds, union
            if part.n_outputs:
                self._walk(slot, step, outputs, slice(part.output, part.output + part.n_outputs))
            kept = part.n - step.nodes + step.accepted
            if self._read_states and slot.drafter is not None:
                slot.drafter.hidden(job.text.tokens, step.position, outputs.states[part.row : part.row + kept])
            slot.held = job.text.tokens[: step.position + kept]
            if kept < part.n:
                self.cache.forget(slot.index, slot.cached)
            del slot.cells[slot.cached :]
        drafts = [step for _, _, step in parts if step.plan is not None]
        if len(drafts) == len(parts):
            self.budget.learn_step(self.batch.n, seconds, sum(step.asked for step in drafts), drafting)
        return sum(step.sample_seconds for _, _, step in parts)

    def _count_cells(self, slot: Slot, n: int) -> None:
        """Give a slot `n` more cells."""
        slot.cells.extend(range(self._cell, self._cell + n))
        slot.used = self.steps
        self._cell += n

    def _walk(self, slot: Slot, step: Step, outputs: Outputs, rows: slice) -> None:
        """Let a text take its tokens; policy and drafter learn what became of the draft."""
        job = slot.job
        assert job is not None
        try:
            ends = job.walk(step, outputs.logits[rows], outputs.best[rows], self.steps)
        except Exception as error:  # of this text: a processor of its caller, a grammar that allows nothing
            self._end(slot, "error", error)
            return
        self.tokens += step.tokens
        self.drafted += step.nodes
        self.accepted += step.accepted
        if step.asked and step.complete:
            self.budget.learn_draft(job.record, step.asked, step.nodes, step.accepted)
            if slot.drafter is not None:
                slot.drafter.observe(step.nodes, step.accepted)
        if ends is not None:
            self._end(slot, ends)

    def _end(self, slot: Slot, reason: str, error: BaseException | None = None) -> None:
        """End the text of a slot; the cache remembers it."""
        job, slot.job = slot.job, None
        assert job is not None
        if job.sampler is not None:
            job.sampler.close()
        job.stream.finish(reason, job.summary(), error)

    def _make_room(self, running: list[Slot]) -> None:
        """Forget an old text; where there is none, preempt the youngest one, and end the only one."""
        old = [slot for slot in self.slots if slot.job is None and slot.cached]
        if old:
            self._forget(min(old, key=lambda slot: slot.used), 0)
            return
        youngest = running[-1]
        if len(running) == 1:
            self._end(youngest, "length")
            return
        job, youngest.job = youngest.job, None
        assert job is not None
        job.preempted += 1
        self.preemptions += 1
        self._forget(youngest, 0)
        heapq.heappush(self.waiting, job)

    def _forget(self, slot: Slot, n: int) -> None:
        """Forget the positions of a slot from `n` on."""
        if slot.cached > n:
            self.cache.forget(slot.index, n)
            slot.held, slot.cells = (slot.held[:n], slot.cells[:n]) if n else (NOTHING, [])

    def end_all(self, reason: str, error: BaseException | None = None) -> None:
        """End every text."""
        for slot in self.running:
            self._end(slot, reason, error)
        for job in self.waiting:
            job.stream.finish(reason, job.summary(), error)
        self.waiting.clear()


def _common(held: Any, text: Any) -> int:
    """Return the length of the common beginning."""
    n = min(len(held), len(text))
    differs = np.flatnonzero(held[:n] != text[:n])
    return int(differs[0]) if len(differs) else n
