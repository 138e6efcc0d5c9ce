"""Processes that share out a list of tasks: results as they come, a stop within one item, no orphans.

A worker is started by a fork server, so that it inherits no threads, locks or open files of the job. The pipe to the
job is its lifeline: when the job closes it, or is killed, the worker gives up at the next item and cleans up after
itself. Signals are the job's affair; a terminal and SLURM send them to every process, so workers are out of their
reach.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from pipeline.data.workers import start_worker_server
from pipeline.errors import DataError, PipelineError

State = TypeVar("State")
Task = TypeVar("Task")
Result = TypeVar("Result")
GoOn = Callable[[], None]
_POLL_S = 0.2
_GRACE_S = 10.0


def run(
    work: Callable[[State, Task, GoOn], Result],
    tasks: Iterable[Task],
    *,
    setup: Callable[[], State],
    workers: int,
    stop: Callable[[], bool],
) -> Generator[Result, None, None]:
    """Do tasks in processes; close the iterator to stop them.

    Args:
        work: does one task, calling its third argument between items: that leaves the process if the job has stopped.
            A function of a module, as the others are: they travel to the workers by name.
        tasks: handed out in this order.
        setup: makes what a worker keeps between tasks.
        workers: processes, at most; never more than tasks.
        stop: asked several times a second; when it says so the iterator ends early.

    Yields:
        Results, in the order in which they are ready.

    Raises:
        PipelineError: as raised by `work`, or DataError if a worker died.
    """
    context = multiprocessing.get_context("forkserver")
    start_worker_server(work.__module__)
    queue = iter(tasks)
    crew: dict[Connection, tuple[Any, Task]] = {}
    try:
        for task in islice(queue, workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, setup, work), daemon=True)
            process.start()
            theirs.close()
            ours.send(task)
            crew[ours] = process, task
        busy = set(crew)
        while busy and not stop():
            for pipe in wait(busy, timeout=_POLL_S):
                assert isinstance(pipe, Connection)
                process, task = crew[pipe]
                result = _receive(pipe, task)
                busy.discard(pipe)
                for task in islice(queue, 1):
                    pipe.send(task)
                    crew[pipe] = process, task
                    busy.add(pipe)
                yield result
    finally:
        for pipe in crew:
            pipe.close()
        for process, _ in crew.values():
            process.join(_GRACE_S)
            if process.exitcode is None:
                process.kill()


def _receive(pipe: Connection, task: object) -> Any:
    try:
        result, error = pipe.recv()
    except EOFError as gone:
        raise DataError(
            f"{task}: its worker process died (out of memory, or a decoder crashed): run the same command again, with "
            "fewer --workers if memory is short"
        ) from gone
    if error is not None:
        raise error
    return result


def _serve(pipe: Connection, setup: Callable[[], State], work: Callable[[State, Task, GoOn], Result]) -> None:
    def go_on() -> None:
        if pipe.poll():  # the job says nothing while a task is running, so this is the end of the pipe
            raise SystemExit

    state = setup()
    # Decoders in C complain on their own account; what is wrong with an input is said by the reason it ends with.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with suppress(EOFError, BrokenPipeError):
        while True:
            task = pipe.recv()
            answer: tuple[Result | None, Exception | None]
            try:
                answer = work(state, task, go_on), None
            except PipelineError as explained:
                answer = None, explained
            except Exception:
                answer = None, RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
            pipe.send(answer)
