"""Peak memory of the evaluations with a large vocabulary, above what the loaded model takes.

    $ python tests/test_eval_memory.py                     # what docs/evaluation.md states; 122,753 tokens

Each runs in a process of its own on a random model, whose own memory is that of a process that only loads it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tiny_llama import write_llama

N_VOCAB = 122_753  # of the published models
MEASURES = {
    "load": "pass",
    "eval ppl": "perplexity(llm, tokens)",
    "eval kld": "divergence(llm, other, tokens)",
    "eval sparsity": "profile(llm, tokens)",
    "eval lm-eval": "Scorer(llm).score([(tokens[:20] + [i], tokens[20 + i:40 + i]) for i in range(64)])",
    "logits of a window": "llm.logits(tokens[:512])",
}
MOST = {"eval ppl": 250, "eval kld": 650, "eval sparsity": 250, "eval lm-eval": 400, "logits of a window": 500}  # MB
PROGRAM = """
import resource, sys
import blockffn
from blockffn.eval.harness.scorer import Scorer
from blockffn.eval.quality.perplexity import divergence, perplexity
from blockffn.eval.quality.sparsity import profile
llm, other = (blockffn.Llama(path, n_ctx=1024, n_threads=1) for path in sys.argv[1:3])
tokens = [1 + 7 * i % 120_000 for i in range(1024)]
llm.logits([1]), other.logits([1])                  # contexts with their buffers
{body}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peaks(folder: Path) -> dict[str, float]:
    """Return the peak resident memory of each evaluation above loading, MB of 10^6 bytes."""
    models = [write_llama(folder / f"{i}.gguf", seed=i, n_vocab=N_VOCAB, n_layer=1, experts=(4, 2)) for i in range(2)]
    found = {}
    for name, body in MEASURES.items():
        command = [sys.executable, "-c", PROGRAM.format(body=body), *map(str, models)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = int(done.stdout.split()[-1]) * 1024 / 1e6
    return {name: value - found["load"] for name, value in found.items() if name != "load"}


def test_memory_is_bounded(tmp_path: Path) -> None:
    """No evaluation holds the logits of its whole text: 1,024 tokens have 503 MB of them, in two models 1,006."""
    found = peaks(tmp_path)
    assert found.keys() == MOST.keys()
    assert {name: value for name, value in found.items() if value > MOST[name]} == {}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps({key: round(value) for key, value in peaks(Path(name)).items()}, indent=1))
