"""Drafts by an EAGLE-2 head: one small decoder that reads the target's hidden states (arXiv 2406.16858).

>>> import blockffn
>>> llm = blockffn.Llama("model.gguf")                         # doctest: +SKIP
>>> llm.speculate(blockffn.EagleDrafter("head.gguf")) # doctest: +SKIP

Row i of the head holds token i + 1 and the target's state of token i (after its final norm); it guesses token i + 2.
While drafting deeper, the head's own output takes the place of the state. Rows with true states stay in the head's
cache, drafted rows are forgotten after each draft.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from blockffn.errors import BlockffnError
from blockffn.gguf_contract import ARCH_EAGLE, DRAFT_TOKENS, key
from blockffn.speculative.decoder import Decoder, Floats
from blockffn.speculative.draft import EMPTY, Draft, Tokens
from blockffn.speculative.drafter import Context, Drafter
from blockffn.speculative.native import check_same, load_model, not_attached, open_context
from blockffn.speculative.tree import AUTHORS, TreeGrower, TreeShape


class EagleDrafter(Drafter):
    """A draft head (converted with `blockffn convert --target`) beside the model that it was trained for.

    llm: the model, or None: the head is loaded when a model is given the drafter.
    tree: True for the authors' shape (3 levels, 10 children, 32 nodes), a TreeShape, or False for chains only.
    Which of chain and tree is used, and how large, is chosen by measured speed. Raises BlockffnError for a file that is
    no head, or a head of another hidden size or vocabulary.
    """

    name = "eagle"
    wants_hidden = True
    max_chain = 6

    def __init__(
        self, path: str | Path, llm: Any = None, tree: bool | TreeShape = True, n_threads: int | None = None
    ) -> None:
        self.path, self.n_threads = str(path), n_threads
        self.shape = tree if isinstance(tree, TreeShape) else AUTHORS
        self.can_tree = tree is not False
        self.max_nodes = self.shape.nodes if self.can_tree else self.max_chain
        self._model: Any = None
        self._context: Any = None
        self._attached: Decoder | None = None
        if llm is not None:
            self.attach(llm)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, None, self.shape if self.can_tree else False, self.n_threads)

    def attach(self, llm: Any) -> None:
        """Load the head (once), compare it with the model, and forget the text."""
        model = self._model or load_model(self.path)
        self._check(model, llm)
        if self._model is None:
            self._model = model
            self._ids = _draft_vocabulary(self.path)  # int32 [n_draft] draft row -> token, or None
            self._n_draft = model.n_vocab() if self._ids is None else len(self._ids)
        if self._attached is None or llm.n_ctx() != self._limit:
            self._open(llm)
        self.reset()

    def _check(self, model: Any, llm: Any) -> None:
        found = model.metadata().get("general.architecture")
        if found != ARCH_EAGLE:
            raise BlockffnError(
                f"{self.path}: expected a draft head ({ARCH_EAGLE}), found the architecture {found}; a model drafts "
                "through blockffn.ModelDrafter"
            )
        if model.n_embd() != llm.n_embd():
            raise BlockffnError(
                f"{self.path}: the head reads hidden states of {model.n_embd()} values, expected "
                f"{llm.n_embd()} as in {llm.model_path}: it was made for another model"
            )
        check_same(self.path, model, llm._model)

    def _open(self, llm: Any) -> None:
        levels = self.shape.iterations - 1  # evaluated beyond the first
        n_seq = max(1, levels * self.shape.top_k) if self.can_tree else 1
        n_batch = max(llm.context_params.n_batch, n_seq)  # llama.cpp wants room for an output of every sequence
        context = open_context(self._model, llm, self.n_threads, n_seq_max=n_seq, n_batch=n_batch)
        if self._context is not None:
            self._context.close()
        self._context = context
        capacity, n_embd = int(context.params.n_batch), self._model.n_embd()
        self._attached = Decoder(
            context.ctx, self._model.n_vocab(), n_embd, capacity, n_seq, hidden=True, n_embd_input=n_embd
        )
        self._limit = llm.n_ctx()

    @property
    def _head(self) -> Decoder:
        if self._attached is None:
            raise not_attached(self.path)
        return self._attached

    def reset(self) -> None:
        """Forget the text."""
        self._text: Tokens = np.empty(0, dtype=np.int32)
        self._rows = 0  # rows in the head's cache, all with true states
        self._pending = 0  # states that wait in the batch for their evaluation
        self._head.truncate(0)

    def begin(self, tokens: Tokens) -> None:
        """Keep the rows of the common beginning with the last text."""
        n = min(len(self._text), len(tokens))
        differs = np.flatnonzero(self._text[:n] != tokens[:n])
        common = int(differs[0]) if len(differs) else n
        self._text = tokens
        self._keep(max(0, common - 1))

    def known_states(self) -> int:
        """Return how many rows are there already, evaluated or waiting."""
        return self._rows + self._pending

    def _keep(self, rows: int) -> None:
        """Forget all rows from `rows` on, waiting ones included."""
        if self._rows + self._pending > rows:
            self._pending = 0
            if self._rows > rows:
                self._head.truncate(rows)
                self._rows = rows

    def hidden(self, text: Tokens, first: int, states: Floats) -> None:
        """Take the target's states of positions first, ... float32 [n, n_embd]; one copy, into the head's batch."""
        self._text = text
        self._keep(first)
        if first > self._rows + self._pending:
            raise BlockffnError(f"EagleDrafter: states from position {first} on, expected {self._rows + self._pending}")
        embd = self._head.batch.embd
        assert embd is not None
        while len(states):
            part = states[: len(embd) - self._pending]
            embd[self._pending : self._pending + len(part)] = part
            self._pending += len(part)
            states = states[len(part) :]
            if len(states):
                self._evaluate_pending(slice(0, 0))

    def propose(self, context: Context, n: int) -> Draft:
        """Return a chain of `n` tokens, or a tree of at most `n` nodes where the context allows it."""
        self._text = context.tokens
        n = min(n, self._limit - len(context.tokens) - self.shape.iterations)
        if n < 1 or self._pending == 0 or self._rows + self._pending != len(context.tokens) - 1:
            return EMPTY  # no room, or no true state of the last token but one that was not drafted from already
        last = self._pending - 1
        self._evaluate_pending(slice(-1, None))
        state, logits = self._head.hidden()[last], self._head.logits(1)[:, : self._n_draft]
        grow = self._tree if context.tree and self.can_tree else self._chain
        draft = grow(context, state, logits, n)
        self._head.truncate(self._rows)
        return draft

    def _evaluate_pending(self, wanted: slice) -> None:
        """Evaluate the waiting rows whose token is known, all but perhaps the last; logits for those of the slice."""
        tokens = self._text[self._rows + 1 : self._rows + 1 + self._pending]
        self._head.evaluate_text(tokens, self._rows, wanted)
        self._rows += len(tokens)
        self._pending -= len(tokens)
        embd = self._head.batch.embd
        assert embd is not None
        embd[: self._pending] = embd[len(tokens) : len(tokens) + self._pending]

    def _chain(self, context: Context, state: Floats, logits: Floats, n: int) -> Draft:
        """Draft the best token again and again. state [n_embd], logits [1, n_draft]."""
        embd = self._head.batch.embd
        assert embd is not None
        drafted: list[int] = []
        while True:
            drafted.append(self._token(int(context.scores(logits, len(drafted), self._ids)[0].argmax())))
            if len(drafted) == n:
                return Draft.chain(drafted, self.name)
            embd[0] = state
            self._head.evaluate_text(
                np.array(drafted[-1:], dtype=np.int32), self._rows + len(drafted) - 1, slice(-1, None)
            )
            state, logits = self._head.hidden()[0], self._head.logits(1)[:, : self._n_draft]

    def _tree(self, context: Context, state: Floats, logits: Floats, n: int) -> Draft:
        """Grow a tree level by level. state [n_embd], logits [1, n_draft]."""
        embd = self._head.batch.embd
        assert embd is not None
        grower = TreeGrower(TreeShape(self.shape.iterations, self.shape.top_k, n + 1))
        states = state[None]  # [rows of the last level, n_embd]
        level = grower.expand(context.scores(logits, 0, self._ids))
        for depth in range(1, self.shape.iterations):
            count, first = len(level.tokens), (depth - 1) * self.shape.top_k
            sequences = np.arange(first, first + count, dtype=np.int32)
            if depth > 1:
                for sequence, row in zip(sequences.tolist(), level.rows.tolist(), strict=True):
                    self._head.share(first - self.shape.top_k + row, sequence, self._rows)
            embd[:count] = states[level.rows]
            self._head.evaluate_level(self._tokens(level.tokens), self._rows + depth - 1, sequences)
            states = self._head.hidden().copy()
            level = grower.expand(context.scores(self._head.logits(count)[:, : self._n_draft], depth, self._ids))
        draft = grower.draft(source=self.name)
        return Draft(self._tokens(draft.tokens), draft.parents, draft.is_chain, self.name)

    def _tokens(self, rows: Tokens) -> Tokens:
        return rows if self._ids is None else self._ids[rows]

    def _token(self, row: int) -> int:
        return row if self._ids is None else int(self._ids[row])

    def draft_logits(self, hidden: Floats, tokens: Sequence[int]) -> Floats:
        """Return the head's logits, teacher forced, float32 [n, n_vocab]: row i guesses token i + 2.

        hidden: the target's states after its final norm, float32 [n, n_embd]; tokens [n + 1]. Tokens that the draft
        vocabulary lacks get -inf. The drafter forgets its text.
        """
        hidden = np.ascontiguousarray(hidden, dtype=np.float32)
        ids = np.asarray(tokens, dtype=np.int32)
        n, n_embd = hidden.shape
        if len(ids) != n + 1 or n_embd != self._head.n_embd or n > self._limit:
            raise ValueError(
                f"draft_logits: expected hidden [n, {self._head.n_embd}] and n + 1 tokens, n <= {self._limit}; "
                f"found {hidden.shape} and {len(ids)}"
            )
        self.reset()
        embd = self._head.batch.embd
        assert embd is not None
        out = np.full((n, self._head.n_vocab), -np.inf, dtype=np.float32)
        columns = np.arange(self._n_draft) if self._ids is None else self._ids
        for start in range(0, n, self._head.batch.capacity):
            part = hidden[start : start + self._head.batch.capacity]
            embd[: len(part)] = part
            self._head.evaluate_text(ids[start + 1 : start + 1 + len(part)], start, slice(None))
            out[start : start + len(part), columns] = self._head.logits(len(part))[:, : self._n_draft]
        self.reset()
        return out

    def fork(self) -> EagleDrafter:
        """Return another one with the same weights."""
        forked = copy.deepcopy(self)
        forked._model = self._model
        if self._model is not None:
            forked._ids, forked._n_draft = self._ids, self._n_draft
        return forked

    def close_context(self) -> None:
        """Free the context; `attach` makes another one."""
        if self._context is not None:
            self._context.close()
        self._context = self._attached = None

    def close(self) -> None:
        """Free the head."""
        self.close_context()
        if self._model is not None:
            self._model.close()
        self._model = None


def _draft_vocabulary(path: str) -> npt.NDArray[np.int32] | None:
    """Return the table of a cut draft vocabulary, int32 [n_draft], or None when the head scores every token."""
    field = gguf.GGUFReader(path).fields.get(key(DRAFT_TOKENS, ARCH_EAGLE))
    return None if field is None else np.array(field.contents(), dtype=np.int32)
