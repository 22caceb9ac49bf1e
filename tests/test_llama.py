"""blockffn.Llama: evaluation beside the conversation, router choices, errors."""

from __future__ import annotations

import ctypes
import gc
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

import blockffn
from blockffn import BlockffnError, _capi, evaluation, library

TOKENS = [1, *range(40, 77)]  # 38 tokens


@pytest.fixture(scope="module", params=["stock", "blockffn"])
def llm(request: pytest.FixtureRequest) -> Iterator[blockffn.Llama]:
    model = blockffn.Llama(request.getfixturevalue(f"{request.param}_model"), n_threads=1)
    yield model
    model.close()


@pytest.fixture(scope="module")
def sparse(blockffn_model: Path) -> Iterator[blockffn.Llama]:
    model = blockffn.Llama(blockffn_model, n_threads=1)
    yield model
    model.close()


def one_by_one(llm: blockffn.Llama, tokens: list[int]) -> np.ndarray:
    """Logits through llama_cpp's own eval, one token at a time: [tokens, vocabulary]."""
    llm.reset()
    rows = []
    for token in tokens:
        llm.eval([token])
        rows.append(np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (llm.n_vocab(),)).copy())
    return np.array(rows)


def nmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - b) ** 2).sum() / (b**2).sum())


@pytest.mark.parametrize("n", [1, 2, 5, 17, 38])
def test_logits_equal_plain_evaluation(llm: blockffn.Llama, n: int) -> None:
    logits = llm.logits(TOKENS[:n])
    assert logits.shape == (n, llm.n_vocab()) and logits.dtype == np.float32
    assert nmse(logits, one_by_one(llm, TOKENS[:n])) < 1e-6


def test_logits_do_not_depend_on_the_batch_size(llm: blockffn.Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = llm.logits(TOKENS)
    monkeypatch.setattr(evaluation, "MAX_LOGIT_BYTES", 1)  # smallest batches: 16 rows
    pieces = evaluation.Evaluator(llm)
    assert pieces._n_batch == 16
    assert nmse(pieces.logits(TOKENS), whole) < 1e-6
    pieces.close()


@pytest.mark.parametrize(("n_vocab", "expected"), [(512, 512), (32768, 512), (73440, 228), (122753, 136), (10**7, 16)])
def test_llama_cpp_holds_the_logits_of_one_batch_only(n_vocab: int, expected: int) -> None:
    assert evaluation.batch_size(n_vocab) == expected
    assert expected == 16 or 4 * expected * n_vocab <= evaluation.MAX_LOGIT_BYTES


def test_evaluation_leaves_the_conversation_alone(llm: blockffn.Llama) -> None:
    llm.reset()
    expected = list(itertools.islice(llm.generate(TOKENS[:9], temp=0.0), 6))
    llm.reset()
    found = []
    for token in itertools.islice(llm.generate(TOKENS[:9], temp=0.0), 6):
        found.append(token)
        llm.logits(TOKENS[::-1])
        llm.hidden_states(TOKENS[5:])
    assert found == expected
    assert llm.n_tokens == 9 + 5


def test_evaluation_grows_with_the_text(llm: blockffn.Llama) -> None:
    short = llm.logits(TOKENS[:3])
    long = llm.logits((TOKENS * 4)[:150])
    assert nmse(long[:3], short) < 1e-6
    assert np.array_equal(llm.logits(TOKENS[:3]).argmax(1), short.argmax(1))


def test_hidden_states_give_the_logits(llm: blockffn.Llama) -> None:
    """logits = head * hidden: the least squares fit to three texts predicts the logits of a fourth."""
    texts = np.random.default_rng(0).integers(3, llm.n_vocab(), (4, 120)).tolist()
    hidden, logits = [llm.hidden_states(text) for text in texts], [llm.logits(text) for text in texts]
    assert hidden[0].shape == (120, llm.n_embd()) and hidden[0].dtype == np.float32
    assert np.allclose(np.sqrt((hidden[0] ** 2).mean(1)), 1.0, atol=0.1)  # after the norm, whose weights are about 1
    head = np.linalg.lstsq(np.concatenate(hidden[:3]), np.concatenate(logits[:3]), rcond=None)[0]
    assert nmse(hidden[3] @ head, logits[3]) < 1e-6


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 10**6], r"tokens\[1\]: expected an id in 0\.\.\d+, found 1000000"),
        ([-1], r"tokens\[0\]"),
        ([[1, 2], [3, 4]], "expected a list of token ids"),
        ([0.5], "expected a list of token ids"),
    ],
)
def test_bad_tokens(llm: blockffn.Llama, tokens: list[int], message: str) -> None:
    with pytest.raises(BlockffnError, match=message):
        llm.logits(tokens)


