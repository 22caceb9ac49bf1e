"""One contender of blockffn.eval.bench.peers that runs in Python: blockffn.Llama, or llama_cpp.Llama as it is.

    $ echo '{"prompt": "import os", "tokens": 32}' | python -m blockffn.eval.bench.peer_worker model.gguf --threads 2

Answers {"tokens", "seconds", "steps", "drafted", "accepted"} per prompt: seconds from the first token to the last.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from blockffn.errors import BlockffnError
from blockffn.eval.bench.worker import memory

CONTEXT = 1024


class Peer:
    """A model with its drafter; `generate` gives its greedy text."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.counts: Any = None
        options = {"n_ctx": CONTEXT, "n_threads": args.threads, "verbose": False}
        self.llm = self._stock(args, options) if args.stock else self._ours(args, options)

    def _ours(self, args: argparse.Namespace, options: dict[str, Any]) -> Any:
        import blockffn
        from blockffn.eval.bench.plans import parse_plan
        from blockffn.speculative.drafter import open_drafter

        llm = blockffn.Llama(args.model, ffn=args.ffn, **options)
        if args.draft:
            llm.speculate(open_drafter(args.draft, args.tree), plan=parse_plan(args.plan))
        return llm

    def _stock(self, args: argparse.Namespace, options: dict[str, Any]) -> Any:
        from blockffn import library

        library.load()  # the library that knows the model
        import llama_cpp

        if args.lookup:
            self.counts = options["draft_model"] = counting_lookup(args.lookup)
        return llama_cpp.Llama(args.model, **options)

    def generate(self, prompt: str, n_tokens: int) -> dict[str, Any]:
        """Generate `n_tokens` tokens greedily, whatever they are."""
        if self.counts is not None:
            self.counts.calls = self.counts.proposed = 0
        tokens: list[int] = []
        started = ended = 0.0
        stream: Iterator[int] = self.llm.generate(self.llm.tokenize(prompt.encode()), temp=0.0)
        for token in stream:
            ended = perf_counter()
            started = started or ended
            tokens.append(token)
            if len(tokens) == n_tokens:
                break
        statistics = self._statistics(len(tokens))
        text = self.llm.detokenize(tokens).decode(errors="replace")
        return {"tokens": len(tokens), "text": text, "seconds": ended - started, **statistics}

    def _statistics(self, n_tokens: int) -> dict[str, Any]:
        if self.counts is not None:
            calls, accepted = self.counts.calls, n_tokens - 1 - self.counts.calls
            return {"steps": calls, "drafted": self.counts.proposed, "accepted": max(0, accepted)}
        if not hasattr(self.llm, "speculation"):
            return {"steps": n_tokens - 1, "drafted": 0, "accepted": 0}
        found = self.llm.statistics()
        return {"steps": found["steps"], "drafted": found["drafted"], "accepted": found["accepted"]}


def counting_lookup(n_tokens: int) -> Any:
    """Return llama_cpp's own prompt lookup with its default n-grams, counting calls and proposed tokens."""
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    class Counting(LlamaPromptLookupDecoding):
        calls = proposed = 0

        def __call__(self, input_ids: Any, /, **options: Any) -> Any:
            found = super().__call__(input_ids, **options)
            self.calls += 1
            self.proposed += len(found)
            return found

    return Counting(num_pred_tokens=n_tokens)


def main() -> int:
    """Answer requests from stdin until it closes; the first answer says that the model is loaded."""
    parser = argparse.ArgumentParser(description="one contender of blockffn.eval.bench.peers")
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--ffn", default="union")
    parser.add_argument("--draft")
    parser.add_argument("--plan", default="auto")
    parser.add_argument("--tree", action="store_true")
    parser.add_argument("--stock", action="store_true")
    parser.add_argument("--lookup", type=int, default=0)
    args = parser.parse_args()
    peer: Peer | None = None
    for line in sys.stdin:
        try:
            peer = peer or Peer(args)
            request = json.loads(line)
            found = peer.generate(request["prompt"], request["tokens"]) | memory()
        except (BlockffnError, RuntimeError, ValueError, IndexError) as error:  # of the peer too: part of the result
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
