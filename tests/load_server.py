"""Many clients at once, who often go away: does a server stay right, whole and small?

    python tests/load_server.py MODEL.gguf --clients 64 --seconds 600

Starts `blockffn serve --exact`, lets every client ask for greedy texts, leave some of them at a random token, and
compares each complete text with what plain decoding says. Prints one line of figures; 1 where anything failed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from serving import Process

import blockffn
from blockffn.speculative import target

PROMPTS = [
    f"def {name}({arguments}):" for name in ("read", "write", "add", "main") for arguments in ("", "x", "a, b", "path")
]
TOKENS = 48


def plain(model: Path) -> dict[str, str]:
    """Return the text of each prompt by plain decoding in exact mode."""
    texts = {}
    with blockffn.Llama(model, n_ctx=512, n_threads=1, exact=True) as llm:
        is_end = target.end_of_text(llm)
        for prompt in PROMPTS:
            ids = llm.generate(llm.tokenize(prompt.encode(), add_bos=llm._model.add_bos_token()), temp=0.0)
            taken = itertools.takewhile(lambda token: not is_end(token), itertools.islice(ids, TOKENS))
            texts[prompt] = b"".join(llm.tokenizer_.piece(token) for token in taken).decode(errors="replace")
    return texts


def resident(pid: int) -> int:
    """Return the resident memory of a process in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


async def client(base: str, expected: dict[str, str], end: float, seed: int, counts: Counter[str]) -> None:
    """Ask until the time is over."""
    draw = random.Random(seed)
    async with httpx.AsyncClient(base_url=base, timeout=120) as http:
        while time.monotonic() < end:
            prompt, leaves = draw.choice(PROMPTS), draw.randrange(TOKENS) if draw.random() < 0.4 else None
            body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
            async with http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code == 429:
                    counts["refused"] += 1
                    await asyncio.sleep(float(response.headers["retry-after"]) * draw.random())
                    continue
                if response.status_code != 200:
                    counts[f"status {response.status_code}"] += 1
                    continue
                await _read(response, expected[prompt], leaves, counts)


async def _read(response: httpx.Response, expected: str, leaves: int | None, counts: Counter[str]) -> None:
    text, n = "", 0
    async for line in response.aiter_lines():
        if line == "data: [DONE]":
            counts["complete"] += 1
            counts["different"] += text != expected
            return
        if line:
            event = json.loads(line[6:])
            if "error" in event:
                counts[f"error {event['error']['message'][:80]}"] += 1
                return
            text += event["choices"][0]["text"]
            n += 1
        if n == leaves:
            counts["left"] += 1
            return
    counts["broken"] += 1


async def load(server: Process, expected: dict[str, str], clients: int, seconds: float) -> dict[str, Any]:
    """Return the counts, and the memory of the server after a tenth of the time and at the end."""
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    tasks = [asyncio.create_task(client(server.base, expected, end, seed, counts)) for seed in range(clients)]
    await asyncio.sleep(seconds / 10)
    early = resident(server.process.pid)
    await asyncio.gather(*tasks)
    async with httpx.AsyncClient(base_url=server.base, timeout=60) as http:
        for _ in range(100):
            state = (await http.get("/settings")).json()
            if state["running"] == state["waiting"] == 0:
                break
            await asyncio.sleep(0.1)
    late = resident(server.process.pid)
    still = state["running"] + state["waiting"]
    return {**counts, "kib_early": early, "kib_late": late, "still_running": still}


def failed(found: dict[str, Any]) -> bool:
    """Is anything but complete, left and refused among the counts? May memory grow by more than 5 % and 16 MiB?"""
    good = {"complete", "left", "refused", "kib_early", "kib_late"}
    grown = found["kib_late"] - found["kib_early"] > max(16 << 10, found["kib_early"] // 20)
    return grown or any(value for name, value in found.items() if name not in good) or not found.get("complete")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--parallel", default="8")
    args = parser.parse_args()
    expected = plain(args.model)
    with tempfile.TemporaryDirectory() as folder:
        server = Process(args.model, Path(folder) / "log.txt", "--exact", "--parallel", args.parallel)
        try:
            found = asyncio.run(load(server, expected, args.clients, args.seconds))
        finally:
            code = server.stop()
    print(json.dumps({"clients": args.clients, "seconds": args.seconds, "exit_code": code, **found}))
    return int(failed(found) or code != 0)


if __name__ == "__main__":
    sys.exit(main())
