"""Speed and memory of `blockffn convert` beside llama.cpp's own converter, on random checkpoints of like size.

$ blockffn bench convert --shape 1.2b --repeat 3 \
    --upstream-python build/upstream-convert/bin/python --upstream build/pristine/vendor/llama.cpp

The upstream converter needs its own requirements (requirements/requirements-convert_hf_to_gguf.txt) in an environment
of its own; without --upstream-python only ours is measured. It converts a Llama with as many weights, the same
embedding, the same element type and the same number of shards. Both run as whole processes, interleaved; the source
files are read once before, so that the disk is out of the comparison. Memory is the peak resident set of the process.
The bound that the converter promises is three times the largest tensor in float32 plus 600 MB. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from blockffn.errors import BlockffnError
from blockffn.eval.environment import environment
from blockffn.eval.planted.files import n_weights, write_checkpoint
from blockffn.eval.planted.model import SHAPES, PlantedShape, shape_named

SHARD_BYTES = 400 << 20
FIXED = 600e6  # bytes that the interpreter and its libraries may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `blockffn bench convert`."""
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1.2b", help="random checkpoint (default: 1.2b)")
    parser.add_argument("--outtypes", nargs="+", default=["f16", "f32"], help="output types; the source is F16")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--upstream", type=Path, help="llama.cpp tree with convert_hf_to_gguf.py")
    parser.add_argument("--upstream-python", type=Path, help="interpreter that has upstream's requirements")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints (default: a temporary folder)")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table and the JSON line."""
    folder = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=args.folder))
    try:
        rows = measure(shape_named(args.shape), folder, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(rows))
    print(json.dumps({"environment": environment(), "rows": rows}))
    return 0


def measure(shape: PlantedShape, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Write the checkpoints, run the candidates in turns, return one row per candidate and type."""
    ours = write_checkpoint(shape, folder / "blockffn")
    sources = {"blockffn": ours}
    if args.upstream_python and args.upstream:
        sources["upstream"] = write_llama(shape, folder / "llama", ours / "tokenizer.model")
    runs: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for outtype in args.outtypes:
        for turn in range(args.repeat + 1):
            for name, source in sources.items():
                target = folder / f"{name}.gguf"
                found = _run(_command(name, source, target, outtype, args))
                target.unlink()
                if turn > 0:  # the first turn warms the page cache
                    runs.setdefault((name, outtype), []).append(found)
    largest = 4 * shape.n_vocab * shape.n_embd
    return [_row(name, outtype, shape, found, largest) for (name, outtype), found in runs.items()]


def _command(name: str, source: Path, target: Path, outtype: str, args: argparse.Namespace) -> list[str]:
    if name == "blockffn":
        tail = ["convert", str(source), "--outfile", str(target), "--outtype", outtype]
        return [sys.executable, "-m", "blockffn.cli", *tail]
    script = str(args.upstream / "convert_hf_to_gguf.py")
    return [str(args.upstream_python), script, str(source), "--outfile", str(target), "--outtype", outtype]


# A process inherits the peak of the one that forked it, so a small one stands between.
LAUNCHER = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def _run(command: list[str]) -> tuple[float, int]:
    """Return seconds and peak resident bytes of one process."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        raise BlockffnError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return seconds, int(done.stdout)


def _row(name: str, outtype: str, shape: PlantedShape, found: list[tuple[float, int]], largest: int) -> dict[str, Any]:
    seconds = [run[0] for run in found]
    return {
        "converter": name,
        "shape": shape.name,
        "weights": n_weights(shape),
        "outtype": outtype,
        "seconds": round(statistics.median(seconds), 2),
        "spread": round(max(seconds) - min(seconds), 2),
        "peak_rss_mb": round(max(run[1] for run in found) / 1e6),
        "bound_mb": round((3 * largest + FIXED) / 1e6),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text for people."""
    lines = [f"{'converter':10} {'type':5} {'seconds':>8} {'spread':>7} {'peak MB':>8} {'bound MB':>9}"]
    for row in rows:
        lines.append(
            f"{row['converter']:10} {row['outtype']:5} {row['seconds']:8.2f} {row['spread']:7.2f} "
            f"{row['peak_rss_mb']:8} "
            f"{row['bound_mb']:9}"
        )
    return "\n".join(lines)


def write_llama(shape: PlantedShape, folder: Path, tokenizer: Path) -> Path:
    """Write a random Llama checkpoint with about as many weights, F16, in shards; return the folder."""
    folder.mkdir()
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    per_layer = (n_weights(shape) - 2 * shape.n_vocab * shape.n_embd) / shape.n_layer
    width = int((per_layer - 4 * shape.n_embd**2) / (3 * shape.n_embd)) // 32 * 32
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.n_embd,
        "intermediate_size": width, "num_hidden_layers": shape.n_layer, "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head, "vocab_size": shape.n_vocab, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray[Any, Any]] = {}
    tensors = list(_llama_shapes(shape, width))
    rng = np.random.default_rng(0)
    for position, (name, size) in enumerate(tensors):
        values = rng.random(size, np.float32)
        shard[name] = (values - 0.5).astype(np.float16)
        if sum(part.nbytes for part in shard.values()) >= SHARD_BYTES or position == len(tensors) - 1:
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _llama_shapes(shape: PlantedShape, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    h = shape.n_embd
    yield "model.embed_tokens.weight", (shape.n_vocab, h)
    for layer in range(shape.n_layer):
        at = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{at}self_attn.{name}.weight", (h, h)
        for name in ("gate_proj", "up_proj"):
            yield f"{at}mlp.{name}.weight", (width, h)
        yield f"{at}mlp.down_proj.weight", (h, width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{name}.weight", (h,)
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (shape.n_vocab, h)