def test_no_tokens(llm: blockffn.Llama) -> None:
    assert llm.logits([]).shape == (0, llm.n_vocab())
    assert llm.hidden_states([]).shape == (0, llm.n_embd())


def test_active_experts(sparse: blockffn.Llama) -> None:
    active = sparse.active_experts(TOKENS)
    assert active.shape == (2, len(TOKENS), 7) and active.dtype == np.bool_
    assert (sparse.n_moe_layers, sparse.n_experts) == (2, 7)
    assert 0.1 < active.mean() < 0.9  # random routers: about half of the experts
    assert np.array_equal(active[:, :5], sparse.active_experts(TOKENS[:5]))  # causal


def test_active_experts_of_a_dense_model(stock_model: Path) -> None:
    llm = blockffn.Llama(stock_model, n_threads=1)
    assert llm.n_moe_layers == 0 and len(llm.union_stats().n_tokens) == 0
    with pytest.raises(BlockffnError, match="no layer of this model has"):
        llm.active_experts(TOKENS)
    llm.close()


@pytest.mark.parametrize("enabled", [False, True])
def test_statistics_are_collected_on_request(sparse: blockffn.Llama, enabled: bool) -> None:
    """A context that nobody asks collects nothing; logits are the same."""
    low, rows = library.load(), []
    ctx = low.llama_init_from_model(sparse.model, low.llama_context_default_params())
    counts = np.zeros(sparse.n_moe_layers, np.int64)
    pointer = counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int64))
    active = (ctypes.c_uint8 * sparse.n_experts)()
    for now in (enabled, not enabled, enabled):
        _capi.function("blockffn_stats_enable")(ctx, now)
        low.llama_memory_clear(low.llama_get_memory(ctx), True)
        assert low.llama_decode(ctx, low.llama_batch_get_one((ctypes.c_int32 * 3)(5, 6, 7), 3)) == 0
        rows.append(np.ctypeslib.as_array(low.llama_get_logits_ith(ctx, -1), (sparse.n_vocab(),)).copy())
        assert _capi.function("blockffn_active_experts")(ctx, 0, 2, active) == now
    _capi.function("blockffn_stats")(ctx, None, pointer, None, None)
    low.llama_free(ctx)
    assert counts[0] == (6 if enabled else 3)
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])


def test_union_stats_count_what_active_experts_sees(sparse: blockffn.Llama) -> None:
    active = sparse.active_experts(TOKENS)  # [layers, tokens, experts]
    sparse.reset()
    sparse.union_stats(reset=True)
    sparse.eval(TOKENS)
    stats = sparse.union_stats()
    n_rows = [len(TOKENS), 1]  # the last layer runs only on the row that needs logits
    assert stats.evaluations.tolist() == [1, 1] and stats.n_tokens.tolist() == n_rows
    assert stats.active_pairs.tolist() == [active[0].sum(), active[1, -1].sum()]
    assert stats.union_size.tolist() == [active[0].any(0).sum(), active[1, -1].sum()]
    sparse.eval(TOKENS[:1])
    later = sparse.union_stats() - stats
    assert later.evaluations.tolist() == [1, 1] and later.n_tokens.tolist() == [1, 1]
    assert 0.0 <= later.token_sparsity <= 1.0 and later.union_share == pytest.approx(1.0 - later.token_sparsity)
    sparse.union_stats(reset=True)
    assert sparse.union_stats().n_tokens.tolist() == [0, 0] and np.isnan(sparse.union_stats().token_sparsity)


def test_dense_and_union_graphs_agree(blockffn_model: Path, sparse: blockffn.Llama) -> None:
    dense = blockffn.Llama(blockffn_model, ffn="dense", n_threads=1)
    assert nmse(dense.logits(TOKENS), sparse.logits(TOKENS)) < 1e-6
    dense.close()


def test_completion_carries_statistics(llm: blockffn.Llama) -> None:
    llm.drafter = None
    llm.speculate(blockffn.NGramDrafter())
    out = llm.create_completion(TOKENS, max_tokens=5, temperature=0.0)
    assert out["usage"]["completion_tokens"] <= 5 and out["speculation"]["steps"] >= 1
    *_, last = llm.create_completion(TOKENS, max_tokens=5, temperature=0.0, stream=True)
    assert last["speculation"]["steps"] >= 1
    llm.speculate(None)


def test_detokenize_equals_llama_cpp(llm: blockffn.Llama) -> None:
    from llama_cpp.llama_tokenizer import LlamaTokenizer

    theirs = LlamaTokenizer(llm)
    rng = np.random.default_rng(1)
    for n in (0, 1, 2, 9, 30):
        tokens = [int(t) for t in rng.integers(0, llm.n_vocab(), n)]
        assert llm.detokenize(tokens, prev_tokens=[1]) == theirs.detokenize(tokens, prev_tokens=[1])
        assert llm.detokenize([1, *tokens]) == theirs.detokenize([1, *tokens])


