"""From the arguments of `blockffn serve` to a server that runs until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ipaddress
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from blockffn.errors import BlockffnError
from blockffn.server.access import LOCAL_HOSTS, Access
from blockffn.server.app import make_app
from blockffn.server.limits import Limits
from blockffn.server.prompts import SEVERAL_CALLS, handler
from blockffn.server.service import Service

GRACE = 5.0  # seconds beyond the limit, for the last bytes of answers that were cut


def serve(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code."""
    access = access_of(args.host, args.api_key_file)
    limits = Limits(
        parallel=args.parallel,
        queue=args.max_queue,
        body_bytes=args.max_body,
        prompts=args.max_prompts,
        n=args.max_n,
        max_tokens=args.max_tokens,
        seconds=args.max_seconds,
        stop_seconds=args.stop_seconds,
    )
    with listen(args.host, args.port) as listener:
        service = open_service(args, limits)
        try:
            port = listener.getsockname()[1]
            host = f"[{args.host}]" if ":" in args.host else args.host
            config = uvicorn.Config(
                make_app(service, access),
                log_level="info" if args.verbose else "warning",
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=int(limits.stop_seconds + GRACE),
            )
            server = Server(config, service, f"serving {service.name} on http://{host}:{port}")
            server.run(sockets=[listener])
            print(server.farewell(), flush=True)
        finally:
            service.engine.close()
            service.llm.close()
    return 0


class Server(uvicorn.Server):
    """A uvicorn server whose stop lets running answers end, within the limit. It greets when it can be stopped so."""

    def __init__(self, config: uvicorn.Config, service: Service, greeting: str) -> None:
        super().__init__(config)
        self._greeting = greeting
        self._service = service
        self._running = 0  # answers when the stop began

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on SIGINT and SIGTERM; uvicorn's own method raises them again afterwards, which would end us unheard."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler_before in before.items():
                signal.signal(number, handler_before)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open for requests, then say so."""
        await super().startup(sockets)
        print(self._greeting, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, wait for answers, cut them at the limit."""
        service = self._service
        service.stop()
        self._running = len(service.running)
        timer = asyncio.get_running_loop().call_later(service.limits.stop_seconds, service.cut_running)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def farewell(self) -> str:
        """Say what became of the answers that ran when the stop began."""
        cut = self._service.cut
        if not cut:
            return f"stopped; {self._running} running answers have ended"
        limit = self._service.limits.stop_seconds
        return f"stopped; {self._running - cut} running answers have ended, {cut} were cut after {limit:g} s"


def open_service(args: argparse.Namespace, limits: Limits) -> Service:
    """Load the model and start its engine."""
    import blockffn
    from blockffn.speculative import drafter

    llm = blockffn.Llama(
        args.model, n_ctx=64, n_threads=args.threads, ffn=args.ffn, chat_format=args.chat_format, verbose=args.verbose
    )
    try:
        _check_chat_format(llm)

        def open_engine(draft: bool, exact: bool) -> Any:
            opened: list[Any] | None = [drafter.open_drafter(one) for one in args.draft] if draft else None
            return blockffn.Engine(
                llm,
                n_parallel=args.parallel,
                drafter=opened,
                exact=exact,
                n_ctx=args.ctx,
                n_threads=args.threads,
                max_queue=limits.streams,
            )

        name = args.alias or Path(args.model).stem
        return Service(llm, open_engine, limits, name, draft=bool(args.draft), exact=args.exact)
    except BaseException:
        llm.close()
        raise


def _check_chat_format(llm: Any) -> None:
    from llama_cpp.llama_chat_format import LlamaChatCompletionHandlerNotFoundException

    if llm.chat_format in SEVERAL_CALLS:
        raise BlockffnError(f"--chat-format {llm.chat_format}: it asks the model several times for one answer")
    try:
        handler(llm)
    except LlamaChatCompletionHandlerNotFoundException as error:
        raise BlockffnError(f"--chat-format: {error}") from error


def access_of(host: str, key_file: Path | None) -> Access:
    """Return who may ask; BlockffnError where an address that others reach has no key."""
    keys = _keys(key_file) if key_file is not None else ()
    if keys:
        return Access(keys)
    if not is_loopback(host):
        raise BlockffnError(
            f"--host {host}: others reach this address: expected --api-key-file with it, or --host 127.0.0.1"
        )
    return Access((), (*LOCAL_HOSTS, host.lower()))


def _keys(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BlockffnError(f"{path}: not UTF-8: expected keys, one a line") from error
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise BlockffnError(f"{path}: expected at least one key, one a line; found none")
    if bad := [key for key in keys if not key.isascii() or " " in key]:
        raise BlockffnError(f"{path}: expected keys of ASCII characters without spaces, found one of {len(bad[0])}")
    return keys


def is_loopback(host: str) -> bool:
    """Does only this machine reach the address?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; BlockffnError where the address cannot be had."""
    if not 0 <= port < 1 << 16:
        raise BlockffnError(f"--port: expected 0 to 65535, found {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except BaseException:
            listener.close()
            raise
        return listener
    except OSError as error:
        reason = error.strerror or error
        raise BlockffnError(f"--host {host} --port {port}: {reason}") from error
