"""The corpus: same split everywhere, tokens that give the text back, a cache that is used and checked."""

from __future__ import annotations

import numpy as np
import pytest
import sentencepiece

from blockffn.errors import BlockffnError
from blockffn.training import corpora, data

TEXTS = [f'def function_{i}(a, b):\n    """Return a + b."""\n\treturn a + {i} * b\n\n\n' * 8 for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return data.train_tokenizer(TEXTS, tmp_path_factory.mktemp("tokenizer") / "tokenizer", 320)


@pytest.mark.parametrize(
    "text", [TEXTS[3], "", " ", "  two  spaces ", "tab\tcr\rnul\0", "Grüße 漢字 🙂", "x = 1234567\n" * 99]
)
def test_tokens_give_the_text_back(tokenizer, text):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    ids = pieces.encode(text)
    assert 0 not in ids
    assert pieces.decode(ids) == text


def test_special_ids_and_size(tokenizer):
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    assert (pieces.unk_id(), pieces.bos_id(), pieces.eos_id(), pieces.get_piece_size()) == (0, 1, 2, 320)


def test_documents_are_framed(tokenizer):
    stream = data.encode_documents(tokenizer, ["a b", "", "return"])
    assert stream.dtype == np.uint16
    assert (stream == data.BOS_ID).sum() == (stream == data.EOS_ID).sum() == 3
    assert stream[0] == data.BOS_ID and stream[-1] == data.EOS_ID
    assert data.document_ids(stream)[[0, -1]].tolist() == [1, 3]


def test_document_ids_of_windows():
    windows = np.array([[5, 2, 1, 6], [1, 6, 7, 8]])
    assert data.document_ids(windows).tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_split_is_by_content():
    share = np.mean([corpora.is_validation(f"text {i}", 0.25) for i in range(2000)])
    assert 0.2 < share < 0.3
    assert [corpora.is_validation(t) for t in TEXTS] == [corpora.is_validation(t) for t in TEXTS]


def test_stdlib_documents_are_clean():
    names = [name for name, _ in corpora.stdlib_documents()]
    assert len(names) == len(set(names)) and len(names) > 300
    assert "json/decoder.py" in names and any(name.startswith("pydoc_data/topics/") for name in names)
    assert not any("/test" in f"/{name}" and name.split("/")[0] in corpora.SKIPPED_FOLDERS for name in names)


def test_cache_is_used_and_depends_on_the_vocabulary(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data, "stdlib_documents", lambda: iter((str(i), text) for i, text in enumerate(TEXTS)))
    monkeypatch.setattr(data, "is_validation", lambda text, share=0.0: "function_7(" in text)
    first = data.prepare(tmp_path, 320, tokenizer)
    assert len(first.train) > len(first.validation) > 100
    monkeypatch.setattr(data, "stdlib_documents", lambda: pytest.fail("the cache was not used"))
    again = data.prepare(tmp_path, 320, tokenizer)
    assert again.fingerprint == first.fingerprint
    with pytest.raises(BlockffnError, match="no such vocabulary"):
        data.prepare(tmp_path, 320, tmp_path / "absent.model")


def test_vocabulary_too_large_for_the_text(tmp_path):
    with pytest.raises(BlockffnError, match="cannot make 4096 pieces"):
        data.train_tokenizer(["only a line"], tmp_path / "t", 4096)
    assert not (tmp_path / "t.model").exists()
