"""One model in a process of its own, timed on request: what `blockffn bench` starts once per model.

    $ echo '{"phase": "decode", "n": 1, "steps": 8}' | python -m blockffn.eval.bench.worker model.gguf < requests

The parent interleaves the requests of several workers; while one works, the others wait for a line on stdin.
Requests and answers are JSON, one per line: phases `decode` and `verify` answer the seconds of every step, `prefill`
those of the whole text, `nodes` also what the nodes of the graph took, `activity` what the router chose, `memory` the
peak resident memory of this process. A request with a plan generates text (blockffn.eval.bench.generate) and answers
the seconds per token, with statistics.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from blockffn.errors import BlockffnError

BATCH = 512  # tokens per evaluation of a prefill
SLACK = 64  # tokens that a generation may take beyond what it is asked for


class Worker:
    """A loaded model with a text to run through it; the text starts again when it is used up.

    args: the parsed arguments of `main`. known: `tokens` is the greedy text of the model, whatever stands before it.
    verbose: llama.cpp's log goes to stderr, which names the buffers.
    """

    def __init__(self, args: argparse.Namespace, tokens: Sequence[int], known: bool, verbose: bool = True) -> None:
        import blockffn
        from blockffn.eval.bench.generate import Generation

        options = {"n_batch": BATCH, "n_ubatch": BATCH, "n_threads": args.threads, "verbose": verbose}
        self.llm = blockffn.Llama(args.model, n_ctx=args.past + 2 * BATCH, ffn=args.ffn, exact=args.exact, **options)
        self.generation = Generation(self.llm, args.draft, args.scripted, args.trees)
        self.target = self.generation.target
        self.past, self.known = args.past, known
        self.text = np.resize(np.asarray(tokens, np.int32), max(len(tokens), args.past + 4 * BATCH))
        self.at = args.past  # next token of the text
        self.kept = 0  # leading tokens of the text that are in the cache
        self.calls: dict[tuple[str, float | None], int] = {}  # of `generate`, by plan and probability

    def set_text(self, text: str) -> None:
        """Take another text, from its beginning."""
        tokens = self.llm.tokenize(text.encode(), add_bos=True)
        self.text = np.resize(np.asarray(tokens, np.int32), max(len(tokens), len(self.text)))
        self.at, self.kept = self.past, 0

    def prefill(self, n: int) -> list[float]:
        """Evaluate `n` tokens from an empty cache, in batches of 512, logits for the last one: [seconds]."""
        self.target.truncate(0)
        self.kept = 0
        started = time.perf_counter()
        for start in range(0, n, BATCH):
            piece = self._next(min(BATCH, n - start))
            self.target.evaluate_text(piece, start, slice(-1, None) if start + len(piece) == n else slice(0, 0))
        self.target.logits(1)
        return [time.perf_counter() - started]

    def steps(self, n: int, steps: int, past: int | None = None) -> list[float]:
        """Evaluate `n` tokens at a time after `past` others, logits for every one: seconds of each step.

        past: at most that of the command line, which is the default.
        """
        past = self.past if past is None else past
        self.target.truncate(min(self.kept, past))
        for start in range(self.kept, past, BATCH):
            self.target.evaluate_text(self.text[start : min(past, start + BATCH)], start, slice(0, 0))
        self.kept = past
        seconds = []
        for step in range(steps):
            piece = self._next(n)
            started = time.perf_counter()
            self.target.evaluate_text(piece, past + step * n, slice(None))
            self.target.logits(n)
            seconds.append(time.perf_counter() - started)
        return seconds

    def nodes(self, n: int, steps: int, past: int) -> dict[str, Any]:
        """Do the same with the nodes of the graph timed: seconds of each step, and sums over the steps by node."""
        from blockffn import node_times

        self.steps(n, 1, past)  # what follows meets a full cache and the graph of its size
        node_times.switch(self.llm.ctx, True)
        try:
            return {"seconds": self.steps(n, steps, past), "nodes": node_times.read(self.llm.ctx)}
        finally:
            node_times.switch(self.llm.ctx, False)

    def generate(self, n: int, plan: str, probability: float | None) -> dict[str, Any]:
        """Generate at least `n` tokens; the same call number has the same prompt, whatever the plan."""
        self.kept = 0
        call = self.calls[plan, probability] = self.calls.get((plan, probability), -1) + 1
        truth = None
        if self.known:
            at = self.past + call * n % (len(self.text) - self.past - n - SLACK)
            truth = np.concatenate([self.text[: self.past - 1], self.text[at : at + n + SLACK]]).tolist()
            prompt = truth[: self.past]  # all but its last token stays in the cache
        else:
            at = call * self.past % (len(self.text) - self.past)
            prompt = self.text[at : at + self.past].tolist()
        found = self.generation.run(prompt, n, plan, truth, probability)
        seconds, statistics = found["seconds"], found["statistics"]
        return {"seconds": [seconds / statistics["measured_tokens"]], "statistics": statistics}

    def activity(self, n_tokens: int) -> dict[str, Any]:
        """Return TLS and CLS_c on the text, as the router inside llama.cpp chose."""
        from blockffn.eval.quality.sparsity import sparsity

        if self.llm.n_moe_layers == 0:
            return {}
        found = sparsity(self.llm, self.text[:n_tokens].tolist())
        return {"tls": found.tls, "cls": {str(size): value for size, value in found.cls.items()}}

    def _next(self, n: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        if self.at + n > len(self.text):
            self.at = self.past
        piece = self.text[self.at : self.at + n]
        self.at += n
        return piece

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what one request asks."""
        phase = request["phase"]
        if request.get("plan"):
            return self.generate(request["steps"], request["plan"], request["probability"])
        if phase in ("prefill", "decode", "verify", "nodes"):
            self.generation.forget()  # what follows goes past its record of the cache
        if phase == "prefill":
            return {"seconds": self.prefill(request["n"])}
        if phase in ("decode", "verify"):
            return {"seconds": self.steps(request["n"], request["steps"])}
        if phase == "nodes":
            return self.nodes(request["n"], request["steps"], request["past"])
        if phase == "activity":
            return self.activity(request["n"])
        if phase == "memory":
            return memory()
        raise ValueError(f"phase: found {phase!r}")


