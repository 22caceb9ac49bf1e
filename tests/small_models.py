"""Small GGUF files of every architecture and kind of layer that the loader knows, for the fuzzer and its tests.

.venv/bin/python tests/small_models.py FOLDER      # writes them, prints their paths
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from checkpoints import write_checkpoint
from tiny_head import write_head

from blockffn.convert.convert import convert_checkpoint
from blockffn.convert.eagle import convert_head

# name -> arguments of write_checkpoint; with "outtype" and "layout" of the converter
MODELS: dict[str, dict[str, Any]] = {
    "mla": {"n_head": 2},
    "mla-q8_0": {"n_head": 2, "tied": True, "norm": "sum", "outtype": "q8_0"},
    "gqa": {"attention": "gqa", "n_head": 4, "n_head_kv": 2, "norm": "none", "outtype": "f16"},
    "deco": {"family": "deco", "attention": "gqa", "n_head": 4, "norm": "simple", "bias": "rms"},
    "deco-gated": {"family": "deco", "attention": "gqa", "n_head": 2, "act": "norm_silu_nomean", "gated": True},
    "dense-layout": {"n_head": 2, "layout": "dense"},
    "twin-mla": {"family": "vanilla", "n_head": 2},
    "twin-gqa": {"family": "vanilla", "attention": "gqa", "n_head": 4, "n_head_kv": 2},
    "remoe": {"family": "remoe", "attention": "gqa", "n_head": 4, "n_expert": 5},
}


def write_models(folder: Path) -> list[Path]:
    """Write all files to `folder` (about 300 kB each) and return their paths."""
    written = []
    for name, arguments in MODELS.items():
        shape = {key: value for key, value in arguments.items() if key not in ("outtype", "layout")}
        if shape.get("family") in ("vanilla", "remoe"):
            shape["layout"] = "hf"
        source = write_checkpoint(folder / "checkpoints" / name, **shape)
        written.append(folder / f"{name}.gguf")
        convert_checkpoint(
            source, written[-1], outtype=arguments.get("outtype", "f32"), layout=arguments.get("layout", "expert")
        )
    write_head(folder / "checkpoints" / "head")
    target = write_checkpoint(folder / "checkpoints" / "target", n_embd=64, n_head=2, attention="gqa")
    written.append(folder / "head.gguf")
    convert_head(folder / "checkpoints" / "head", target, written[-1], outtype="f32")
    return written


if __name__ == "__main__":
    print("\n".join(map(str, write_models(Path(sys.argv[1])))))
