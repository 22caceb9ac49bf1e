"""Log-likelihoods of continuations: what multiple-choice tasks and perplexities are made of.

    >>> scorer = Scorer(llm)                                                        # doctest: +SKIP
    >>> scorer.score([([1, 5], [7]), ([1, 5], [8, 9])])                             # doctest: +SKIP
    [(-3.2, True), (-9.7, False)]

Requests that begin alike share the evaluation of what they share (tries.py), and their continuations are evaluated
side by side as sequences of one batch, whose experts are read once for all. The last text of a batch stays in the
cache, so that the next batch begins where it differs. Unless the model was given cache types, the cache is float32
and attention runs in float32, as in blockffn.evaluation.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from blockffn import library, logs
from blockffn.errors import BlockffnError
from blockffn.eval.harness.tries import Pack, Text, common, packs
from blockffn.evaluation import batch_size
from blockffn.speculative.decoder import Batch, rows_at

if TYPE_CHECKING:
    from blockffn.llama import Llama

Request = tuple[Sequence[int], Sequence[int]]  # context and continuation, token ids
Result = tuple[float, bool]  # ln p(continuation), and whether greedy decoding would write it

LEAVES = 32  # texts of a pack
NODES = 512  # tokens of a pack, unless one text alone has more: attention reads the whole pack for every token
STORE = 0  # the sequence that keeps the last text


class Scorer:
    """Scores on the weights of `llm`, in a context of its own. Free it with `close`."""

    def __init__(self, llm: Llama, max_leaves: int = LEAVES) -> None:
        self._llm = cast("Llama", weakref.proxy(llm))
        self._low = library.load()
        self.max_length = llm.n_ctx()
        self._leaves = max_leaves
        self._rows = batch_size(llm.n_vocab())  # rows of logits that llama.cpp holds at a time
        self._stored: Text = ()
        self.evaluated = 0  # tokens, since the scorer was made
        self._ctx = self._new_context()
        self._memory = self._low.llama_get_memory(self._ctx)
        self._batch = _NodeBatch(NODES, 1 + max_leaves)

    def close(self) -> None:
        """Free the native context."""
        if self._ctx is not None:
            self._low.llama_free(self._ctx)
            self._ctx = None

    def score(self, requests: Sequence[Request], done: Callable[[int, Result], None] | None = None) -> list[Result]:
        """Return the result of each request, in the order of the requests; `done` is told of each as it comes.

        A request longer than the context loses its beginning. Errors: BlockffnError for an empty context or
        continuation, for token ids outside the vocabulary and for a failed evaluation.
        """
        asked: dict[Text, list[int]] = {}  # text without its last token -> requests
        for number, request in enumerate(requests):
            asked.setdefault(self._text(number, request), []).append(number)
        results: list[Result | None] = [None] * len(requests)
        ordered = sorted(asked)
        at = 0
        for pack in packs(list(asked), self._leaves, NODES):
            inside: list[int] = []
            while at < len(ordered) and ordered[at] <= pack.texts[-1]:
                inside += asked[ordered[at]]
                at += 1
            for number, result in self._score(pack, [(number, requests[number]) for number in inside]):
                results[number] = result
                if done is not None:
                    done(number, result)
        return cast("list[Result]", results)

    def _text(self, number: int, request: Request) -> Text:
        context, continuation = request
        if not context or not continuation:
            what = "context" if not context else "continuation"
            raise BlockffnError(f"request {number}: the {what} has no tokens: expected at least one")
        text = (*context, *continuation)[-(self.max_length + 1) :]
        if min(text) < 0 or max(text) >= self._llm.n_vocab():
            raise BlockffnError(f"request {number}: expected token ids in 0..{self._llm.n_vocab() - 1}")
        return tuple(map(int, text[:-1]))

    def _score(self, pack: Pack, requests: Sequence[tuple[int, Request]]) -> Iterator[tuple[int, Result]]:
        """Evaluate a pack and yield (number, result) of the requests in it, which are sorted as its texts are."""
        nodes, owners, targets = [], [], []
        leaf = 0
        for index, (number, request) in enumerate(requests):
            text, continuation = self._text(number, request), request[1]
            while pack.texts[leaf][: len(text)] != text:
                leaf += 1
            scored = min(len(continuation), len(text))
            nodes.append(pack.path(leaf)[len(text) - scored : len(text)])
            owners.append(np.full(scored, index))
            targets.append(np.asarray(continuation[-scored:], np.int64))
        node, owner, target = (np.concatenate(part) for part in (nodes, owners, targets))
        sums, greedy = np.zeros(len(requests)), np.ones(len(requests), np.bool_)
        for rows, logits in self._evaluate(pack, np.unique(node)):
            mine = np.flatnonzero((node >= rows[0]) & (node <= rows[-1]))
            row = np.searchsorted(rows, node[mine])
            top = logits.max(axis=1, keepdims=True)  # [rows, 1]
            total = np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64))  # [rows]
            value = logits[row, target[mine]]
            np.add.at(sums, owner[mine], (value - top[row, 0]).astype(np.float64) - total[row])
            np.logical_and.at(greedy, owner[mine], logits.argmax(axis=1)[row] == target[mine])
        for index, (number, _) in enumerate(requests):
            yield number, (float(sums[index]), bool(greedy[index]))

    def _evaluate(
        self, pack: Pack, wanted: npt.NDArray[np.int32]
    ) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        """Evaluate the nodes that are not in the cache; yield the wanted ones with their logits [rows, n_vocab]."""
        known = self._recall(pack, int(pack.depths[wanted].min()))
        missing = np.flatnonzero(pack.depths >= known).astype(np.int32)
        output = np.isin(missing, wanted)
        start = 0
        while start < len(missing):
            end = min(start + NODES, len(missing))
            too_many = np.flatnonzero(np.cumsum(output[start:end]) > self._rows)
            if len(too_many):
                end = start + int(too_many[0])
            part = missing[start:end]
            self._batch.set_nodes(pack, part, output[start:end])
            with logs.collect() as lines:
                status = self._low.llama_decode(self._ctx, self._batch.native)
            if status != 0:
                self._low.llama_memory_clear(self._memory, True)
                self._stored = ()
                raise BlockffnError(f"evaluation of {len(part)} tokens failed: {logs.reason(lines) or status}")
            self.evaluated += len(part)
            rows = part[output[start:end]]
            if len(rows):
                yield rows, rows_at(self._address(), len(rows), self._llm.n_vocab())
            start = end
        self._keep(pack, known)

    def _address(self) -> int:
        return ctypes.cast(self._low.llama_get_logits(self._ctx), ctypes.c_void_p).value or 0

    def _recall(self, pack: Pack, first_row: int) -> int:
        """Give every leaf what all of them share with the stored text, but no token whose logits are wanted."""
        known = min(first_row, common(self._stored, pack.texts[0]), common(self._stored, pack.texts[-1]))
        self._low.llama_memory_seq_rm(self._memory, STORE, known, -1)
        for leaf in range(len(pack.texts)):
            self._low.llama_memory_seq_cp(self._memory, STORE, 1 + leaf, 0, known)
        self._stored = self._stored[:known]
        return known

    def _keep(self, pack: Pack, known: int) -> None:
        """Store the last text, forget the others."""
        last = len(pack.texts)
        self._low.llama_memory_seq_cp(self._memory, last, STORE, known, -1)
        for leaf in range(len(pack.texts)):
            self._low.llama_memory_seq_rm(self._memory, 1 + leaf, -1, -1)
        self._stored = pack.texts[-1]

    def _new_context(self) -> Any:
        low, llm = self._low, self._llm
        params = low.llama_context_params.from_buffer_copy(llm.context_params)
        params.n_ctx = self.max_length + NODES
        params.n_batch = params.n_ubatch = NODES
        params.n_seq_max, params.kv_unified = 1 + self._leaves, True
        params.n_outputs_max = min(NODES, self._rows)
        params.pooling_type, params.embeddings = low.LLAMA_POOLING_TYPE_NONE, False
        if llm.default_cache:
            params.type_k = params.type_v = low.GGML_TYPE_F32
        with logs.collect() as lines:
            ctx = low.llama_init_from_model(llm.model, params)
        if not ctx:
            cause = logs.reason(lines) or "out of memory?"
            raise BlockffnError(f"no context for {params.n_ctx} tokens: {cause}; choose a smaller n_ctx")
        llm.apply_adapters(ctx)
        return ctx


class _NodeBatch(Batch):
    """A batch of nodes of a tree, each in the sequences of the leaves below it; leaf i is sequence 1 + i."""

    def set_nodes(self, pack: Pack, nodes: npt.NDArray[np.int32], output: npt.NDArray[np.bool_]) -> None:
        """Hold some nodes of a pack; logits for those where `output` is true."""
        n = len(nodes)
        self.token[:n], self.pos[:n] = pack.tokens[nodes], pack.depths[nodes]
        first, last = pack.first[nodes], pack.last[nodes]
        self.n_seq_id[:n] = last - first + 1
        widest = int(self.n_seq_id[:n].max())
        self.seq_id[:n, :widest] = (1 + first)[:, None] + np.arange(widest, dtype=np.int32)
        self.logits[:n] = output
        self.native.n_tokens = n
