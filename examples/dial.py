"""Fewer experts for some quality: python examples/dial.py MODEL.gguf TEXT."""

import sys
from pathlib import Path

import blockffn
from blockffn.eval.quality.perplexity import perplexity

for threshold in (0.0, 0.1, 0.2):
    with blockffn.Llama(sys.argv[1], router_threshold=threshold) as llm:
        tokens = llm.tokenize(Path(sys.argv[2]).read_bytes())
        active = llm.active_experts(tokens).mean()
        print(f"tau {threshold}: {100 * active:.1f} % active, perplexity {perplexity(llm, tokens, 64).perplexity:.2f}")
