"""Convert a checkpoint and let the model answer: python examples/convert_and_chat.py CHECKPOINT QUESTION."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import blockffn

source, question = sys.argv[1:3] if len(sys.argv) > 2 else ("examples/tiny-blockffn", "import os")
with TemporaryDirectory() as folder:
    blockffn.convert.convert_checkpoint(source, Path(folder) / "model.gguf", outtype="f16")
    with blockffn.Llama(Path(folder) / "model.gguf", n_ctx=512) as llm:
        message = {"role": "user", "content": question}
        answer = llm.create_chat_completion([message], max_tokens=32, temperature=0.0)
        print(answer["choices"][0]["message"]["content"])
