"""Arguments and steps that the commands which run a model share."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blockffn.errors import BlockffnError

if TYPE_CHECKING:
    from blockffn.llama import Llama, UnionStats


def count(text: str) -> int:
    """Argument type: a positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text}")
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `open_model`."""
    parser.add_argument("-m", "--model", required=True, metavar="M.gguf", help="model file")
    parser.add_argument("-c", "--ctx-size", type=count, metavar="N", help="context (default: the trained one, <= 4096)")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")
    parser.add_argument("--ffn", choices=("union", "dense"), default="union", help="sparse op or every expert")
    parser.add_argument(
        "--router-threshold", type=float, metavar="T", help="skip experts below T x the token's largest score"
    )
    parser.add_argument(
        "--union-budget", type=int, default=0, metavar="N", help="most experts per layer of a verified batch"
    )
    parser.add_argument("--exact", action="store_true", help="speculative greedy text equals plain greedy text")
    parser.add_argument("--draft", metavar="ngram|PATH", help="speculate: n-grams, a draft model or an EAGLE head")
    parser.add_argument(
        "--tree", action=argparse.BooleanOptionalAction, help="may an EAGLE head draft trees? (default: it may)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show the log of llama.cpp")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sampling`."""
    parser.add_argument("--temp", type=float, default=0.8, metavar="T", help="temperature, 0 = greedy (default: 0.8)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the sampler (default: 0)")
    parser.add_argument("--top-k", type=int, default=40, metavar="K", help="keep the K likeliest tokens (default: 40)")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="keep this much mass (default: 0.95)")
    parser.add_argument("--min-p", type=float, default=0.05, metavar="P", help="drop below P x likeliest")
    parser.add_argument("--repeat-penalty", type=float, default=1.0, metavar="X", help="1 = none (default)")


def open_model(args: argparse.Namespace) -> Llama:
    """Load the model that the arguments name, with its drafter."""
    if args.tree and args.draft is None:
        raise BlockffnError("--tree: needs --draft with an EAGLE head")
    import blockffn
    from blockffn.speculative import drafter

    llm: Llama = blockffn.Llama(
        args.model,
        n_ctx=args.ctx_size,
        n_threads=args.threads,
        ffn=args.ffn,
        drafter=drafter.open_drafter(args.draft, args.tree),
        exact=args.exact,
        router_threshold=args.router_threshold,
        union_budget=args.union_budget,
        verbose=args.verbose,
    )
    return llm


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling arguments of `Llama.generate`."""
    return {
        "temp": args.temp,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repeat_penalty": args.repeat_penalty,
    }


@dataclass
class Meter:
    """Clock and counters of one generation: `start` before it, `token` for each token of it, `report` after it."""

    llm: Llama
    n_prompt: int
    n_tokens: int = 0
    times: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # start, first token, last token
    prompt_stats: UnionStats | None = None

    def start(self) -> None:
        """Call before the prompt is evaluated."""
        self.times[0] = time.perf_counter()

    def token(self) -> None:
        """Call when a token arrives."""
        now = time.perf_counter()
        if self.n_tokens == 0:
            self.times[1] = now
            self.prompt_stats = self.llm.union_stats() if self.llm.n_moe_layers else None
        self.times[2] = now
        self.n_tokens += 1

    def report(self) -> dict[str, Any]:
        """Return the figures; None where there is nothing to measure."""
        start, first, last = self.times
        result: dict[str, Any] = {
            "prompt_tokens": self.n_prompt,
            "generated_tokens": self.n_tokens,
            "prompt_tokens_per_second": _rate(self.n_prompt, first - start),
            "decode_tokens_per_second": _rate(self.n_tokens - 1, last - first),
            "token_sparsity": None,
            "union_share": None,
        }
        if self.prompt_stats is not None and self.n_tokens > 1:
            stats = self.llm.union_stats() - self.prompt_stats
            result["experts"] = stats.n_experts
            result["token_sparsity"] = _finite(stats.token_sparsity)
            result["union_share"] = _finite(stats.union_share)
        if self.llm.drafter is not None:
            result["speculation"] = self.llm.statistics()
        return result


def _rate(amount: float, per: float) -> float | None:
    return amount / per if per > 0 and amount > 0 else None


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value
