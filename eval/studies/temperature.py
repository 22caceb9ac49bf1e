"""Sampled text with drafts: what is accepted at which temperature, and what it is worth.

    $ blockffn bench temperature -m model.gguf -f text.txt --draft head.gguf --plan "chain 3"
    $ blockffn bench temperature --shape 1.2b --acceptance 0.8

Texts are sampled from pieces of the file, each with a seed of its own: without drafts, with drafts that share the noise
of the draw (`sampling="coupled"`), and with drafts by best guesses (`sampling="stock"`). At temperature 0 both are the
same, and only one is measured. The ways take turns text by text, so that a slow minute of the machine meets them all.
`by position`: the share of drafts whose first i tokens were accepted. Speeds are medians over the rounds, with the
lowest and the highest; prompts are left out.

A planted model (`--shape`) is sure of its text, which therefore is the same at every temperature; a script drafts it
with the given luck. There the temperatures differ in the time of the sampler alone. Ends with a line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockffn.commands.common import count
from blockffn.errors import BlockffnError
from blockffn.eval.bench.plans import parse_plan
from blockffn.eval.studies.text import add_model_arguments, model_and_text
from blockffn.speculative import ScriptedDrafter
from blockffn.speculative.drafter import open_drafter

PROMPT = 32
HEADER = "temperature  way      tokens/step  tokens/s (range)        of plain  accepted by position"
LINE = "{temperature:<12} {way:<8} {tokens_per_step:11.2f}  {rate:7.1f} ({low:.1f} to {high:.1f})  {gain:12.2f}  {at}"
WAYS = ("plain", "coupled", "stock")


@dataclass
class Sums:
    """What one way took at one temperature: sums over all rounds, and the speed of each round."""

    steps: int = 0
    accepted: int = 0
    drafted_at: list[int] = field(default_factory=list)  # drafts that reached position 1, 2, ...
    accepted_at: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # by round
    seconds: list[float] = field(default_factory=list)

    def begin_round(self) -> None:
        """Start a round."""
        self.tokens.append(0)
        self.seconds.append(0.0)

    def add(self, found: dict[str, Any]) -> None:
        """Take the statistics of a text into the last round."""
        self.steps += found["steps"]
        self.accepted += found["accepted"]
        for ours, theirs in ((self.drafted_at, "drafted_by_position"), (self.accepted_at, "accepted_by_position")):
            ours[:] = [a + b for a, b in itertools.zip_longest(ours, found[theirs], fillvalue=0)]
        self.tokens[-1] += found["predicted_n"]
        self.seconds[-1] += found["predicted_ms"] / 1e3

    def figures(self) -> dict[str, Any]:
        """Return tokens per step, speed with its range, and the shares accepted by position."""
        rates = [n / seconds for n, seconds in zip(self.tokens, self.seconds, strict=True)]
        shares = [right / tried for right, tried in zip(self.accepted_at, self.drafted_at, strict=True)]
        speed = {"rate": statistics.median(rates), "low": min(rates), "high": max(rates)}
        return {"tokens_per_step": (self.steps + self.accepted) / self.steps, "by_position": shares} | speed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench temperature`."""
    add_model_arguments(parser)
    parser.add_argument("--draft", metavar="ngram|PATH", help="with -m: the drafter")
    parser.add_argument("--acceptance", type=float, default=0.8, metavar="P", help="of --shape's script (0.8)")
    parser.add_argument("--plan", default="chain 3", help='"auto", "chain N" or "tree N" (default: chain 3)')
    parser.add_argument("--temperatures", default="0,0.6,0.8,1", metavar="T,T", help="default: %(default)s")
    parser.add_argument("--texts", type=count, default=8, metavar="N", help="texts of a round (default: 8)")
    parser.add_argument("--tokens", type=count, default=150, metavar="N", help="of a text (default: 150)")
    parser.add_argument("--rounds", type=count, default=3, metavar="N", help="default: 3")
    parser.add_argument("-t", "--threads", type=count, metavar="N", help="threads (default: physical cores)")