def test_text_comes_back(sparse: blockffn.Llama) -> None:
    for text in ("def add(a, b):\n    return a + b", "naïve café 你好 🙂", " leading", "tab\tand  spaces"):
        assert sparse.detokenize(sparse.tokenize(text.encode())).decode() == text


def test_long_pieces_are_whole(tmp_path: Path) -> None:
    """llama_cpp's own tokenizer cuts pieces at 32 bytes."""
    from tiny_llama import write_llama

    piece = b"x" * 200
    path = write_llama(tmp_path / "long.gguf", vocab_edit={100: piece})
    kinds = gguf.GGUFReader(path, "r+").fields["tokenizer.ggml.token_type"]
    kinds.parts[kinds.data[100]][0] = gguf.TokenType.NORMAL
    llm = blockffn.Llama(path, n_threads=1)
    assert llm.detokenize([100]) == piece and llm.detokenize([97, 100, 98]) == b"^" + piece + b"_"
    llm.close()


def test_default_context_and_threads(blockffn_model: Path) -> None:
    llm = blockffn.Llama(blockffn_model)
    assert llm.n_ctx() == 256  # what the model was trained with
    assert llm.n_threads >= 1 and llm.n_threads_batch == llm.n_threads
    llm.close()


def test_quiet_unless_verbose(stock_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    blockffn.Llama(stock_model, n_threads=1).close()
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    blockffn.Llama(stock_model, n_threads=1, verbose=True).close()
    assert "llama_model_loader" in capfd.readouterr().err
    blockffn.Llama(stock_model, n_threads=1).close()
    assert capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def dynamic_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose RoPE would change beyond its trained context of 256."""
    from checkpoints import write_checkpoint

    folder = tmp_path_factory.mktemp("dynamic")
    scaling = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    source = write_checkpoint(folder / "source", config=scaling)
    blockffn.convert.convert_checkpoint(source, folder / "model.gguf", outtype="f32")
    return folder / "model.gguf"


def test_dynamic_rope_is_refused_beyond_the_trained_context(dynamic_model: Path) -> None:
    with pytest.raises(BlockffnError, match=r"trained context of 256 tokens.*not supported"):
        blockffn.Llama(dynamic_model, n_ctx=512)
    llm = blockffn.Llama(dynamic_model, n_threads=1)
    assert llm.logits(TOKENS * 6).shape[0] == 6 * len(TOKENS)
    with pytest.raises(BlockffnError, match="trained context of 256 tokens"):
        llm.logits(TOKENS * 7)
    llm.close()


def test_close_frees_everything_and_may_be_called_twice(stock_model: Path) -> None:
    llm = blockffn.Llama(stock_model, n_threads=1)
    llm.logits(TOKENS)
    llm.close()
    llm.close()
    other = blockffn.Llama(stock_model, n_threads=1)
    other.logits(TOKENS)
    seen = weakref.ref(other)
    del other
    gc.collect()
    assert seen() is None


def truncated(model: Path, tmp_path: Path, share: float) -> Path:
    path = tmp_path / f"cut-{share}.gguf"
    data = model.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.01, 0.5, 0.99])
def test_truncated_file(stock_model: Path, tmp_path: Path, share: float) -> None:
    path = truncated(stock_model, tmp_path, share)
    with pytest.raises(BlockffnError, match=r"cut-.*(truncated|not a GGUF|incomplete|corrupted)"):
        blockffn.Llama(path)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(BlockffnError, match="no such file"):
        blockffn.Llama(tmp_path / "missing.gguf")
    with pytest.raises(BlockffnError, match="is a directory"):
        blockffn.Llama(tmp_path)
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(BlockffnError, match=r"not a GGUF file .*hell"):
        blockffn.Llama(tmp_path / "text.gguf")


def with_architecture(stock_model: Path, tmp_path: Path, name: bytes) -> Path:
    """The model with another architecture name of the same length."""
    path = tmp_path / f"{name.decode()}.gguf"
    path.write_bytes(stock_model.read_bytes().replace(b"llama", name))
    return path


def test_unknown_architecture(stock_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BlockffnError, match="unknown model architecture: 'lxxma'"):
        blockffn.Llama(with_architecture(stock_model, tmp_path, b"lxxma"))


def test_draft_head_is_not_a_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "head.gguf", "blockffn-eagle")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(BlockffnError, match=r"draft head.*EagleDrafter"):
        blockffn.Llama(tmp_path / "head.gguf")


@pytest.mark.parametrize(
    ("arguments", "message"), [({"ffn": "sparse"}, "ffn: expected one of"), ({"n_ctx": -1}, "n_ctx: expected")]
)
def test_bad_arguments(stock_model: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BlockffnError, match=message):
        blockffn.Llama(stock_model, **arguments)  # type: ignore[arg-type]
