"""The written file: types, keys, streaming, splitting, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from gguf import GGUFReader, GGUFValueType, GGUFWriter, quants

from blockffn.cli import main
from blockffn.convert import convert_checkpoint, load_canonical, writer
from blockffn.errors import BlockffnError

DECO: dict[str, Any] = {"family": "deco", "norm": "simple", "attention": "gqa", "n_head": 4, "n_head_kv": 2}


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def values(path: Path, name: str) -> np.ndarray[Any, Any]:
    tensor = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == name)
    return quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("stored", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0", "auto"])
def test_outtypes(tmp_path: Path, outtype: str, stored: str) -> None:
    """Each value is the nearest one of the output type; auto keeps the stored type."""
    source = write_checkpoint(tmp_path / "m", dtype=stored)
    report = convert_checkpoint(source, tmp_path / "m.gguf", outtype=outtype)
    assert report.outtype == (stored if outtype == "auto" else outtype)
    _, tensors = load_canonical(source)
    original = tensors["layers.0.q_a"].float()
    expected = {
        "f32": lambda: original,
        "f16": lambda: original.half().float(),
        "bf16": lambda: original.bfloat16().float(),
        "q8_0": lambda: torch.from_numpy(quants.dequantize(quants.quantize(original.numpy(), 8), 8)),
        # type: ignore[arg-type]
    }[report.outtype]()
    np.testing.assert_array_equal(values(tmp_path / "m.gguf", "blk.0.attn_q_a.weight"), expected.numpy())


def test_rows_that_q8_0_cannot_hold_stay_f16(tmp_path: Path) -> None:
    report = convert_checkpoint(write_checkpoint(tmp_path / "m"), tmp_path / "m.gguf", outtype="q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.attn_q_b.weight"] == "F16" and types["blk.0.attn_q_a.weight"] == "Q8_0"  # rows of 24 and of 64
    assert any("stay F16 instead of Q8_0: blk.0.attn_q_b.weight" in note for note in report.notes)


def test_keys_of_a_blockffn_model(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "tiny", n_head=2, config={"rope_scaling": {"type": "linear", "factor": 2.0}})
    convert_checkpoint(source, tmp_path / "m.gguf", outtype="f16")
    found = fields(tmp_path / "m.gguf")
    expected = {
        "general.architecture": "blockffn", "general.name": "tiny", "general.file_type": 1, "blockffn.block_count": 2,
        "blockffn.attention.head_count": 2, "blockffn.attention.head_count_kv": 1, "blockffn.attention.key_length": 32,
        "blockffn.attention.value_length": 16, "blockffn.attention.key_length_mla": 48,
        "blockffn.attention.value_length_mla": 32, "blockffn.attention.q_lora_rank": 24,
        "blockffn.attention.kv_lora_rank": 16, "blockffn.rope.dimension_count": 16, "blockffn.feed_forward_length": 0,
        "blockffn.rope.scaling.type": "linear", "blockffn.rope.scaling.factor": 2.0, "blockffn.expert_count": 7,
        "blockffn.expert_used_count": 7, "blockffn.expert_feed_forward_length": 32,
        "blockffn.expert_activation": "silu",
        "blockffn.expert_layout": "expert", "blockffn.router.norm": "rms", "blockffn.router.bias_method": "none",
        "blockffn.embedding_scale": 12.0, "blockffn.logit_scale": 0.5, "blockffn.hidden_activation": "silu",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert found["blockffn.residual_scale"] == pytest.approx(1.4 / 2**0.5, rel=1e-6)
    assert found["blockffn.attention.lora_layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_dynamic_rope_travels_as_its_own_key(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m", config={"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    convert_checkpoint(source, tmp_path / "m.gguf")
    found = fields(tmp_path / "m.gguf")
    assert found["blockffn.rope.scaling.type"] == "none" and found["blockffn.rope.scaling.dynamic_factor"] == 2.0


def test_digest_of_the_source(tmp_path: Path) -> None:
    """general.source.sha256 is what `sha256sum FILES | sha256sum` prints."""
    source = write_checkpoint(tmp_path / "m", fmt="safetensors_sharded")
    report = convert_checkpoint(source, tmp_path / "m.gguf")
    names = ["config.json", *(f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)), "tokenizer.model"]
    names.append("tokenizer_config.json")
    lines = [f"{hashlib.sha256((source / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert fields(tmp_path / "m.gguf")["general.source.sha256"] == report.sha256 == expected


def test_metadata_file(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m")
    extra = tmp_path / "extra.json"
    extra.write_text(json.dumps({"general.license": "mit", "general.tags": ["a", "b"], "general.name": "Other"}))
    convert_checkpoint(source, tmp_path / "m.gguf", metadata=extra)
    found = fields(tmp_path / "m.gguf")
    assert (found["general.license"], found["general.tags"], found["general.name"]) == ("mit", ["a", "b"], "Other")


CARD = """---
license: apache-2.0
language:
- en
- zh
tags: [moe, sparse]
base_model: SparseLLM/BlockFFN-Small
---
# A model
"""


def test_model_card(tmp_path: Path) -> None:
    """Licence, languages, tags and base models, as upstream's converter; --metadata wins."""
    source = write_checkpoint(tmp_path / "m")
    (source / "README.md").write_text(CARD)
    (tmp_path / "extra.json").write_text('{"general.license": "mit"}')
    convert_checkpoint(source, tmp_path / "m.gguf", vocab_only=True, metadata=tmp_path / "extra.json")
    found = fields(tmp_path / "m.gguf")
    assert (found["general.license"], found["general.tags"]) == ("mit", ["moe", "sparse"])
    assert found["general.languages"] == ["en", "zh"] and found["general.base_model.count"] == 1
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/SparseLLM/BlockFFN-Small"
    assert found["general.base_model.0.organization"] == "SparseLLM"


