"""The seam between llama_cpp.Llama and the draft and verify loop.

For the author of blockffn.Llama: inherit from `Speculative` before llama_cpp.Llama and call `set_up_speculation`
at the end of the constructor; nothing else is needed::

    class Llama(Speculative, llama_cpp.Llama):
        def __init__(self, ..., drafter=None, exact=False):
            super().__init__(...)
            self.set_up_speculation(drafter, exact)

`Speculative` replaces only `generate` (the source of tokens), `eval`, and the rows that log-probabilities are read
from. Everything above them stays llama_cpp's own: text, stop strings, streaming, echo, chat formats. Every result,
and the last chunk of every stream, carries ``["speculation"]``. Plain decoding runs through the same loop with a
drafter that proposes nothing, so that log-probabilities work without logits_all (rows are kept for the generated
tokens only, for the prompt too where echo asks for it) and `exact=True` compares like with like.

`set_up_speculation` may replace the llama_context that llama_cpp.Llama made by another one of the same model, when
trees need sequences, a drafter needs hidden states, or exact mode needs other kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from blockffn import library
from blockffn.errors import BlockffnError
from blockffn.speculative.drafter import Drafter
from blockffn.speculative.loop import Loop, Sampling
from blockffn.speculative.policy import PLAIN, Plan, Policy, limits
from blockffn.speculative.target import Target


class Speculative:
    """Mixin for a subclass of llama_cpp.Llama; see the module's docstring."""

    _loop: Loop | None = None
    _sequences = 1  # of the cache; more than one for trees
    exact: bool = False

    def set_up_speculation(self: Any, drafter: Drafter | None, exact: bool = False, plan: Plan | None = None) -> None:
        """Use `drafter` from now on (None: plain decoding). `plan` fixes the draft of every step, for experiments."""
        used = drafter or Drafter()
        if self._loop is not None:
            self._loop.settle()
        n_seq = max(self._sequences, used.max_nodes if used.can_tree else 1)
        flash = library.load().LLAMA_FLASH_ATTN_TYPE_ENABLED
        if n_seq > self._sequences or (exact and self.context_params.flash_attn_type != flash):
            _replace_context(self, n_seq, exact)
        if exact != self.exact:
            _set_exact(self._ctx.ctx, exact)
        self.exact, self.drafter, self._sequences = exact, drafter, n_seq
        target = Target(self._ctx.ctx, self._n_vocab, self.n_embd(), self.n_batch, n_seq, used.wants_hidden, alone=True)
        used.attach(self)
        policy = Policy(*limits(used), PLAIN if drafter is None else plan)
        self._loop = Loop(self, target, used, policy, _union_counter(self))

    def speculation(self) -> dict[str, Any]:
        """Return the statistics of the last generation (see blockffn.speculative.stats)."""
        assert self._loop is not None
        return self._loop.statistics.as_dict()

    def close(self: Any) -> None:
        """Free the model; a generator that is still open ends quietly."""
        if self._loop is not None:
            self._loop.abandon()
        super().close()  # type: ignore[misc]

    def eval(self: Any, tokens: Sequence[int]) -> None:
        """Evaluate tokens after the current text, as llama_cpp.Llama.eval does."""
        if self._loop is None or (self._logits_all and self._loop.keep_rows is None):
            super().eval(tokens)  # type: ignore[misc]
        else:
            self._loop.evaluate(np.asarray(tokens, dtype=np.int32))
        self._requires_eval = False

    def generate(
        self: Any,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.80,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        penalize_nl: bool = True,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        grammar: Any = None,
    ) -> Generator[int, Sequence[int] | None, None]:
        """Yield the tokens that follow a prompt until the context is full; arguments as in llama_cpp.Llama.generate."""
        chain = {
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "typical_p": typical_p,
            "temp": temp,
            "repeat_penalty": repeat_penalty,
            "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty,
            "tfs_z": tfs_z,
            "mirostat_mode": mirostat_mode,
            "mirostat_tau": mirostat_tau,
            "mirostat_eta": mirostat_eta,
            "penalize_nl": penalize_nl,
            "logits_processor": logits_processor,
            "grammar": grammar,
        }
        penalties = repeat_penalty != 1.0 or frequency_penalty != 0.0 or presence_penalty != 0.0
        greedy = temp == 0.0 and not (penalties or logits_processor or grammar)
        self._sampler = None if greedy else self._init_sampler(**chain)
        prompt = list(tokens) if reset else [*self._input_ids.tolist(), *tokens]
        if not prompt:
            raise BlockffnError("generate: the prompt is empty: expected at least one token")
        sampling = Sampling(_greedy if greedy else _chain_sampler(self), _end_of_text(self), stopping_criteria)
        yield from self._loop.run(prompt, sampling)

    def _create_completion(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Add the statistics to llama_cpp's results, and keep the rows that log-probabilities need."""
        logits_all = self._logits_all
        keep = kwargs.get("logprobs") is not None
        if keep and not logits_all:
            self._loop.keep_rows, self._logits_all = "all" if kwargs.get("echo") else "new", True
        try:
            for result in super()._create_completion(*args, **kwargs):  # type: ignore[misc]
                done = result["choices"][0]["finish_reason"] is not None
                yield {**result, "speculation": self.speculation()} if done else result
        finally:
            self._loop.keep_rows, self._logits_all = None, logits_all

    def create_chat_completion(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Add the statistics to the answer, or to the last chunk of a stream: llama_cpp's chat formats drop them."""
        result = super().create_chat_completion(*args, **kwargs)  # type: ignore[misc]
        if isinstance(result, dict):
            return {**result, "speculation": self.speculation()}
        return self._with_statistics(result)

    def _with_statistics(self, chunks: Iterator[Any]) -> Iterator[Any]:
        for chunk in chunks:
            done = any(choice.get("finish_reason") is not None for choice in chunk["choices"])
            yield {**chunk, "speculation": self.speculation()} if done else chunk

    @property
    def _scores(self: Any) -> Any:
        """The logits that llama_cpp reads log-probabilities from, indexed by position."""
        if self._loop is not None and self._loop.keep_rows is not None:
            return self._loop.rows()
        return self.scores[: self.n_tokens, :]


def _greedy(_row: int, logits: Any) -> int:
    return int(logits.argmax())


def _chain_sampler(llm: Any) -> Callable[[int, Any], int]:
    """Return a function that samples with llama_cpp's chain, which also takes note of the token."""
    sample, chain, ctx = library.load().llama_sampler_sample, llm._sampler, llm._ctx.ctx
    return lambda row, _logits: int(sample(chain.sampler, ctx, row))


def _end_of_text(llm: Any) -> Callable[[int], bool]:
    is_end, vocab = library.load().llama_vocab_is_eog, llm._model.vocab
    known: dict[int, bool] = {}

    def check(token: int) -> bool:
        if token not in known:
            known[token] = bool(is_end(vocab, token))
        return known[token]

    return check


def _union_counter(llm: Any) -> Callable[[], float] | None:
    """Return a function that reads how many experts were loaded so far (mean over the layers), None without experts."""
    layers = getattr(llm, "n_moe_layers", 0)
    if not layers:
        return None
    from blockffn import _capi

    read, ctx = _capi.function("blockffn_stats"), llm._ctx.ctx
    arrays = [np.zeros(layers, dtype=np.int64) for _ in range(4)]  # evaluations, tokens, pairs, union
    pointers = [array.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)) for array in arrays]

    def count() -> float:
        read(ctx, *pointers)
        return float(arrays[3].sum()) / layers

    return count


