"""A drafter of one's own, which repeats the last token: python examples/custom_drafter.py MODEL.gguf."""

import sys

import blockffn
from blockffn.speculative import Drafter
from blockffn.speculative.draft import Draft, Plan


class Repeat(Drafter):
    def propose(self, context, n):
        return Draft.chain([context.tokens[-1]] * n)


with blockffn.Llama(sys.argv[1]) as llm:
    llm.speculate(Repeat(), plan=Plan(2))
    out = llm.create_completion("x = 1", max_tokens=24, temperature=0.0)
    print(out["choices"][0]["text"], out["speculation"]["accepted"], "of", out["speculation"]["drafted"])