@pytest.mark.parametrize(
    "card", ["---\n[[[\n---\n", "---\n" + "[" * 5000 + "\n---\n", "---\n- a\n---\n", "# no header", "",
             "---\nlicense: {a: 1}\ntags: 5\nbase_model: [[x], ../y, 5]\n---\n", "---\nx: 2024-99-99\n---\n"],
)  # fmt: skip
def test_odd_model_cards_say_nothing(tmp_path: Path, card: str) -> None:
    source = write_checkpoint(tmp_path / "m")
    (source / "README.md").write_text(card)
    convert_checkpoint(source, tmp_path / "m.gguf", vocab_only=True)
    assert not any(key in fields(tmp_path / "m.gguf") for key in ("general.license", "general.base_model.count"))


@pytest.mark.parametrize(
    "content", ['{"general.alignment": 7}', '{"general.name": 5}', '{"general.x": Infinity}', '{"general.x": -1}',
                '{"general.x": 99999999999}', '{"general.x": "\\ud800"}', '{"general.x y": 1}'],
)  # fmt: skip
def test_metadata_that_no_gguf_can_hold(tmp_path: Path, content: str) -> None:
    (tmp_path / "extra.json").write_text(content)
    with pytest.raises(BlockffnError, match="general"):
        convert_checkpoint(
            write_checkpoint(tmp_path / "m"), tmp_path / "m.gguf", metadata=tmp_path / "extra.json", dry_run=True
        )


@pytest.mark.parametrize(
    "content", ['{"blockffn.logit_scale": 1.0}', '{"general.file_type": 0}', "[]", '{"general.x": null}']
)
def test_metadata_cannot_change_the_model(tmp_path: Path, content: str) -> None:
    (tmp_path / "extra.json").write_text(content)
    with pytest.raises(BlockffnError, match=r"extra\.json"):
        convert_checkpoint(write_checkpoint(tmp_path / "m"), tmp_path / "m.gguf", metadata=tmp_path / "extra.json")


@pytest.mark.parametrize(
    "values", [[1, -2, 3] * 500, [0.5, -1e6] * 700, ["", "a", "\u4f60\u597d"] * 400, [True] * 2000, [1]]
)
def test_long_arrays_are_packed_as_gguf_packs_them(tmp_path: Path, values: list[Any]) -> None:
    stock, fast = (kind(None, "x") for kind in (GGUFWriter, writer.FastWriter))
    expected = stock._pack_val(values, GGUFValueType.ARRAY, True)
    assert fast._pack_val(values, GGUFValueType.ARRAY, True) == bytes(expected)


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_checkpoint(tmp_path / "m", **DECO)
    assert main(["convert", str(source), "--outfile", str(tmp_path / "m.gguf"), "--dry-run", "--outtype", "q8_0"]) == 0
    printed = capsys.readouterr().out
    assert "blk.1.ffn_act_mean.weight" in printed and "would write" in printed
    assert "believed num_layers = 2 and not num_hidden_layers = 32" in printed
    assert not list(tmp_path.glob("*.gguf"))


def test_vocab_only(tmp_path: Path) -> None:
    convert_checkpoint(write_checkpoint(tmp_path / "m"), tmp_path / "m.gguf", vocab_only=True)
    reader = GGUFReader(tmp_path / "m.gguf")
    assert not reader.tensors and len(reader.fields["tokenizer.ggml.tokens"].contents()) == 512


