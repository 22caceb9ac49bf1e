"""The model class: llama_cpp.Llama on the patched library, with what BlockFFN models need beside it.

>>> import blockffn
>>> llm = blockffn.Llama("model.gguf", n_ctx=2048, drafter="ngram")       # doctest: +SKIP
>>> llm.create_completion("def add(a, b):", max_tokens=16)["choices"]     # doctest: +SKIP
>>> llm.active_experts(llm.tokenize(b"import os")).mean()                 # doctest: +SKIP
0.19

Tokens come from the draft and verify loop (blockffn.speculative.loop), plain ones too: from a drafter that proposes
nothing. So `generate` and `eval` are replaced, what reads or replaces the cache, and the rows that log-probabilities
are read from. Everything above them stays llama_cpp's own: text, stop strings, streaming, echo, chat formats.

Threads: one call at a time. A call waits for the one that runs in another thread: a complete answer, an evaluation, or
one chunk of a stream. Between two chunks nothing is held: whoever starts a generation then ends the open one, and its
next chunk raises RuntimeError.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import warnings
from collections import deque
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from blockffn import _capi, dial, gguf_contract, library, logs
from blockffn.errors import BlockffnError
from blockffn.evaluation import Evaluator
from blockffn.threads import default_threads
from blockffn.union_stats import UnionStats

library.load()
import llama_cpp  # noqa: E402  only after `load`

from blockffn.pieces import PieceTokenizer  # noqa: E402
from blockffn.speculative import target  # noqa: E402
from blockffn.speculative.decoder import Decoder  # noqa: E402
from blockffn.speculative.drafter import Drafter, DrafterLike, LlamaDraftModelDrafter, open_drafter  # noqa: E402
from blockffn.speculative.loop import Loop, Sampling  # noqa: E402
from blockffn.speculative.policy import PLAIN, Plan, Policy, limits  # noqa: E402
from blockffn.speculative.rows import KeptRows, Rows  # noqa: E402

if TYPE_CHECKING:
    from blockffn.engine import Engine, GenerationParams, Stream, Token

DEFAULT_CONTEXT = 4096  # upper bound of the context that is reserved when none is asked for
FFN_KINDS = ("union", "dense")
SAMPLING = ("coupled", "stock")


class Llama(llama_cpp.Llama):
    """llama_cpp.Llama with the router's choices, memory-bounded evaluation and working speculative decoding.

    Beyond the arguments of llama_cpp.Llama:
    drafter: what proposes tokens that are verified in one batch: "ngram", the file of a draft model or an EAGLE head, a
        blockffn.speculative.Drafter, or a list of these, of which the first that has a proposal is asked. Results, and
        the last chunk of a stream, carry ``out["speculation"]``. `speculate` sets another one.
    exact: greedy text with a drafter equals plain greedy text of the same mode, token for token.
    sampling: "coupled" draws tokens with noise that depends on seed, position and token alone, which draft models and
        heads share; "stock" draws as llama_cpp does, the same tokens for the same seed.
    draft_model: a llama_cpp.llama_speculative.LlamaDraftModel, as llama_cpp.Llama takes it; used like a drafter.
    ffn: "union" (sparse op) or "dense" (every expert, stock ops). Models without our experts: our kernels, stock ones.
    router_threshold: skip, for every token, the experts below this share of its largest score; 0 skips none, None takes
        what the file says. union_budget: most experts per layer that a verified batch computes; 0 is no bound. Both can
        be set later (see blockffn.dial).
    flash_attn: on, as llama.cpp itself chooses on CPUs; llama_cpp.Llama has it off, which is slower here.
    n_ctx: None takes the context the model was trained with, at most 4096; n_threads: None: see blockffn.threads.
    Errors: BlockffnError for a file that is missing, damaged or of an unknown architecture, and for a context that the
    model cannot have.
    """

    _evaluator: Evaluator | None = None
    _loop: Loop | None = None
    _sequences = 1  # of the cache; more than one for trees
    _next_rows: KeptRows | None = None  # where the next generation copies its logits to
    drafter: Drafter | None = None
    exact: bool = False
    _threshold: float | None = None  # asked for; None: of the file
    _budget = 0

    def __init__(
        self,
        model_path: str | Path,
        *,
        drafter: DrafterLike | Sequence[DrafterLike] | None = None,
        exact: bool = False,
        draft_model: Any = None,
        ffn: str = "union",
        router_threshold: float | None = None,
        union_budget: int = 0,
        sampling: str = "coupled",
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        flash_attn: bool = True,
        kv_overrides: dict[str, bool | int | float | str] | None = None,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        self._lock = RLock()
        if ffn not in FFN_KINDS:
            raise BlockffnError(f"ffn: expected one of {', '.join(FFN_KINDS)}, found {ffn!r}")
        if sampling not in SAMPLING:
            raise BlockffnError(f"sampling: expected one of {', '.join(SAMPLING)}, found {sampling!r}")
        if drafter is not None and draft_model is not None:
            raise BlockffnError("drafter and draft_model: expected one of them, found both")
        self._threshold = dial.checked_threshold(router_threshold)
        self._budget = dial.checked_budget(union_budget, exact)
        opened = open_drafter(drafter) if draft_model is None else LlamaDraftModelDrafter(draft_model)
        header = _capi.read_header(model_path)
        overrides = dict(kv_overrides or {})
        if ffn == "dense":
            overrides[gguf_contract.key(gguf_contract.FFN_DENSE, header.architecture)] = True
        threads = n_threads or default_threads()
        logs.install(verbose)
        context = _checked_context(model_path, header, n_ctx)
        with logs.collect() as lines:
            try:
                super().__init__(
                    str(model_path),
                    n_ctx=context,
                    n_threads=threads,
                    n_threads_batch=n_threads_batch or threads,
                    flash_attn=flash_attn,
                    kv_overrides=overrides or None,
                    verbose=verbose,
                    **kwargs,
                )
            except (ValueError, RuntimeError) as error:
                raise BlockffnError(f"{model_path}: {logs.reason(lines) or error}") from error
        if kwargs.get("tokenizer") is None:
            self.tokenizer_ = PieceTokenizer(self)
        self.ffn, self.sampling = ffn, sampling
        self.default_cache = kwargs.get("type_k") is None and kwargs.get("type_v") is None
        self._all_rows = KeptRows(self._n_vocab, memory=self.scores) if self._logits_all else None
        self.logits_all, self._logits_all = self._logits_all, True  # log-probabilities need no logits_all here
        if not self.logits_all:  # llama_cpp reserves n_batch rows
            self.scores = np.zeros((1, self._n_vocab), dtype=np.float32)
        if self._threshold is not None:
            dial.set_threshold(self.ctx, self._threshold)
        if self._budget:
            self.union_budget = self._budget
        self.speculate(opened, exact)

    def close(self) -> None:
        """Free the model, its drafter and everything that was made from it; ``with`` does so at its end.

        A generator that is still open ends quietly.
        """
        if not hasattr(self, "_stack"):  # the constructor refused its arguments
            return
        with self._lock:
            if self._evaluator is not None:
                self._evaluator.close()
                self._evaluator = None
            if self._loop is not None:
                self._loop.abandon()
                if self._loop.drafter.serves == id(self):
                    self._loop.drafter.close()
                self._loop = None
            super().close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        """Return the arguments of the constructor, for pickle and copy; the copy loads the model and has no text yet.

        Drafters are copied too: a drafter serves one model.
        """
        state: dict[str, Any] = super().__getstate__()
        state |= {"logits_all": self.logits_all, "ffn": self.ffn, "exact": self.exact, "draft_model": None}
        state |= {"router_threshold": self._threshold, "union_budget": self._budget}
        state["sampling"] = self.sampling
        state["drafter"] = copy.deepcopy(self.drafter)
        if self.default_cache:
            state |= {"type_k": None, "type_v": None}
        return state

    def speculate(
        self,
        drafter: DrafterLike | Sequence[DrafterLike] | None,
        exact: bool | None = None,
        plan: Plan | None = None,
    ) -> None:
        """Use another drafter from now on, as the constructor takes it; an open stream ends.

        exact: None keeps the mode. `plan` fixes the draft of every step, for experiments. The llama_context is replaced
        by another one of the same model, and the text forgotten, when trees need sequences or exact mode needs flash
        attention. If anything fails, model and drafter stay as they were.
        """
        opened, exact = open_drafter(drafter), self.exact if exact is None else exact
        dial.checked_budget(self._budget, exact)
        with self._lock:
            if self._loop is not None:
                self._loop.end()
            used = opened or Drafter()
            target.check_fits(self, used)
            used.attach(self)
            leaves = min(used.max_nodes, self.n_batch - 1)  # of the largest tree: it is verified in one batch
            n_seq = max(self._sequences, leaves if used.can_tree else 1)
            flash = library.load().LLAMA_FLASH_ATTN_TYPE_ENABLED
            if n_seq > self._sequences or (exact and self.context_params.flash_attn_type != flash):
                target.replace_context(self, n_seq, exact)
            elif exact != self.exact:
                target.set_exact(self._ctx.ctx, exact)
            self.exact, self.drafter, self._sequences = exact, opened, n_seq
            used.serves = id(self)
            decoder = Decoder(
                self._ctx.ctx, self._n_vocab, self.n_embd(), self.n_batch, n_seq, used.wants_hidden, alone=True
            )
            decoder.budget = self._budget
            policy = Policy(*limits(used), PLAIN if opened is None else plan, target.step_growth(self))
            self._loop = Loop(self, decoder, used, policy, target.union_counter(self))

    def statistics(self) -> dict[str, Any]:
        """Return what the drafts of the last generation were worth (see blockffn.speculative.stats)."""
        return self._running().statistics.as_dict()

    def set_up_speculation(self, drafter: Drafter | None, exact: bool = False, plan: Plan | None = None) -> None:
        """Call `speculate`: the old name, for one release."""
        warnings.warn("set_up_speculation is now called speculate", DeprecationWarning, stacklevel=2)
        self.speculate(drafter, exact, plan)

    def speculation(self) -> dict[str, Any]:
        """Call `statistics`: the old name, for one release."""
        warnings.warn("speculation is now called statistics", DeprecationWarning, stacklevel=2)
        return self.statistics()

    @property
    def loop(self) -> Loop:
        """The draft and verify loop, for experiments: its target, drafter, policy and statistics."""
        return self._running()

    def _running(self) -> Loop:
        if self._loop is None:
            raise BlockffnError("this model was closed; load it again")
        return self._loop

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after the current text, as llama_cpp.Llama.eval does."""
        with self._lock:
            loop = self._running()
            loop.end()
            loop.kept = self._all_rows
            if len(tokens):
                loop.evaluate(np.asarray(tokens, dtype=np.int32))
            self._requires_eval = False

    def reset(self) -> None:
        """Forget the text, as llama_cpp.Llama.reset does; an open stream ends."""
        with self._lock:
            self._running().end()
            super().reset()

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """Embed texts, as llama_cpp.Llama.embed does; the conversation is forgotten, an open stream ends."""
        with self._lock:
            self._running().end()
            return super().embed(*args, **kwargs)

    def save_state(self) -> Any:
        """Return a llama_cpp.LlamaState of the verified text. Its `scores` are empty without logits_all."""
        with self._lock:
            self._running().settle()
            state = super().save_state()
            if not self.logits_all:
                state.scores = np.empty((0, self._n_vocab), dtype=np.float32)
            return state

    def load_state(self, state: Any) -> None:
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
                super().load_state(fitted)
            except RuntimeError:  # llama.cpp refuses it, and may have changed the cache by then
                self.n_tokens = loop.target.rewind(0)
                raise
            if self._all_rows is not None:
                self._all_rows.known = known

    def generate(
        self,
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
            chooser = target.chooser(self, chain, greedy)
            prompt = list(tokens) if reset else [*self._input_ids.tolist(), *tokens]
            if not prompt:
                raise BlockffnError("generate: the prompt is empty: expected at least one token")
            sampling = Sampling(chooser.sample, target.end_of_text(self), stopping_criteria, chooser.draw)
            kept, self._next_rows = self._next_rows or self._all_rows, None
        yield from target.locked(self._lock, loop.run(prompt, sampling, kept))

    def engine(self, n_parallel: int = 8, **changes: Any) -> Engine:
        """Return an Engine on these weights, in this mode, with a copy of the drafter; close it before the model.

        Its cache holds as many tokens as the conversation's, of all texts together. changes: arguments of Engine.
        """
        from blockffn.engine import Engine

        self._running()
        own = {"n_ctx": self.n_ctx(), "exact": self.exact, "n_batch": self.n_batch}
        drafter = None if self.drafter is None or "drafter" in changes else copy.deepcopy(self.drafter)
        return Engine(self, n_parallel=n_parallel, **({**own, "drafter": drafter} | changes))

    def generate_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: GenerationParams | Sequence[GenerationParams] | None = None,
        n_parallel: int = 8,
    ) -> list[Stream]:
        """Return the ended streams of many prompts, in their order, `n_parallel` at a time (see Engine.generate_many).

        The conversation is not touched; a context is opened beside it and freed at the end.
        """
        with self.engine(min(n_parallel, max(len(prompts), 1))) as engine:
            return engine.generate_many(prompts, params)

    async def stream_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: GenerationParams | Sequence[GenerationParams] | None = None,
        n_parallel: int = 8,
    ) -> AsyncIterator[tuple[int, Token]]:
        """Yield (number of the prompt, token) of many prompts, as the tokens come (see Engine.stream_many)."""
        with self.engine(min(n_parallel, max(len(prompts), 1))) as engine:
            async for number, token in engine.stream_many(prompts, params):
                yield number, token

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Add the statistics to llama_cpp's results, and keep the rows that log-probabilities need."""
        kept = self._all_rows
        if kept is None and kwargs.get("logprobs") is not None:
            kept = KeptRows(self._n_vocab, prompt=bool(kwargs.get("echo")))
        yield from target.locked(self._lock, self._results(super()._create_completion(*args, **kwargs), kept))

    def _results(self, results: Iterator[Any], kept: KeptRows | None = None) -> Generator[Any, None, None]:
        """Add the statistics to the last chunk. The logits are copied to `kept`, which is let go of at the end."""
        self._next_rows = kept
        try:
            for chunk in results:
                done = any(choice.get("finish_reason") is not None for choice in chunk["choices"])
                yield {**chunk, "speculation": self.statistics()} if done else chunk
        finally:
            self._next_rows = None
            if self._loop is not None and self._loop.kept is kept:
                self._loop.kept = self._all_rows

    @functools.wraps(llama_cpp.Llama.create_chat_completion)  # editors and wrappers see llama_cpp's signature
    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Add the statistics to the answer, or to the last chunk of a stream: llama_cpp's chat formats drop them."""
        with self._lock:
            result = super().create_chat_completion(*args, **kwargs)
            if isinstance(result, dict):
                return {**result, "speculation": self.statistics()}
        return target.locked(self._lock, self._results(result))

    @property
    def _scores(self) -> Any:
        """The logits that llama_cpp reads, indexed by position: all, the kept ones, or those of the last token."""
        loop = self._running()
        if self.logits_all and loop.kept is self._all_rows:
            return self.scores[: self.n_tokens]
        if loop.kept is not None:
            return loop.kept.rows()
        rows = np.empty((0, self._n_vocab), dtype=np.float32) if loop.row is None else loop.row[None]
        return Rows.of(rows, self.n_tokens - 1)

    @property
    def eval_logits(self) -> deque[list[float]]:
        """The logits of all tokens with logits_all, of the last one otherwise."""
        return deque(self._scores.tolist(), maxlen=self._n_ctx if self.logits_all else 1)

    @property
    def n_moe_layers(self) -> int:
        """Number of layers with routed experts, of any architecture (0 for a dense model)."""
        return int(_capi.function("blockffn_n_moe_layers")(self.model))

    @property
    def has_relu_router(self) -> bool:
        """Whether its experts are routed by ReLU: only these models have a dial."""
        return bool(_capi.function("blockffn_has_relu_router")(self.model))

    @property
    def n_experts(self) -> int:
        """Number of routed experts per layer."""
        return int(_capi.function("blockffn_n_experts")(self.model))

    @property
    def router_threshold(self) -> float:
        """Experts below this share of a token's largest score are skipped; None sets it to what the file says.

        Setting it forgets the text.
        """
        return dial.threshold(self.ctx)

    @router_threshold.setter
    def router_threshold(self, value: float | None) -> None:
        with self._lock:
            value = dial.checked_threshold(value)
            self.reset()  # what the cache holds was computed with another one
            dial.set_threshold(self.ctx, value)
            self._threshold = value
            if self._evaluator is not None:
                self._evaluator.close()

    @property
    def union_budget(self) -> int:
        """Most experts per layer that a verified batch computes, those with the largest summed score; 0: no bound."""
        return self._budget

    @union_budget.setter
    def union_budget(self, value: int) -> None:
        with self._lock:
            value = dial.checked_budget(value, self.exact)
            with dial.union_budget(self.ctx, value):  # refused where there are no experts
                self._budget = value
            if self._loop is not None:
                self._loop.target.budget = value

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after every token, float32 [n_tokens, n_vocab]; the conversation is not touched."""
        with self._lock:
            return self._evaluation().logits(tokens)

    def logit_rows(self, tokens: Sequence[int], first: int = 0) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield the same from token `first` on, a batch at a time: (token, float32 [rows, n_vocab]).

        The rows are valid until the next ones. Memory: that of one batch, at most 64 MiB of logits.
        """
        with self._lock:
            yield from self._evaluation().logit_rows(tokens, first)

    def hidden_states(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the hidden states float32 [n_tokens, n_embd], after the final norm."""
        with self._lock:
            return self._evaluation().hidden_states(tokens)

    def active_experts(self, tokens: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Return the router's choices, bool [n_moe_layers, n_tokens, n_experts]; the conversation is not touched."""
        with self._lock:
            return self._evaluation().active_experts(tokens)

    def union_stats(self, reset: bool = False, ctx: Any = None) -> UnionStats:
        """Return the expert counters of the conversation since the last reset (see UnionStats).

        ctx: another llama_context of this model, whose counters are wanted.
        """
        arrays = [np.zeros(self.n_moe_layers, np.int64) for _ in range(4)]
        pointers = [array.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)) for array in arrays]
        ctx = self.ctx if ctx is None else ctx
        _capi.function("blockffn_stats")(ctx, *pointers)
        if reset:
            _capi.function("blockffn_stats_reset")(ctx)
        evaluations, n_tokens, active_pairs, union_size = arrays
        return UnionStats(evaluations, n_tokens, active_pairs, union_size, self.n_experts)

    def apply_adapters(self, ctx: Any) -> None:
        """Give another context of this model the LoRA adapter and the router threshold that the conversation has."""
        if self._threshold is not None:
            dial.set_threshold(ctx, self._threshold)
        if self._lora_adapter is None:
            return
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(self._lora_adapter)  # type: ignore[misc]
        llama_cpp.llama_set_adapters_lora(ctx, adapters, 1, (ctypes.c_float * 1)(self.lora_scale))

    def _evaluation(self) -> Evaluator:
        self._running()
        if self._evaluator is None:
            self._evaluator = Evaluator(self)
        return self._evaluator


def _checked_context(model_path: str | Path, header: _capi.Header, n_ctx: int | None) -> int:
    """Return the context length to reserve, by the header of the file."""
    if header.architecture == gguf_contract.ARCH_EAGLE:
        raise BlockffnError(
            f"{model_path}: this is a draft head ({header.architecture}), not a model: load the model it was made for "
            f"and give it drafter=blockffn.EagleDrafter({str(model_path)!r})"
        )
    if n_ctx is None:
        return min(header.context_length or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if n_ctx < 0:
        raise BlockffnError(f"n_ctx: expected a number of tokens, or 0 for the trained context; found {n_ctx}")
    return n_ctx
