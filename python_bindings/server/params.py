"""Fields of a request as the engine's GenerationParams; what is absent keeps llama_cpp's default."""

from __future__ import annotations

from typing import Any

from blockffn.server.errors import ApiError, shortened
from blockffn.server.limits import Limits
from blockffn.server.prompts import Prompt
from blockffn.server.schemas import ChatRequest, SamplingRequest

SAME = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "frequency_penalty", "presence_penalty",
    "mirostat_mode", "mirostat_tau", "mirostat_eta", "ignore_eos",
)  # fmt: skip


def generation(
    body: SamplingRequest, prompt: Prompt, index: int, logprobs: int | None, n_vocab: int, limits: Limits
) -> Any:
    """Return the GenerationParams of answer `index` of a request; answers of one request have successive seeds."""
    from blockffn.engine import GenerationParams

    given: dict[str, Any] = {name: value for name in SAME if (value := getattr(body, name)) is not None}
    if body.seed is not None:
        given["seed"] = (body.seed + index) & 0xFFFFFFFF
    return GenerationParams(
        max_tokens=_max_tokens(body, limits),
        stop=prompt.stops,
        logit_bias=_biases(body, n_vocab, limits),
        logprobs=logprobs,
        grammar=prompt.grammar,
        **given,
    )


def _max_tokens(body: SamplingRequest, limits: Limits) -> int | None:
    """Return the bound of the answer: OpenAI's 16 for completions, the server's limit for chat, unless it is given."""
    asked = body.max_tokens
    if isinstance(body, ChatRequest):
        asked = body.max_completion_tokens or asked
        if asked is None:
            return limits.max_tokens
    most = limits.max_tokens
    if asked is None:
        return min(16, most or 16)
    if most is not None and asked > most:
        raise ApiError(400, f"max_tokens: expected at most {most}, found {asked}", param="max_tokens")
    return asked


def _biases(body: SamplingRequest, n_vocab: int, limits: Limits) -> dict[int, float] | None:
    if not body.logit_bias:
        return None
    if len(body.logit_bias) > limits.biases:
        raise ApiError(
            400, f"logit_bias: expected at most {limits.biases} tokens, found {len(body.logit_bias)}", "logit_bias"
        )
    result = {}
    for token, bias in body.logit_bias.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < n_vocab):
            message = f"logit_bias: expected token ids from 0 to {n_vocab - 1}, found {shortened(token)}"
            raise ApiError(400, message, "logit_bias")
        result[int(token)] = float(bias)
    return result
