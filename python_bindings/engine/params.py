"""How one text is generated, and what comes out: `GenerationParams` and `Token`.

>>> from blockffn.engine.params import GenerationParams
>>> GenerationParams(max_tokens=8, temperature=0.0).greedy
True
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from blockffn.errors import BlockffnError

Processor = Callable[[npt.NDArray[np.int32], npt.NDArray[np.float32]], npt.NDArray[np.float32]]
SAMPLING = ("coupled", "stock")
UNIT_RANGE = ("top_p", "min_p", "typical_p")


@dataclass(frozen=True)
class GenerationParams:
    """The arguments of llama_cpp.Llama.create_completion that choose tokens, with its names and defaults.

    max_tokens: None or 0 for as many as the context holds. seed: None draws one. stop: texts that end the answer and
    are not part of it. logprobs: so many most likely tokens beside each token; 0 for the token's own alone.
    logits_processor: functions (input_ids, scores) -> scores. ignore_eos: tokens that end a text do not end this one.
    sampling: "coupled" draws with noise that drafters share, "stock" as llama_cpp does, seed for seed. tfs_z and
    penalize_nl are taken and have no effect, as in llama_cpp.
    """

    max_tokens: int | None = 16
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    tfs_z: float = 1.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    penalize_nl: bool = True
    seed: int | None = None
    stop: str | Sequence[str] | None = ()
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    grammar: Any = None  # llama_cpp.LlamaGrammar
    logits_processor: Sequence[Processor] | None = None
    ignore_eos: bool = False
    sampling: str = "coupled"

    def __post_init__(self) -> None:
        """Check every value; BlockffnError names the field, what is expected and what was found."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, float) and not math.isfinite(value):
                raise BlockffnError(f"{field.name}: expected a finite number, found {value!r}")
        for name in UNIT_RANGE:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise BlockffnError(f"{name}: expected 0 to 1, found {getattr(self, name)!r}")
        if self.mirostat_mode not in (0, 1, 2):
            raise BlockffnError(f"mirostat_mode: expected 0, 1 or 2, found {self.mirostat_mode!r}")
        if self.logprobs is not None and self.logprobs < 0:
            raise BlockffnError(f"logprobs: expected a number from 0 on, or None, found {self.logprobs!r}")
        if self.sampling not in SAMPLING:
            raise BlockffnError(f"sampling: expected one of {', '.join(SAMPLING)}, found {self.sampling!r}")

    @property
    def greedy(self) -> bool:
        """Is the most likely token taken, whatever came before? With `ignore_eos`: of those that end no text."""
        return self.temperature == 0.0 and not (
            self.penalized or self.logits_processor or self.grammar or self.logit_bias
        )

    @property
    def penalized(self) -> bool:
        """Does what was said before change the scores?"""
        return self.repeat_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end the answer."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return tuple(stop for stop in stops if stop)


class Token(NamedTuple):
    """One token of an answer.

    text: what it adds to the answer. It is empty while a character or a stop text may still be incomplete; the token
    that decides carries what was held back. logprob, top_logprobs: of the model's own distribution, where asked for.
    source: "plain" of a step without a draft, "draft" for an accepted drafted token, "verified" for the token that the
    model put after a draft. step: number of the evaluation that it came from.
    """

    id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    source: str = "plain"
    step: int = 0
