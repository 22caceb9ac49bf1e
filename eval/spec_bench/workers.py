"""Who answers the questions: this process, several processes with threads pinned to cores of their own, or Ray.

    for records in answers(questions, Crew(settings, workers=2)):
        ...

Records come in the order in which they are done. A worker that ends or fails ends the run; what came before is kept.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from blockffn.errors import BlockffnError
from blockffn.eval.spec_bench.questions import Question
from blockffn.eval.spec_bench.session import Record, Session, Settings
from blockffn.threads import physical_cores

Answers = Generator[dict[str, Record], None, None]


@dataclass(frozen=True)
class Crew:
    """`workers` sessions of `threads` threads each (None: the cores divided by the workers); `ray`: where Ray runs."""

    settings: Settings
    workers: int = 1
    threads: int | None = None
    n_ctx: int | None = None
    ray: str | None = None

    def threads_each(self) -> int:
        """Return the threads of one worker."""
        return self.threads or max(1, physical_cores() // (1 if self.ray else self.workers))


def answers(questions: Sequence[Question], crew: Crew) -> Answers:
    """Yield the records of every question. Errors: BlockffnError of a session, or for a worker that ended."""
    if not questions:
        return
    if crew.ray is not None:
        from blockffn.eval.spec_bench.ray_workers import answers_by_ray

        yield from answers_by_ray(questions, crew)
    elif crew.workers == 1:
        session = Session(crew.settings, crew.n_ctx, crew.threads_each())
        try:
            for question in questions:
                yield session.answer(question)
        finally:
            session.close()
    else:
        yield from _by_processes(questions, crew)


def _by_processes(questions: Sequence[Question], crew: Crew) -> Answers:
    waiting = list(reversed(questions))
    with _started(crew, min(crew.workers, len(questions))) as workers:
        busy = dict(workers)
        while busy:
            for channel in wait(list(busy)):
                assert isinstance(channel, Connection)
                result = _received(channel, busy[channel])
                if waiting:
                    channel.send(waiting.pop())
                else:
                    del busy[channel]
                if result is not None:
                    yield result


def _received(channel: Connection, worker: BaseProcess) -> dict[str, Record] | None:
    """Return what a worker sent: None when it is ready for its first question."""
    try:
        kind, value = channel.recv()
    except (EOFError, OSError):
        worker.join()
        raise BlockffnError(
            f"worker {worker.name} ended with code {worker.exitcode} (killed, or out of memory?); what was answered "
            "before is kept: give the same command again to go on"
        ) from None
    if kind == "error":
        raise BlockffnError(value)
    records: dict[str, Record] | None = value
    return records


@contextmanager
def _started(crew: Crew, count: int) -> Generator[list[tuple[Connection, BaseProcess]], None, None]:
    """Start the workers and end them at the end, whatever they do."""
    context = multiprocessing.get_context("spawn")  # a copy of a process that has loaded the library would hang
    resource_tracker.ensure_running()  # else the first start would do it, and unblock SIGINT on the way
    workers: list[tuple[Connection, BaseProcess]] = []
    try:
        for index, cores in enumerate(core_sets(sorted(os.sched_getaffinity(0)), count)):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(
                target=_work, args=(theirs, crew, cores), name=str(index), daemon=True
            )
            # inherited: Ctrl-C is for the parent alone, which ends its workers
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
            workers.append((ours, process))
        yield workers
    finally:
        for _, process in workers:
            process.terminate()
        for channel, process in workers:  # open until then: a worker that sends to a closed one would complain
            process.join()
            channel.close()


def core_sets(cores: Sequence[int], count: int) -> list[list[int]]:
    """Return the cores of each of `count` workers: neighbours, none in two sets while there are enough.

    >>> core_sets([0, 1, 2, 3], 2), core_sets([4, 5], 3)
    ([[0, 1], [2, 3]], [[4], [5], [4]])
    """
    each = max(1, len(cores) // count)
    sets = [list(cores[start : start + each]) for start in range(0, len(cores) - each + 1, each)]
    return [sets[index % len(sets)] for index in range(count)]


def _work(channel: Connection, crew: Crew, cores: list[int]) -> None:
    """Answer questions until the channel is closed: the body of a worker process."""
    os.sched_setaffinity(0, cores)
    try:
        session = Session(crew.settings, crew.n_ctx, crew.threads or len(cores))
        channel.send(("ready", None))
        while True:
            channel.send(("answer", session.answer(channel.recv())))
    except EOFError:
        return
    except BlockffnError as error:
        channel.send(("error", str(error)))
    except BrokenPipeError:  # the parent was killed
        return
    except OSError as error:
        channel.send(("error", f"worker: {error}"))


def describe(crew: Crew) -> dict[str, Any]:
    """Return what stands about the workers beside the figures."""
    return {"workers": crew.workers, "threads": crew.threads_each(), "ray": crew.ray is not None}
