"""What does a slow store do to a thousand ranks that train from one shard set? A simulation; no cluster is needed.

    python benchmarks/simulated_cluster.py [--quick] [--json FILE] [--check]

`cluster_model.py` says what is real and what is modelled. The set: shards of 1,000 64-px PNGs, 10 MB each, whose sizes
are lognormal; 512 images/s a rank (32 in 1/16 s), 4 lanes and 4 workers a rank, window 256. The run is resumed near the
end of an epoch and goes on into the next one. The store: 30 ms, 80 MB/s a request, 5,500 requests a second (S3's limit
for GETs of one prefix), 3 GB/s a node of 8 ranks, 100 GB/s in all.

    requests/s   mean, and the most in any second, from 1 s after the first batch on; start: the most before that
    first batch  seconds to the first batch of the slowest rank, without the start of Python
    waiting      share of the time after the first batch in which the devices have no batch
    slowest      how long the rank that waits most for its own data waits, over the median rank
    epoch's end  most requests in any second from 4 steps before the new epoch to 2 s after its first step; and how long
                 the devices wait in these 6 steps

--check compares the model with the real loader: one rank without workers, from an S3 server on this machine that
answers late. Requests must be equal, one by one; the time is printed beside the model's.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import numpy as np

sys.path.append(str(Path(__file__).parent))  # for tests that import this file

from cluster_model import Cluster, ReaderModel, Result, Shard, StoreModel, simulate
from counting_store import Request, store

from pipeline.data.images.preprocess import encode
from pipeline.data.loading.batches import Batches
from pipeline.data.loading.order import Order, rank_lanes
from pipeline.data.shards.index_file import write_index
from pipeline.data.shards.shard_set import Sample, ShardSet, key, pack, write_shard

BATCH, LANES, WORKERS, WINDOW, STEP_S = 32, 4, 4, 256, 1 / 16
SAMPLES, IMAGE_BYTES, SPREAD, EXTRA_BYTES = 1000, 8500, 0.5, 1536
"""Of a shard; of an image and the standard deviation of its logarithm; of headers and KEY.json."""
DECODE_S_PER_BYTE = 0.15e-3 / (IMAGE_BYTES + EXTRA_BYTES)
"""6,500 images of 64 px a second and worker: docs/performance.md."""
BEFORE, AFTER = 60, 30
"""Steps of the old epoch and of the new one."""
SIDECAR_HEAD, SIDECAR_ROW = 1 << 12, 28  # bytes that the reader asks for
PADDING = 10_240


def equal(lanes: int, per_lane: int = 10) -> np.ndarray:
    """Samples of each shard, (S,): all alike, as many shards for each lane."""
    return np.full(lanes * per_lane, SAMPLES)


def unequal(lanes: int, per_lane: int = 10) -> np.ndarray:
    """Lognormal with a standard deviation of 1; the smallest has 1 sample."""
    rng = np.random.default_rng(1)
    drawn = SAMPLES * np.exp(rng.standard_normal(lanes * per_lane) - 0.5)
    return np.maximum(drawn.astype(np.int64), 1)


def giant(lanes: int, per_lane: int = 10) -> np.ndarray:
    """Equal ones, and one of 100 times their size."""
    return np.append(equal(lanes, per_lane), 100 * SAMPLES)


def image_bytes(shard: int, samples: int, between: float = 0.0) -> np.ndarray:
    """Bytes of the samples of a shard in the tar, (samples,): lognormal; `between` shards their mean varies too."""
    rng = np.random.default_rng([7, shard])
    mean = IMAGE_BYTES * np.exp(between * rng.standard_normal() - between**2 / 2)
    drawn = mean * np.exp(SPREAD * rng.standard_normal(samples) - SPREAD**2 / 2) + EXTRA_BYTES
    return (drawn.astype(np.int64) + 511) // 512 * 512


def synthetic(sizes: np.ndarray) -> Callable[[int], Shard]:
    """The shards of a set that does not exist."""

    @lru_cache(maxsize=64)
    def shard(i: int) -> Shard:
        ends = np.cumsum(image_bytes(i, int(sizes[i])))
        return Shard(ends.tolist(), -(-int(ends[-1] + 1024) // PADDING) * PADDING, sidecar_bytes(len(ends)))

    return shard


def sidecar_bytes(rows: int) -> int:
    return SIDECAR_HEAD + SIDECAR_ROW * rows


def cluster(ranks: int, sizes: np.ndarray, **changes: Any) -> Cluster:
    """A run on so many ranks that begins `BEFORE` steps before the end of its first epoch."""
    order = Order(1, tuple(map(int, sizes)), BATCH * ranks, LANES * ranks, WINDOW)
    first_step = max(order.samples // order.global_batch - BEFORE, 0)
    whole = Cluster(
        order, synthetic(sizes), ranks, WORKERS, steps=BEFORE + AFTER, step_s=STEP_S,
        decode_s_per_byte=DECODE_S_PER_BYTE, first_step=first_step,
    )  # fmt: skip
    return replace(whole, **changes)


def cached(share: float) -> Callable[[int, int], bool]:
    """Each node has this share of the set."""
    return lambda _epoch, shard: shard * 0.6180339887 % 1 < share


def scenarios(ranks: int, quick: bool) -> Iterator[tuple[str, Cluster]]:
    """The runs whose figures are the rows of the table."""
    even, uneven = cluster(ranks, equal(LANES * ranks)), cluster(ranks, unequal(LANES * ranks))
    slow, far = StoreModel(slow_share=0.02), StoreModel(latency_s=0.1)
    yield "lognormal shards", uneven
    yield "equal shards", even
    yield "lognormal, 1 request in 50 takes 0.6 s", replace(uneven, store=slow)
    yield "lognormal, latency 100 ms", replace(uneven, store=far)
    if quick:
        return
    yield "lognormal, data.cache has half of the set", replace(uneven, is_cached=cached(0.5))
    yield "no limit of requests", replace(uneven, store=StoreModel(rate=1e9))
    yield "one shard 100 times as large", cluster(ranks, giant(LANES * ranks))
    small, sized, late = {"first_block": 1 << 16}, {"asks_for_size": True}, {"opens_ahead": False}
    for title, parts in {
        "nothing opened ahead": late, "a HEAD of each tar": sized, "first block 64 KiB": small,
        "all three": small | sized | late, "4 steps ahead, not 2": {"prefetch": 4},
    }.items():  # fmt: skip
        yield f"reader changed: {title}", replace(uneven, reader=ReaderModel(**parts))


def figures(run: Cluster, result: Result) -> dict[str, float]:
    """The columns of the table."""
    first, last = result.begun_s[0], result.begun_s[-1]
    arrivals = result.arrivals_s[result.arrivals_s <= last]
    settled = arrivals[arrivals > first + 1]
    new = min(-(-run.order.samples // run.order.global_batch) - run.first_step, run.steps - 1)  # first of an epoch
    begun = np.array(result.begun_s)
    before = max(new - 4, 0)  # workers are ahead
    around = arrivals[(arrivals > max(begun[before], first + 1)) & (arrivals < begun[new] + 2)]
    mean = len(settled) / (last - first - 1)
    own = result.waits_s[:, 1:].sum(1)
    return {
        "requests_per_s": mean,
        "peak_requests_per_s": most_in_a_second(settled),
        "start_requests_per_s": most_in_a_second(arrivals[arrivals <= first + 1]),
        "refused": result.refused,
        "bytes_per_s": result.bytes / last,
        "first_batch_s": first,
        "waiting": max(1 - (run.steps - 1) * run.step_s / (last - first), 0.0),
        "median_rank_waits_s": float(np.median(own)),
        "slowest_rank_waits_s": float(own.max()),
        "epoch_end_requests_per_s": most_in_a_second(around),
        "epoch_end_over_mean": most_in_a_second(around) / max(mean, 1e-9),
        "epoch_end_waiting_s": float(begun[new + 2] - begun[before] - (new + 2 - before) * run.step_s),
        "requests_per_1000_images": 1000 * len(arrivals) / (run.steps * run.order.global_batch),
    }  # fmt: skip


def most_in_a_second(arrivals: np.ndarray) -> int:
    """The largest number of arrivals in any second."""
    if not len(arrivals):
        return 0
    return int((np.searchsorted(arrivals, arrivals + 1.0) - np.arange(len(arrivals))).max())


HEADS = (
    "ranks", "scenario", "requests/s: mean", "most", "start", "refused", "GB/s", "first batch, s", "waiting",
    "median rank waits, s", "slowest", "epoch's end: requests/s", "× mean", "waiting, s",
)  # fmt: skip


def table_row(ranks: int, title: str, row: dict[str, float]) -> str:
    cells = (
        f"{ranks:,}", title, f"{row['requests_per_s']:,.0f}", f"{row['peak_requests_per_s']:,}",
        f"{row['start_requests_per_s']:,}", f"{row['refused']:,}", f"{row['bytes_per_s'] / 1e9:.2f}",
        f"{row['first_batch_s']:.2f}", f"{row['waiting']:.1%}", f"{row['median_rank_waits_s']:.2f}",
        f"{row['slowest_rank_waits_s']:.2f}", f"{row['epoch_end_requests_per_s']:,}",
        f"{row['epoch_end_over_mean']:.1f}", f"{row['epoch_end_waiting_s']:.2f}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def balance(ranks: int, steps: int = 20) -> dict[str, float]:
    """Samples and bytes that the ranks get in a step, of the real order: samples exactly alike, bytes nearly.

    Returns:
        The largest number of samples of a lane in a step over G/V, and the largest bytes of a rank in a step over the
        mean, for shards and pictures of unequal sizes; `between`: also the means of the shards differ.
    """
    result = {}
    sizes = unequal(LANES * ranks)
    order = Order(1, tuple(map(int, sizes)), BATCH * ranks, LANES * ranks, WINDOW)
    streams = [order.lane_stream(lane, 0) for lane in range(order.lanes)]
    places = [[[item.place for item in islice(stream, BATCH // LANES)] for _ in range(steps)] for stream in streams]
    result["samples_of_a_lane_over_its_share"] = max(len(step) for lane in places for step in lane) * LANES / BATCH
    for name, between in (("bytes", 0.0), ("bytes_between", 0.5)):
        bytes_of = lru_cache(maxsize=None)(partial(_bytes_of, sizes, between))
        by_rank = np.zeros((ranks, steps))
        for rank in range(ranks):
            for lane in rank_lanes(order.lanes, rank, ranks):
                by_rank[rank] += [sum(bytes_of(shard)[row] for shard, row in step) for step in places[lane]]
        result[f"{name}_most_over_mean_of_a_step"] = float((by_rank.max(0) / by_rank.mean(0)).mean())
        result[f"{name}_most_over_mean_of_the_run"] = float(by_rank.sum(1).max() / by_rank.sum(1).mean())
    return result


def _bytes_of(sizes: np.ndarray, between: float, shard: int) -> np.ndarray:
    return image_bytes(shard, int(sizes[shard]), between)


class Counting(Protocol):
    """A store that is at `s3://pool`."""

    latency_s: float

    def take(self) -> list[Request]:
        """The requests since the last call."""


def check(counting: Counting, latency_s: float = 0.1, steps: int = 12) -> dict[str, Any]:
    """The real loader beside the model: whether their requests are equal, and the seconds of both."""
    shards = _made("s3://pool/check")
    order = Order(1, tuple(shards.shard_samples), global_batch=256, lanes=4, window=WINDOW)
    sidecars = [shards.sidecar(i) for i in range(len(order.shard_samples))]
    counting.latency_s = latency_s
    latencies_s = [_latency(counting.take, shards)]
    counting.take()
    started = time.perf_counter()
    with Batches(shards, order, rank=0, world_size=1, first_sample=0, workers=0, flip=False) as batches:
        for _ in islice(batches, steps):
            pass
        real_s = time.perf_counter() - started
    time.sleep(1)  # a request that was begun ahead may still be on its way
    real = counted(counting.take())
    latencies_s.append(_latency(counting.take, shards))
    own_latency_s = sum(latencies_s) / 2

    def shard(i: int) -> Shard:
        return Shard(np.cumsum(sidecars[i]["length"]).tolist(), shards.shards[i].bytes, sidecar_bytes(len(sidecars[i])))

    modelled = simulate(Cluster(
        order, shard, ranks=1, workers=0, steps=steps, step_s=0.0, decode_s_per_byte=DECODE_S_PER_BYTE,
        store=StoreModel(latency_s=own_latency_s, spread=0.0, connection_bps=1e9),
    ))  # fmt: skip
    expected = Counter(modelled.log)
    return {"requests": real.total(), "predicted_requests": expected.total(), "equal": real == _named(expected, shards),
            "seconds": real_s, "predicted_seconds": modelled.begun_s[-1], "latency_s": own_latency_s}  # fmt: skip


def _made(url: str) -> ShardSet:
    rng = np.random.default_rng(0)
    records, position = [], 0
    for number, count in enumerate((400, 150, 700, 300, 1, 250)):
        samples = []
        for _ in range(count):
            image = encode(rng.integers(256, size=(48, 48, 3), dtype=np.uint8), "png")
            samples.append(Sample(key(position), image, "png", None, {}))
            position += 1
        records.append(write_shard(url, f"set-{number:06d}", map(pack, samples), dict))
    write_index(url, records, size=(48, 48), channels=3, classes=None, source="noise", settings={}, counts={})
    return ShardSet.open(url)


def _latency(take: Callable[[], list[Request]], shards: ShardSet) -> float:
    """Seconds of a small request here: the given latency and what the server, the proxy and the client need."""
    shards.sidecar(0)
    take()
    started = time.perf_counter()
    for _ in range(5):
        shards.sidecar(4)
    return (time.perf_counter() - started) / len(take())


def counted(requests: list[Request]) -> Counter[tuple[str, str, int, int]]:
    """The requests of files of a set: (method, name, start, end)."""
    result: Counter[tuple[str, str, int, int]] = Counter()
    for _, method, path, ranged in requests:
        start, _, end = ranged.removeprefix("bytes=").partition("-")
        name = unquote(path).rpartition("/")[2]
        result[method, name, int(start or 0), int(end) + 1 if end else 0] += 1
    return result


def _named(expected: Counter[tuple[str, str, int, int]], shards: ShardSet) -> Counter[tuple[str, str, int, int]]:
    """The model's files by their names in the set."""
    names = Counter[tuple[str, str, int, int]]()
    for (method, file, start, end), count in expected.items():
        number, ending = file.split(".")
        names[method, f"{shards.shards[int(number)].stem}.{ending}", start, end] += count
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 64, 1000])
    parser.add_argument("--quick", action="store_true", help="1 and 8 ranks, some of the rows")
    parser.add_argument("--check", action="store_true", help="only compare the model with the real loader")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    gc.disable()  # it would look through millions of events again and again
    result: dict[str, Any] = {}
    if options.check:
        with store() as counting:
            result["check"] = check(counting)
        print(json.dumps(result["check"], indent=1))
        if not result["check"]["equal"]:
            raise SystemExit("the loader sent other requests than the model says")
    else:
        print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
        rows = result["rows"] = []
        for ranks in [1, 8] if options.quick else options.ranks:
            for title, run in scenarios(ranks, options.quick):
                rows.append({"ranks": ranks, "scenario": title} | figures(run, simulate(run)))
                print(table_row(ranks, title, rows[-1]), flush=True)
                gc.collect()  # the processes of a cluster refer to each other
        most = rows[-1]["ranks"]
        result["balance"] = balance(most)
        print(f"\nbalance of {most:,} ranks:", *(f"{name} {value:.3f}" for name, value in result["balance"].items()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
