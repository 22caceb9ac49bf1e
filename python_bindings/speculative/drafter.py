"""The interface of a drafter: whatever guesses the next tokens.

A drafter sees only verified text. The loop calls, for each generation::

    drafter.begin(prompt)                  # the text of a new generation, which may continue the last one
    draft = drafter.propose(context, 4)    # at most 4 nodes after the last token of context.tokens
    drafter.observe(len(draft), accepted)  # how many of them were right

    >>> import numpy as np
    >>> from blockffn.speculative.drafter import Context, Drafter
    >>> len(Drafter().propose(Context(np.array([1, 2, 3], dtype=np.int32)), 4))
    0
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blockffn import _capi, gguf_contract
from blockffn.errors import BlockffnError
from blockffn.speculative.draft import EMPTY, Draft, Tokens
from blockffn.speculative.sampling import Draw


@dataclass
class Context:
    """What a drafter may look at."""

    tokens: Tokens  # int32 [n], the verified text; the last token is not evaluated by the target yet
    tree: bool = False  # may the draft be a tree?
    draw: Draw | None = None  # how the target draws, where its noise is shared; None: guess the likeliest tokens

    def scores(self, logits: npt.NDArray[np.float32], ahead: int, ids: Any = None) -> npt.NDArray[np.float32]:
        """Return scores [rows, n] whose largest is the guess of the token `ahead` places after the text (from 0)."""
        return logits if self.draw is None else self.draw.scores(logits, len(self.tokens) + ahead, ids)


class Drafter:
    """Base of all drafters: proposes nothing. Subclasses override what they need.

    A drafter serves one model at a time, the last one that it was given to, which closes it with itself. One that was
    replaced by another drafter is left to its owner. One that holds native memory defines `__reduce__`, so
    that copies of the model get a fresh one.
    """

    name = "none"
    can_tree = False  # may `propose` return a tree when the context allows it?
    max_nodes = 16  # the largest draft that is worth asking for
    max_chain = 16  # the longest chain among them
    wants_hidden = False  # does `hidden` have to be called?
    serves: int | None = None  # id of the model that it was given to last; set by the model

    def attach(self, llm: Any) -> None:
        """Meet the target, a blockffn.Llama, before the first generation with it."""

    def reset(self) -> None:
        """Forget everything."""

    def begin(self, tokens: Tokens) -> None:
        """Start a generation whose verified text so far is `tokens`, int32 [n]."""

    def propose(self, context: Context, n: int) -> Draft:
        """Return a draft of at most `n` nodes that may follow `context.tokens`."""
        return EMPTY

    def observe(self, proposed: int, accepted: int) -> None:
        """Learn that `accepted` tokens of a draft of `proposed` nodes were right."""

    def hidden(self, text: Tokens, first: int, states: npt.NDArray[np.float32]) -> None:
        """Receive the target's states after its final norm, float32 [n, n_embd], of verified positions first, ...

        `text` int32 is the verified text as far as it is known: usually one token longer than the states.
        """

    def known_states(self) -> int:
        """Return for how many first tokens of the text of `begin` the states need not be passed again."""
        return 0

    def fork(self) -> Drafter:
        """Return a drafter of the same kind for another text, not attached yet; it shares weights with this one."""
        return copy.deepcopy(self)

    def close_context(self) -> None:
        """Free what belongs to the text, and leave weights, which others may share."""

    def close(self) -> None:
        """Free what the drafter holds; `Llama.close` calls it. It may be attached again."""


class LlamaDraftModelDrafter(Drafter):
    """Asks a llama_cpp.llama_speculative.LlamaDraftModel, such as LlamaPromptLookupDecoding, for chains."""

    name = "draft_model"

    def __init__(self, draft_model: Callable[..., Tokens]) -> None:
        if not callable(draft_model):
            raise BlockffnError(
                f"draft_model: expected a llama_cpp.llama_speculative.LlamaDraftModel, found {draft_model!r}; a GGUF "
                "file drafts as drafter=blockffn.ModelDrafter(path)"
            )
        self.draft_model = draft_model
        self.max_nodes = self.max_chain = int(getattr(draft_model, "num_pred_tokens", Drafter.max_nodes))

    def propose(self, context: Context, n: int) -> Draft:
        """Return the first `n` tokens of its proposal."""
        return Draft.chain(np.asarray(self.draft_model(context.tokens), dtype=np.int32)[:n], self.name)


DrafterLike = Drafter | str | Path  # a drafter, "ngram", or the file of a draft model or an EAGLE head


def open_drafter(what: DrafterLike | Sequence[DrafterLike] | None, tree: bool | None = None) -> Drafter | None:
    """Return the drafter that `what` names; a list gives the first of them that has a proposal (`Combination`).

    tree: may the draft be a tree? None leaves that to the drafter: EAGLE heads draft trees. Nothing is loaded before a
    model is given the drafter, but the header of a file. Raises BlockffnError for a file that is missing or no GGUF,
    and for trees of what drafts chains.
    """
    from blockffn.speculative.combination import Combination
    from blockffn.speculative.eagle import EagleDrafter
    from blockffn.speculative.model import ModelDrafter
    from blockffn.speculative.ngram import NGramDrafter

    if what is None or isinstance(what, Drafter):
        return what
    if isinstance(what, Sequence) and not isinstance(what, str):
        opened = [open_drafter(part, tree) for part in what]
        if not opened:
            raise BlockffnError("drafter: expected at least one drafter, found an empty list")
        return Combination([drafter for drafter in opened if drafter is not None])
    if not isinstance(what, (str, Path)):
        raise BlockffnError(f'drafter: expected "ngram", a file, a Drafter or a list of these, found {what!r}')
    if what == "ngram":
        if tree:
            raise BlockffnError("tree: n-gram drafts are chains: expected the file of an EAGLE head")
        return NGramDrafter()
    if not Path(what).is_file():
        raise BlockffnError(f'drafter: {what}: no such file; expected "ngram", a draft model or an EAGLE head (GGUF)')
    if _capi.read_header(what).architecture == gguf_contract.ARCH_EAGLE:
        return EagleDrafter(what, tree=tree is not False)
    if tree:
        raise BlockffnError(f"tree: {what} is a model, and a draft model proposes chains: expected an EAGLE head")
    return ModelDrafter(what)
