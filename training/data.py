"""Text cut into tokens: vocabulary, token files under a cache folder, windows to train on.

    >>> from blockffn.training.data import prepare
    >>> corpus = prepare(CorpusConfig(vocab_size=4096))      # the standard library
    >>> corpus.train.dtype, int(corpus.train[0]) == corpus.bos_id
    (dtype('uint16'), True)

blockffn.training.corpora gives the documents and their split. They pass one by one through the tokenizer into files
that are memory-mapped, so that a corpus may be larger than the memory. The vocabulary is a given SentencePiece model,
or a BPE model with byte fallback, bos 1 and eos 2 like the published models; it keeps white space and line ends as they
are, because Python code means something by them.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockffn.errors import BlockffnError
from blockffn.training import corpora
from blockffn.training.config import CorpusConfig
from blockffn.training.corpora import Source

BOS_ID, EOS_ID = 1, 2
FINGERPRINT = "sha256"  # a file of the cache
VOCABULARY_CHARS = 12_000_000  # of text at most learn a vocabulary: the trainer of SentencePiece holds it in memory
Tokens = NDArray[np.unsignedinteger[Any]]  # uint16, or uint32 for more than 65,536 pieces


@dataclass(frozen=True)
class Corpus:
    """Token streams (documents joined as bos ... eos) and the vocabulary that made them."""

    train: Tokens  # [n_train]
    validation: Tokens  # [n_validation]
    tokenizer: Path  # tokenizer.model
    bos_id: int
    eos_id: int
    fingerprint: str  # SHA-256 over both streams


def prepare(config: CorpusConfig) -> Corpus:
    """Return the corpus, from the cache when sources, split and vocabulary are the same, else made anew.

    The validation text lies beside the tokens as validation.txt. Several runs may start at once: a folder appears
    whole, the first stays. Raises BlockffnError for text or a vocabulary that cannot be used, and for a full disk.
    """
    sources = corpora.open_sources(config.sources, config.json_field, config.package_mb)
    given = corpora.open_sources(config.validation, config.json_field, config.package_mb) if config.validation else []
    tokenizer = Path(config.tokenizer) if config.tokenizer else None
    key: dict[str, Any] = {
        "sources": [[source.name, source.key] for source in sources],
        "vocab_size": config.vocab_size,
        "split": [config.validation_share, *corpora.SPLIT],
        "validation": [[source.name, source.key] for source in given],
    }
    if tokenizer is not None:
        check_tokenizer(tokenizer, config.vocab_size)
        key["tokenizer"] = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    cache = Path(config.cache)
    folder = cache / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    if not folder.is_dir():
        try:
            _make(folder, key, Split(sources, given, config.validation_share), config.vocab_size, tokenizer)
        except OSError as err:
            raise BlockffnError(f"{cache}: the tokens cannot be written ({err.strerror}); nothing was kept") from err
    kind = token_type(config.vocab_size)
    train, validation = (np.memmap(folder / f"{name}.bin", dtype=kind, mode="r") for name in ("train", "validation"))
    fingerprint = (folder / FINGERPRINT).read_text(encoding="utf-8")
    return Corpus(train, validation, tokenizer or folder / "tokenizer.model", BOS_ID, EOS_ID, fingerprint)


class Split:
    """Texts to train on and to validate with: `given` sources validate, without any the documents that are chosen."""

    def __init__(self, sources: list[Source], given: list[Source], share: float) -> None:
        self.sources, self.given = sources, given
        self.chosen = frozenset() if given else corpora.choose_validation(sources, share)

    def train(self) -> Iterator[str]:
        """Yield what is not chosen, in the order of the sources."""
        return (text for source in self.sources for _, text in source if corpora.digest(text) not in self.chosen)

    def validation(self) -> Iterator[str]:
        """Yield the other texts, in their order."""
        if self.given:
            return (text for source in self.given for _, text in source)
        return (text for source in self.sources for _, text in source if corpora.digest(text) in self.chosen)


def _make(folder: Path, key: Any, split: Split, vocab_size: int, tokenizer: Path | None) -> None:
    """Fill a folder beside `folder`, then give it the name, unless another run was first."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        fingerprint = hashlib.sha256()
        model = tokenizer or train_tokenizer(_sample(split), whole / "tokenizer", vocab_size)
        for name, texts in (("train", split.train), ("validation", split.validation)):
            with (whole / f"{name}.bin").open("wb") as out:
                for stream in encode_documents(model, texts()):
                    out.write(stream.data)
                    fingerprint.update(stream.data)
                if not out.tell():
                    raise BlockffnError(
                        f"[corpus]: no document is left for {name}; documents of 1,000 to 15,000 characters can "
                        "validate: give more, a larger validation_share, or sources of their own in `validation`"
                    )
        with (whole / "validation.txt").open("w", encoding="utf-8") as out:
            out.writelines(split.validation())
        (whole / FINGERPRINT).write_text(fingerprint.hexdigest(), encoding="utf-8")
        (whole / "key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")
        try:
            whole.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def _sample(split: Split) -> Iterator[str]:
    """Yield documents of about VOCABULARY_CHARS in all, chosen by the hash of their text."""
    share = min(1.0, VOCABULARY_CHARS / max(1, sum(len(text) for text in split.train())))
    return (text for text in split.train() if corpora.is_candidate(text[::-1], share))


