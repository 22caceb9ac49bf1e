"""What `make demo` shows: the bundled trained model, from checkpoint to text, plainly and speculatively.

    $ python examples/demo.py

Converts examples/tiny-blockffn (and the draft models beside it, where they are bundled) to GGUF, quantizes it,
continues a few lines of Python with and without drafts, and measures the sparsity on a module of the standard library.
Everything goes through the public commands and classes; the files land in build/demo.
"""

from __future__ import annotations

import argparse as sample_module  # its source is the text on which sparsity is measured
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blockffn
from blockffn.cli import main as command

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
OUT = ROOT / "build" / "demo"
QUANTIZED = "Q4_0"
SAMPLING: dict[str, Any] = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repeat_penalty": 1.1, "seed": 3}
N_TOKENS = 110
PROMPTS = (
    'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a text file as a list of strings.\n',
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
)


@dataclass
class Run:
    """One way of generating the texts, with its speed and what its drafts were worth."""

    name: str
    texts: list[str]
    seconds: float
    tokens: int
    steps: int
    drafted: int
    accepted: int

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def main() -> int:
    """Run all steps; returns the exit code of the first command that fails."""
    OUT.mkdir(parents=True, exist_ok=True)
    model, quantized = OUT / "tiny-blockffn.gguf", OUT / f"tiny-blockffn-{QUANTIZED}.gguf"
    heading("Checkpoint to GGUF, compared with the torch reference")
    call("convert", EXAMPLES / "tiny-blockffn", "--outfile", model, "--outtype", "f16", "--verify")
    heading("Smaller")
    call("quantize", model, quantized, QUANTIZED)
    heading("Text")
    runs = [generate("plain", quantized, None)]
    for prompt, text in zip(PROMPTS, runs[0].texts, strict=True):
        print(indented(prompt + text) + "\n")
    heading("The same text from drafts")
    runs.append(generate("n-gram drafts", quantized, blockffn.NGramDrafter()))
    draft = EXAMPLES / "tiny-blockffn-draft"
    if (draft / "config.json").exists():
        call("convert", draft, "--outfile", OUT / "draft.gguf", "--outtype", "f16")
        drafter = blockffn.ModelDrafter(OUT / "draft.gguf")
        runs.append(generate("draft model", quantized, drafter))
    head = EXAMPLES / "tiny-blockffn-eagle"
    if (head / "config.json").exists():
        call("convert", head, "--outfile", OUT / "eagle.gguf", "--target", model)
        runs.append(generate("EAGLE head", quantized, OUT / "eagle.gguf"))
    print_runs(runs)
    heading("Sparsity")
    print_sparsity(quantized)
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


def generate(name: str, path: Path, drafter: Any) -> Run:
    """Continue every prompt; `drafter` is None, a drafter, or the file of an EAGLE head."""
    llm = blockffn.Llama(path, n_ctx=512, exact=True)
    try:
        used = blockffn.EagleDrafter(drafter, llm) if isinstance(drafter, Path) else drafter
        llm.speculate(used, exact=True)
        llm.create_completion("warm up", max_tokens=8, temperature=0.0)
        run = Run(name, [], 0.0, 0, 0, 0, 0)
        for prompt in PROMPTS:
            result = llm.create_completion(prompt, max_tokens=N_TOKENS, **SAMPLING)
            stats = result["speculation"]
            run.texts.append(result["choices"][0]["text"])
            run.seconds += stats["predicted_ms"] / 1e3
            run.tokens += stats["predicted_n"]
            run.steps += stats["steps"]
            run.drafted += stats["drafted"]
            run.accepted += stats["accepted"]
        return run
    finally:
        llm.close()


def print_runs(runs: list[Run]) -> None:
    """Print speed, tokens per step and acceptance of every run, and whether its text is the plain one."""
    print(f"\n{'':<16}{'tokens/s':>10}{'tokens/step':>13}{'accepted':>18}   text")
    for run in runs:
        accepted = f"{run.accepted}/{run.drafted} {100 * run.accepted / run.drafted:3.0f} %" if run.drafted else "-"
        same = "the plain text" if run.texts == runs[0].texts else "DIFFERS from the plain text"
        per_step = (run.steps + run.accepted) / run.steps
        print(f"{run.name:<16}{run.speed:10.1f}{per_step:13.2f}{accepted:>18}   {same}")
    print("A drafter that costs more than it gains is switched off, with this model soon: a plain step is so cheap.")


def print_sparsity(path: Path) -> None:
    """Print TLS and CLS_8 on the source of a standard module."""
    llm = blockffn.Llama(path, n_ctx=512)
    try:
        file = Path(str(sample_module.__file__))
        tokens = llm.tokenize(file.read_bytes()[:8000])[:1024]
        found = blockffn.eval.sparsity(llm, tokens)
    finally:
        llm.close()
    print(f"{len(found.layer_tls)} layers of {found.n_experts} experts, on {found.n_tokens} tokens of {file.name}:")
    print(f"TLS   {100 * found.tls:5.1f} %   of the experts are not needed by a token")
    print(f"CLS_8 {100 * found.cls[8]:5.1f} %   of the experts are not needed by any of 8 consecutive tokens")


def indented(text: str) -> str:
    """Return the text behind a bar, trailing space removed."""
    return "\n".join("  | " + line.rstrip() for line in text.rstrip().splitlines())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except blockffn.BlockffnError as error:
        sys.exit(f"error: {error}")
