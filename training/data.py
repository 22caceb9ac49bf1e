"""The text that the small models learn: what every CPython carries, cut into tokens and kept under a cache folder.

    >>> from blockffn.training.data import prepare
    >>> corpus = prepare(Path("build/corpus"), vocab_size=4096)
    >>> corpus.train.dtype, int(corpus.train[0]) == corpus.bos_id
    (dtype('uint16'), True)

blockffn.training.corpora gives the documents and their split. The vocabulary is a SentencePiece BPE model with byte
fallback, bos 1 and eos 2 like the published models; it keeps white space and line ends as they are, because Python code
means something by them.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockffn.errors import BlockffnError
from blockffn.training import corpora

BOS_ID, EOS_ID = 1, 2


@dataclass(frozen=True)
class Corpus:
    """Token streams (uint16, documents joined as bos ... eos) and the vocabulary that made them."""

    train: NDArray[np.uint16]  # [n_train]
    validation: NDArray[np.uint16]  # [n_validation]
    tokenizer: Path  # tokenizer.model
    bos_id: int
    eos_id: int
    fingerprint: str  # SHA-256 over both streams


def train_tokenizer(texts: list[str], prefix: Path, vocab_size: int) -> Path:
    """Train a SentencePiece BPE vocabulary on `texts` and return the path ``PREFIX.model``.

    Identity normalisation, runs of spaces kept and allowed inside one piece, digits split, byte fallback. Raises
    BlockffnError when the text is too small for the vocabulary.
    """
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    prefix.parent.mkdir(parents=True, exist_ok=True)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(prefix),
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            add_dummy_prefix=False,
            character_coverage=0.9999,
            unk_id=0,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            max_sentence_length=20_000,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as err:
        raise BlockffnError(
            f"tokenizer: cannot make {vocab_size} pieces from {len(lines)} lines of text ({err}); "
            "give more text or a smaller vocab_size"
        ) from err
    return prefix.with_name(prefix.name + ".model")


def encode_documents(tokenizer: Path, texts: list[str]) -> NDArray[np.uint16]:
    """Tokens of all documents, each as bos, text, eos: uint16 [n_tokens]."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    if pieces.get_piece_size() > 2**16:
        raise BlockffnError(f"{tokenizer}: expected at most 65536 pieces, found {pieces.get_piece_size()}")
    streams = [[BOS_ID, *pieces.encode(text), EOS_ID] for text in texts]
    return np.concatenate([np.asarray(stream, dtype=np.uint16) for stream in streams])  # [n_tokens]


def bytes_of_pieces(tokenizer: Path) -> NDArray[np.int64]:
    """Bytes of text that each token stands for, 0 for control tokens: int64 [V]."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))

    def n_bytes(i: int) -> int:
        if pieces.is_control(i) or pieces.is_unknown(i):
            return 0
        return 1 if pieces.is_byte(i) else len(pieces.id_to_piece(i).replace("\u2581", " ").encode())

    return np.array([n_bytes(i) for i in range(pieces.get_piece_size())], dtype=np.int64)


def document_ids(tokens: NDArray[np.integer], bos_id: int = BOS_ID) -> NDArray[np.int64]:
    """Number of the document that each token belongs to, counted along the last axis: int64, shape of `tokens`.

    >>> document_ids(np.array([7, 8, 1, 5, 2, 1, 9]))
    array([0, 0, 1, 1, 1, 2, 2])
    """
    return np.cumsum(tokens == bos_id, axis=-1, dtype=np.int64)


class Windows:
    """Stretches of `length` + 1 tokens of a stream, in an order that changes every epoch."""

    def __init__(self, stream: NDArray[np.uint16], length: int, seed: int) -> None:
        self.stream, self.length, self.seed = stream, length, seed
        self.count = (len(stream) - 1) // length
        if self.count < 1:
            raise BlockffnError(f"corpus: {len(stream)} tokens are too few for sequences of {length}; use shorter ones")
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def batch(self, first: int, n: int) -> Tensor:
        """Windows number `first` to `first + n` of the endless order: int64 [n, length + 1]."""
        return torch.from_numpy(np.stack([self._shuffled(i) for i in range(first, first + n)]).astype(np.int64))

    def in_order(self, n: int = 0) -> Iterator[Tensor]:
        """The first `n` windows as they stand in the text (0: all), each int64 [1, length + 1]."""
        for i in range(min(n, self.count) if n else self.count):
            yield torch.from_numpy(self._cut(i).astype(np.int64))[None]

    def _shuffled(self, index: int) -> NDArray[np.uint16]:
        epoch, place = divmod(index, self.count)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        return self._cut(int(self._order[place]))

    def _cut(self, i: int) -> NDArray[np.uint16]:
        return self.stream[i * self.length : (i + 1) * self.length + 1]


def prepare(cache: Path, vocab_size: int, tokenizer: Path | None = None) -> Corpus:
    """Return the corpus, from `cache` when it was made by the same interpreter and vocabulary, else made anew.

    `tokenizer` names an existing vocabulary (a tokenizer.model) to use instead of training one. The validation text
    lies beside the tokens as validation.txt. Several runs may start at once: a folder appears whole, the first stays.
    """
    key = {"python": sys.version.split()[0], "vocab_size": vocab_size, "split": corpora.SPLIT}
    if tokenizer is not None:
        if not tokenizer.is_file():
            raise BlockffnError(f"{tokenizer}: no such vocabulary; remove `tokenizer` from [corpus] to train one")
        key["tokenizer"] = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    folder = cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=cache) as scratch:
            whole = Path(scratch) / "whole"
            _build(whole, vocab_size, tokenizer)
            (whole / "key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
            try:
                whole.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another run was first
                    raise
    train, validation = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "validation"))
    fingerprint = hashlib.sha256(train)
    fingerprint.update(validation)
    return Corpus(train, validation, tokenizer or folder / "tokenizer.model", BOS_ID, EOS_ID, fingerprint.hexdigest())


def _build(folder: Path, vocab_size: int, tokenizer: Path | None) -> None:
    train, validation = corpora.split([text for _, text in corpora.stdlib_documents()])
    # Neighbours in a package resemble each other: order by hash, so that every stretch of the stream is a mixture.
    train.sort(key=lambda text: hashlib.sha256(text.encode("utf-8")).digest())
    folder.mkdir()
    model = tokenizer or train_tokenizer(train, folder / "tokenizer", vocab_size)
    np.save(folder / "train.npy", encode_documents(model, train))
    np.save(folder / "validation.npy", encode_documents(model, validation))
    (folder / "validation.txt").write_text("".join(validation), encoding="utf-8")
