"""Draft heads: what they take from a target in one file, in several, or quantized, and lists of draft tokens."""

from __future__ import annotations

import pickle
import shutil
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from gguf import GGUFReader, quants
from test_convert_errors import bomb
from tiny_head import write_head

from blockffn.convert import convert_checkpoint
from blockffn.convert.draft_tokens import read_draft_tokens
from blockffn.convert.eagle import convert_head
from blockffn.errors import BlockffnError
from blockffn.gguf_file import read_gguf


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied target as checkpoint, in one file, in parts, in Q8_0, and the head of the one file."""
    folder = tmp_path_factory.mktemp("eagle")
    source = write_checkpoint(folder / "target", n_head=2, attention="gqa", dtype="bf16")
    convert_checkpoint(source, folder / "target.gguf")
    convert_checkpoint(source, folder / "part.gguf", split_max_size=50_000)
    convert_checkpoint(source, folder / "target-q8.gguf", outtype="q8_0")
    write_head(folder / "head")
    convert_head(folder / "head", folder / "target.gguf", folder / "head.gguf")
    return folder


def parts(place: Path) -> list[Path]:
    return sorted(place.glob("part-*.gguf"))


def test_target_in_several_files(place: Path, tmp_path: Path) -> None:
    """The output matrix lies in another file than the embedding; the head has it all the same."""
    first, *_, last = (GGUFReader(file) for file in parts(place))
    assert "output.weight" not in [tensor.name for tensor in first.tensors]
    assert "token_embd.weight" not in [tensor.name for tensor in last.tensors]
    convert_head(place / "head", parts(place)[0], tmp_path / "head.gguf")
    assert (tmp_path / "head.gguf").read_bytes() == (place / "head.gguf").read_bytes()
    assert "output.weight" in [tensor.name for tensor in GGUFReader(tmp_path / "head.gguf").tensors]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("last", "this is part .* name the first part"),
        ("missing", "no such file"),
        ("renamed", "parts of a split model"),
    ],
)
def test_incomplete_targets_are_refused(place: Path, tmp_path: Path, damage: str, message: str) -> None:
    copies = [Path(shutil.copy(file, tmp_path)) for file in parts(place)]
    target = copies[-1] if damage == "last" else copies[0]
    if damage == "missing":
        copies[-1].unlink()
    if damage == "renamed":
        target = copies[0].rename(tmp_path / "target.gguf")
    with pytest.raises(BlockffnError, match=message):
        convert_head(place / "head", target, tmp_path / "head.gguf")
    assert not (tmp_path / "head.gguf").exists()


def test_quantized_target_is_named(place: Path, tmp_path: Path) -> None:
    report = convert_head(place / "head", place / "target-q8.gguf", tmp_path / "head.gguf", outtype="f32")
    for name in ("token_embd.weight", "output.weight"):
        assert any(f"{name} comes from Q8_0 of target-q8.gguf, with its rounding" in note for note in report.notes)
    source = {tensor.name: tensor for tensor in GGUFReader(place / "target-q8.gguf").tensors}
    for tensor in GGUFReader(tmp_path / "head.gguf").tensors:
        if tensor.name in source and tensor.name.startswith(("token_embd", "output.")):
            expected = quants.dequantize(source[tensor.name].data, source[tensor.name].tensor_type)
            np.testing.assert_array_equal(tensor.data, expected)
    exact = convert_head(place / "head", place / "target.gguf", tmp_path / "exact.gguf", outtype="f32")
    assert not any("rounding" in note for note in exact.notes)


def test_every_value_of_a_gguf_can_be_read(place: Path) -> None:
    for file in (place / "target.gguf", place / "target-q8.gguf", parts(place)[0]):
        stock = {tensor.name: tensor for part in read_gguf(file).paths for tensor in GGUFReader(part).tensors}
        for tensor in read_gguf(file).tensors:
            expected = quants.dequantize(stock[tensor.name].data, stock[tensor.name].tensor_type)
            np.testing.assert_array_equal(tensor.read(), expected)


def test_absurd_depth_of_a_head(place: Path, tmp_path: Path) -> None:
    """The first layer that is not there ends the reading."""
    source = write_head(tmp_path / "bad")
    (source / "config.json").write_text((source / "config.json").read_text().replace("2,", "2000000000,", 1))
    with pytest.raises(BlockffnError, match=r"layers\.2\.self_attn.*found none"):
        convert_head(source, place / "target.gguf", tmp_path / "head.gguf")


IDS = [7, 3, 500, 12]


@pytest.mark.parametrize("content", [IDS, dict.fromkeys(IDS, 5), Counter(IDS)], ids=["list", "dict", "Counter"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickled_draft_tokens(tmp_path: Path, content: Any, protocol: int) -> None:
    """freq_N.pkl as the authors keep it: ids, or ids with their counts."""
    file = tmp_path / "freq_4.pkl"
    file.write_bytes(pickle.dumps(content, protocol))
    assert read_draft_tokens(file, 512) == IDS


def test_draft_tokens_in_the_folder_of_the_head(place: Path, tmp_path: Path) -> None:
    """Named by itself, the file is looked for where the authors keep it, in the folder or the hub's copy of it."""
    shutil.copytree(place / "head", tmp_path / "head")
    (tmp_path / "head" / "freq_4.pkl").write_bytes(pickle.dumps(IDS))
    report = convert_head(tmp_path / "head", place / "target.gguf", tmp_path / "head.gguf", draft_tokens="freq_4.pkl")
    assert report.files == [tmp_path / "head.gguf"]
    assert GGUFReader(tmp_path / "head.gguf").fields["blockffn-eagle.draft_tokens"].contents() == IDS
    report = convert_head(tmp_path / "head", place / "target.gguf", tmp_path / "head.gguf")
    assert any("the folder holds freq_4.pkl: --draft-tokens" in note for note in report.notes)


