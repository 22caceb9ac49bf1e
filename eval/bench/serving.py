"""HTTP servers beside which a benchmark runs: started on a free port of the loopback address, ended afterwards.

with serving("llama-server", llama_server("model.gguf", parallel=8, n_ctx=4096, threads=2)) as base:
    complete(base, {"prompt": "def", "max_tokens": 8})
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import IO, Any

from blockffn import library
from blockffn.errors import BlockffnError
from blockffn.eval.bench.process import last_line

START, STOP, ANSWER = 120.0, 10.0, 600.0  # seconds until a server has started, has stopped, has answered


def llama_server(model: str, parallel: int, n_ctx: int, threads: int) -> list[str]:
    """Return the command line of llama-server without its port; `n_ctx` tokens for all texts together."""
    words = ["-m", model, "-np", str(parallel), "-c", str(n_ctx), "-t", str(threads), "--kv-unified", "--no-ui"]
    return [str(library.program("llama-server")), *words]


def our_server(model: str, parallel: int, n_ctx: int, threads: int) -> list[str]:
    """Return the command line of `blockffn serve` without its port."""
    words = ["-m", model, "--parallel", str(parallel), "--ctx", str(n_ctx), "-t", str(threads)]
    return [sys.executable, "-m", "blockffn", "serve", *words]


@contextlib.contextmanager
def serving(name: str, command: Sequence[str]) -> Iterator[str]:
    """Start a server and yield its address, http://127.0.0.1:PORT; `name` stands in errors."""
    with tempfile.TemporaryFile("w+") as log:
        port = _free_port()
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=subprocess.STDOUT)
        try:
            base = f"http://127.0.0.1:{port}"
            _wait(name, base, process, log)
            yield base
        finally:
            process.terminate()
            try:
                process.wait(STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def complete(base: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request at /v1/completions. Errors: BlockffnError with what the server said."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{base}/v1/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER) as response:
            return dict(json.loads(response.read()))
    except urllib.error.HTTPError as error:
        raise BlockffnError(f"{base}: status {error.code}: {error.read()[:500].decode(errors='replace')}") from error
    except OSError as error:
        raise BlockffnError(f"{base}: {error}") from error


def _wait(name: str, base: str, process: subprocess.Popen[Any], log: IO[str]) -> None:
    """Wait until /health says that the server answers."""
    end = time.monotonic() + START
    while time.monotonic() < end:
        if process.poll() is not None:
            raise BlockffnError(f"{name}: the server ended with code {process.returncode}: {last_line(log)}")
        with contextlib.suppress(OSError):  # not listening yet, or 503 while the model is loaded
            with urllib.request.urlopen(f"{base}/health", timeout=5) as response:
                if response.status == 200:
                    return
        time.sleep(0.1)
    raise BlockffnError(f"{name}: the server has not started within {START:.0f} s")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
