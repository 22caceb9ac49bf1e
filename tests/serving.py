"""A server of ours for tests: in this process, or as `blockffn serve` in one of its own."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

import blockffn
from blockffn.commands.serve import add_arguments
from blockffn.server.limits import Limits

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] or '' }}\n{% endfor %}"
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}[assistant] "
)


def chat_model(folder: Path, template: str = TEMPLATE) -> Path:
    """Write a small BlockFFN model, float32, with a chat template."""
    from checkpoints import write_checkpoint

    source = write_checkpoint(folder / "source", n_embd=256, n_head=2, n_layer=2)
    settings = source / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    model = folder / "chat.gguf"
    blockffn.convert.convert_checkpoint(source, model, outtype="f32")
    return model


class Local:
    """A server in a thread of this process, so that tests see its service. `words`: as of `blockffn serve`."""

    def __init__(
        self, model: Path, *words: str, limits: dict[str, Any] | None = None, keys: tuple[str, ...] = ()
    ) -> None:
        import argparse

        import uvicorn

        from blockffn.server.access import Access
        from blockffn.server.app import make_app
        from blockffn.server.run import listen, open_service

        parser = argparse.ArgumentParser()
        add_arguments(parser)
        args = parser.parse_args(["-m", str(model), "-t", "1", "--ctx", "2048", *words])
        bounds = Limits(**(asdict(Limits(parallel=args.parallel)) | (limits or {})))
        self.service = open_service(args, bounds)
        self.listener = listen("127.0.0.1", 0)
        self.base = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.keys = keys
        config = uvicorn.Config(make_app(self.service, Access(keys)), log_level="critical", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        self.client = httpx.Client(base_url=self.base, timeout=60, headers=headers)
        for _ in range(200):
            if self._server.started:
                return
            time.sleep(0.02)
        raise AssertionError("the server has not started")

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self.listener]))

    def post(self, path: str, **body: Any) -> httpx.Response:
        """Return the response to a JSON body."""
        return self.client.post(path, json=body)

    def ok(self, path: str, **body: Any) -> dict[str, Any]:
        """Return the answer to a request that has to succeed."""
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        return dict(response.json())

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """Return the events of a streamed answer, which has to end with [DONE]."""
        response = self.post(path, stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, done, last = response.text.split("\n\n")
        assert done == "data: [DONE]" and last == ""
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def idle(self, seconds: float = 20) -> bool:
        """Is nothing generated any more? Waits for it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            figures = self.service.engine.statistics()
            if not self.service.running and not figures["running"] and not figures["waiting"]:
                return True
            time.sleep(0.02)
        return False

    @contextmanager
    def held(self, after: int) -> Iterator[None]:
        """Let the engine take `after` more steps, and none beyond until the block is left: no answer ends too early."""
        scheduler = self.service.engine._scheduler
        step, first, released = scheduler.step, scheduler.steps, threading.Event()

        def held_step() -> None:  # turns of an idle engine do not count
            if scheduler.steps - first >= after:
                released.wait(60)
            step()

        scheduler.step = held_step  # type: ignore[method-assign]
        try:
            yield
        finally:
            scheduler.step = step  # type: ignore[method-assign]
            released.set()

    def stop(self) -> None:
        """End the server and free its model."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(20)
        self.client.close()
        self.listener.close()
        self.service.engine.close()
        self.service.llm.close()


class Process:
    """`blockffn serve` in a process of its own, on a free port of 127.0.0.1."""

    def __init__(self, model: Path, log: Path, *words: str) -> None:
        command = [sys.executable, "-m", "blockffn.cli", "serve", "-m", str(model), "-t", "1", "--port", "0", *words]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        for _ in range(600):
            assert self.process.poll() is None, log.read_text()
            if "serving" in (text := log.read_text()):
                self.base = text.split()[-1]
                return
            time.sleep(0.05)
        raise AssertionError(log.read_text())

    def stop(self) -> int:
        """Ask the server to stop and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)
