"""Processes that share out items in chunks: results in order, a stop within one item, no orphans, no lost job.

A worker is started by a fork server, so that it inherits no threads, locks or open files of the job. The pipe to the
job is its lifeline: when the job closes it, or is killed, the worker gives up at the next item. Signals are the job's
affair; a terminal and SLURM send them to every process, so workers are out of their reach.

An item may kill its worker: decoders in C crash, or never end. It is done again, alone, by a fresh process, so that an
accident costs nothing; a second death is its own.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.sharedctypes import RawValue
from typing import Any, Generic, NamedTuple, TypeVar

from pipeline.data.workers import start_worker_server
from pipeline.errors import PipelineError

State = TypeVar("State")
Item = TypeVar("Item")
Result = TypeVar("Result")
GoOn = Callable[[], None]
_POLL_S = 0.2
_GRACE_S = 10.0
_AHEAD = 4
"""Chunks a worker that may wait, done, for one before them: they bound the memory."""
CPU_LIMIT_S = 60.0
NO_LIMIT_S = 1e9
"""For items that are large, and not to be given up."""


class _Piece(NamedTuple, Generic[Item]):
    """Items to do: a whole chunk, or what a death has left of one."""

    chunk: int
    first: int
    """Place of the first item in its chunk."""
    items: Sequence[Item]
    is_retry: bool = False


class _Board(Generic[Item, Result]):
    """What is to be done, what is under way and what is done, so that results leave in order."""

    def __init__(self, chunks: Iterable[Sequence[Item]], ahead: int) -> None:
        self._coming, self._ahead = enumerate(chunks), ahead
        self._again: deque[_Piece[Item]] = deque()
        self._results: dict[int, list[Any]] = {}
        self._missing: dict[int, int] = {}
        self._given = self._left = 0

    def next_piece(self) -> _Piece[Item] | None:
        """The next thing to do; None if there is none, or not before something earlier is done."""
        if self._again:
            return self._again.popleft()
        if self._given < self._left + self._ahead:
            for number, items in self._coming:
                self._given, self._missing[number] = number + 1, len(items)
                self._results[number] = [None] * len(items)
                return _Piece(number, 0, items)
        return None

    def enter(self, piece: _Piece[Item], results: Sequence[Result]) -> None:
        self._results[piece.chunk][piece.first : piece.first + len(results)] = results
        self._missing[piece.chunk] -= len(results)

    def isolate(self, piece: _Piece[Item], at: int) -> None:
        """Do a piece again, this item of it alone."""
        for start, end in ((0, at), (at, at + 1), (at + 1, len(piece.items))):
            if items := piece.items[start:end]:
                self._again.append(_Piece(piece.chunk, piece.first + start, items, is_retry=start == at))

    def finished(self) -> Iterator[list[Result]]:
        """The results of chunks that are done, as far as all before them are."""
        while self._missing.get(self._left) == 0:
            del self._missing[self._left]
            self._left += 1
            yield self._results.pop(self._left - 1)


class _Worker:
    """A process and what it is at."""

    def __init__(self, setup: Callable[[], Any], work: Callable[..., Any], cpu_limit_s: float) -> None:
        context = multiprocessing.get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self._done = RawValue("q", 0)  # items of the piece; shared, as a death leaves no time to tell
        self._process = context.Process(target=_serve, args=(theirs, self._done, setup, work, cpu_limit_s), daemon=True)
        self._process.start()
        theirs.close()
        self.piece: _Piece[Any] | None = None

    def begin(self, piece: _Piece[Any]) -> None:
        self.piece, self._done.value = piece, 0
        with suppress(BrokenPipeError):  # dead already: told by the end of its pipe
            self.pipe.send(piece.items)

    def take(self) -> tuple[_Piece[Any], list[Any] | None]:
        """The piece that it was at, with the results; None for these if the process has died."""
        piece, self.piece = self.piece, None
        assert piece is not None
        try:
            results, error = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return piece, None
        if error is not None:
            raise error
        return piece, results

    def died(self, piece: _Piece[Any]) -> tuple[int, int]:
        """At which item of the piece, and with which exit code."""
        self.pipe.close()
        self._process.join()
        return min(self._done.value, len(piece.items) - 1), self._process.exitcode or 0

    def end(self, deadline: float) -> None:
        self._process.join(max(deadline - time.monotonic(), 0))
        self._process.kill()


def run(
    work: Callable[[State, Sequence[Item], GoOn], Iterator[Result]],
    chunks: Iterable[Sequence[Item]],
    *,
    setup: Callable[[], State],
    workers: int,
    stop: Callable[[], bool],
    bury: Callable[[Item, int], Result],
    cpu_limit_s: float = CPU_LIMIT_S,
) -> Generator[list[Result], None, None]:
    """Do items in processes; close the iterator to stop them.

    Args:
        work: yields a result for each item. If one takes long it calls its third argument now and then: that leaves the
            process if the job has stopped. A function of a module: it travels to the workers by name.
        chunks: items to hand out together, in this order; a few for each worker are under way.
        setup: makes what a worker keeps between chunks.
        workers: processes, at most.
        stop: asked several times a second; when it says so the iterator ends early.
        bury: the result for an item that has killed two processes, given the exit code of the second; may raise.
        cpu_limit_s: seconds of computing after which an item is taken for one that never ends (-SIGXCPU).

    Yields:
        The results of each chunk, in the order of the chunks.

    Raises:
        PipelineError: as raised by `setup`, `work` or `bury`.
    """
    start_worker_server(work.__module__)
    board = _Board[Item, Result](chunks, _AHEAD * workers)
    crew: dict[Connection, _Worker] = {}

    def hand_out() -> None:
        idle = [worker for worker in crew.values() if worker.piece is None]
        while (idle or len(crew) < workers) and (piece := board.next_piece()):
            worker = idle.pop() if idle else _Worker(setup, work, cpu_limit_s)
            crew[worker.pipe] = worker
            worker.begin(piece)

    try:
        hand_out()
        while (busy := [pipe for pipe, worker in crew.items() if worker.piece]) and not stop():
            for pipe in wait(busy, timeout=_POLL_S):
                assert isinstance(pipe, Connection)
                worker = crew[pipe]
                piece, results = worker.take()
                if results is not None:
                    board.enter(piece, results)
                    continue
                del crew[pipe]
                at, exit_code = worker.died(piece)
                if piece.is_retry:
                    board.enter(piece, [bury(piece.items[0], exit_code)])
                else:
                    board.isolate(piece, at)
            hand_out()
            for chunk in board.finished():
                yield chunk
                hand_out()
    finally:
        for pipe in crew:
            pipe.close()
        deadline = time.monotonic() + _GRACE_S
        for worker in crew.values():
            worker.end(deadline)


def _serve(
    pipe: Connection,
    done: Any,
    setup: Callable[[], State],
    work: Callable[[State, Sequence[Item], GoOn], Iterator[Result]],
    cpu_limit_s: float,
) -> None:
    def go_on() -> None:
        if pipe.poll():  # the job says nothing while a piece is under way, so this is the end of the pipe
            raise SystemExit

    # Decoders in C complain on their own account; what is wrong with an input is said by the reason it ends with.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    state: State | None = None
    with suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            items = pipe.recv()
            found: list[Result] = []
            error: Exception | None = None
            try:
                state = setup() if state is None else state
                results = work(state, items, go_on)
                for _ in items:
                    go_on()
                    _allow(cpu_limit_s)
                    found.append(next(results))
                    done.value += 1
            except PipelineError as explained:
                error = explained
            except Exception:
                error = RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
            pipe.send((found, error))


def _allow(seconds: float) -> None:
    """Let the kernel end this process after so many more seconds of computing."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
