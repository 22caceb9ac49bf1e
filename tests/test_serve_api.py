"""`blockffn serve`: OpenAI's objects, whole and as events, and what llama_cpp says for the same request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Local, chat_model

import blockffn

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS}}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Local]:
    started = Local(model, "--exact", "--parallel", "4")
    yield started
    started.stop()


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[blockffn.Llama]:
    with blockffn.Llama(model, n_ctx=1024, n_threads=1, exact=True) as loaded:
        yield loaded


def test_completion_equals_llama_cpp(server: Local, llm: blockffn.Llama) -> None:
    answer = server.ok("/v1/completions", prompt="def add", logprobs=3, **GREEDY)
    expected = llm.create_completion("def add", logprobs=3, **GREEDY)
    choice, theirs = answer["choices"][0], expected["choices"][0]
    assert choice["text"].replace("\ufffd", "") == theirs["text"]
    assert choice["finish_reason"] == theirs["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == expected["usage"]["total_tokens"]
    ours = choice["logprobs"]
    assert set(ours) == set(theirs["logprobs"])
    assert ours["token_logprobs"] == pytest.approx(theirs["logprobs"]["token_logprobs"], abs=1e-4)
    assert [len(top) in (3, 4) for top in ours["top_logprobs"]] == [True] * 12


def test_drafts_change_the_steps_and_not_the_text(model: Path, server: Local) -> None:
    drafting = Local(model, "--exact", "--draft", "ngram", "--parallel", "1")
    try:
        body = {"prompt": "abcabcabcabcabcabc", "max_tokens": 96, "temperature": 0}
        answer, plain = drafting.ok("/v1/completions", **body), server.ok("/v1/completions", **body)
        assert answer["choices"][0]["text"] == plain["choices"][0]["text"]
        assert answer["timings"]["draft_n"] > 0
        assert answer["metrics"]["speculative_decoding"]["num_draft_tokens"] == answer["timings"]["draft_n"]
        assert plain["timings"].get("draft_n", 0) == 0
    finally:
        drafting.stop()


def test_chat_equals_llama_cpp(server: Local, llm: blockffn.Llama) -> None:
    answer = server.ok("/v1/chat/completions", messages=MESSAGES, **GREEDY)
    expected = llm.create_chat_completion(MESSAGES, repeat_penalty=1.0, **GREEDY)
    assert (
        answer["choices"][0]["message"]["content"].replace("\ufffd", "")
        == (expected["choices"][0]["message"]["content"])
    )
    assert answer["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    same = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    again = server.ok("/v1/chat/completions", messages=same, **GREEDY)
    assert again["choices"] == answer["choices"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_events_add_up_to_the_whole(server: Local, path: str) -> None:
    request: dict[str, Any] = {"n": 2, "seed": 7, "temperature": 1.0, "max_tokens": 10}
    request |= {"prompt": "x = "} if path == "/v1/completions" else {"messages": MESSAGES, "logprobs": True}
    whole = server.ok(path, **request)
    *events, last = server.events(path, stream_options={"include_usage": True}, **request)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 20
    for index in range(2):
        choices = [c for event in events for c in event["choices"] if c["index"] == index]
        expected = whole["choices"][index]
        if path == "/v1/completions":
            assert "".join(c["text"] for c in choices) == expected["text"]
        else:
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(c["delta"].get("content", "") for c in choices) == expected["message"]["content"]
            rows = [row for c in choices if c["logprobs"] for row in c["logprobs"]["content"]]
            assert [row["token"] for row in rows] == [row["token"] for row in expected["logprobs"]["content"]]
        assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + [expected["finish_reason"]]
    assert whole["choices"][0] != {**whole["choices"][1], "index": 0}  # two answers, two seeds
    assert all(event["blockffn"]["source"] == "plain" for event in events if "blockffn" in event)


def test_figures_of_an_answer(server: Local) -> None:
    whole = server.ok("/v1/completions", prompt="figures of one answer", **GREEDY)
    final = server.events("/v1/completions", prompt="figures of another one", **GREEDY)[-1]
    for answer in (whole, final):
        timings, drafts = answer["timings"], answer["metrics"]["speculative_decoding"]
        assert timings["predicted_n"] == 12 and timings["prompt_n"] + timings["cache_n"] > 3
        assert timings["predicted_per_second"] == pytest.approx(12e3 / timings["predicted_ms"])
        assert drafts["num_draft_tokens"] == 0 and drafts["tokens_per_step"] == 1.0
        assert 0 < drafts["experts_read_share"] <= 1 and drafts["union_size"] <= 7


def test_seed_decides(server: Local) -> None:
    def text(seed: int) -> str:
        return str(server.ok("/v1/completions", prompt="a", temperature=1.0, seed=seed)["choices"][0]["text"])

    assert text(1) == text(1) != text(2)


def test_several_prompts_and_ids(server: Local) -> None:
    ids = server.ok("/tokenize", content="def add", add_special=True)["tokens"]
    both = server.ok("/v1/completions", prompt=["def add", "import"], n=2, **GREEDY)["choices"]
    assert [choice["index"] for choice in both] == [0, 1, 2, 3]
    assert both[0]["text"] == both[1]["text"] != both[2]["text"]
    alone = server.ok("/v1/completions", prompt=ids, **GREEDY)["choices"][0]["text"]
    assert alone == both[0]["text"] == server.ok("/v1/completions", prompt=[ids], **GREEDY)["choices"][0]["text"]


def test_stop_and_echo_and_bias(server: Local) -> None:
    text = server.ok("/v1/completions", prompt="def add", **GREEDY)["choices"][0]["text"]
    stop = text[4:7]
    cut = server.ok("/v1/completions", prompt="def add", stop=[stop], **GREEDY)["choices"][0]
    assert cut["finish_reason"] == "stop" and cut["text"] == text[: text.index(stop)]
    streamed = server.events("/v1/completions", prompt="def add", stop=stop, **GREEDY)
    assert "".join(event["choices"][0]["text"] for event in streamed) == cut["text"]
    assert server.ok("/v1/completions", prompt="def add", echo=True, **GREEDY)["choices"][0]["text"] == "def add" + text
    token = server.ok("/tokenize", content="def")["tokens"][-1]
    forced = server.ok("/v1/completions", prompt="x", logit_bias={str(token): 100}, **GREEDY)["choices"][0]["text"]
    assert forced.count("def") >= 11


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "json_schema", "json_schema": {"name": "w", "schema": PARAMETERS, "strict": True}},
        {"type": "json_object", "schema": PARAMETERS},
    ],
)
def test_answer_follows_a_schema(server: Local, wanted: dict[str, Any]) -> None:
    for seed in range(3):
        answer = server.ok(
            "/v1/chat/completions",
            messages=MESSAGES,
            response_format=wanted,
            seed=seed,
            temperature=1.0,
            max_tokens=200,
        )
        choice = answer["choices"][0]
        if choice["finish_reason"] == "length":  # a random model may write spaces for ever
            continue
        value = json.loads(choice["message"]["content"])
        assert value["city"] in ("Oslo", "Rome") and isinstance(value.get("days", 0), int)


def test_named_and_required_tools(server: Local) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in (named, "required"):
        request = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice, "seed": 5, "max_tokens": 300}
        whole = server.ok("/v1/chat/completions", **request)["choices"][0]
        if whole["finish_reason"] == "length":
            continue
        (call,) = whole["message"]["tool_calls"]
        assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] is None
        assert call["function"]["name"] == "weather" and call["id"].startswith("call_")
        assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")
        deltas = [event["choices"][0]["delta"] for event in server.events("/v1/chat/completions", **request)]
        parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
        assert parts[0]["function"]["name"] == "weather"
        assert "".join(part["function"]["arguments"] for part in parts) == call["function"]["arguments"]


def test_tools_reach_the_template(server: Local) -> None:
    without = server.ok("/v1/chat/completions", messages=MESSAGES, **GREEDY)["usage"]["prompt_tokens"]
    request = {"messages": MESSAGES, "tools": TOOLS, **GREEDY}
    assert server.ok("/v1/chat/completions", **request)["usage"]["prompt_tokens"] > without + 30
    assert server.ok("/v1/chat/completions", tool_choice="none", **request)["usage"]["prompt_tokens"] == without


def test_tokenize_and_back(server: Local, llm: blockffn.Llama) -> None:
    text = "def add(a, b): # sum\n"
    tokens = server.ok("/tokenize", content=text)["tokens"]
    assert tokens == llm.tokenize(text.encode(), add_bos=False)
    assert server.ok("/detokenize", tokens=tokens)["content"].strip() == text.strip()
    pieces = server.ok("/tokenize", content=text, with_pieces=True)["tokens"]
    assert [piece["id"] for piece in pieces] == tokens and "add" in "".join(piece["piece"] for piece in pieces)


def test_models_health_and_page(server: Local) -> None:
    (model,) = server.client.get("/v1/models").json()["data"]
    assert model["id"] == "chat" and model["meta"]["n_experts"] == 7
    assert server.client.get("/v1/models/chat").json() == model
    assert server.client.get("/health").json() == {"status": "ok"}
    page = server.client.get("/")
    assert page.headers["content-type"].startswith("text/html") and "default-src 'none'" in str(page.headers)
    assert not re.search(r"(src|href)=\"(?!data:)|url\(", page.text)  # it loads nothing


def test_metrics_count(server: Local) -> None:
    def read() -> dict[str, float]:
        lines = server.client.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    before = read()
    server.ok("/v1/completions", prompt="count this", n=2, **GREEDY)
    after = read()
    grown = {name: after[name] - before[name] for name in after if name.endswith("_total")}
    assert grown["llamacpp:tokens_predicted_total"] == 24 and grown["blockffn:answers_total"] == 2
    assert grown["llamacpp:prompt_tokens_total"] + grown["blockffn:prompt_tokens_reused_total"] >= 6
    assert grown["vllm:spec_decode_num_draft_tokens_total"] == 0
    assert 0 < after["blockffn:experts_read_ratio"] < 1 and 'blockffn:union_size_by_layer{layer="1"}' in after


def test_embeddings_only_where_the_model_has_them(server: Local) -> None:
    response = server.post("/v1/embeddings", input="text")
    assert response.status_code == 400 and response.json()["error"]["code"] == "no_embeddings"


def test_exact_mode_is_a_switch(server: Local) -> None:
    state = server.client.get("/settings").json()
    assert state["exact"] and not state["draft"] and not state["can_draft"] and len(state["union"]["layers"]) == 2
    assert not server.ok("/settings", exact=False)["exact"]
    assert server.ok("/settings", exact=True)["exact"]
    assert server.post("/settings", draft=True).status_code == 400
