"""Write a model as a Hugging Face folder that `open_checkpoint` reads exactly like a published one.

    save_checkpoint(Path("examples/tiny-blockffn"), decoder.config, decoder.canonical(), Path("build/tokenizer.model"))

The families (blockffn, deco) say what config.json holds and how tensors are named and arranged. Weights are bfloat16 in
one safetensors file; the expert bias of DECO, which only moves a threshold, stays float32. Files appear whole or not at
all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from blockffn.convert.families import write_config
from blockffn.convert.hugging_face import shared_keys
from blockffn.convert.model import ModelConfig
from blockffn.whole_file import write_text


def save_checkpoint(folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], tokenizer: Path) -> None:
    """Write config.json, generation_config.json, tokenizer files and model.safetensors into `folder`.

    tensors: canonical names (blockffn.convert.model) and values of any float type. tokenizer: a SentencePiece model.
    """
    keys, layout = write_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {}
    for canonical, value in tensors:
        name, values = layout.store(canonical, value.detach().cpu())
        stored[name] = values.to(torch.float32 if canonical.endswith(".expert_bias") else torch.bfloat16)
    save_tensors(folder / "model.safetensors", stored)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    ids = {key: value for key, value in shared_keys(config).items() if key in ("bos_token_id", "eos_token_id")}
    write_json(folder / "config.json", keys)
    write_json(folder / "generation_config.json", {**ids, "do_sample": True})
    write_json(folder / "tokenizer_config.json", _tokenizer_config(config))


def _tokenizer_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.n_ctx_train,
    }


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.touch()
    mode = partial.stat().st_mode  # what the umask allows; save_file leaves the file to its owner alone
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial, metadata={"format": "pt"})
    partial.chmod(mode)
    os.replace(partial, path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(values, indent=2) + "\n")