def token_type(n_vocab: int) -> type[np.uint16 | np.uint32]:
    """The type that tokens of so many pieces are stored in."""
    return np.uint16 if n_vocab <= 2**16 else np.uint32


def check_tokenizer(path: Path, vocab_size: int) -> None:
    """Raise BlockffnError unless `path` is a SentencePiece model of `vocab_size` pieces with bos 1 and eos 2."""
    if not path.is_file():
        raise BlockffnError(f"{path}: no such vocabulary; remove `tokenizer` from [corpus] to train one")
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as err:
        raise BlockffnError(f"{path}: not a SentencePiece model; `tokenizer` needs a tokenizer.model") from err
    found = (pieces.get_piece_size(), pieces.bos_id(), pieces.eos_id())
    if found != (vocab_size, BOS_ID, EOS_ID):
        raise BlockffnError(
            f"{path}: expected {vocab_size} pieces with bos {BOS_ID} and eos {EOS_ID}, found {found[0]} pieces, bos "
            f"{found[1]}, eos {found[2]}; set vocab_size in [corpus] to what the vocabulary has"
        )


def train_tokenizer(texts: Iterable[str], prefix: Path, vocab_size: int) -> Path:
    """Train a SentencePiece BPE vocabulary on `texts` and return the path ``PREFIX.model``.

    Identity normalisation, runs of spaces kept and allowed inside one piece, digits split, byte fallback. Raises
    BlockffnError when the text is too small for the vocabulary.
    """
    lines = (line for text in texts for line in text.splitlines() if line.strip())
    prefix.parent.mkdir(parents=True, exist_ok=True)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
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
            f"tokenizer: cannot make {vocab_size} pieces from this text ({err}); give more text or a smaller vocab_size"
        ) from err
    return prefix.with_name(prefix.name + ".model")


def encode_documents(tokenizer: Path, texts: Iterable[str]) -> Iterator[Tokens]:
    """Yield the tokens of each document, bos, text, eos: [n_tokens] in the type of `token_type`."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    kind = token_type(pieces.get_piece_size())
    for text in texts:
        yield np.asarray([BOS_ID, *pieces.encode(text), EOS_ID], dtype=kind)


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

    def __init__(self, stream: Tokens, length: int, seed: int) -> None:
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

    def _shuffled(self, index: int) -> Tokens:
        epoch, place = divmod(index, self.count)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
        return self._cut(int(self._order[place]))

    def _cut(self, i: int) -> Tokens:
        return self.stream[i * self.length : (i + 1) * self.length + 1]
