"""A model of training ranks that read one shard set from an object store: events in order of time, in one process.

Real are the order of the samples (`Order.lane_stream`) and the division of the lanes (`rank_lanes`). Modelled are:

- the store: latency, a slow tail, requests a second, bandwidth of a connection, of a node and of the whole store.
  Above its rate it refuses (503), and the reader repeats the request with the pauses of `storage/remote.py`.
- the reader (`data/loading/shard_reader.py`, `storage/remote.py`): to open a shard it asks for the sidecar, then for
  the first block of the tar; from the second 64 KiB of a block on the next one is under way. The next shard of a lane
  is opened ahead. A worker reads its lanes in turn, and waits where a byte is not there.
- decoding, in proportion to the bytes, in the worker's process.
- the trainer: a worker is at most `prefetch` steps ahead of its rank, and a step begins when the last rank has its
  batch. All steps take the same time.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from pipeline.data.loading.order import Item, Order, Place, announced, rank_lanes
from pipeline.data.loading.shard_reader import announced_ahead

AHEAD, LARGEST = 1 << 20, 1 << 22
_BUFFER = 1 << 16  # of `storage/remote.py`: a block counts as begun when the second one of these is read
_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 8.0


class Event:
    """Something that processes wait for; it happens once."""

    def __init__(self, count: int = 1) -> None:
        self.left = count
        self.waiting: list[Process] = []


Process = Generator["float | Event", None, None]
"""Yields seconds to sleep, or an event to wait for."""


class Clock:
    """Runs the processes in the order of time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Process]] = []
        self._numbers = itertools.count()

    def start(self, process: Process) -> None:
        """Let a process begin now."""
        heapq.heappush(self._heap, (self.now, next(self._numbers), process))

    def happen(self, event: Event) -> None:
        """One of the counts of an event; with the last one it has happened."""
        event.left -= 1
        if not event.left:
            for process in event.waiting:
                self.start(process)

    def run(self) -> None:
        """Until no process is left that does not wait for ever."""
        while self._heap:
            self.now, _, process = heapq.heappop(self._heap)
            for wait in process:
                if isinstance(wait, float):
                    heapq.heappush(self._heap, (self.now + wait, next(self._numbers), process))
                    break
                if wait.left > 0:
                    wait.waiting.append(process)
                    break


@dataclass(frozen=True)
class StoreModel:
    """What a store does; the defaults are near what is published and measured of S3."""

    latency_s: float = 0.03
    """Median of a request, without the transfer."""
    spread: float = 0.4
    """Standard deviation of its logarithm."""
    slow_share: float = 0.0
    """Share of requests that take `slow_times` as long."""
    slow_times: float = 20.0
    rate: float = 5500.0
    """Requests a second that are answered, with a second's worth in store; more are refused."""
    connection_bps: float = 80e6
    """Bytes a second of one request."""
    node_bps: float = 3e9
    total_bps: float = 100e9


class Store:
    """The store, and what it was asked."""

    def __init__(self, clock: Clock, model: StoreModel, nodes: int, seed: int = 0) -> None:
        self._clock, self._model = clock, model
        self._random = np.random.default_rng(seed)
        self._tokens, self._counted_at = model.rate, 0.0
        self._free_at = [0.0] * (nodes + 1)  # the last one: of the whole store
        self.arrivals: list[float] = []
        self.refused, self.bytes = 0, 0
        self.log: list[tuple[str, str, int, int]] = []
        """(method, file, start, end) of each request, without repetitions; a HEAD has no range: 0, 0."""

    def request(self, node: int, method: str, file: str, start: int = 0, end: int = 0) -> Event:
        """Ask now; the event is the answer."""
        answer = Event()
        self.log.append((method, file, start, end))
        self._clock.start(self._attempts(node, end - start, answer))
        return answer

    def _attempts(self, node: int, length: int, answer: Event) -> Process:
        pause = _PAUSE_S
        while True:
            self.arrivals.append(self._clock.now)
            latency = self._latency()
            if self._is_within_rate():
                break
            self.refused += 1
            yield latency + min(pause, _LONGEST_PAUSE_S) * self._random.uniform(0.5, 1.5)
            pause *= 2
        self.bytes += length
        yield latency
        ends = [self._clock.now + length / self._model.connection_bps]
        for i, bps in ((node, self._model.node_bps), (-1, self._model.total_bps)):
            self._free_at[i] = max(self._free_at[i], self._clock.now) + length / bps
            ends.append(self._free_at[i])
        yield max(ends) - self._clock.now
        self._clock.happen(answer)

    def _latency(self) -> float:
        drawn = self._model.latency_s * float(np.exp(self._model.spread * self._random.standard_normal()))
        is_slow = self._model.slow_share and self._random.random() < self._model.slow_share
        return drawn * self._model.slow_times if is_slow else drawn

    def _is_within_rate(self) -> bool:
        now, rate = self._clock.now, self._model.rate
        self._tokens = min(self._tokens + (now - self._counted_at) * rate, rate)
        self._counted_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Shard(NamedTuple):
    """What lies where in a shard."""

    ends: list[int]
    """Where each sample ends, in the order of the rows; they begin at 0 and have no gaps."""
    bytes: int
    """Of the tar."""
    sidecar_bytes: int


