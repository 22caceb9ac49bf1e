"""What `make demo` shows: the bundled trained model, from checkpoint to text, and what its sparsity is good for.

    $ python examples/demo.py
    $ python examples/demo.py --shape 1.2b        # the plot for the size of BlockFFN-XLarge too (random weights, 2 GB)

Converts examples/tiny-blockffn and its EAGLE head to GGUF, quantizes, continues a few lines of Python; completes code
greedily with n-gram drafts, where speculation gains, and with the head, where it cannot, and says why; draws how many
experts a batch of n tokens needs, and what it takes. Everything goes through the public commands and classes; the files
land in build/demo.
"""

from __future__ import annotations

import argparse  # its source is also the text that is completed and measured
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blockffn
from blockffn.cli import main as command
from blockffn.eval.bench import models as bench
from blockffn.speculative.policy import Plan

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
OUT = ROOT / "build" / "demo"
QUANTIZED = "Q4_0"
SAMPLING: dict[str, Any] = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repeat_penalty": 1.1, "seed": 3}
N_TOKENS = 110  # of a sampled text
PROMPTS = (
    'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a text file as a list of strings.\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
)
N_CODE, N_PROMPT, N_PROMPTS = 160, 96, 4  # tokens of a greedy completion and of its prompt; how many
SIZES = (1, 2, 4, 8, 16, 32)  # tokens at once
CHAIN = 3  # tokens that the head drafts


@dataclass
class Run:
    """One way of completing the code, with its speed and what its drafts were worth."""

    name: str
    texts: list[str]
    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_ms: float = 0.0
    verify_ms: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def main(arguments: list[str] | None = None) -> int:
    """Run all steps; returns the exit code of the first command that fails."""
    parser = argparse.ArgumentParser(description="what the bundled model shows")
    parser.add_argument("--shape", help="draw the plot for a random model of this shape too, such as 1.2b")
    shape = parser.parse_args(arguments).shape
    OUT.mkdir(parents=True, exist_ok=True)
    model, quantized = OUT / "tiny-blockffn.gguf", OUT / f"tiny-blockffn-{QUANTIZED}.gguf"
    head, dense = OUT / "eagle.gguf", OUT / f"tiny-dense-{QUANTIZED}.gguf"
    heading("Checkpoint to GGUF, compared with the torch reference")
    call("convert", EXAMPLES / "tiny-blockffn", "--outfile", model, "--outtype", "f16", "--verify")
    call("quantize", model, quantized, QUANTIZED)
    heading("Text")
    for prompt, text in zip(PROMPTS, sampled(quantized), strict=True):
        print(indented(prompt + text) + "\n")
    heading("Greedy code completion, with and without drafts")
    call("convert", EXAMPLES / "tiny-blockffn-eagle", "--outfile", head, "--target", model)
    runs = [completed("plain", quantized, None), completed("n-grams, automatic", quantized, "ngram")]
    runs.append(completed(f"EAGLE head, chain {CHAIN}", quantized, head, Plan(CHAIN)))
    print_runs(runs)
    heading("Sparsity, and what it saves")
    call(
        "convert", EXAMPLES / "tiny-blockffn", "--outfile", OUT / "dense.gguf", "--outtype", "f16", "--layout", "dense"
    )
    call("quantize", OUT / "dense.gguf", dense, QUANTIZED)
    shown = measured("tiny-blockffn", quantized, dense, {"text": source()})
    if shape is not None:
        from blockffn.eval.planted import files, model as planted  # noqa: I001

        made = files.models(shape, QUANTIZED, say=lambda line: print(line, flush=True))
        text = {"tokens": planted.text(made.shape, 4096)}
        shown = [*shown, *measured(f"{shape}, random weights", made.union, made.dense, text)]
    draw(shown, OUT / "union.png")
    return 0


def heading(text: str) -> None:
    """Print the title of a step."""
    print(f"\n== {text} ==", flush=True)


def call(*arguments: object) -> None:
    """Show a `blockffn` command and run it; end the demo with its exit code when it fails."""
    words = [str(word) for word in arguments]
    shown = [str(Path(word).relative_to(ROOT)) if word.startswith(str(ROOT)) else word for word in words]
    print(f"$ blockffn {shlex.join(shown)}", flush=True)
    code = command(words)
    if code:
        raise SystemExit(code)


def source() -> str:
    """Return code that the model did not see: a module of the standard library."""
    return Path(str(argparse.__file__)).read_text(encoding="utf-8")


def sampled(path: Path) -> list[str]:
    """Continue every prompt, sampled with a fixed seed."""
    with blockffn.Llama(path, n_ctx=512) as llm:
        results = [llm.create_completion(prompt, max_tokens=N_TOKENS, **SAMPLING) for prompt in PROMPTS]
    return [result["choices"][0]["text"] for result in results]


def completed(name: str, path: Path, drafter: str | Path | None, plan: Plan | None = None) -> Run:
    """Complete pieces of code greedily in exact mode; the first pass warms up, and lets the automatic choice learn."""
    with blockffn.Llama(path, n_ctx=512, exact=True) as llm:
        used = blockffn.EagleDrafter(drafter, tree=False) if isinstance(drafter, Path) else drafter
        llm.speculate(used, exact=True, plan=plan)
        tokens = llm.tokenize(source().encode())
        for _ in range(2):
            run = Run(name, [])
            for start in range(0, N_PROMPTS * 800, 800):
                result = llm.create_completion(tokens[start : start + N_PROMPT], max_tokens=N_CODE, temperature=0.0)
                stats = result["speculation"]
                run.texts.append(result["choices"][0]["text"])
                run.seconds += stats["predicted_ms"] / 1e3
                for key, figure in (("tokens", "predicted_n"), *((each, each) for each in SUMMED)):
                    setattr(run, key, getattr(run, key) + stats[figure])
    return run