def test_draft_tokens_from_the_hub(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    shutil.copytree(place / "head", tmp_path / "cache")
    (tmp_path / "cache" / "freq_4.pkl").write_bytes(pickle.dumps(IDS))
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda _, **options: asked.update(options) or str(tmp_path / "cache")
    )
    convert_head("SparseLLM/Head", place / "target.gguf", tmp_path / "head.gguf", draft_tokens="freq_4.pkl")
    assert "freq_*.pkl" in asked["allow_patterns"]


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([Attack()]), "refused: the pickle asks for builtins.print"),
        (pickle.dumps(OrderedDict.fromkeys(IDS)), "refused: the pickle asks for collections.OrderedDict"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "refused: the pickle asks for builtins.eval"),
        (b"\x80\x04\x8c\x0bcollections\x8c\x10Counter.__init__\x93.", "refused"),
        (pickle.dumps(set(IDS), 0), "refused"),
        (pickle.dumps(5), "found a int"),
        (pickle.dumps([1.5]), "found 1.5"),
        (pickle.dumps(IDS)[:-3], "expected a list"),
        (b"]r\xff\xff\xff\x7f.", "a damaged pickle"),  # would take a table of 16 GB
        (b"not a pickle", "expected a list"),
        (b"", "expected a list"),
    ],
)
def test_hostile_pickles_of_draft_tokens(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    file = tmp_path / "freq_4.pkl"
    file.write_bytes(content)
    with pytest.raises(BlockffnError, match=message) as caught:
        read_draft_tokens(file, 512)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert "never run" not in capfd.readouterr().out


def test_draft_tokens_that_inflate(tmp_path: Path) -> None:
    bomb(tmp_path / "ids.pt", "archive/data.pkl")
    with pytest.raises(BlockffnError, match="inflates to 100000000 bytes"):
        read_draft_tokens(tmp_path / "ids.pt", 512)
    torch.save(torch.tensor(IDS), tmp_path / "ids.pt")
    assert read_draft_tokens(tmp_path / "ids.pt", 512) == IDS