def memory() -> dict[str, float]:
    """Return the peak resident memory of this process and its parts now (Linux), in MB of 10^6 bytes."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("VmHWM", "RssAnon", "RssFile"):
            found[name] = int(rest.split()[0]) * 1024 / 1e6
    return {"peak_rss_mb": found["VmHWM"], "anonymous_mb": found["RssAnon"], "file_mb": found["RssFile"]}


def main() -> int:
    """Answer requests from stdin until it closes. The first line holds the text as token ids, or words to tokenize."""
    parser = argparse.ArgumentParser(description="one model of `blockffn bench`")
    parser.add_argument("model")
    parser.add_argument("--ffn", default="union")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--past", type=int, required=True)
    parser.add_argument("--draft")
    for flag in ("--scripted", "--trees", "--exact"):
        parser.add_argument(flag, action="store_true")
    args = parser.parse_args()
    try:
        first = json.loads(sys.stdin.readline())
        worker = Worker(args, first.get("tokens") or [0], "tokens" in first)
        if "text" in first:
            worker.set_text(first["text"])
        print(json.dumps({"ready": True, "vocab": worker.llm.n_vocab()}), flush=True)
        for line in sys.stdin:
            print(json.dumps(worker.answer(json.loads(line))), flush=True)
    except Exception as error:  # whatever it is, whoever asked has to know; a traceback would be lost in a log
        cause = str(error) if isinstance(error, BlockffnError) else f"{type(error).__name__}: {error}"
        print(json.dumps({"error": cause}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
