"""Choosing tokens: llama_cpp's sampler chain, and noise that the target and its drafters share.

A token is drawn as the largest of score + noise over the candidates that the chain leaves, with Gumbel noise: that is a
draw from their distribution (the Gumbel-max trick). The noise is a function of seed, position and token alone. So a
drafter with probabilities of its own takes the largest of its scores with the same noise, and agrees far more often
than its best guess would; and the text depends on the seed, not on who drafts or whether anyone does.

    >>> import numpy as np
    >>> from blockffn.speculative.sampling import Noise
    >>> noise = Noise(seed=1)
    >>> ids = np.arange(3)
    >>> bool((noise(7, ids) == Noise(seed=1)(7, ids[::-1])[::-1]).all())
    True

Mirostat draws by itself inside llama.cpp. `stock` draws every token there, seed for seed as llama_cpp does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from blockffn import library, logs
from blockffn.errors import BlockffnError
from blockffn.speculative.tree import log_total, take, top_k

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[Any]
CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
MASK = (1 << 64) - 1
# increment and multipliers of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
LAST_TOKENS = 64  # that penalties look at, as in llama_cpp
CANDIDATES = 64  # that a drafter draws from at most


class Noise:
    """Standard Gumbel noise by position and token: `noise(position, ids)` float64 like `ids`."""

    def __init__(self, seed: int) -> None:
        self._key = _mix_number(seed & MASK)

    def __call__(self, position: int, ids: Ids) -> npt.NDArray[np.float64]:
        key = _mix_number(self._key ^ (position + 1) & MASK)
        bits = np.asarray(ids).astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(key)
        for shift, factor in ((30, FIRST), (27, SECOND)):
            bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
        bits ^= bits >> np.uint64(31)
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1), never an end
        noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform))
        return noise


def _mix_number(value: int) -> int:
    value = (value + GOLDEN) & MASK
    for shift, factor in ((30, FIRST), (27, SECOND)):
        value = ((value ^ (value >> shift)) * factor) & MASK
    return value ^ (value >> 31)


@dataclass(frozen=True)
class Draw:
    """How the target will draw, for drafters: its noise, and the part of its chain that looks at scores alone."""

    noise: Noise
    temperature: float
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0

    def scores(self, logits: Floats, position: int, ids: Ids | None = None) -> Floats:
        """Return what to take the largest of instead of logits, float32 [rows, n]; -inf for all but the candidates.

        All rows guess the token at `position`. ids: the tokens of the columns, where these are not the tokens.
        """
        columns = top_k(logits, min(self.top_k if self.top_k > 0 else CANDIDATES, CANDIDATES, logits.shape[1]))
        best = take(logits, columns)  # [rows, k], the largest first
        rest = best - log_total(best)[:, None]
        before = np.cumsum(np.exp(rest), axis=1) - np.exp(rest)
        kept = (before < self.top_p) & (best >= best[:, :1] + np.log(max(self.min_p, 1e-30)))
        noisy = best / max(self.temperature, 1e-6) + self.noise(position, columns if ids is None else ids[columns])
        scores = np.full(logits.shape, -np.inf, dtype=np.float32)
        scores[np.arange(len(logits))[:, None], columns] = np.where(kept, noisy, -np.inf)
        return scores


def draw_of(params: Any, seed: int) -> Draw | None:
    """Return how a text with these parameters is drawn outside llama.cpp, None where llama.cpp draws or none is."""
    if params.sampling != "coupled" or params.mirostat_mode or params.temperature == 0.0:
        return None
    if params.temperature < 0.0:  # llama_cpp: the model's own distribution, whole
        return Draw(Noise(seed), 1.0, 0)
    return Draw(Noise(seed), params.temperature, params.top_k, params.top_p, params.min_p)


class Chain:
    """llama_cpp's chain of samplers for one text, in its order: processors, penalties, grammar, truncation, draw.

    params: an object with llama_cpp's names (blockffn.engine.params.GenerationParams). text: returns the verified text
    int32 [n], which logits processors read. draw: with its noise; None leaves the draw to llama.cpp with `seed`.
    """

    def __init__(
        self, model: Any, params: Any, seed: int, text: Callable[[], Any], draw: Draw | None, is_end: Any = None
    ) -> None:
        self._api = library.load()
        self.noise = None if draw is None else draw.noise
        self._text, self._processors = text, tuple(params.logits_processor or ())
        n_vocab = int(model.n_vocab())
        self._bias = _bias(params, n_vocab, is_end)
        self._candidates = np.zeros(n_vocab, dtype=CANDIDATE)
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._native = _native_chain(model, params, seed, self.noise is not None)
        self._array = self._api.llama_token_data_array()
        self._data = ctypes.cast(self._candidates.ctypes.data, dict(self._array._fields_)["data"])
        self._pointer = ctypes.pointer(self._array)

    def sample(self, position: int, logits: Floats) -> int:
        """Return the token at `position` of the text, given the logits float32 [n_vocab], and take note of it."""
        scores = logits
        if self._bias is not None:
            scores = scores.copy()
            scores[self._bias[0]] += self._bias[1]
        for processor in self._processors:
            scores = np.asarray(processor(self._text(), scores), dtype=np.float32)
        candidates, array = self._candidates, self._array
        candidates["id"], candidates["logit"], candidates["p"] = self._ids, scores, 0.0
        array.data, array.size, array.selected, array.sorted = self._data, len(candidates), -1, False
        self._api.llama_sampler_apply(self._native.sampler, self._pointer)
        left = candidates[: array.size]
        chosen = array.selected
        if self.noise is not None:
            chosen = int(np.argmax(left["logit"] + self.noise(position, left["id"])))
        if chosen < 0 or left["logit"][chosen] == -np.inf:  # llama.cpp's grammar ends the process when told of such one
            raise BlockffnError("no token is possible here: grammar, logit_bias and processors exclude all of them")
        token = int(left["id"][chosen])
        self._api.llama_sampler_accept(self._native.sampler, token)
        return token

    def close(self) -> None:
        """Free llama.cpp's samplers."""
        self._native.close()


