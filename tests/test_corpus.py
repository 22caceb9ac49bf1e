"""The corpus: same split everywhere, tokens that give the text back, a cache that is used and checked."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece

from blockffn.errors import BlockffnError
from blockffn.training import corpora, data
from blockffn.training.config import CorpusConfig

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
    stream = np.concatenate(list(data.encode_documents(tokenizer, ["a b", "", "return"])))
    assert stream.dtype == np.uint16
    assert (stream == data.BOS_ID).sum() == (stream == data.EOS_ID).sum() == 3
    assert stream[0] == data.BOS_ID and stream[-1] == data.EOS_ID
    assert data.document_ids(stream)[[0, -1]].tolist() == [1, 3]


def test_document_ids_of_windows():
    windows = np.array([[5, 2, 1, 6], [1, 6, 7, 8]])
    assert data.document_ids(windows).tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_split_is_by_content():
    share = np.mean([corpora.is_candidate(f"text {i}", 0.25) for i in range(2000)])
    assert 0.2 < share < 0.3
    assert sum(corpora.is_candidate(text, 1.0) for text in TEXTS) == len(TEXTS)


def test_stdlib_documents_are_clean():
    names = [name for name, _ in corpora.stdlib_documents()]
    assert len(names) == len(set(names)) and len(names) > 300
    assert "json/decoder.py" in names and any(name.startswith("pydoc_data/topics/") for name in names)
    assert not any("/test" in f"/{name}" and name.split("/")[0] in corpora.SKIPPED_FOLDERS for name in names)


def standing_alone(number):
    """A document of 1,400 characters whose lines occur in no other one."""
    return "".join(f"value_{number}_{i} = compute({number * i})\n" for i in range(60))


def chosen(texts, share=1.0):
    """The texts of one source that validate, in their order."""
    found = corpora.choose_validation([[(str(i), text) for i, text in enumerate(texts)]], share)
    return [text for text in texts if corpora.digest(text) in found]


def test_validation_has_no_long_document_and_no_near_copy():
    """All are candidates; 1 is too short, 2 too long; 3 shares 18 of its 60 lines with the long 4; 6 is there twice."""
    copied = "".join(standing_alone(4).splitlines(keepends=True)[:18])
    near = copied + "".join(standing_alone(3).splitlines(keepends=True)[18:])
    long = standing_alone(4) + "".join(f"row_{i} = {i}\n" for i in range(1500))
    texts = [standing_alone(0), "x = 1\n" * 100, standing_alone(2) * 20, near, long, standing_alone(5)]
    assert chosen([*texts, standing_alone(6), standing_alone(6)]) == [texts[0], texts[5]]


def test_near_copies_are_found_in_other_sources():
    near = [("a", standing_alone(0) + "one_more_line = True\n")], [("b", standing_alone(0))]
    assert corpora.choose_validation(near, 1.0) == frozenset()
    assert len(corpora.choose_validation(near[:1], 1.0)) == 1


def test_split_of_the_standard_library():
    """By document; none dominates; none says what a training document says; posixpath.py and its kin train together."""
    documents = dict(corpora.stdlib_documents())
    validation = chosen(list(documents.values()), CorpusConfig(4096).validation_share)
    train = [text for text in documents.values() if text not in set(validation)]
    size = sum(map(len, validation))
    assert len(validation) > 15 and size > 50_000 and max(map(len, validation)) < 0.15 * size
    assert {documents[name] for name in ("os.py", "ntpath.py", "posixpath.py")} <= set(train)
    training_lines = [set(filter(None, text.splitlines())) for text in train]
    for text in validation:
        own = {line for line in text.splitlines() if len(line.split()) > 3}
        assert max(len(own & lines) for lines in training_lines) < 0.3 * len(own)


def test_sources_are_files_folders_lines_and_packages(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/two.txt").write_bytes(b"second\r\ntext")
    (tmp_path / "a.jsonl").write_text('{"body": "first", "n": 1}\n\n{"body": "f\u00fcnf"}\n', encoding="utf-8")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (source,) = corpora.open_sources([str(tmp_path)], json_field="body")
    expected = [("a.jsonl:1", "first"), ("a.jsonl:3", "f\u00fcnf"), ("b/two.txt", "second\ntext")]
    assert [(os.path.relpath(name, tmp_path), text) for name, text in source] == expected
    assert list(source) == list(source)  # again and again
    (pattern,) = corpora.open_sources([str(tmp_path / "**/*.txt")])
    assert [text for _, text in pattern] == ["second\ntext"]
    (package,) = corpora.open_sources(["package:sentencepiece"])
    assert "sentencepiece/__init__.py" in dict(package)
    (capped,) = corpora.open_sources(["package:torch"], package_mb=0.1)
    assert 0 < sum(len(text) for _, text in capped) <= 1e5
    assert capped.key[0] and capped.key[0][0].startswith("torch==")


BAD_SOURCES = {
    "none": ([], "expected at least one source"),
    "absent": (["absent"], "absent: no such file or folder"),
    "package": (["package:no_such_package"], "no such package in this environment"),
    "empty": (["empty"], "the folder holds no file"),
    "bytes": (["latin.txt"], r"latin.txt: expected UTF-8 text, found byte 0xfc at offset 2"),
    "line": (["bytes.jsonl"], r"bytes.jsonl: expected UTF-8 text, found byte 0xfc at offset 25"),
    "json": (["broken.jsonl"], r"broken.jsonl:2: not a line of JSON"),
    "field": (["field.jsonl"], r"field.jsonl:1: expected a text in the field 'text', found title, words"),
    "list": (["list.jsonl"], r"list.jsonl:1: expected a text in the field 'text', found list"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_sources(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"ab\xfcr")
    (tmp_path / "bytes.jsonl").write_bytes(b'{"text": "good"}\n{"text":\xfc}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "field.jsonl").write_text('{"title": "a", "words": 3}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    names, message = BAD_SOURCES[case]
    with pytest.raises(BlockffnError, match=message):
        for source in corpora.open_sources(names):
            list(source)


@pytest.fixture
def config(tmp_path, tokenizer):
    """A folder of documents as source, one of which validates."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i, text in enumerate([*TEXTS, standing_alone(0)]):
        (folder / f"{i:03d}.txt").write_text(text)
    return CorpusConfig(
        320, (str(folder),), validation_share=1.0, cache=str(tmp_path / "cache"), tokenizer=str(tokenizer)
    )


