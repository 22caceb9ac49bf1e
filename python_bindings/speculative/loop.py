"""The draft and verify loop: one generator of tokens for plain, chain and tree decoding.

Every step evaluates the last verified token together with a draft, then walks down the draft: the next token is
sampled from the target's logits at the current node; while the draft holds that token, the walk goes on. So each
token comes from the target's own distribution, and whatever has a memory (penalties, grammar, logits processors,
the random generator) sees verified tokens only, one after another, exactly as in plain decoding.

A step is one record (draft.py): `_step` opens it, `_walk` fills it, `_close` hands it to the policy and the statistics.

`blockffn.llama` puts this loop under llama_cpp.Llama; tests/test_speculative_loop.py drives it directly.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from blockffn.speculative.decoder import Decoder, Floats
from blockffn.speculative.draft import ROOT, Step, Tokens, children_of
from blockffn.speculative.drafter import Context, Drafter
from blockffn.speculative.policy import Policy
from blockffn.speculative.rows import KeptRows
from blockffn.speculative.sampling import Draw
from blockffn.speculative.stats import Statistics


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: `sample(row of the batch, logits [n_vocab])`, which tokens end the text, when to stop."""

    sample: Callable[[int, Floats], int]
    is_end: Callable[[int], bool] = lambda token: False
    stop: Callable[[Tokens, Floats], bool] | None = None
    draw: Draw | None = None  # whose noise drafters share


class Text:
    """The verified text of one generation, in memory of its own: drafters keep views of it."""

    def __init__(self, prompt: Sequence[int], limit: int) -> None:
        self._memory = np.empty(limit + 1, dtype=np.int32)
        self.n = 0
        self.append(prompt)

    def append(self, tokens: Sequence[int]) -> None:
        """Add verified tokens; RuntimeError when the context cannot hold them."""
        if self.n + len(tokens) > len(self._memory):
            raise RuntimeError(f"the context is full: {self.n + len(tokens)} tokens in {len(self._memory) - 1}")
        self._memory[self.n : self.n + len(tokens)] = tokens
        self.n += len(tokens)

    def add(self, token: int) -> None:
        """Add one verified token; RuntimeError when the context cannot hold it."""
        if self.n == len(self._memory):
            raise RuntimeError(f"the context is full: {self.n + 1} tokens in {self.n - 1}")
        self._memory[self.n] = token
        self.n += 1

    @property
    def tokens(self) -> Tokens:
        """The text, int32 [n]; never changes where it was once verified."""
        return self._memory[: self.n]

    @property
    def room(self) -> int:
        """How many more tokens can be evaluated after the last one."""
        return len(self._memory) - 1 - self.n


