"""Questions answered by Ray: one actor per worker, on whichever machine of the cluster has the cores for it.

    $ ray start --head                                       # on one machine, ray start --address ... on the others
    $ blockffn eval spec-bench ... --ray auto --workers 4 --threads 8

Every machine needs blockffn and the model file at the same path. The answers are written where the command was given.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Generator, Sequence
from typing import Any

from blockffn.errors import BlockffnError
from blockffn.eval.spec_bench.questions import Question
from blockffn.eval.spec_bench.session import Record, Session
from blockffn.eval.spec_bench.workers import Crew


def answers_by_ray(questions: Sequence[Question], crew: Crew) -> Generator[dict[str, Record], None, None]:
    """Yield the records of every question. Errors: BlockffnError when no cluster answers or an actor fails."""
    import ray

    _check_reachable(crew.ray)
    try:
        ray.init(address=crew.ray, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _no_cluster(crew.ray, error) from error
    threads = crew.threads_each()
    count = min(crew.workers, len(questions))
    cores = int(ray.cluster_resources().get("CPU", 0))
    if cores < threads:
        ray.shutdown()
        raise BlockffnError(
            f"--ray {crew.ray}: a worker needs {threads} CPUs, the cluster has {cores}; lower --threads"
        )
    actors: list[Any] = [
        ray.remote(num_cpus=threads)(Session).remote(crew.settings, crew.n_ctx, threads) for _ in range(count)
    ]
    try:
        yield from _collect(ray, questions, actors)
    finally:
        for actor in actors:
            ray.kill(actor)
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raise BlockffnError where nothing listens at HOST:PORT: Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str | None, error: Exception) -> BlockffnError:
    return BlockffnError(f"--ray {address}: no cluster answers there ({error}); start one with `ray start --head`")


def _collect(
    ray: Any, questions: Sequence[Question], actors: Sequence[Any]
) -> Generator[dict[str, Record], None, None]:
    """Keep every actor busy with one question."""
    waiting = list(reversed(questions))
    running = {actor.answer.remote(waiting.pop()): actor for actor in actors}
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        actor = running.pop(ready)
        try:
            records = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise BlockffnError(str(error.cause)) from error
        except ray.exceptions.RayError as error:
            raise BlockffnError(f"a worker of Ray ended: {error}; give the same command again to go on") from error
        if waiting:
            running[actor.answer.remote(waiting.pop())] = actor
        yield records
