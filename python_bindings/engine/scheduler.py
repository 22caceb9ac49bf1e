"""The steps of an engine: who is served, what one evaluation holds, and what becomes of its rows.

A step evaluates the last token of every running text, with its draft, and pieces of the prompts of those that start,
in one llama_decode. One thread calls `step`; nothing here is locked.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

from blockffn import library
from blockffn.engine.batch import Part, SharedBatch
from blockffn.engine.job import NOTHING, Job, Slot
from blockffn.speculative.decoder import REASONS, Floats, address_function, rows_at
from blockffn.speculative.draft import PLAIN, Step

PIECE = 32  # tokens of prompts in a step that also continues texts
FULL = 1  # llama_decode: no room in the cache
GROWTH = 32  # tokens that each running text must have room for before another one starts
MOST_CELLS = 1 << 30  # their numbers start anew


class Scheduler:
    """Serves jobs in the order of their arrival with the sequences of one context."""

    def __init__(
        self, ctx: int, n_vocab: int, n_parallel: int, capacity: int, union: Callable[[], float] | None = None
    ) -> None:
        self._api = library.load()
        self.ctx, self.n_vocab, self.union = ctx, n_vocab, union
        self.n_cells = int(self._api.llama_n_ctx(ctx))
        self._memory = self._api.llama_get_memory(ctx)
        self._logits_address = address_function(self._api.llama_get_logits)
        self.batch = SharedBatch(capacity)
        self.slots = [Slot(index, index) for index in range(n_parallel)]
        self.waiting: list[Job] = []  # a heap by arrival
        self.steps = self.tokens = self.preemptions = 0
        self._union_total = 0.0
        self._cell = 0  # number of the next cell

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
        self._cancel()
        self._admit()
        while running := self.running:
            began = perf_counter()
            parts = self._fill(running)
            code = int(self._api.llama_decode(self.ctx, self.batch.native))
            if code == 0:
                self._finish_step(parts, began)
                return
            if code != FULL:
                raise RuntimeError(f"evaluating {self.batch.n} tokens: {REASONS.get(code, f'code {code}')}")
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
        used = len(np.unique(np.concatenate([slot.cells for slot in running])))
        coming = sum(len(slot.waiting) + GROWTH for slot in running)
        shared = max(_common(slot.held, job.text.tokens) for slot in running)
        return used + coming + job.text.n - shared + GROWTH <= self.n_cells

    def _place(self, job: Job, free: list[Slot]) -> None:
        """Give a job one of the free slots: what the cache already holds of its text is not evaluated again."""
        text = job.text.tokens
        common = {slot.index: _common(slot.held, text) for slot in self.slots}
        slot = max(free, key=lambda slot: (common[slot.index], -slot.cached, -slot.used))
        source = max(self.slots, key=lambda other: common[other.index])
        reuse = min(common[source.index], job.text.n - 1)
        if source is not slot and reuse > common[slot.index]:
            self._forget(slot, 0)
            self._api.llama_memory_seq_cp(self._memory, source.seq, slot.seq, 0, reuse)
        else:
            self._forget(slot, reuse)
        slot.held, slot.cells = text[:reuse], source.cells[:reuse]
        slot.job, slot.used = job, self.steps
        job.started = job.started or perf_counter()
        job.statistics.reused_n += reuse

    def _fill(self, running: list[Slot]) -> list[tuple[Slot, Part, Step]]:
        """Fill the batch: first the texts that go on, then pieces of prompts."""
        batch = self.batch
        batch.clear()
        parts = []
        for slot in running:
            if len(slot.waiting) == 1:
                step = Step(PLAIN, position=slot.cached)
                parts.append((slot, batch.add_text(slot.waiting, slot.cached, slot.seq, 1), step))
        room = min(batch.room, PIECE) if parts else batch.room
        for slot in running:
            tokens = slot.waiting
            if len(tokens) > 1 and room > 0:
                piece = tokens[:room]
                last = int(len(piece) == len(tokens))
                parts.append((slot, batch.add_text(piece, slot.cached, slot.seq, last), Step(None)))
                room -= len(piece)
        return parts

    def _finish_step(self, parts: list[tuple[Slot, Part, Step]], began: float) -> None:
        """Read the rows of the evaluation, and let every text take its tokens."""
        logits: Floats = np.empty((0, self.n_vocab), dtype=np.float32)
        if self.batch.n_outputs:
            logits = rows_at(self._logits_address(self.ctx), self.batch.n_outputs, self.n_vocab)
        else:
            self._api.llama_synchronize(self.ctx)
        seconds = perf_counter() - began
        union = None
        if self.union is not None:
            total = self.union()
            union, self._union_total = total - self._union_total, total
        self.steps += 1
        for slot, part, step in parts:
            job = slot.job
            assert job is not None
            cells = np.arange(self._cell, self._cell + part.n, dtype=np.int32)
            self._cell = (self._cell + part.n) % MOST_CELLS
            slot.cells = np.concatenate([slot.cells, cells])
            slot.held, slot.used = job.text.tokens[: slot.cached + part.n], self.steps
            if step.plan is None:
                job.statistics.prompt_n += part.n
                job.statistics.prompt_seconds += seconds
            else:
                step.verify_seconds, step.union = seconds, union
            if part.n_outputs:
                self._walk(slot, step, logits[part.output : part.output + part.n_outputs])

    def _walk(self, slot: Slot, step: Step, logits: Any) -> None:
        job = slot.job
        assert job is not None
        before = job.text.n
        try:
            ends = job.walk(step, logits, self.steps)
        except Exception as error:  # of this text: a processor of its caller, a grammar that allows nothing
            self._end(slot, "error", error)
            return
        self.tokens += job.text.n - before
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
            self._api.llama_memory_seq_rm(self._memory, slot.seq, n, -1)
            slot.held, slot.cells = (slot.held[:n], slot.cells[:n]) if n else (NOTHING, NOTHING)

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