SUMMED = ("steps", "drafted", "accepted", "draft_ms", "verify_ms")


def print_runs(runs: list[Run]) -> None:
    """Print speed, tokens per step and acceptance of every run, and why the head gains nothing."""
    plain, head = runs[0], runs[-1]
    print(f"\n{'':<22}{'tokens/s':>10}{'of plain':>10}{'tokens/step':>13}{'accepted':>10}   text")
    for run in runs:
        accepted = f"{100 * run.accepted / run.drafted:.0f} %" if run.drafted else "-"
        same = "the plain text" if run.texts == plain.texts else "DIFFERS from the plain text"
        per_step, share = (run.steps + run.accepted) / run.steps, run.speed / plain.speed
        print(f"{run.name:<22}{run.speed:10.0f}{share:9.2f}x{per_step:13.2f}{accepted:>10}   {same}")
    step, drafting, verifying = (
        value / run.steps for value, run in ((plain.verify_ms, plain), (head.draft_ms, head), (head.verify_ms, head))
    )
    tokens = (head.steps + head.accepted) / head.steps
    cost, saved = drafting + verifying, tokens * step
    print("\nN-grams cost nothing, so what they guess right is gained.")
    print(f"The head gives {tokens:.1f} tokens a step: drafting {drafting:.2f} ms, verifying {verifying:.2f} ms.")
    print(
        f"As many plain steps of {step:.2f} ms take {saved:.2f} ms, so it {'loses' if cost >= saved else 'gains'} here."
    )
    print("A quiet machine decodes this model in 0.2 to 0.5 ms a token: less than a drafted one takes.")
    print("A model of 1.2 B parameters takes 30 ms a token, and a drafted one 4 ms: there a head gains.")


Curve = tuple[str, int, list[float], dict[str, list[float]]]  # name, experts, share by SIZES, milliseconds by SIZES


def measured(name: str, union: Path, dense: Path, text: dict[str, Any]) -> list[Curve]:
    """Return the share of experts that n tokens need, and the milliseconds of a step of n tokens, union and dense."""
    with blockffn.Llama(union, n_ctx=512) as llm:
        tokens = text.get("tokens") or llm.tokenize(text["text"].encode())
        found = blockffn.eval.sparsity(llm, tokens[:1024], SIZES)
    share = [1.0 - found.cls[size] for size in SIZES]
    print(f"{name}: {len(found.layer_tls)} layers of {found.n_experts} experts, on {found.n_tokens} tokens")
    print(f"TLS   {100 * found.tls:5.1f} %   of the experts are not needed by a token")
    print(f"CLS_8 {100 * found.cls[8]:5.1f} %   of the experts are not needed by any of 8 consecutive tokens")
    pair = [bench.Candidate(str(union), "union"), bench.Candidate(str(dense), "dense")]
    timed = bench.phases(SIZES[1:], prefill=0)
    rows = bench.run(pair, text, blockffn.threads.physical_cores(), rounds=3, timed=timed).rows
    times = {ffn: [row["step_ms"] for row in rows if row["ffn"] == ffn] for ffn in ("union", "dense")}
    print("tokens at once   " + "".join(f"{size:9}" for size in SIZES))
    print("experts needed   " + "".join(f"{100 * value:7.0f} %" for value in share))
    for ffn, values in times.items():
        print(f"{ffn}, ms a step  " + "".join(f"{value:9.2f}" for value in values))
    return [(name, found.n_experts, share, times)]


def draw(curves: list[Curve], target: Path) -> None:
    """Draw experts needed and milliseconds of a step over the tokens at once, a row for every model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(curves), 2, figsize=(9, 3.4 * len(curves)), squeeze=False)
    for (name, n_experts, share, times), (left, right) in zip(curves, axes, strict=True):
        apart = [1 - (1 - share[0]) ** size for size in SIZES]
        left.plot(SIZES, [100 * value for value in share], "o-", label="needed by n tokens of the text")
        left.plot(SIZES, [100 * value for value in apart], "--", color="grey", label="if tokens chose independently")
        left.set_title(f"{name}: union of {n_experts} experts", fontsize=9)
        left.set_ylabel("experts needed, %")
        left.set_ylim(0, 100)
        for ffn, values in times.items():
            right.plot(SIZES, values, "o-", label=f"{ffn}, {QUANTIZED}")
        right.set_title("one step", fontsize=9)
        right.set_ylabel("milliseconds")
        right.set_ylim(0)
        for axis in (left, right):
            axis.set_xscale("log", base=2)
            axis.set_xticks(SIZES, [str(size) for size in SIZES])
            axis.set_xlabel("tokens at once")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    shown = target.relative_to(ROOT) if target.is_relative_to(ROOT) else target
    print(f"\nThe union grows more slowly than the batch: neighbouring tokens share experts. Plot: {shown}")


def indented(text: str) -> str:
    """Return the text behind a bar, trailing space removed."""
    return "\n".join("  | " + line.rstrip() for line in text.rstrip().splitlines())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except blockffn.BlockffnError as error:
        sys.exit(f"error: {error}")