def test_split_holds_the_same_tensors(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m")
    convert_checkpoint(source, tmp_path / "whole.gguf")
    report = convert_checkpoint(source, tmp_path / "part.gguf", split_max_size=150_000)
    count = len(report.files)
    assert count > 2 and [file.name for file in report.files] == [
        f"part-{k:05d}-of-{count:05d}.gguf" for k in range(1, count + 1)
    ]
    parts = [GGUFReader(file) for file in report.files]
    merged = {tensor.name: tensor.data.tobytes() for part in parts for tensor in part.tensors}
    whole = GGUFReader(tmp_path / "whole.gguf")
    assert merged == {tensor.name: tensor.data.tobytes() for tensor in whole.tensors}
    assert [part.fields["split.no"].contents() for part in parts] == list(range(count))
    assert all(part.fields["split.tensors.count"].contents() == len(whole.tensors) for part in parts)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("split", [0, 100_000])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
def test_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | type[BaseException], split: int
) -> None:
    """The old file survives; no partial one appears."""
    source, target = write_checkpoint(tmp_path / "m"), tmp_path / "out"
    target.mkdir()
    (target / "m.gguf").write_text("old")
    encode, calls = writer._encode_piece, [0]

    def fail(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 9:
            raise error
        return encode(*args)

    monkeypatch.setattr(writer, "_encode_piece", fail)
    with pytest.raises((BlockffnError, KeyboardInterrupt, MemoryError)):
        convert_checkpoint(source, target / "m.gguf", split_max_size=split)
    assert leftovers(target) == ["m.gguf"] and (target / "m.gguf").read_text() == "old"


def failing_replace(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """os.replace raises at this call, after or before it has moved the file."""
    replace, calls = writer.os.replace, [0]

    def fail(old: Path, new: Path) -> None:
        calls[0] += 1
        if calls[0] == call and isinstance(error, OSError):
            raise error
        replace(old, new)
        if calls[0] == call:
            raise error

    monkeypatch.setattr(writer.os, "replace", fail)


@pytest.mark.parametrize("call", [1, 3, 6])
@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()], ids=["disk", "Ctrl-C"])
def test_split_set_is_replaced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, older: bool, error: BaseException
) -> None:
    """A rename that fails, or an interruption after one, gives back every part that was there."""
    source, target = write_checkpoint(tmp_path / "m"), tmp_path / "out"
    target.mkdir()
    report = convert_checkpoint(source, target / "m.gguf", split_max_size=100_000)
    assert len(report.files) >= 4
    for file in report.files:
        file.write_text(f"old {file.name}") if older else file.unlink()
    before = leftovers(target)
    failing_replace(monkeypatch, min(call, len(report.files) * (2 if older else 1)), error)
    with pytest.raises((BlockffnError, KeyboardInterrupt)):
        convert_checkpoint(source, target / "m.gguf", split_max_size=100_000)
    assert leftovers(target) == before
    assert all(file.read_text() == f"old {file.name}" for file in report.files if older)


def test_split_set_replaces_an_older_one(tmp_path: Path) -> None:
    source, target = write_checkpoint(tmp_path / "m"), tmp_path / "out"
    target.mkdir()
    files = convert_checkpoint(source, target / "m.gguf", split_max_size=100_000).files
    contents = [file.read_bytes() for file in files]
    for file in files:
        file.write_text("old")
    convert_checkpoint(source, target / "m.gguf", split_max_size=100_000)
    assert [file.read_bytes() for file in files] == contents
    assert leftovers(target) == [file.name for file in files]


def test_parts_that_cannot_be_put_back_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails for good: the earlier parts are left in the hidden folder, not deleted."""
    source, target = write_checkpoint(tmp_path / "m"), tmp_path / "out"
    target.mkdir()
    files = convert_checkpoint(source, target / "m.gguf", split_max_size=100_000).files
    for file in files:
        file.write_text("old")
    replace, calls = writer.os.replace, [0]

    def fail(old: Path, new: Path) -> None:
        calls[0] += 1
        if calls[0] >= 3:
            raise OSError(5, "Input/output error")
        replace(old, new)

    monkeypatch.setattr(writer.os, "replace", fail)
    with pytest.raises(BlockffnError, match="Input/output error"):
        convert_checkpoint(source, target / "m.gguf", split_max_size=100_000)
    kept = [file for file in target.rglob("m-*.gguf") if file.read_bytes() == b"old"]
    assert len(kept) == len(files)


def test_files_are_on_the_disk_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of every file, then the renames, then fsync of the folder."""
    source, target = write_checkpoint(tmp_path / "m"), tmp_path / "out"
    target.mkdir()
    events: list[str] = []
    replace, fsync = writer.os.replace, writer.os.fsync

    def synced(handle: int) -> None:
        events.append("sync " + Path(f"/proc/self/fd/{handle}").resolve().name)
        fsync(handle)

    def renamed(old: Path, new: Path) -> None:
        events.append("rename " + new.name)
        replace(old, new)

    monkeypatch.setattr(writer.os, "fsync", synced)
    monkeypatch.setattr(writer.os, "replace", renamed)
    convert_checkpoint(source, target / "m.gguf")
    assert events == ["sync m.gguf", "rename m.gguf", "sync out"]