def _replace_context(llm: Any, n_seq: int, exact: bool) -> None:
    """Give the model a new, empty context with `n_seq` sequences in one cache; exact mode needs flash attention.

    Only there are the values not transposed in the cache, so that an accepted path can be moved together.
    """
    from llama_cpp import _internals as internals

    params = llm.context_params
    params.n_seq_max = n_seq
    params.kv_unified = True
    if exact:
        params.flash_attn_type = library.load().LLAMA_FLASH_ATTN_TYPE_ENABLED
    llm._ctx.close()
    llm._ctx = llm._stack.enter_context(
        contextlib.closing(internals.LlamaContext(model=llm._model, params=params, verbose=llm.verbose))
    )
    llm.n_tokens, llm._requires_eval, llm.exact = 0, True, False
    if hasattr(llm, "apply_adapters"):
        llm.apply_adapters(llm._ctx.ctx)


def _set_exact(ctx: int, exact: bool) -> None:
    """Choose kernels whose result for a token does not depend on the other tokens of the batch (see patches/)."""
    native = getattr(library.load()._lib, "llama_set_batch_invariant", None)
    if native is None:
        raise BlockffnError(
            f"{library.directory() / library.LIBRARY}: function llama_set_batch_invariant is missing, exact mode needs "
            "it: this is not the library of the patched tree, or an old one; run `make setup`"
        )
    native.argtypes, native.restype = [ctypes.c_void_p, ctypes.c_bool], None
    native(ctx, exact)