@dataclass(frozen=True)
class ReaderModel:
    """How a lane reads; the defaults are the pipeline's, the others show what each part of it is good for."""

    asks_for_size: bool = False
    """A HEAD of the tar before its first range."""
    first_block: int = LARGEST
    opens_ahead: bool = True
    """A shard is opened, with its first block, 64 to 1,024 samples ahead, each lane at another time."""
    prefetch: int = 2
    """Steps that a worker is ahead of its rank."""


@dataclass(frozen=True)
class Cluster:
    """Everything about a run."""

    order: Order
    shard: Callable[[int], Shard]
    ranks: int
    workers: int
    """Of a rank; 0: the rank reads itself, when it needs the batch."""
    steps: int
    step_s: float
    """Of the device; with the exchange of gradients."""
    decode_s_per_byte: float
    first_step: int = 0
    ranks_of_node: int = 8
    store: StoreModel = field(default_factory=StoreModel)
    reader: ReaderModel = field(default_factory=ReaderModel)
    is_cached: Callable[[int, int], bool] | None = None
    """(epoch, shard) → whether its files lie on the node."""


class Lane:
    """One lane's reader: `ShardReader` and `_RangedFile` in one."""

    def __init__(self, cluster: Cluster, store: Store, clock: Clock, node: int, number: int) -> None:
        self._cluster, self._store, self._clock, self._node = cluster, store, clock, node
        order = cluster.order
        start = cluster.first_step * order.global_batch // order.lanes
        items = order.lane_stream(number, start)
        if cluster.reader.opens_ahead:
            items = announced(items, self._announce, announced_ahead(number))
        self.items: Iterator[Item] = items
        self.shard = -1
        self.facts = Shard([], 0, 0)
        self.row = 0  # the next one, if it goes on in order
        self.have = 0  # bytes of the tar that have come, up to here
        self._block_start = 0
        self._length = 0
        self._next: tuple[Event, int] | None = None
        self._announced: deque[Place] = deque()
        self._opened: tuple[Place, Event] | None = None
        self.held: dict[Place, int] = {}

    def begin(self) -> None:
        """Open the first shard, as all lanes of a worker do together."""
        first = next(self.items)
        self.items = itertools.chain([first], self.items)

    def open(self, place: Place, position: int) -> Process:
        """Go on in another shard, from a row on."""
        self.shard, self.facts, self._next = place.shard, self._cluster.shard(place.shard), None
        self.have = self._start_of(place)
        self._length = self._cluster.reader.first_block
        self.row = place.row
        cached, opened = self._cluster.is_cached, self._opened
        if cached and cached(position // self._cluster.order.samples, place.shard):
            self.have = self.facts.bytes
        elif opened and opened[0] == place:
            yield opened[1]
            self._took(self._first_length(place))
        else:
            done = Event()
            self._clock.start(self._opening(place, done))
            yield done
            self._took(self._first_length(place))
        self._opened = None
        self._open_next()

    def seek(self, row: int) -> None:
        """Go on at another row of this shard, which the slice of the next epoch begins with."""
        start = self.facts.ends[row - 1] if row else 0
        if not (self.row and self.facts.ends[self.row - 1]) <= start <= self.have:
            self.have, self._length, self._next = start, self._cluster.reader.first_block, None
        self.row = row

    def take(self) -> Process:
        """The next block."""
        event, length = self._next or self._block()
        yield event
        self._next = None
        self._took(length)

    def consumed(self, end: int) -> None:
        """The tar is read up to here; from the second buffer of a block on the next block is asked for."""
        is_begun = end > self._block_start + _BUFFER
        if is_begun and self._next is None and self._length >= AHEAD and self.have < self.facts.bytes:
            self._next = self._block()

    def _took(self, length: int) -> None:
        self._block_start = self.have
        self.have += length
        self._length = min(2 * self._length, LARGEST)

    def _announce(self, place: Place) -> None:
        self._announced.append(place)
        self._open_next()

    def _open_next(self) -> None:
        if self._announced and not self._opened:
            place = self._announced.popleft()
            self._opened = place, Event()
            self._clock.start(self._opening(*self._opened))

    def _opening(self, place: Place, done: Event) -> Process:
        """Sidecar, perhaps the size of the tar, and its first block."""
        shard = self._cluster.shard(place.shard)
        cached = self._cluster.is_cached
        if not (cached and cached(0, place.shard)):
            yield self._store.request(self._node, "GET", f"{place.shard}.npy", 0, shard.sidecar_bytes)
            if self._cluster.reader.asks_for_size:
                yield self._store.request(self._node, "HEAD", f"{place.shard}.tar")
            start = self._start_of(place)
            yield self._range(place.shard, start, start + self._first_length(place))
        self._clock.happen(done)

    def _start_of(self, place: Place) -> int:
        return self._cluster.shard(place.shard).ends[place.row - 1] if place.row else 0

    def _first_length(self, place: Place) -> int:
        return min(self._cluster.reader.first_block, self._cluster.shard(place.shard).bytes - self._start_of(place))

    def _block(self) -> tuple[Event, int]:
        length = min(self._length, self.facts.bytes - self.have)
        return self._range(self.shard, self.have, self.have + length), length

    def _range(self, shard: int, start: int, end: int) -> Event:
        """The last range of a tar asks for a byte more, to notice a longer file."""
        is_last = end == self._cluster.shard(shard).bytes
        return self._store.request(self._node, "GET", f"{shard}.tar", start, end + is_last)


@dataclass
class Result:
    """What happened. Seconds since the start."""

    begun_s: list[float]
    """When each step began: the slowest rank had its batch."""
    waits_s: np.ndarray
    """How long each rank waited for its batch, (ranks, steps), the first one without the start of Python."""
    arrivals_s: np.ndarray
    """When each request came to the store, repetitions included; ascending."""
    refused: int
    bytes: int
    log: list[tuple[str, str, int, int]]


def simulate(cluster: Cluster, seed: int = 0) -> Result:
    """Run a cluster; with equal seeds the store draws equal latencies."""
    return _Run(cluster, seed).result()


class _Run:
    """The processes of a cluster, and the events that they wait for."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster, self._clock = cluster, Clock()
        self._store = Store(self._clock, cluster.store, -(-cluster.ranks // cluster.ranks_of_node), seed)
        steps, ranks = range(cluster.steps), range(cluster.ranks)
        self._ready = [[Event(max(cluster.workers, 1)) for _ in steps] for _ in ranks]
        self._taken = [[Event() for _ in steps] for _ in ranks]
        self._all_there, self._ended = [Event(cluster.ranks) for _ in steps], [Event() for _ in steps]
        self._waits, self._begun = np.zeros((cluster.ranks, cluster.steps)), [0.0] * cluster.steps

    def result(self) -> Result:
        """Run it."""
        self._clock.start(self._device())
        workers = max(self._cluster.workers, 1)
        for rank in range(self._cluster.ranks):
            own, node = rank_lanes(self._cluster.order.lanes, rank, self._cluster.ranks), self._node(rank)
            for worker in range(workers):
                share = own[len(own) * worker // workers : len(own) * (worker + 1) // workers]
                lanes = [Lane(self._cluster, self._store, self._clock, node, lane) for lane in share]
                for lane in lanes:
                    lane.begin()
                self._clock.start(self._work(rank, lanes))
            self._clock.start(self._train(rank))
        self._clock.run()
        store = self._store
        return Result(
            self._begun, self._waits, np.sort(np.array(store.arrivals)), store.refused, store.bytes, store.log
        )

    def _node(self, rank: int) -> int:
        return rank // self._cluster.ranks_of_node

    def _work(self, rank: int, lanes: list[Lane]) -> Process:
        """A worker; without any, the rank itself, which reads when the step before has ended."""
        ahead = self._cluster.reader.prefetch
        for step in range(self._cluster.steps):
            if self._cluster.workers and step >= ahead:
                yield self._taken[rank][step - ahead]
            elif not self._cluster.workers and step:
                yield self._ended[step - 1]
            busy = 0.0
            for lane in lanes:
                busy = yield from _read_step(self._cluster, lane, busy)
            yield busy
            self._clock.happen(self._ready[rank][step])

    def _train(self, rank: int) -> Process:
        for step in range(self._cluster.steps):
            asked = self._clock.now
            yield self._ready[rank][step]
            self._waits[rank, step] = self._clock.now - asked
            self._clock.happen(self._taken[rank][step])
            self._clock.happen(self._all_there[step])
            yield self._ended[step]

    def _device(self) -> Process:
        """All devices: they exchange gradients, so the last rank decides."""
        for step in range(self._cluster.steps):
            yield self._all_there[step]
            self._begun[step] = self._clock.now
            yield self._cluster.step_s
            self._clock.happen(self._ended[step])


def _read_step(cluster: Cluster, lane: Lane, busy: float) -> Generator[float | Event, None, float]:
    """A lane's samples of one step. `busy`: seconds of decoding that have not passed yet; returned as well."""
    order = cluster.order
    for position, place, reads in itertools.islice(lane.items, order.global_batch // order.lanes):
        for needed in reads:
            shard, row = needed
            if shard == lane.shard and row != lane.row:
                lane.seek(row)
            if shard != lane.shard or lane.have < lane.facts.ends[row]:
                yield busy
                busy = 0.0
                if shard != lane.shard:
                    yield from lane.open(needed, position)
                while lane.have < lane.facts.ends[row]:
                    yield from lane.take()
            lane.row = row + 1
            lane.consumed(lane.facts.ends[row])
            lane.held[needed] = lane.facts.ends[row] - (lane.facts.ends[row - 1] if row else 0)
        busy += lane.held.pop(place) * cluster.decode_s_per_byte
    return busy
