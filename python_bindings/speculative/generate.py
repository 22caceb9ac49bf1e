"""The seam between llama_cpp.Llama and the draft and verify loop.

For the author of blockffn.Llama: inherit from `Speculative` before llama_cpp.Llama and call `set_up_speculation`
at the end of the constructor; nothing else is needed::

    class Llama(Speculative, llama_cpp.Llama):
        def __init__(self, ..., drafter=None, exact=False):
            self._lock = threading.RLock()
            super().__init__(...)
            self.set_up_rows()
            self.set_up_speculation(drafter, exact)

`Speculative` replaces only `generate` (the source of tokens), `eval`, what reads or replaces the cache, and the rows
that log-probabilities are read from. Everything above them stays llama_cpp's own: text, stop strings, streaming, echo,
chat formats. Every result, and the last chunk of every stream, carries ``["speculation"]``. Plain decoding runs through
the same loop with a drafter that proposes nothing, so that log-probabilities work without logits_all (rows are kept for
the generated tokens only, for the prompt too where echo asks for it) and `exact=True` compares like with like.

Threads: one call at a time. A call waits for the one that runs in another thread: a complete answer, an evaluation, or
one chunk of a stream. Between two chunks nothing is held: whoever starts a generation then ends the open one, and its
next chunk raises RuntimeError.

`set_up_speculation` may replace the llama_context that llama_cpp.Llama made by another one of the same model, when
trees need sequences, a drafter needs hidden states, or exact mode needs other kernels. If anything fails, model and
drafter stay as they were.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from threading import RLock
from typing import Any

import numpy as np

from blockffn import library, logs
from blockffn.errors import BlockffnError
from blockffn.speculative.decoder import Decoder
from blockffn.speculative.drafter import Drafter
from blockffn.speculative.loop import Loop, Sampling
from blockffn.speculative.policy import PLAIN, Plan, Policy, limits
from blockffn.speculative.rows import KeptRows, Rows

library.load()
import llama_cpp  # noqa: E402  only after `load`


class Speculative:
    """Mixin for a subclass of llama_cpp.Llama; see the module's docstring."""

    _loop: Loop | None = None
    _lock: RLock
    _sequences = 1  # of the cache; more than one for trees
    _all_rows: KeptRows | None = None  # llama_cpp's `scores`, with logits_all
    _next_rows: KeptRows | None = None  # where the next generation copies its logits to
    drafter: Drafter | None = None
    exact: bool = False

    def set_up_rows(self: Any) -> None:
        """Take over `scores`, of which llama_cpp reserves n_batch rows that nothing needs; call once, at first."""
        self.logits_all = self._logits_all
        self._logits_all = True  # log-probabilities need no logits_all here
        if self.logits_all:
            self._all_rows = KeptRows(self._n_vocab, memory=self.scores)
        else:
            self.scores = np.zeros((1, self._n_vocab), dtype=np.float32)

    def set_up_speculation(self: Any, drafter: Drafter | None, exact: bool = False, plan: Plan | None = None) -> None:
        """Use `drafter` from now on (None: plain decoding). `plan` fixes the draft of every step, for experiments."""
        with self._lock:
            if self._loop is not None:
                self._loop.end()
            used = drafter or Drafter()
            _check_fits(self, used)
            used.attach(self)
            leaves = min(used.max_nodes, self.n_batch - 1)  # of the largest tree: it is verified in one batch
            n_seq = max(self._sequences, leaves if used.can_tree else 1)
            flash = library.load().LLAMA_FLASH_ATTN_TYPE_ENABLED
            if n_seq > self._sequences or (exact and self.context_params.flash_attn_type != flash):
                _replace_context(self, n_seq, exact)
            elif exact != self.exact:
                _set_exact(self._ctx.ctx, exact)
            self.exact, self.drafter, self._sequences = exact, drafter, n_seq
            target = Decoder(
                self._ctx.ctx, self._n_vocab, self.n_embd(), self.n_batch, n_seq, used.wants_hidden, alone=True
            )
            policy = Policy(*limits(used), PLAIN if drafter is None else plan)
            used.serves = id(self)
            self._loop = Loop(self, target, used, policy, _union_counter(self))

    @property
    def loop(self) -> Loop:
        """The draft and verify loop, for experiments: its target, drafter, policy and statistics."""
        assert self._loop is not None
        return self._loop

    def speculation(self) -> dict[str, Any]:
        """Return the statistics of the last generation (see blockffn.speculative.stats)."""
        return self._running().statistics.as_dict()

    def _running(self) -> Loop:
        if self._loop is None:
            raise BlockffnError("this model was closed; load it again")
        return self._loop

    def close(self: Any) -> None:
        """Free the model and its drafter; a generator that is still open ends quietly."""
        with self._lock:
            if self._loop is not None:
                self._loop.abandon()
                if self._loop.drafter.serves == id(self):
                    self._loop.drafter.close()
                self._loop = None
            super().close()  # type: ignore[misc]

    def eval(self: Any, tokens: Sequence[int]) -> None:
        """Evaluate tokens after the current text, as llama_cpp.Llama.eval does."""
        with self._lock:
            loop = self._running()
            loop.end()
            loop.kept = self._all_rows
            if len(tokens):
                loop.evaluate(np.asarray(tokens, dtype=np.int32))
            self._requires_eval = False

    def reset(self: Any) -> None:
        """Forget the text, as llama_cpp.Llama.reset does; an open stream ends."""
        with self._lock:
            self._running().end()
            super().reset()  # type: ignore[misc]

    def embed(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Embed texts, as llama_cpp.Llama.embed does; the conversation is forgotten, an open stream ends."""
        with self._lock:
            self._running().end()
            return super().embed(*args, **kwargs)  # type: ignore[misc]

    def save_state(self: Any) -> Any:
        """Return a llama_cpp.LlamaState of the verified text. Its `scores` are empty without logits_all."""
        with self._lock:
            self._running().settle()
            state = super().save_state()  # type: ignore[misc]
            if not self.logits_all:
                state.scores = np.empty((0, self._n_vocab), dtype=np.float32)
            return state

    def load_state(self: Any, state: Any) -> None:
        """Go back to a saved state, as llama_cpp.Llama.load_state does; an open stream ends."""
        if state.n_tokens > len(self.input_ids):
            raise BlockffnError(
                f"load_state: the state holds {state.n_tokens} tokens, the context {len(self.input_ids)}: load the "
                f"model with n_ctx={state.n_tokens} or more"
            )
        fitted = copy.copy(state)
        fitted.scores = np.zeros_like(self.scores[: state.n_tokens])
        known = min(len(fitted.scores), len(state.scores))
        fitted.scores[:known] = state.scores[:known]
        fitted.input_ids = self.input_ids.copy()
        fitted.input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
        with self._lock:
            loop = self._running()
            loop.end()
            try:
                super().load_state(fitted)  # type: ignore[misc]
            except RuntimeError:  # llama.cpp refuses it, and may have changed the cache by then
                self.n_tokens = loop.target.rewind(0)
                raise
            if self._all_rows is not None:
                self._all_rows.known = known

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
        with self._lock:
            loop = self._running()
            self._sampler = None if greedy else self._init_sampler(**chain)
            prompt = list(tokens) if reset else [*self._input_ids.tolist(), *tokens]
            if not prompt:
                raise BlockffnError("generate: the prompt is empty: expected at least one token")
            sampling = Sampling(_greedy if greedy else _chain_sampler(self), _end_of_text(self), stopping_criteria)
            kept, self._next_rows = self._next_rows or self._all_rows, None
        yield from _locked(self._lock, loop.run(prompt, sampling, kept))

    def _create_completion(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Add the statistics to llama_cpp's results, and keep the rows that log-probabilities need."""
        kept = self._all_rows
        if kept is None and kwargs.get("logprobs") is not None:
            kept = KeptRows(self._n_vocab, prompt=bool(kwargs.get("echo")))
        yield from _locked(self._lock, self._results(kept, super()._create_completion(*args, **kwargs)))  # type: ignore[misc]

    def _results(self: Any, kept: KeptRows | None, results: Iterator[Any]) -> Generator[Any, None, None]:
        """Run one completion, which copies its logits to `kept`; free them at its end."""
        self._next_rows = kept
        try:
            yield from self._with_statistics(results)
        finally:
            self._next_rows = None
            if self._loop is not None and self._loop.kept is kept:
                self._loop.kept = self._all_rows

    def create_chat_completion(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Add the statistics to the answer, or to the last chunk of a stream: llama_cpp's chat formats drop them."""
        with self._lock:
            result = super().create_chat_completion(*args, **kwargs)  # type: ignore[misc]
            if isinstance(result, dict):
                return {**result, "speculation": self.speculation()}
        return _locked(self._lock, self._with_statistics(result))

    def _with_statistics(self, chunks: Iterator[Any]) -> Generator[Any, None, None]:
        for chunk in chunks:
            done = any(choice.get("finish_reason") is not None for choice in chunk["choices"])
            yield {**chunk, "speculation": self.speculation()} if done else chunk

    @property
    def _scores(self: Any) -> Any:
        """The logits that llama_cpp reads, indexed by position: all, the kept ones, or those of the last token."""
        loop = self._running()
        if self.logits_all and loop.kept is self._all_rows:
            return self.scores[: self.n_tokens]
        if loop.kept is not None:
            return loop.kept.rows()
        rows = np.empty((0, self._n_vocab), dtype=np.float32) if loop.row is None else loop.row[None]
        return Rows.of(rows, self.n_tokens - 1)

    @property
    def eval_logits(self: Any) -> deque[list[float]]:
        """The logits of all tokens with logits_all, of the last one otherwise."""
        return deque(self._scores.tolist(), maxlen=self._n_ctx if self.logits_all else 1)


# editors, and wrappers that inspect it, see llama_cpp's signature
functools.update_wrapper(Speculative.create_chat_completion, llama_cpp.Llama.create_chat_completion)


def _locked(lock: Any, items: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
    """Run a generator so that it holds `lock` while it works, and lets go of it while its caller does."""
    sent = None
    try:
        while True:
            with lock:
                try:
                    item = items.send(sent)
                except StopIteration:
                    return
            sent = yield item
    finally:
        with lock:
            items.close()


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


def _check_fits(llm: Any, drafter: Drafter) -> None:
    """Refuse a drafter whose drafts the model's cache cannot verify."""
    if (llm._is_recurrent or llm._is_hybrid) and type(drafter) is not Drafter:
        raise BlockffnError(
            f"{llm.model_path}: the memory of a recurrent model cannot forget rejected tokens: drafts by "
            f"{drafter.name} cannot be verified; use drafter=None"
        )
    most = library.load().llama_max_parallel_sequences()
    if drafter.can_tree and drafter.max_nodes > most:
        raise BlockffnError(
            f"{drafter.name}: trees of up to {drafter.max_nodes} nodes need as many sequences, llama.cpp has {most} at "
            f"most: expected a tree size of at most {most + 1}, root included"
        )


def _replace_context(llm: Any, n_seq: int, exact: bool) -> None:
    """Give the model a new, empty context with `n_seq` sequences in one cache; exact mode needs flash attention.

    Only there are the values not transposed in the cache, so that an accepted path can be moved together. The old one
    is freed once the new one is there: for a moment both need memory, and a failure changes nothing.
    """
    from llama_cpp import _internals as internals

    params = type(llm.context_params).from_buffer_copy(llm.context_params)
    params.n_seq_max = max(n_seq, params.n_seq_max)
    params.kv_unified = True
    if exact:
        params.flash_attn_type = library.load().LLAMA_FLASH_ATTN_TYPE_ENABLED
    with logs.collect() as lines:
        try:
            context = internals.LlamaContext(model=llm._model, params=params, verbose=llm.verbose)
        except ValueError as error:
            raise BlockffnError(
                f"{llm.model_path}: no context of {params.n_ctx} tokens with {n_seq} sequences beside the present one: "
                f"{logs.reason(lines) or error}; nothing was changed"
            ) from error
    try:
        if exact:
            _set_exact(context.ctx, True)
        llm.apply_adapters(context.ctx)
    except BaseException:
        context.close()
        raise
    llm._ctx.close()
    llm._ctx, llm.context_params = llm._stack.enter_context(contextlib.closing(context)), params
    llm.n_tokens, llm._requires_eval = 0, True


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