@pytest.mark.parametrize(("split", "limit"), [(0, 50_000), (100_000, 50_000), (0, 10)])
def test_a_disk_that_is_full_in_the_middle(tmp_path: Path, split: int, limit: int) -> None:
    """Real writes that fail, with 10 bytes once more when the file is closed: one line, nothing left, the old file."""
    source, target = write_checkpoint(tmp_path / "m"), tmp_path / "out"
    target.mkdir()
    (target / "m.gguf").write_text("old")
    script = (
        "import resource, sys\n"
        "from blockffn.cli import main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "sys.exit(main(['convert', sys.argv[1], '--outfile', sys.argv[2], *sys.argv[3:]]))\n"
    )
    command = [sys.executable, "-c", script, str(source), str(target / "m.gguf")]
    command += ["--split-max-size", str(split)] if split else []
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert leftovers(target) == ["m.gguf"] and (target / "m.gguf").read_text() == "old"


@pytest.mark.parametrize("name", ["mkdtemp", "open"])
def test_missing_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of the folder to write to, and of a file to read."""
    source = write_checkpoint(tmp_path / "m")

    def refuse(*args: Any, **_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(args[0]) if args else None)

    if name == "mkdtemp":
        monkeypatch.setattr(writer.tempfile, "mkdtemp", refuse)
    else:
        monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(BlockffnError, match="Permission denied"):
        convert_checkpoint(source, tmp_path / "m.gguf")
    assert leftovers(tmp_path) == ["m"]


def test_full_disk_is_noticed_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "m")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(writer, "_write_data", None)  # would fail if it were reached
    with pytest.raises(BlockffnError, match="not enough space"):
        convert_checkpoint(source, tmp_path / "m.gguf")


def test_signal_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM in the middle of writing: exit code 143, no file."""
    source = write_checkpoint(tmp_path / "m")
    script = (
        "import os, signal, sys\n"
        "from blockffn.cli import main\n"
        "from blockffn.convert import writer\n"
        "encode = writer._encode_piece\n"
        "def kill(*args):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return encode(*args)\n"
        "writer._encode_piece = kill\n"
        "sys.exit(main(['convert', sys.argv[1], '--outfile', sys.argv[2]]))\n"
    )
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "out" / "m.gguf")]
    assert subprocess.run(command, capture_output=True).returncode == 143
    assert leftovers(tmp_path / "out") == []


def test_safetensors_need_neither_torch_nor_llama_cpp(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m", dtype="bf16")
    script = (
        "import sys, blockffn.convert\n"
        "blockffn.convert.convert_checkpoint(sys.argv[1], sys.argv[2])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'llama_cpp')))\n"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "m.gguf")]
    assert subprocess.run(command, timeout=120).returncode == 0


def test_existing_file_is_replaced(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "m")
    (tmp_path / "m.gguf").write_text("old")
    convert_checkpoint(source, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"
    assert leftovers(tmp_path) == ["m", "m.gguf"]


@pytest.mark.parametrize("outtype", ["bf16", "f16"])
def test_large_tensors_are_never_whole_in_memory(tmp_path: Path, outtype: str) -> None:
    """Peak of all allocations: less than one float32 copy of the largest tensor, here 30,000 rows of 256."""
    source = write_checkpoint(tmp_path / "m", dtype="bf16", n_vocab=30_000, n_embd=256, n_layer=1, tied=True)
    tracemalloc.start()
    try:
        convert_checkpoint(source, tmp_path / "m.gguf", outtype=outtype)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 30_000 * 256


def test_progress_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with writer._Progress(10**9) as progress:
        for _ in range(100):
            progress.add(10**7)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[-1] == "convert: 100 % of 1.00 GB written"