def run(args: argparse.Namespace) -> int:
    """Measure; print a table and one line of JSON."""
    import blockffn
    from blockffn.eval.environment import environment, headline

    temperatures, plan = _temperatures(args.temperatures), parse_plan(args.plan)
    if (args.model is None) == (args.draft is not None):
        raise BlockffnError("--draft: goes with -m, and -m needs it; --shape drafts by a script, see --acceptance")
    path, text = model_and_text(args.shape, args.model, args.file)
    options = {"n_ctx": PROMPT + args.tokens + 64, "n_threads": args.threads}
    with blockffn.Llama(path, **options) as plain, blockffn.Llama(path, **options) as fast:
        tokens = text(fast, args.texts * PROMPT + args.tokens + 64)
        scripted = None
        if args.model is None:
            scripted = ScriptedDrafter(tokens, args.acceptance, fast.n_vocab(), max_nodes=31)
        fast.speculate(scripted or open_drafter(args.draft, plan is not None and plan.tree), plan=plan)
        sums = measure({"plain": plain, "coupled": fast, "stock": fast}, temperatures, tokens, args, scripted)
        threads = int(fast.n_threads)
    rows: list[dict[str, Any]] = []
    for (temperature, way), found in sums.items():
        rows.append({"temperature": temperature, "way": way} | found.figures())
    where = environment() | {"threads": threads, "model": path, "draft": args.draft or args.acceptance}
    print(f"{headline(where, threads)}; {Path(path).name}, {args.plan}")
    print(HEADER)
    for row in rows:
        of_plain = next(other["rate"] for other in rows if other["temperature"] == row["temperature"])
        row["gain"] = row["rate"] / of_plain
        print(LINE.format(**row, at=" ".join(f"{share:.2f}" for share in row["by_position"])))
    print(json.dumps({"environment": where, "rows": rows}))
    return 0


def measure(
    models: dict[str, Any],
    temperatures: Sequence[float],
    tokens: Sequence[int],
    args: argparse.Namespace,
    scripted: ScriptedDrafter | None,
) -> dict[tuple[float, str], Sums]:
    """Return what each way took at each temperature; `models`: by way."""
    keys = [(temperature, way) for temperature in temperatures for way in ways(temperature, scripted)]
    sums: dict[tuple[float, str], Sums] = {}
    for number in range(args.rounds + 1):
        if number < 2:  # the first round warms up
            sums = {key: Sums() for key in keys}
        for found in sums.values():
            found.begin_round()
        for seed in range(args.texts):
            truth = tokens[seed * PROMPT :]
            for (temperature, way), found in sums.items():
                models[way].sampling = "stock" if way == "stock" else "coupled"
                if scripted is not None:
                    scripted.aim(truth, args.acceptance)
                found.add(sample(models[way], truth[:PROMPT], args.tokens, temperature, seed))
    return sums


def ways(temperature: float, scripted: Any) -> Sequence[str]:
    """Return the ways that differ: best guesses are what both kinds of draft are at temperature 0, and the script's."""
    return WAYS[:2] if temperature == 0 or scripted is not None else WAYS


def sample(llm: Any, prompt: Sequence[int], n: int, temperature: float, seed: int) -> dict[str, Any]:
    """Sample `n` tokens after a prompt; return the statistics of the drafts."""
    llm.set_seed(seed)
    for _ in itertools.islice(llm.generate(prompt, temp=temperature), n):
        pass
    found: dict[str, Any] = llm.statistics()
    return found


def _temperatures(words: str) -> list[float]:
    try:
        found = [float(word) for word in words.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0.0 <= value < 100.0 for value in found):
        raise BlockffnError(f"--temperatures: expected numbers from 0 on with commas between, found {words!r}")
    return found
