"""Contestants take turns, so that a busy machine slows all alike; their figures are medians, and medians of ratios."""

from __future__ import annotations

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

Work = Callable[[], object]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that a peer's network is called in: bf16 autocast, or none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class Turns:
    """Seconds that each contestant took in each round.

    Args:
        device: where the work is done; it is waited for at both ends of a turn.
        threads: of a CPU. With one, the processor's time is taken and not the clock's, which others' work stretches.
        waits: whether the work also waits for other processes, so that only the clock tells.
    """

    def __init__(self, device: torch.device, threads: int = 0, *, waits: bool = False) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._device, self._alone = device, device.type == "cpu" and torch.get_num_threads() == 1 and not waits
        self.seconds: dict[str, list[float]] = {}

    def take(self, contestants: Mapping[str, Work], rounds: int) -> None:
        """Some rounds after one that does not count."""
        self._take({name: partial(self.timed, work) for name, work in contestants.items()}, rounds)

    def take_apart(self, makers: Mapping[str, Callable[[], Work]], rounds: int) -> None:
        """The same, each contestant made and run in a process of its own, as its users would.

        In one process they would share an allocator, and each would pay for pages that another gave back.

        Args:
            makers: of what is timed; they can be pickled.
            rounds: that count.
        """
        with ExitStack() as stack:
            self._take({name: stack.enter_context(self._apart(maker)) for name, maker in makers.items()}, rounds)

    def _take(self, timed: Mapping[str, Callable[[], float]], rounds: int) -> None:
        for number in range(rounds + 1):
            for name, turn in timed.items():
                seconds = turn()
                if number:
                    self.seconds.setdefault(name, []).append(seconds)

    @contextmanager
    def _apart(self, maker: Callable[[], Work]) -> Iterator[Callable[[], float]]:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, maker, self._device, torch.get_num_threads()))
        process.start()
        there.close()

        def turn() -> float:
            here.send(None)
            return float(here.recv())

        try:
            yield turn
        finally:
            here.close()
            process.join()

    def timed(self, work: Work) -> float:
        """Seconds that some work takes."""
        clock = time.process_time if self._alone else time.perf_counter
        self._wait()
        started = clock()
        work()
        self._wait()
        return clock() - started

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def median(self, name: str) -> float:
        """Seconds of a turn."""
        return statistics.median(self.seconds[name])

    def faster(self, name: str, other: str) -> float:
        """How many times faster than another."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.seconds[name], self.seconds[other]))

    def where(self) -> str:
        """The machine, for the foot of a table."""
        if self._device.type == "cuda":
            return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
        names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
        threads = torch.get_num_threads()
        clock = "seconds of the processor" if self._alone else "seconds of the clock"
        return f"{(names or [platform.processor()])[0]}, threads: {threads}, {clock}, torch {torch.__version__}"


def _serve(connection: Connection, maker: Callable[[], Work], device: torch.device, threads: int) -> None:
    turns, work = Turns(device, threads), maker()
    while True:
        try:
            connection.recv()
        except EOFError:
            return
        connection.send(turns.timed(work))


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