def _bias(params: Any, n_vocab: int, is_end: Any) -> tuple[Ids, Floats] | None:
    """Return tokens and what is added to their scores, None where nothing is."""
    bias = {int(token): float(value) for token, value in (getattr(params, "logit_bias", None) or {}).items()}
    if bias and not all(0 <= token < n_vocab for token in bias):
        raise BlockffnError(f"logit_bias: expected tokens from 0 to {n_vocab - 1}, found {sorted(bias)}")
    if getattr(params, "ignore_eos", False) and is_end is not None:
        bias |= {token: -np.inf for token in range(n_vocab) if is_end(token)}
    if not bias:
        return None
    return np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float32)


def _native_chain(model: Any, params: Any, seed: int, drawn_outside: bool) -> Any:
    """Return llama_cpp's LlamaSampler as llama_cpp.Llama builds it; without the last draw where `drawn_outside`."""
    from llama_cpp import _internals as internals

    chain, n_vocab, temperature = internals.LlamaSampler(), model.n_vocab(), params.temperature
    penalties = params.repeat_penalty, params.frequency_penalty, params.presence_penalty
    chain.add_penalties(n_vocab, getattr(params, "last_n_tokens_size", LAST_TOKENS), *penalties)
    if params.grammar is not None:
        _add_grammar(chain, model, params.grammar)
    if temperature == 0.0:
        chain.add_greedy()
    elif temperature > 0.0 and params.mirostat_mode == 1:
        chain.add_mirostat(n_vocab, seed, params.mirostat_tau, params.mirostat_eta, 100)
    elif temperature > 0.0 and params.mirostat_mode == 2:
        chain.add_mirostat_v2(seed, params.mirostat_tau, params.mirostat_eta)
    else:
        if temperature > 0.0:
            chain.add_top_k(params.top_k)
            chain.add_typical(params.typical_p, 1)
            chain.add_top_p(params.top_p, 1)
            chain.add_min_p(params.min_p, 1)
            chain.add_temp(temperature)
        if not drawn_outside:
            chain.add_dist(seed)
    return chain


def _add_grammar(chain: Any, model: Any, grammar: Any) -> None:
    """Add a llama_cpp.LlamaGrammar; BlockffnError for one that llama.cpp cannot read, which it would crash on later."""
    api = library.load()
    with logs.collect() as lines:
        native = api.llama_sampler_init_grammar(model.vocab, grammar._grammar.encode(), grammar._root.encode())
    if not native:
        raise BlockffnError(f"grammar: {logs.reason(lines) or 'llama.cpp cannot read it'}; expected GBNF")
    api.llama_sampler_chain_add(chain.sampler, native)