def caches(config):
    return list(os.scandir(config.cache))


def test_cache_is_used_until_text_or_split_change(config, monkeypatch):
    first = data.prepare(config)
    assert len(first.train) > len(first.validation) > 100 and first.train.dtype == np.uint16
    (folder,) = caches(config)
    assert open(f"{folder.path}/validation.txt").read() == standing_alone(0)
    with monkeypatch.context() as patch:
        patch.setattr(data, "encode_documents", lambda *_: pytest.fail("the cache was not used"))
        assert data.prepare(config).fingerprint == first.fingerprint
    with open(f"{config.sources[0]}/000.txt", "a") as text:
        text.write("one more line\n")
    assert data.prepare(config).fingerprint != first.fingerprint
    assert len(caches(config)) == 2


def test_validation_may_have_sources_of_its_own(config, tmp_path):
    (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:2]))
    found = data.prepare(replace(config, validation=(str(tmp_path / "held.jsonl"),)))
    assert (found.validation == data.BOS_ID).sum() == 2
    assert (found.train == data.BOS_ID).sum() == len(TEXTS) + 1  # nothing is taken from the sources


def test_vocabulary_of_published_size_is_stored_in_32_bits():
    assert data.token_type(65_536) is np.uint16 and data.token_type(73_448) is np.uint32


def test_refuses_vocabularies_that_do_not_fit(config, tmp_path):
    with pytest.raises(BlockffnError, match="no such vocabulary"):
        data.prepare(replace(config, tokenizer=str(tmp_path / "absent.model")))
    with pytest.raises(BlockffnError, match="expected 4096 pieces with bos 1 and eos 2, found 320 pieces"):
        data.prepare(replace(config, vocab_size=4096))
    (tmp_path / "no.model").write_text("no vocabulary")
    with pytest.raises(BlockffnError, match="not a SentencePiece model"):
        data.prepare(replace(config, tokenizer=str(tmp_path / "no.model")))


def test_one_long_text_cannot_validate(config, tmp_path):
    (tmp_path / "book.txt").write_text("".join(standing_alone(i) for i in range(50)))
    with pytest.raises(BlockffnError, match=r"no document is left for validation; .* sources of their own"):
        data.prepare(replace(config, sources=(str(tmp_path / "book.txt"),)))
    assert caches(config) == []


def test_runs_that_start_together_share_one_whole_cache(config, monkeypatch):
    """A second run begins and ends while the first one encodes; what it loaded is never written again."""
    encode, inner = data.encode_documents, []

    def interrupted(model, texts):
        if not inner:
            inner.append(None)
            inner[0] = data.prepare(config)
            (folder,) = [entry for entry in caches(config) if os.path.isfile(f"{entry.path}/train.bin")]
            inner.append(os.stat(f"{folder.path}/train.bin"))
        return encode(model, texts)

    monkeypatch.setattr(data, "encode_documents", interrupted)
    outer = data.prepare(config)
    (folder,) = caches(config)  # no scratch folder is left
    after = os.stat(f"{folder.path}/train.bin")
    assert (after.st_ino, after.st_mtime_ns) == (inner[1].st_ino, inner[1].st_mtime_ns)
    assert outer.fingerprint == inner[0].fingerprint and np.array_equal(outer.train, inner[0].train)


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(28, "No space left on device")])
def test_a_build_that_fails_leaves_nothing(config, monkeypatch, error):
    """Also where the disk fills while tokens are written."""

    def fails(model, texts):
        yield np.ones(5, np.uint16)
        raise error

    monkeypatch.setattr(data, "encode_documents", fails)
    expected = BlockffnError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        data.prepare(config)
    assert caches(config) == []


def test_vocabulary_too_large_for_the_text(tmp_path):
    with pytest.raises(BlockffnError, match="cannot make 4096 pieces"):
        data.train_tokenizer(["only a line"], tmp_path / "t", 4096)
    assert not (tmp_path / "t.model").exists()
