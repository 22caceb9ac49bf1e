"""How sparse is the router on a text? python examples/sparsity_of_a_text.py MODEL.gguf TEXT."""

import sys
from pathlib import Path

import blockffn

model, text = sys.argv[1:3]
with blockffn.Llama(model) as llm:
    found = blockffn.eval.sparsity(llm, llm.tokenize(Path(text).read_bytes()))
print(f"a token leaves out {100 * found.tls:.1f} % of the experts")
for size, share in found.cls.items():
    print(f"{size:>3} neighbouring tokens leave out {100 * (share or 0):.1f} %")
