"""`blockffn.replace_llama`: programs that construct llama_cpp.Llama get ours, with a drafter and exact mode."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import blockffn

TEXT = "abcabcabcabc"


pytestmark = pytest.mark.filterwarnings("ignore:Using `httpx`")


@pytest.fixture(autouse=True)
def replaced() -> Iterator[type]:
    yield blockffn.replace_llama(drafter="ngram", exact=True, n_threads=1)
    blockffn.restore_llama()


def expected(model: Path) -> str:
    with blockffn.Llama(model, n_threads=1, exact=True, n_ctx=512) as llm:
        return str(llm.create_completion(TEXT, max_tokens=24, temperature=0.0)["choices"][0]["text"])


def test_constructed_by_name(blockffn_model: Path, replaced: type) -> None:
    import llama_cpp

    with llama_cpp.Llama(model_path=str(blockffn_model), n_ctx=512) as llm:
        assert isinstance(llm, replaced) and llm.exact and isinstance(llm.drafter, blockffn.NGramDrafter)
        out: Any = llm.create_completion(TEXT, max_tokens=24, temperature=0.0)
        assert out["choices"][0]["text"] == expected(blockffn_model) and out["speculation"]["steps"] > 0
    with llama_cpp.Llama(str(blockffn_model), exact=False, drafter=None) as llm:  # what is passed has precedence
        assert not llm.exact and llm.drafter is None
        copy = pickle.loads(pickle.dumps(llm))
        assert isinstance(copy, replaced) and not copy.exact
        copy.close()


def test_every_model_has_a_drafter_of_its_own(blockffn_model: Path) -> None:
    import llama_cpp

    blockffn.replace_llama(drafter=blockffn.NGramDrafter(), n_threads=1)
    first, second = llama_cpp.Llama(str(blockffn_model)), llama_cpp.Llama(str(blockffn_model))
    assert first.drafter is not second.drafter
    first.close()
    second.close()


def test_draft_model_of_the_program_is_used(blockffn_model: Path) -> None:
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    with llama_cpp.Llama(str(blockffn_model), draft_model=LlamaPromptLookupDecoding()) as llm:
        assert not isinstance(llm.drafter, blockffn.NGramDrafter) and llm.drafter is not None


def test_restored() -> None:
    import llama_cpp

    blockffn.restore_llama()
    assert not issubclass(llama_cpp.Llama, blockffn.Llama) and issubclass(blockffn.Llama, llama_cpp.Llama)


def test_llama_cpp_server(blockffn_model: Path) -> None:
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings
    from starlette.testclient import TestClient

    settings = ModelSettings(model=str(blockffn_model), n_ctx=512, n_threads=1, verbose=False)
    with TestClient(create_app(server_settings=ServerSettings(), model_settings=[settings])) as client:
        body = {"prompt": TEXT, "max_tokens": 24, "temperature": 0.0, "repeat_penalty": 1.0}
        answer = client.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == expected(blockffn_model)


@pytest.mark.skipif(importlib.util.find_spec("langchain_community") is None, reason="LangChain: make test-clients")
def test_langchain(blockffn_model: Path) -> None:
    from langchain_community.llms import LlamaCpp  # pyright: ignore[reportMissingImports]

    llm = LlamaCpp(model_path=str(blockffn_model), n_ctx=512, max_tokens=24, temperature=0.0, repeat_penalty=1.0,
                   verbose=False)  # fmt: skip
    assert isinstance(llm.client.drafter, blockffn.NGramDrafter)
    assert llm.invoke(TEXT) == expected(blockffn_model)


@pytest.mark.skipif(importlib.util.find_spec("llama_index") is None, reason="LlamaIndex: make test-clients")
def test_llama_index(blockffn_model: Path) -> None:
    from llama_index.llms.llama_cpp import LlamaCPP  # pyright: ignore[reportMissingImports]

    llm = LlamaCPP(
        model_path=str(blockffn_model), context_window=512, max_new_tokens=24, temperature=0.0, verbose=False,
        messages_to_prompt=lambda messages: TEXT, completion_to_prompt=lambda prompt: prompt,
    )  # fmt: skip
    assert isinstance(llm._model.drafter, blockffn.NGramDrafter)
    assert llm.complete(TEXT).text == expected(blockffn_model)
