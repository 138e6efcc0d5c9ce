"""A pool of worker processes: results in order, a stop within one item, no orphans, and a crash costs one item.

Workers are forked by the fork server, so they inherit no threads, locks or open files of the job. When the job closes
its pipe to a worker, or is killed, the worker ends at its next item. Stop signals, which a terminal and SLURM send to
every process, do not reach workers: only the job handles them.

An item may kill its worker, as decoders in C can crash or never end. A new process then does this item alone. If that
process dies too, the item is the cause, and `on_worker_death` gives its result.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import RawValue
from typing import Any, Generic, NamedTuple, TypeVar

from pipeline.errors import PipelineError
from pipeline.processes.forkserver import start_worker_server

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")
CheckStop = Callable[[], None]
_POLL_S = 0.2
_GRACE_S = 10.0
_AHEAD = 4
"""Chunks for each worker that may be done before an earlier one is; this bounds the memory."""
CPU_LIMIT_S = 60.0
NO_LIMIT_S = 1e9
"""For large items, which may take any time."""


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def exit_cause(exit_code: int) -> str:
    """Why a process ended, for a message: the name of a signal or its exit code."""
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"


class _Piece(NamedTuple, Generic[Item]):
    """Items to do: a whole chunk, or a part of one that a dead worker has left."""

    chunk: int
    first: int
    """Index of the first item in its chunk."""
    items: Sequence[Item]
    is_retry: bool = False


class _Chunks(Generic[Item, Result]):
    """The chunks that are to be done, in progress and done; gives results in the order of the chunks."""

    def __init__(self, chunks: Iterable[Sequence[Item]], ahead: int) -> None:
        self._coming, self._ahead = enumerate(chunks), ahead
        self.rerun: deque[_Piece[Item]] = deque()
        self._results: dict[int, list[Any]] = {}
        self._missing: dict[int, int] = {}
        self._started = self._finished = 0

    def next_piece(self) -> _Piece[Item] | None:
        """The next piece; None if there is none, or none before an earlier chunk is done."""
        if self.rerun:
            return self.rerun.popleft()
        if self._started < self._finished + self._ahead:
            for number, items in self._coming:
                self._started, self._missing[number] = number + 1, len(items)
                self._results[number] = [None] * len(items)
                return _Piece(number, 0, items)
        return None

    def store(self, piece: _Piece[Item], results: Sequence[Result]) -> None:
        self._results[piece.chunk][piece.first : piece.first + len(results)] = results
        self._missing[piece.chunk] -= len(results)

    def isolate(self, piece: _Piece[Item], at: int) -> None:
        """Schedule a piece again, with the item at this index alone."""
        for start, end in ((0, at), (at, at + 1), (at + 1, len(piece.items))):
            if items := piece.items[start:end]:
                self.rerun.append(_Piece(piece.chunk, piece.first + start, items, is_retry=start == at))

    def finished(self) -> Iterator[list[Result]]:
        """The results of the next chunks, up to the first that is not done."""
        while self._missing.get(self._finished) == 0:
            del self._missing[self._finished]
            self._finished += 1
            yield self._results.pop(self._finished - 1)


class _Worker:
    """A process and the piece that it works on."""

    def __init__(self, setup: Callable[[], Any], work: Callable[..., Any], cpu_limit_s: float) -> None:
        context = multiprocessing.get_context("forkserver")
        self.pipe, remote_end = context.Pipe()
        self._done = RawValue("q", 0)  # items of the piece; in shared memory, as a dying process cannot send it
        arguments = (remote_end, self._done, setup, work, cpu_limit_s)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        remote_end.close()
        self.piece: _Piece[Any] | None = None

    def begin(self, piece: _Piece[Any]) -> None:
        self.piece, self._done.value = piece, 0
        with suppress(BrokenPipeError, ConnectionResetError):  # it is dead already; `take` will see that
            self.pipe.send(piece.items)

    def take(self) -> tuple[_Piece[Any], list[Any] | None]:
        """The piece with its results; None for the results if the process has died."""
        piece, self.piece = self.piece, None
        assert piece is not None
        try:
            results, error = self.pipe.recv()
        except (EOFError, OSError):  # the process has died, perhaps in the middle of a message
            return piece, None
        if error is not None:
            raise error
        return piece, results

    def died(self, piece: _Piece[Any]) -> tuple[int, int]:
        """The index of the item at which the process died, and its exit code."""
        self.pipe.close()
        self._process.join()
        return min(self._done.value, len(piece.items) - 1), self._process.exitcode or 0

    def end(self, deadline: float) -> None:
        self._process.join(max(deadline - time.monotonic(), 0))
        self._process.kill()


def run(
    work: Callable[[State, Sequence[Item], CheckStop], Iterator[Result]],
    chunks: Iterable[Sequence[Item]],
    *,
    setup: Callable[[], State],
    workers: int,
    stop: Callable[[], bool],
    on_worker_death: Callable[[Item, int], Result],
    cpu_limit_s: float = CPU_LIMIT_S,
) -> Generator[list[Result], None, None]:
    """Process items in worker processes; close the iterator to stop them.

    Args:
        work: yields a result for each item. A long item must call the third argument now and then: it exits the process
            if the job has stopped. A function or method that has a name in a module, as it is pickled by name.
        chunks: items that one worker gets together. Each worker has a few chunks in progress.
        setup: makes the state that a worker keeps between chunks.
        workers: processes, at most.
        stop: called several times a second; when it returns True the iterator ends early.
        on_worker_death: gives the result for an item that has killed two processes, from the exit code of the second;
            may raise.
        cpu_limit_s: CPU seconds for an item; an item that takes longer kills its process (-SIGXCPU).

    Yields:
        The results of each chunk, in the order of the chunks.

    Raises:
        PipelineError: as raised by `setup`, `work` or `on_worker_death`.
    """
    start_worker_server(work.__module__)
    queue = _Chunks[Item, Result](chunks, _AHEAD * workers)
    pool: dict[Connection, _Worker] = {}

    def hand_out() -> None:
        idle = [worker for worker in pool.values() if worker.piece is None]
        while (idle or len(pool) < workers) and (piece := queue.next_piece()):
            worker = idle.pop() if idle else _Worker(setup, work, cpu_limit_s)
            pool[worker.pipe] = worker
            worker.begin(piece)

    try:
        hand_out()
        while (busy := [pipe for pipe, worker in pool.items() if worker.piece]) and not stop():
            for pipe in wait(busy, timeout=_POLL_S):
                assert isinstance(pipe, Connection)
                worker = pool[pipe]
                piece, results = worker.take()
                if results is not None:
                    queue.store(piece, results)
                    continue
                del pool[pipe]
                at, exit_code = worker.died(piece)
                if piece.is_retry:
                    queue.store(piece, [on_worker_death(piece.items[0], exit_code)])
                else:
                    queue.isolate(piece, at)
            hand_out()
            for chunk in queue.finished():
                yield chunk
                hand_out()
    finally:
        for pipe in pool:
            pipe.close()
        deadline = time.monotonic() + _GRACE_S
        for worker in pool.values():
            worker.end(deadline)


def _serve(
    pipe: Connection,
    done: Any,
    setup: Callable[[], State],
    work: Callable[[State, Sequence[Item], CheckStop], Iterator[Result]],
    cpu_limit_s: float,
) -> None:
    def check_stop() -> None:
        if pipe.poll():  # the job sends nothing while a piece is in progress, so the pipe was closed
            raise SystemExit

    # Decoders in C print their own warnings; what is wrong with an input is recorded as the reason of its rejection.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    state: State | None = None
    with suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            items = pipe.recv()
            done_results: list[Result] = []
            error: Exception | None = None
            try:
                state = setup() if state is None else state
                results = work(state, items, check_stop)
                for _ in items:
                    check_stop()
                    _allow(cpu_limit_s)
                    done_results.append(next(results))
                    done.value += 1
            except PipelineError as explained:
                error = explained
            except Exception:
                error = RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
            pipe.send((done_results, error))


def _allow(seconds: float) -> None:
    """Let the kernel end this process after so many more seconds of computing."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
