"""The loader: the same batches for every world and any number of workers, every byte checked, nothing skipped."""

from __future__ import annotations

import dataclasses
import resource
import time
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.images.preprocess import encode
from pipeline.data.loading.batches import Batch, Batches, read_all
from pipeline.data.loading.order import Order
from pipeline.data.loading.shard_reader import ShardReader
from pipeline.data.shards.index_file import write_index
from pipeline.data.shards.shard_set import Sample, ShardSet, pack, write_shard
from pipeline.errors import ConfigError, DataError
from pipeline.keyed_random import Use, integers
from pipeline.storage import files

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

SIZE = (4, 6)
SHARDS = (5, 0, 1, 17, 14)
SAMPLES = sum(SHARDS)


def image(number: int) -> np.ndarray[Any, Any]:
    """(H, W, 3): tells its number and which side is left."""
    image = np.zeros((*SIZE, 3), dtype=np.uint8)
    image[..., 0], image[..., 1] = number // 256, number % 256
    image[:, : SIZE[1] // 2, 2] = 255
    return image


def write_set(url: str, shards: tuple[int, ...] = SHARDS, images: dict[int, bytes] | None = None) -> ShardSet:
    """A set of `image`s whose labels are their numbers; `images` replaces some."""
    images, records, number = images or {}, [], 0
    for shard, samples in enumerate(shards):
        content = [
            Sample(f"{i:09d}", images.get(i, encode(image(i), "png")), "png", i, {"source": f"{i}.png"})
            for i in range(number, number + samples)
        ]
        number += samples
        records.append(write_shard(url, f"set-{shard:06d}", map(pack, content), dict))
    write_index(url, records, size=SIZE, channels=3, classes=None, source={}, settings={}, counts={})
    return ShardSet.open(url)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_set(str(tmp_path_factory.mktemp("set")))


def order_of(shards: ShardSet, **changes: int) -> Order:
    return Order(
        **{"seed": 5, "shard_samples": shards.shard_samples, "global_batch": 12, "lanes": 12, "window": 4} | changes  # type: ignore[arg-type]
    )


def rank_batches(
    shards: ShardSet, rank: int = 0, world_size: int = 1, workers: int = 0, step: int = 0, flip: bool = True
) -> Batches:
    return Batches(
        shards,
        order_of(shards),
        rank=rank,
        world_size=world_size,
        first_sample=12 * step,
        workers=workers,
        flip=flip,
    )


def global_batches(shards: ShardSet, steps: range, world_size: int = 1, workers: int = 0) -> list[Batch]:
    """What all ranks together give, rank after rank."""
    shares = []
    for rank in range(world_size):
        with rank_batches(shards, rank, world_size, workers, steps.start) as batches:
            shares.append(list(islice(batches, len(steps))))
    assert all(len(batch.positions) == 12 // world_size for share in shares for batch in share)
    return [
        Batch(*(torch.cat([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(Batch)))
        for parts in zip(*shares)
    ]


def assert_same(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert torch.equal(a.positions, b.positions)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.images, b.images)


@pytest.fixture(scope="module")
def reference(shards: ShardSet) -> list[Batch]:
    """Ten steps, more than three epochs, by one rank in one process."""
    return global_batches(shards, range(10))


def numbers(images: Tensor) -> Tensor:
    return images[:, 0, 0, 0].long() * 256 + images[:, 1, 0, 0].long()


def test_every_epoch_holds_every_image_once_with_its_label(shards: ShardSet, reference: list[Batch]) -> None:
    labels = torch.cat([batch.labels for batch in reference])
    positions = torch.cat([batch.positions for batch in reference])
    assert positions.sort().values.tolist() == list(range(120))
    by_position = labels[positions.argsort()]
    for epoch in range(3):
        seen = by_position[epoch * SAMPLES : (epoch + 1) * SAMPLES]
        assert seen.sort().values.tolist() == list(range(SAMPLES))
    for batch in reference:
        assert batch.images.shape == (12, 3, *SIZE)
        assert (batch.images.dtype, batch.labels.dtype, batch.positions.dtype) == (
            torch.uint8,
            torch.int64,
            torch.int64,
        )
        assert torch.equal(numbers(batch.images), batch.labels)


def test_a_position_holds_what_the_order_says(shards: ShardSet, reference: list[Batch]) -> None:
    first = np.concatenate([[0], np.cumsum(SHARDS)])
    for batch in reference:
        for position, label in zip(batch.positions.tolist(), batch.labels.tolist()):
            item = next(order_of(shards).lane_stream(position % 12, position // 12))
            assert first[item.place.shard] + item.place.row == label


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_global_batches_are_the_same_for_every_world(shards: ShardSet, reference: list[Batch], world_size: int) -> None:
    assert_same(global_batches(shards, range(10), world_size), reference)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (1, 3), (3, 2)])
def test_global_batches_are_the_same_for_any_number_of_workers(
    shards: ShardSet, reference: list[Batch], world_size: int, workers: int
) -> None:
    steps = 10 if world_size < 12 else 2
    assert_same(global_batches(shards, range(steps), world_size, workers), reference[:steps])


def test_a_run_may_resume_with_another_world_and_other_workers(shards: ShardSet, reference: list[Batch]) -> None:
    got = global_batches(shards, range(0, 3), world_size=4, workers=0)
    got += global_batches(shards, range(3, 5), world_size=2, workers=1)
    got += global_batches(shards, range(5, 6), world_size=1, workers=3)
    got += global_batches(shards, range(6, 10), world_size=2, workers=0)
    assert_same(got, reference)


def test_a_resume_at_any_step_continues_with_the_same_batches(shards: ShardSet, reference: list[Batch]) -> None:
    for step in range(10):
        assert_same(global_batches(shards, range(step, 10)), reference[step:])


def test_a_run_may_resume_twenty_times(shards: ShardSet) -> None:
    unbroken = global_batches(shards, range(21))
    assert_same([batch for step in range(21) for batch in global_batches(shards, range(step, step + 1))], unbroken)


def test_what_workers_have_read_ahead_does_not_count(shards: ShardSet, reference: list[Batch]) -> None:
    with rank_batches(shards, workers=3) as batches:
        for _ in range(4):
            next(batches)  # by now the workers are at work on steps 4 and 5
    assert_same(global_batches(shards, range(4, 10)), reference[4:])


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_delivered_images_stay_as_the_loader_continues(shards: ShardSet, reference: list[Batch], workers: int) -> None:
    got = []
    with rank_batches(shards, workers=workers) as batches:
        for batch in islice(batches, 10):
            got.append(batch)
            time.sleep(0.05)  # the workers are as far ahead as they ever are
    assert_same(got, reference)


def test_too_little_shared_memory_is_one_line(shards: ShardSet) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a full /dev/shm answers in the same way
    try:
        with pytest.raises(DataError) as refused:
            rank_batches(shards, workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(refused.value) == (
        "the loader's batches take 1 MiB of shared memory, and there is less: set data.workers=0, which needs none, "
        "or enlarge /dev/shm (in containers: --shm-size)"
    )


def test_position_in_the_middle_of_the_lanes_is_a_bug(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match="first_sample=7"):
        Batches(shards, order_of(shards), rank=0, world_size=1, first_sample=7, workers=0, flip=False)


def test_ranks_that_cannot_share_the_lanes_are_refused(shards: ShardSet) -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes=12: run with 1, 2, 3, 4, 6, 12 ranks"):
        rank_batches(shards, world_size=5)


def test_flips_are_those_of_the_position(shards: ShardSet, reference: list[Batch]) -> None:
    plain = list(islice(rank_batches(shards, flip=False), 10))
    by_label: dict[int, set[bool]] = {}
    for flipped, straight in zip(reference, plain):
        assert torch.equal(straight.images[:, 2, 0, 0], torch.full((12,), 255, dtype=torch.uint8))
        is_flipped = flipped.images[:, 2, 0, 0] == 0
        expected = torch.where(is_flipped[:, None, None, None], straight.images.flip(-1), straight.images)
        assert torch.equal(flipped.images, expected)
        for label, mirrored in zip(flipped.labels.tolist(), is_flipped.tolist()):
            by_label.setdefault(label, set()).add(mirrored)
    share = torch.cat([batch.images[:, 2, 0, 0] == 0 for batch in reference]).double().mean()
    assert 0.3 < share < 0.7  # 120 draws: half, give or take 0.046
    assert sum(len(seen) == 2 for seen in by_label.values()) > SAMPLES / 2, "an image is not flipped for good"


@pytest.mark.parametrize(("rank", "world_size", "workers"), [(0, 1, 0), (1, 3, 0), (1, 2, 2)])
def test_flips_of_a_long_run_are_drawn_by_position(shards: ShardSet, rank: int, world_size: int, workers: int) -> None:
    with rank_batches(shards, rank, world_size, workers, step=3) as batches:
        for batch in islice(batches, 100):
            expected = integers(5, batch.positions, Use.FLIP, 2) == 1
            assert torch.equal(batch.images[:, 2, 0, 0] == 0, expected)


def test_global_random_state_is_left_alone(shards: ShardSet) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        with rank_batches(shards, workers=workers) as batches:
            next(batches)
    assert torch.equal(torch.get_rng_state(), before)


def test_read_all_gives_the_set_in_the_order_of_the_index(shards: ShardSet) -> None:
    everything = read_all(shards)
    expected = np.stack([image(i).transpose(2, 0, 1) for i in range(SAMPLES)])
    assert np.array_equal(everything.images.numpy(), expected)
    assert everything.labels.tolist() == everything.positions.tolist() == list(range(SAMPLES))
    assert len(read_all(shards, limit=1000).labels) == SAMPLES


@pytest.mark.parametrize("limit", [None, 1, 7, 9, SAMPLES])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_limited_read_is_spread_over_the_set_and_shared_by_the_ranks(
    shards: ShardSet, limit: int | None, ranks: int
) -> None:
    count = limit or SAMPLES
    parts = [read_all(shards, limit, (rank, ranks)) for rank in range(ranks)]
    labels = torch.cat([part.labels for part in parts])
    assert labels.tolist() == [i * SAMPLES // count for i in range(count)]
    assert torch.equal(numbers(torch.cat([part.images for part in parts])), labels)
    assert torch.cat([part.positions for part in parts]).tolist() == list(range(count)), "whoever reads them"
    assert {len(part.labels) for part in parts} <= {count // ranks, -(-count // ranks)}


def test_grey_images_without_labels(tmp_path: Path) -> None:
    grey = [np.full((3, 5, 1), i, dtype=np.uint8) for i in range(4)]
    record = write_shard(
        str(tmp_path),
        "g-000000",
        (pack(Sample(f"{i:09d}", encode(x, "png"), "png", None, {})) for i, x in enumerate(grey)),
        dict,
    )
    write_index(str(tmp_path), [record], size=(3, 5), channels=1, classes=None, source={}, settings={}, counts={})
    batch = read_all(ShardSet.open(str(tmp_path)))
    assert batch.images.shape == (4, 1, 3, 5)
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert batch.labels.tolist() == [-1] * 4


def test_shards_may_lie_behind_a_url() -> None:
    shards = write_set("memory://remote/set")
    try:
        batch = next(rank_batches(shards))
        assert torch.equal(numbers(batch.images), batch.labels)
    finally:
        fsspec.filesystem("memory").rm("/remote", recursive=True)


class Counted:
    """Counts what is asked of the storage, which does the reading."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opens = self.reads = self.bytes = 0
        self._open_read = files.open_read
        monkeypatch.setattr(files, "open_read", self.open_read)

    def open_read(self, url: str, offset: int = 0, length: int | None = None) -> BinaryIO:
        file = self._open_read(url, offset, length)
        if url.endswith(".tar"):
            self.opens += 1
            file = CountedFile(file, self)  # type: ignore[assignment]
        return file


class CountedFile:
    def __init__(self, file: BinaryIO, counted: Counted) -> None:
        self.seek, self.close, self._read, self._counted = file.seek, file.close, file.read, counted

    def read(self, size: int) -> bytes:
        data = self._read(size)
        self._counted.reads += 1
        self._counted.bytes += len(data)
        return data


def test_bytes_are_read_once_an_epoch_and_after_a_resume_less_than_a_window_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_set(str(tmp_path), (30, 50, 0, 1, 39))  # ten steps an epoch
    order = order_of(shards, lanes=4, window=6)
    counted = Counted(monkeypatch)

    def read(start: int, stop: int) -> int:
        """Samples read for these steps."""
        before = counted.reads
        batches = Batches(shards, order, rank=0, world_size=1, first_sample=12 * start, workers=0, flip=False)
        assert len([*islice(batches, stop - start)]) == stop - start
        return counted.reads - before

    assert read(0, 10) == 120
    assert counted.bytes == sum(int(shards.sidecar(i)["length"].sum()) for i in range(5))
    assert counted.opens <= 4 + 3, "each shard once, and once more where a lane begins inside"
    for stop in range(1, 10):
        first_part = read(0, stop)
        assert first_part + read(stop, 10) - 120 <= 4 * (order.window - 1)
        assert read(stop, stop + 1) <= 12 + 4 * (order.window - 1), "the first batch waits for no more than a window"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_bit_is_one_line_that_names_shard_and_row(tmp_path: Path, workers: int) -> None:
    shards = write_set(str(tmp_path))
    row = shards.sidecar(3)[2]
    flip_bit(tmp_path / "set-000003.tar", int(row["offset"]) + int(row["image_offset"]) + 40)
    with pytest.raises(DataError) as refused, rank_batches(shards, workers=workers) as batches:
        [*islice(batches, 4)]
    assert str(refused.value) == (
        f"{tmp_path}/set-000003.tar: the sample in row 2 does not have the crc32 of the sidecar; "
        f"`ddpm verify {tmp_path}` names all such"
    )


def flip_bit(path: Path, offset: int) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_shard_cut_at_any_block_never_ends_in_silence(tmp_path: Path) -> None:
    """Every tar reader ends cleanly on most of these cuts, and samples are gone."""
    shards = write_set(str(tmp_path), (12,))
    tar = tmp_path / "set-000000.tar"
    whole = tar.read_bytes()
    end = int(shards.sidecar(0)[-1]["offset"] + shards.sidecar(0)[-1]["length"])
    for cut in range(0, end, 512):
        tar.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=rf"set-000000\.tar is cut short or changed: {cut} bytes"):
            next(rank_batches(shards))
    tar.write_bytes(whole)
    assert next(rank_batches(shards)).labels.sort().values.tolist() == list(range(12))


def test_a_zeroed_header_anywhere_never_ends_in_silence(tmp_path: Path) -> None:
    shards = write_set(str(tmp_path), (12,))
    tar = tmp_path / "set-000000.tar"
    whole = tar.read_bytes()
    for row in range(12):
        offset = int(shards.sidecar(0)[row]["offset"])
        tar.write_bytes(whole[:offset] + bytes(512) + whole[offset + 512 :])
        with pytest.raises(DataError, match=rf"the sample in row {row} does not have the crc32"):
            next(rank_batches(shards))


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_are_none_or_of_another_size_are_refused(tmp_path: Path, workers: int) -> None:
    broken = write_set(str(tmp_path / "broken"), (12,), {7: b"no image"})
    with pytest.raises(DataError, match=r"set-000000\.tar: the sample in row 7 is no image"):
        next(rank_batches(broken, workers=workers))
    large = write_set(str(tmp_path / "large"), (12,), {7: encode(np.zeros((9, 6, 3), dtype=np.uint8), "png")})
    with pytest.raises(DataError, match=r"row 7 is \(9, 6, 3\), the index says \(4, 6, 3\)"):
        next(rank_batches(large, workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("suffix", ["tar", "npy"])
def test_a_file_that_vanished_is_named(tmp_path: Path, suffix: str, workers: int) -> None:
    shards = write_set(str(tmp_path))
    (tmp_path / f"set-000004.{suffix}").unlink()
    with (
        pytest.raises(DataError, match=rf"set-000004\.{suffix}") as refused,
        rank_batches(shards, workers=workers) as b,
    ):
        [*islice(b, 4)]
    assert "\n" not in str(refused.value)


def test_closed_batches_give_no_more_and_close_twice(shards: ShardSet) -> None:
    batches = rank_batches(shards, workers=1)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_shards_of_a_store_are_opened_before_their_samples_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each lane's next shard when the one before has begun, and at the start the first shards of all lanes together."""
    shards = write_set("memory://opened/early", (40,) * 6)
    order = order_of(shards, global_batch=4, lanes=2, window=1)
    calls: list[tuple[str, int]] = []
    sidecar, read = ShardSet.sidecar, ShardReader.read
    monkeypatch.setattr(ShardSet, "sidecar", lambda self, i: calls.append(("open", i)) or sidecar(self, i))
    monkeypatch.setattr(
        ShardReader, "read", lambda self, place: calls.append(("read", place.shard)) or read(self, place)
    )
    with Batches(shards, order, rank=0, world_size=1, first_sample=0, workers=0, flip=False) as batches:
        drawn = [next(batches) for _ in range(60)]
    assert {kind for kind, _ in calls[:2]} == {"open"} and len({shard for _, shard in calls[:2]}) == 2
    first_opened = {shard: calls.index(("open", shard)) for shard in range(6)}
    for shard, at in first_opened.items():
        first_read = calls.index(("read", shard))
        assert at < first_read and (at < 2 or sum(kind == "read" for kind, _ in calls[at:first_read]) >= 16)
    assert sorted(torch.cat([batch.labels for batch in drawn]).tolist()) == list(range(240))


@pytest.mark.parametrize("gone", ["tar", "npy"])
def test_a_shard_that_is_gone_is_an_error_of_the_sample_that_needs_it(gone: str) -> None:
    shards = write_set(f"memory://gone/{gone}", (40, 40))
    order = order_of(shards, global_batch=1, lanes=1, window=1)
    last = order.lane_stream(0, 0)
    second = [next(last).place.shard for _ in range(80)][-1]
    files.remove(f"{shards.url}/set-{second:06d}.{gone}")
    with Batches(shards, order, rank=0, world_size=1, first_sample=0, workers=0, flip=False) as batches:
        for _ in range(40):
            next(batches)
        with pytest.raises(DataError, match=f"set-{second:06d}.{gone} is missing"):
            next(batches)
