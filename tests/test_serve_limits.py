"""What the server refuses, and that nobody else suffers from it: sizes, keys, queue, clients that go away, stop."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzzed_requests
import httpx
import pytest
from serving import Local, Process, chat_model

import blockffn
from blockffn import cli
from blockffn.server import run

LONG: dict[str, Any] = {"prompt": "x", "max_tokens": 1500, "temperature": 1.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Local]:
    bounds = {"queue": 2, "body_bytes": 300_000, "body_seconds": 0.5, "n": 3, "prompts": 2, "max_tokens": 1600}
    started = Local(model, "--parallel", "2", limits=bounds)
    yield started
    started.stop()


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", {"prompt": "x" * 300_000}, 413, "longer than 300000"),
        ("/v1/completions", {"prompt": "def " * 3000}, 400, "at most 2048 fit"),
        ("/v1/completions", {"prompt": "x", "n": 4}, 400, "n: expected 1 to 3, found 4"),
        ("/v1/completions", {"prompt": ["x"] * 3}, 400, "1 to 2 texts"),
        ("/v1/completions", {"prompt": ["x"] * 2, "n": 3}, 400, "at most 4 answers"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 1601}, 400, "at most 1600"),
        ("/v1/completions", {"prompt": "x", "max_tokens": "4"}, 400, "max_tokens: "),
        ("/v1/completions", {"prompt": "x", "temprature": 1}, 400, "temprature: unknown field"),
        ("/v1/completions", {"prompt": ""}, 200, ""),  # the begin-of-text token is a prompt
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/completions", {"prompt": "x", "stop": ["a"] * 17}, 400, "0 to 16 texts"),
        ("/v1/nothing", {}, 404, "no such path"),
    ],
)
def test_bounds(server: Local, path: str, body: dict[str, Any], status: int, words: str) -> None:
    response = server.post(path, **body)
    assert response.status_code == status, response.text
    if status != 200:
        error = response.json()["error"]
        assert words in error["message"] and error["type"] == "invalid_request_error" and set(error) == {
            "message", "type", "param", "code",
        }  # fmt: skip


def test_fuzzed_requests_are_refused(server: Local) -> None:
    """A short form of `python tests/fuzzed_requests.py`, and a good request is served afterwards."""
    kinds = set()
    for request in fuzzed_requests.requests(400, seed=1):
        response = fuzzed_requests.send(server.client, request)
        assert 400 <= response.status_code < 500, (request.kind, request.body[:200], response.text)
        assert response.json()["error"]["message"]
        kinds.add(request.kind)
    assert len(kinds) == 13
    assert server.ok("/v1/completions", prompt="x")["usage"]["completion_tokens"] > 0


def test_full_queue_is_429(server: Local) -> None:
    with (
        server.held(after=4),
        httpx.Client(base_url=server.base, timeout=60) as client,
        client.stream(
            "POST", "/v1/completions", json={**LONG, "prompt": ["a", "b"], "n": 2, "stream": True}
        ) as running,
    ):
        lines = running.iter_lines()  # kept: httpx closes the connection with it
        next(lines)
        response = server.post("/v1/completions", prompt="x")
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"
        assert server.post("/settings", exact=True).status_code == 409
    assert server.idle()
    assert server.ok("/v1/completions", prompt="x", max_tokens=2)["usage"]["completion_tokens"] > 0
    assert server.service.totals.refused == 1


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_goes_away_frees_its_place(server: Local, stream: bool) -> None:
    host, port = server.listener.getsockname()[:2]
    body = json.dumps({**LONG, "n": 2, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    before = server.service.totals.cancelled
    with server.held(after=4), socket.create_connection((host, port)) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        end = time.monotonic() + 20
        while not server.service.engine.statistics()["running"] and time.monotonic() < end:
            time.sleep(0.01)
        assert server.service.engine.statistics()["running"]
    assert server.idle()
    assert server.service.totals.cancelled == before + 2  # not a word of 1500 was needed to notice


def test_time_limit_is_an_answer(model: Path) -> None:
    server = Local(model, limits={"seconds": 0.3})
    try:
        choice = server.ok("/v1/completions", **LONG)["choices"][0]
        assert choice["finish_reason"] == "length"
        assert server.idle()
    finally:
        server.stop()


def test_slow_body_is_refused(server: Local) -> None:
    host, port = server.listener.getsockname()[:2]
    with socket.create_connection((host, port)) as connection:
        head = (
            f"POST /tokenize HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        )
        connection.sendall(head.encode() + b'{"content"')
        connection.settimeout(20)
        assert b" 408 " in connection.recv(4096).splitlines()[0]


def test_names_of_others_are_refused_without_a_key(server: Local) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        response = server.client.get("/v1/models", headers={"Host": host})
        assert response.status_code in (400, 403), host
    assert server.client.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200


def test_keys(model: Path) -> None:
    server = Local(model, keys=("first", "second"))
    try:
        assert server.client.get("/v1/models").status_code == 200
        assert httpx.get(server.base + "/health").status_code == httpx.get(server.base + "/").status_code == 200
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"}):
            response = httpx.get(server.base + "/v1/models", headers=header)
            assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"
        assert httpx.get(server.base + "/metrics", headers={"Authorization": "Bearer second"}).status_code == 200
    finally:
        server.stop()


def test_templates_stay_in_the_sandbox(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    escape = (
        "{{ messages[0].content }}{{ cycler.__init__.__globals__.os.system('touch " + str(touched) + "') }}"
        "{% for c in ().__class__.__base__.__subclasses__() %}{{ c }}{% endfor %}"
    )
    server = Local(chat_model(tmp_path, escape))
    try:
        response = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=1)
        assert response.status_code == 400 and "chat format" in response.json()["error"]["message"]
        assert not touched.exists()
        assert server.ok("/v1/completions", prompt="x", max_tokens=1)
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("limit", "words"), [("30", "1 running answers have ended"), ("0.2", "1 were cut after 0.2 s")]
)
def test_stop_lets_answers_end(model: Path, tmp_path: Path, limit: str, words: str) -> None:
    server = Process(model, tmp_path / "log.txt", "--ctx", "16384", "--stop-seconds", limit)
    n = 6000 if limit == "30" else 16000
    found: list[Any] = []

    def ask() -> None:
        with httpx.stream("POST", server.base + "/v1/completions", json={**LONG, "max_tokens": n, "stream": True},
                          timeout=60) as response:  # fmt: skip
            for line in response.iter_lines():
                found.append(line)

    thread = threading.Thread(target=ask)
    thread.start()
    while len(found) < 3:
        time.sleep(0.01)
    assert server.stop() == 0
    thread.join(30)
    assert words in server.log.read_text()
    assert found[-2] == "data: [DONE]" and '"finish_reason":"length"' in "".join(found[-8:])


def test_interrupt_stops_too(model: Path, tmp_path: Path) -> None:
    server = Process(model, tmp_path / "log.txt")
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0 and "stopped" in server.log.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "expected --api-key-file"),
        (["--host", "::"], "expected --api-key-file"),
        (["--api-key-file", "{empty}"], "at least one key"),
        (["--api-key-file", "nowhere.txt"], "nowhere.txt"),
        (["--chat-format", "functionary"], "asks the model several times"),
        (["--chat-format", "frob"], "frob"),
        (["--port", "70000"], "0 to 65535, found 70000"),
        (["--draft", "nowhere.gguf"], "nowhere.gguf"),
    ],
)
def test_refused_at_the_start(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    (tmp_path / "empty").write_text("# none yet\n\n")
    given = [word.format(empty=tmp_path / "empty") for word in words]
    assert cli.main(["serve", "-m", str(model), "-t", "1", *given]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1


def test_taken_port(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main(["serve", "-m", str(model), "--port", str(taken.getsockname()[1])]) == 1
    assert "in use" in capsys.readouterr().err


def test_which_addresses_need_a_key(tmp_path: Path) -> None:
    assert [run.is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert [run.is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org", "")] == [False] * 5
    (tmp_path / "keys").write_text("# for the team\none\n\n two \n")
    assert run.access_of("0.0.0.0", tmp_path / "keys").keys == ("one", "two")
    with pytest.raises(blockffn.BlockffnError):
        run.access_of("0.0.0.0", None)
