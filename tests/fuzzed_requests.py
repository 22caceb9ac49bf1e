"""Requests that are wrong, each in a way that its maker knows; a server answers every one with a status of 400 to 499.

python tests/fuzzed_requests.py http://127.0.0.1:8080 --count 10000 --seed 1
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
TEXT = {"prompt": "hi", "max_tokens": 1}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": TEXT,
    "/tokenize": {"content": "hi"},
    "/detokenize": {"tokens": [1]},
    "/v1/embeddings": {"input": "hi"},
}
NUMBERS = ("temperature", "top_p", "min_p", "n", "max_tokens", "seed", "frequency_penalty", "top_k", "repeat_penalty")
NO_NUMBERS: list[Any] = ["1", "", [], {}, [1], True, "NaN", {"a": 1}]
HUGE: list[Any] = [10**30, -(10**30), 1e308, -1e308, 10**400]
SCHEMAS: list[Any] = [
    {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
    {"type": "string", "minLength": 10**8},
    {"type": "string", "pattern": "^" + "(" * 400 + "a" + ")" * 400},
    {"type": "string", "pattern": "^a{1000000}$"},
    {"type": "string", "pattern": "^[$"},
    {"$ref": "https://example.invalid/schema.json"},
    {"$ref": "#/nowhere"},
    {"type": "nothing"},
    {"enum": 5},
    {"properties": {str(i): {"type": "string"} for i in range(3000)}, "type": "object"},
]


class Request(NamedTuple):
    """A request that is wrong. kind: how."""

    kind: str
    path: str
    body: bytes
    headers: dict[str, str]
    method: str = "POST"


def requests(count: int, seed: int) -> Iterator[Request]:
    """Yield `count` requests, the same for the same seed."""
    draw = random.Random(seed)
    makers = (
        cut,
        damaged,
        wrong_type,
        huge,
        nested,
        unknown,
        missing,
        schema,
        message,
        elsewhere,
        typed,
        tokens,
        tools,
    )
    for _ in range(count):
        yield draw.choice(makers)(draw)


def _request(kind: str, path: str, body: Any) -> Request:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Request(kind, path, data, {"Content-Type": "application/json"})


def _some(draw: random.Random) -> tuple[str, dict[str, Any]]:
    path = draw.choice(["/v1/chat/completions", "/v1/completions"])
    return path, dict(BODIES[path])


def cut(draw: random.Random) -> Request:
    """A body that ends too early."""
    path = draw.choice(list(BODIES))
    data = json.dumps(BODIES[path]).encode()
    return _request("cut", path, data[: draw.randrange(len(data))])


def damaged(draw: random.Random) -> Request:
    """Bytes that are no JSON."""
    path = draw.choice(list(BODIES))
    data = draw.choice(
        [
            b"\xff\xfe" + draw.randbytes(draw.randrange(200)),
            b'{"prompt": "\\ud800"}',
            b'{"prompt": NaN}',
            b"{'prompt': 'a'}",
            b'{"prompt": "a",}',
            b'{"prompt": "a"} x',
            b'{"messages": [{"role": "user", "content": "\x00"}]}',
            b"null",
            b"[]",
            b'"text"',
        ]
    )
    return _request("damaged", path, data)


def wrong_type(draw: random.Random) -> Request:
    """A text, list or object where a number belongs."""
    path, body = _some(draw)
    return _request("wrong type", path, body | {draw.choice(NUMBERS): draw.choice(NO_NUMBERS)})


def huge(draw: random.Random) -> Request:
    """A number that is beyond every range."""
    path, body = _some(draw)
    return _request("huge", path, body | {draw.choice(NUMBERS): draw.choice(HUGE)})


def nested(draw: random.Random) -> Request:
    """Lists in lists, or objects in objects."""
    path = draw.choice(list(BODIES))
    name = next(iter(BODIES[path]))
    depth = draw.randrange(3, 20000)
    inside = draw.choice([b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth])
    return _request("nested", path, b'{"' + name.encode() + b'": ' + inside + b"}")


def unknown(draw: random.Random) -> Request:
    """A field that nobody knows."""
    path, body = _some(draw)
    return _request("unknown", path, body | {draw.choice(["temprature", "", "__class__", "stops", "x" * 3000]): 1})


def missing(draw: random.Random) -> Request:
    """A body without what it is about."""
    path = draw.choice(list(BODIES))
    return _request("missing", path, dict(list(BODIES[path].items())[1:]))


def schema(draw: random.Random) -> Request:
    """A schema that has no grammar, or one of no reasonable size."""
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": draw.choice(SCHEMAS)}}
    return _request("schema", "/v1/chat/completions", CHAT | {"response_format": wanted})


def tools(draw: random.Random) -> Request:
    """Tools that cannot be called."""
    named: dict[str, Any] = {"type": "function", "function": {"name": "f"}}
    good = [{"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}]
    bad = [{"type": "function", "function": {"name": "f", "parameters": draw.choice(SCHEMAS)}}]
    found = draw.choice(
        [
            {"tool_choice": named},
            {"tools": good, "tool_choice": named},
            {"tools": bad, "tool_choice": named},
            {"tools": bad, "tool_choice": "required"},
            {"tools": [{"type": "function"}]},
            {"tools": [{"type": "retrieval"}]},
            {"tools": "all"},
        ]
    )
    return _request("tools", "/v1/chat/completions", CHAT | found)


def message(draw: random.Random) -> Request:
    """Messages that are none."""
    bad = draw.choice(
        [
            {"role": "king", "content": "x"},
            {"role": "user", "content": 5},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]},
            {"role": "user", "content": [{"type": "text"}]},
            {"content": "x"},
            {"role": "user", "content": "x", "tool_calls": [{"id": "a"}]},
            {"role": None},
            [],
            "hello",
        ]
    )
    return _request(
        "message", "/v1/chat/completions", CHAT | {"messages": draw.choice([[bad], [*CHAT["messages"], bad]])}
    )  # type: ignore[misc]


def elsewhere(draw: random.Random) -> Request:
    """A path or a method that does not exist."""
    path = draw.choice(["/v1/nothing", "/../etc/passwd", "/v1/models/%2e%2e/x", "/%00", "/" + "a" * 3000])
    method = draw.choice(["GET", "POST", "DELETE", "PUT"])
    if draw.random() < 0.5:
        path, method = draw.choice(list(BODIES)), draw.choice(["GET", "DELETE", "PUT", "PATCH"])
    return Request("elsewhere", path, b"{}", {"Content-Type": "application/json"}, method)


def typed(draw: random.Random) -> Request:
    """A body that says it is something else than JSON."""
    path = draw.choice(list(BODIES))
    kind = draw.choice(["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data; boundary=x"])
    return Request("typed", path, json.dumps(BODIES[path]).encode(), {"Content-Type": kind})


def tokens(draw: random.Random) -> Request:
    """Token ids, stop texts or biases that the model does not have."""
    path, body = draw.choice(
        [
            ("/v1/completions", {"prompt": [10**8]}),
            ("/v1/completions", {"prompt": [-1]}),
            ("/v1/completions", {"prompt": []}),
            ("/v1/completions", {"prompt": [1, "a"]}),
            ("/v1/completions", {"prompt": ["a"] * 5000}),
            ("/v1/completions", {"prompt": [1] * 100_000}),
            ("/v1/completions", {"prompt": "a " * 50_000}),
            ("/v1/completions", TEXT | {"n": 5000}),
            ("/v1/completions", TEXT | {"logit_bias": {"x": 1}}),
            ("/v1/completions", TEXT | {"logit_bias": {"99999999": 1}}),
            ("/v1/completions", TEXT | {"logit_bias": {"1": 10**9}}),
            ("/v1/completions", TEXT | {"stop": ["a"] * 500}),
            ("/v1/completions", TEXT | {"logprobs": 10**6}),
            ("/detokenize", {"tokens": [10**8]}),
        ]
    )
    return _request("tokens", path, body)


def send(client: httpx.Client, request: Request) -> httpx.Response:
    """Send a request and return the response."""
    return client.request(request.method, request.path, content=request.body, headers=request.headers)


def main() -> int:
    """Send them to a server; 1 where one of them is not answered with 4xx in OpenAI's form."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("server", metavar="http://HOST:PORT")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    kinds: Counter[str] = Counter()
    statuses: Counter[int] = Counter()
    with httpx.Client(base_url=args.server, timeout=60) as client:
        for request in requests(args.count, args.seed):
            response = send(client, request)
            kinds[request.kind] += 1
            statuses[response.status_code] += 1
            if not 400 <= response.status_code < 500 or "message" not in response.json()["error"]:
                print(f"{request.kind}: {response.status_code} for {request.body[:300]!r}: {response.text[:300]}")
                return 1
    print(f"{args.count} requests, each refused; statuses {dict(statuses)}; kinds {dict(kinds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