class Loop:
    """Generates with one target and one drafter.

    `state` is the llama_cpp.Llama whose n_tokens and input_ids always describe the verified part of the cache.
    `union` returns the number of experts read so far, a mean over the layers.
    """

    def __init__(
        self,
        state: Any,
        target: Decoder,
        drafter: Drafter,
        policy: Policy,
        union: Callable[[], float] | None = None,
    ) -> None:
        self.state, self.target, self.drafter, self.policy, self.union = state, target, drafter, policy, union
        self.statistics = Statistics()
        self.kept: KeptRows | None = None  # where the logits that tokens are sampled from are copied to, if anywhere
        self.row: Floats | None = None  # the logits of the last verified token, [n_vocab], until the next evaluation
        self._logits: Floats = np.empty((0, 0), dtype=np.float32)  # outputs of the last evaluation, [rows, n_vocab]
        self._batch_row = 0  # the row of the batch that the first of them belongs to
        self._union_total = 0.0
        self._open: tuple[Text, Step] | None = None  # the step whose draft is being walked
        self._owner: Text | None = None  # the text of the generation that may go on
        self._accounted = 0.0  # the clock where the last step was closed: what follows belongs to the next one

    def run(
        self, prompt: Sequence[int], sampling: Sampling, kept: KeptRows | None = None
    ) -> Generator[int, Sequence[int] | None, None]:
        """Yield the tokens that follow `prompt` until the context is full; it may be closed at any token.

        `kept` takes a copy of the logits that the tokens are sampled from.
        """
        self.settle()
        text = Text(prompt, min(len(self.state.input_ids), self.state.n_ctx()))
        self.kept, self._owner = kept, text
        self._begin(text.tokens)
        step = self._text_step()
        while True:
            sent = yield from self._walk(text, step, sampling)
            if sent is None or (text.room < 0 and not sent):
                return  # stopped, or the context cannot take the last token
            if sent:
                text.append(sent)
                self.evaluate(text.tokens[self.state.n_tokens :], text.tokens)
                step = self._text_step()
            else:
                step = self._step(text, sampling.draw)

    def settle(self) -> None:
        """End the step of a generator that was left at a token: the cache then holds the verified text and no more.

        The generator may go on.
        """
        if self._open is not None:
            text, step = self._open
            self._close(text, step, perf_counter())

    def end(self) -> None:
        """End the generation that was left at a token: the cache is about to be changed from outside."""
        self.settle()
        self._owner = None

    def abandon(self) -> None:
        """Let go of the cache, which is about to be freed: a generator that is still open must not touch it."""
        self._open = self._owner = None

    def evaluate(self, tokens: Tokens, text: Tokens | None = None) -> None:
        """Append `tokens` int32 [n], n > 0, to the verified text in batches; the last one's logits are kept.

        `text` is the whole verified text, where it is already known in memory that does not change.
        """
        self.settle()
        if text is None:
            self._owner = None
        state, target, kept = self.state, self.target, self.kept
        everything = kept is not None and kept.prompt
        target.truncate(state.n_tokens)
        for start in range(0, len(tokens), target.batch.capacity):
            part = tokens[start : start + target.batch.capacity]
            last = slice(-1, None) if start + len(part) == len(tokens) else slice(0, 0)
            target.evaluate_text(part, state.n_tokens, slice(None) if everything else last)
            if kept is not None and everything:
                kept.put(state.n_tokens, target.logits(len(part)))
            if self.drafter.wants_hidden:
                known = np.concatenate([state.input_ids[: state.n_tokens], tokens[start:]]) if text is None else text
                self.drafter.hidden(known, state.n_tokens, target.hidden())
            state.input_ids[state.n_tokens : state.n_tokens + len(part)] = part
            state.n_tokens += len(part)
        self._logits = target.logits(len(part) if everything else 1)[-1:]
        self._batch_row, self.row = len(part) - 1, self._logits[0]

    def _begin(self, prompt: Tokens) -> None:
        """Reuse the part of the cache that `prompt` begins with, evaluate the rest."""
        started = perf_counter()
        state = self.state
        self.statistics = Statistics()
        self.policy.begin()
        known = state.input_ids[: min(state.n_tokens, len(prompt) - 1)]
        differs = np.flatnonzero(known != prompt[: len(known)])
        reuse = int(differs[0]) if len(differs) else len(known)
        self.drafter.begin(prompt)
        self.target.begin()
        if self.drafter.wants_hidden:
            reuse = min(reuse, self.drafter.known_states())
        if self.kept is not None:
            reuse = min(reuse, self.kept.begin(len(prompt)))
        state.n_tokens = reuse = self.target.rewind(reuse)
        self.evaluate(prompt[reuse:], prompt)
        self.statistics.prompt_n, self.statistics.reused_n = len(prompt) - reuse, reuse
        self.statistics.prompt_seconds = perf_counter() - started

    def _text_step(self) -> Step:
        """Return the open step of a text just evaluated: no draft, and the evaluation is in none of its parts."""
        self._union_total = self.union() if self.union else 0.0
        self._accounted = perf_counter()
        return Step(None)

    def _step(self, text: Text, draw: Draw | None) -> Step:
        """Plan, draft and evaluate: the last token of `text` is the root. Returns the open step."""
        step = Step(self.policy.plan(), position=text.n - 1)
        assert step.plan is not None
        step.asked = min(step.plan.nodes, text.room, self.target.batch.capacity - 1)
        t1 = perf_counter()
        if step.asked > 0:
            context = Context(text.tokens, step.plan.tree, draw)
            step.draft = self.drafter.propose(context, step.asked).first(step.asked)
        t2 = perf_counter()
        root = int(text.tokens[-1])
        self.target.evaluate_draft(root, step.draft, step.position)
        self._logits = self.target.logits(1 + step.nodes)  # waits for the end of the evaluation
        t3 = perf_counter()
        self._batch_row = 0
        self.state.input_ids[step.position] = root
        self.state.n_tokens = step.position + 1
        if self.union is not None:
            total = self.union()
            step.union, self._union_total = total - self._union_total, total
        step.draft_seconds, step.verify_seconds = t2 - t1, t3 - t2
        step.loop_seconds, self._accounted = t1 - self._accounted, t3
        return step

    def _walk(
        self, text: Text, step: Step, sampling: Sampling
    ) -> Generator[int, Sequence[int] | None, Sequence[int] | None]:
        """Yield the tokens of one evaluation; return what the caller sent, None to end the generation.

        Closing the generator in the middle keeps what was verified so far.
        """
        state, logits, batch_row, draft = self.state, self._logits, self._batch_row, step.draft
        started = self._accounted
        tokens = draft.tokens.tolist()
        children = None if draft.is_chain else children_of(draft)
        node = ROOT
        mine = self._open = (text, step)
        try:
            while True:
                sample_started = perf_counter()
                row = self.row = logits[node + 1]
                if self.kept is not None:
                    self.kept.put(state.n_tokens - 1, row)
                token = sampling.sample(batch_row + 1 + node, row)
                sampled = perf_counter()
                step.sample_seconds += sampled - sample_started
                if sampling.stop is not None and sampling.stop(state.input_ids[: state.n_tokens], row):
                    return None
                text.add(token)
                child = _child(children, tokens, node, token)
                step.complete = child is None
                step.loop_seconds += perf_counter() - sampled + sample_started - started
                step.tokens += 1
                try:
                    sent = yield token
                finally:
                    started = perf_counter()  # the caller's time is left out, also when it closes the generator
                if self._owner is not text:
                    raise RuntimeError("this generation was ended by another one on the same model, or by its reset")
                if self._open is not mine:  # settled meanwhile
                    self._accounted = started
                    return sent or ()
                if sent or child is None or sampling.is_end(token):
                    return sent or ()
                step.path.append(child)
                node = child
                state.input_ids[state.n_tokens] = token
                state.n_tokens += 1
        finally:
            if self._open is mine:
                self._close(text, step, started)

    def _close(self, text: Text, step: Step, started: float) -> None:
        """Keep the accepted path, forget the rest of the draft; policy, statistics and drafter learn from the step.

        `started`: the clock since when the loop's own time was not booked.
        """
        self._open = None
        if step.plan is not None:
            if self.drafter.wants_hidden:
                states, path = self.target.hidden(), step.path
                rows = states[: 1 + len(path)] if step.draft.is_chain else states[[0, *(1 + node for node in path)]]
                self.drafter.hidden(text.tokens, step.position, rows)
            self.target.keep(step.path, step.nodes)
            if step.complete:
                self.drafter.observe(step.nodes, step.accepted)
        self._accounted = perf_counter()
        step.loop_seconds += self._accounted - started
        self.policy.learn(step)
        self.statistics.add(step)
        self.statistics.switched_off, self.statistics.switched_off_reason = self.policy.switched_off, self.policy.reason


def _child(children: dict[tuple[int, int], int] | None, tokens: list[int], node: int, token: int) -> int | None:
    """Return the child of `node` that holds `token`."""
    if children is not None:
        return children.get((node, token))
    following = node + 1
    return following if following < len(tokens) and tokens[following] == token else None
