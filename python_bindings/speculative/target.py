"""What the loop needs of the model that it serves: context, exact kernels, sampler, counter of experts.

`blockffn.llama.Llama` is what people see; this file is what puts a llama_cpp model under the loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from blockffn import _capi, gguf_contract, library, logs
from blockffn.errors import BlockffnError
from blockffn.speculative.drafter import Drafter
from blockffn.speculative.sampling import Chain, Draw, draw_of

library.load()


def locked(lock: Any, items: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
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


def greedy(_row: int, logits: Any) -> int:
    return int(logits.argmax())


@dataclass(frozen=True)
class Chooser:
    """What chooses the tokens of a generation, `sample(row of the batch, logits)`, and how, for drafters."""

    sample: Callable[[int, Any], int]
    draw: Draw | None = None


def chooser(llm: Any, arguments: dict[str, Any], alone: bool) -> Chooser:
    """Return what chooses tokens by the arguments of llama_cpp's chain. alone: greedy, without any other part."""
    llm._sampler = None
    if alone:
        return Chooser(greedy)
    seed = llm._seed if llm._seed != library.load().LLAMA_DEFAULT_SEED else random.getrandbits(32)
    params = SimpleNamespace(
        **arguments, temperature=arguments["temp"], sampling=llm.sampling, last_n_tokens_size=llm.last_n_tokens_size
    )
    draw = draw_of(params, seed)
    if draw is None:
        llm._sampler = llm._init_sampler(**arguments)
        return Chooser(chain_sampler(llm))
    chain = Chain(llm._model, params, seed, lambda: llm._input_ids, draw)
    return Chooser(lambda _row, logits: chain.sample(llm.n_tokens, logits), draw)


def chain_sampler(llm: Any) -> Callable[[int, Any], int]:
    """Return a function that samples with llama_cpp's chain, which also takes note of the token."""
    sample, chain, ctx = library.load().llama_sampler_sample, llm._sampler, llm._ctx.ctx
    return lambda row, _logits: int(sample(chain.sampler, ctx, row))


def end_of_text(llm: Any) -> Callable[[int], bool]:
    is_end, vocab = library.load().llama_vocab_is_eog, llm._model.vocab
    known: dict[int, bool] = {}

    def check(token: int) -> bool:
        if token not in known:
            known[token] = bool(is_end(vocab, token))
        return known[token]

    return check


def union_counter(llm: Any, ctx: int | None = None) -> Callable[[], float] | None:
    """Return a function that reads how many experts were loaded so far (mean over the layers), None without experts.

    ctx: another context of the model than that of its conversation.
    """
    layers = getattr(llm, "n_moe_layers", 0)
    if not layers:
        return None
    read, ctx = _capi.function("blockffn_stats"), ctx or llm._ctx.ctx
    _capi.function("blockffn_stats_enable")(ctx, True)
    arrays = [np.zeros(layers, dtype=np.int64) for _ in range(4)]  # evaluations, tokens, pairs, union
    pointers = [array.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)) for array in arrays]

    def count() -> float:
        read(ctx, *pointers)
        return float(arrays[3].sum()) / layers

    return count


def step_growth(llm: Any) -> float | None:
    """Return what a further token adds to a step by the profile in the file; None without one, or run densely."""
    found = llm.metadata.get(gguf_contract.key(gguf_contract.PROFILE_STEP_GROWTH))
    if found is None or llm.ffn == "dense":
        return None
    growth = float(found)
    return growth if 0.0 <= growth <= 1.0 else None


def check_fits(llm: Any, drafter: Drafter) -> None:
    """Refuse a drafter whose drafts the model's cache cannot verify."""
    check_chains_fit(llm, drafter)
    most = library.load().llama_max_parallel_sequences()
    if drafter.can_tree and drafter.max_nodes > most:
        raise BlockffnError(
            f"{drafter.name}: trees of up to {drafter.max_nodes} nodes need as many sequences, llama.cpp has {most} at "
            f"most: expected a tree size of at most {most + 1}, root included"
        )


def check_chains_fit(llm: Any, drafter: Drafter) -> None:
    """Refuse a drafter for a model whose memory cannot forget rejected tokens."""
    if (llm._is_recurrent or llm._is_hybrid) and type(drafter) is not Drafter:
        raise BlockffnError(
            f"{llm.model_path}: the memory of a recurrent model cannot forget rejected tokens: drafts by "
            f"{drafter.name} cannot be verified; use drafter=None"
        )


def replace_context(llm: Any, n_seq: int, exact: bool) -> None:
    """Give the model a new, empty context with `n_seq` sequences in one cache; exact mode needs flash attention.

    Only there are the values not transposed in the cache, so that an accepted path can be moved together. The old one
    is freed once the new one is there: for a moment both need memory, and a failure changes nothing.
    """
    context = new_context(llm, exact, n_seq_max=max(n_seq, llm.context_params.n_seq_max))
    llm._ctx.close()
    llm._ctx, llm.context_params = llm._stack.enter_context(contextlib.closing(context)), context.params
    llm.n_tokens, llm._requires_eval = 0, True


def new_context(llm: Any, exact: bool, **changes: Any) -> Any:
    """Return another context (llama_cpp's LlamaContext) of a loaded model, like that of its conversation but changed.

    One cache for all sequences. BlockffnError where it cannot be had.
    """
    from llama_cpp import _internals as internals

    params = type(llm.context_params).from_buffer_copy(llm.context_params)
    params.kv_unified = True
    if exact:
        params.flash_attn_type = library.load().LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.swa_full = True  # cells that a sliding window hides are not used again there
    for name, value in changes.items():
        setattr(params, name, value)
    with logs.collect() as lines:
        try:
            context = internals.LlamaContext(model=llm._model, params=params, verbose=llm.verbose)
        except ValueError as error:
            raise BlockffnError(
                f"{llm.model_path}: no context of {params.n_ctx} tokens with {params.n_seq_max} sequences beside the "
                f"present one: {logs.reason(lines) or error}; nothing was changed"
            ) from error
    try:
        if exact:
            set_exact(context.ctx, True)
        llm.apply_adapters(context.ctx)
    except BaseException:
        context.close()
        raise
    return context


def set_exact(ctx: int, exact: bool) -> None:
    """Choose kernels whose result for a token does not depend on the other tokens of the batch (see patches/).

    BlockffnError where the backends of this build, or the place of the weights, cannot promise it.
    """
    with logs.collect() as lines:
        done = _capi.function("llama_set_batch_invariant")(ctx, exact)
    if not done:
        raise BlockffnError(
            f"exact mode is not possible here: {logs.reason(lines) or 'llama.cpp refuses it'}; leave out exact=True, "
            "or use a build for CPUs alone, as `make setup` makes it"
        )
