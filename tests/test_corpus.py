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


def standing_alone(number):
    """A document of 1,400 characters whose lines occur in no other one."""
    return "".join(f"value_{number}_{i} = compute({number * i})\n" for i in range(60))


def test_validation_has_no_long_document_and_no_near_copy(monkeypatch):
    """All are candidates; 1 is too short, 2 too long; 3 shares 18 of its 60 lines with the long 4."""
    monkeypatch.setattr(corpora, "is_validation", lambda text: True)
    copied = "".join(standing_alone(4).splitlines(keepends=True)[:18])
    near = copied + "".join(standing_alone(3).splitlines(keepends=True)[18:])
    long = standing_alone(4) + "".join(f"row_{i} = {i}\n" for i in range(1500))
    texts = [standing_alone(0), "x = 1\n" * 100, standing_alone(2) * 20, near, long, standing_alone(5)]
    train, validation = corpora.split(texts)
    assert validation == [texts[0], texts[5]]
    assert train == texts[1:5]


def test_split_of_the_standard_library():
    """By document; none dominates; none says what a training document says; posixpath.py and its kin train together."""
    documents = dict(corpora.stdlib_documents())
    train, validation = corpora.split(list(documents.values()))
    size = sum(map(len, validation))
    assert len(train) + len(validation) == len(documents) and not set(train) & set(validation)
    assert len(validation) > 15 and size > 50_000 and max(map(len, validation)) < 0.15 * size
    assert {documents[name] for name in ("os.py", "ntpath.py", "posixpath.py")} <= set(train)
    training_lines = [set(filter(None, text.splitlines())) for text in train]
    for text in validation:
        own = {line for line in text.splitlines() if len(line.split()) > 3}
        assert max(len(own & lines) for lines in training_lines) < 0.3 * len(own)


@pytest.fixture
def small_library(monkeypatch):
    texts = [*TEXTS, standing_alone(0)]
    monkeypatch.setattr(corpora, "stdlib_documents", lambda: iter((str(i), text) for i, text in enumerate(texts)))
    monkeypatch.setattr(corpora, "is_validation", lambda text: text == texts[-1])
    return monkeypatch


def test_cache_is_used_and_depends_on_the_vocabulary(tmp_path, tokenizer, small_library):
    first = data.prepare(tmp_path, 320, tokenizer)
    assert len(first.train) > len(first.validation) > 100
    assert [path.read_text() for path in tmp_path.glob("*/validation.txt")] == [standing_alone(0)]
    small_library.setattr(corpora, "stdlib_documents", lambda: pytest.fail("the cache was not used"))
    again = data.prepare(tmp_path, 320, tokenizer)
    assert again.fingerprint == first.fingerprint
    with pytest.raises(BlockffnError, match="no such vocabulary"):
        data.prepare(tmp_path, 320, tmp_path / "absent.model")


def test_runs_that_start_together_share_one_whole_cache(tmp_path, tokenizer, small_library):
    """A second run begins and ends while the first one encodes; what it loaded is never written again."""
    encode, inner = data.encode_documents, []

    def interrupted(model, texts):
        if not inner:
            inner.append(None)
            inner[0] = data.prepare(tmp_path, 320, tokenizer)
            (folder,) = [path for path in tmp_path.iterdir() if (path / "train.npy").is_file()]
            inner.append((folder / "train.npy").stat())
        return encode(model, texts)

    small_library.setattr(data, "encode_documents", interrupted)
    outer = data.prepare(tmp_path, 320, tokenizer)
    (folder,) = tmp_path.iterdir()  # no scratch folder is left
    after = (folder / "train.npy").stat()
    assert (after.st_ino, after.st_mtime_ns) == (inner[1].st_ino, inner[1].st_mtime_ns)
    assert outer.fingerprint == inner[0].fingerprint and np.array_equal(outer.train, inner[0].train)


def test_a_build_that_fails_leaves_nothing(tmp_path, tokenizer, small_library):
    small_library.setattr(data, "encode_documents", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.prepare(tmp_path, 320, tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_vocabulary_too_large_for_the_text(tmp_path):
    with pytest.raises(BlockffnError, match="cannot make 4096 pieces"):
        data.train_tokenizer(["only a line"], tmp_path / "t", 4096)
    assert not (tmp_path / "t.model").exists()
