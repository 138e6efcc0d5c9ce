"""Sample sets: which seeds are there, in which shard, drawn how; and when the set is complete."""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pipeline.data.shards import verify as integrity
from pipeline.data.shards.sample_set import Format, SampleSet, index_is_incomplete, provenance, stem, verify
from pipeline.data.shards.seeds import count_within, merged, parse_seeds, ranges_text, seeds_text, without
from pipeline.data.shards.shard_set import ShardSet
from pipeline.errors import ConfigError, DataError
from pipeline.storage import files

PROVENANCE = {"checkpoint_sha256": "ab" * 32, "sampler": "ddim", "steps": 50, "size": [4, 6], "format": "tar"}


def image(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (4, 6, 3), np.uint8)


def sample_set(url: str, size: int = 4, format: Format = "tar", **provenance: Any) -> SampleSet:
    return SampleSet(url, format, size, PROVENANCE | {"format": format, **provenance}, {"torch": "x"})


def draw(target: SampleSet, text: str, only: Iterable[int] | None = None, classes: int = 0) -> int:
    """Draw what is missing, as the job does; how many images that took."""
    count = 0
    for i in target.numbers(parse_seeds(text)):
        asked = target.seeds_in(i, parse_seeds(text))
        if only is not None and i not in only:
            continue
        there = target.committed(i)
        if not there.issuperset(asked):
            seeds = sorted(there.union(asked))
            labels = {seed: seed % classes for seed in seeds} if classes else {}
            target.write(i, ((seed, image(seed)) for seed in seeds), labels)
            count += len(seeds)
    return count


def finish(target: SampleSet, text: str, classes: int = 0) -> bool:
    names = [f"class {i}" for i in range(classes)] or None
    return target.finish(parse_seeds(text), size=(4, 6), channels=3, classes=names)


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "samples") if request.param == "local" else f"memory://{uuid.uuid4().hex}/samples"


# --- seeds ---


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("7", [(7, 8)]),
        ("0-3", [(0, 4)]),
        ("5,1,3", [(1, 2), (3, 4), (5, 6)]),
        ("0-4,3-9", [(0, 10)]),
        ("0-4,5-9", [(0, 10)]),
        ("0-9,2-3", [(0, 10)]),
        ("1,1,1", [(1, 2)]),
        (" 3 , 0-1 ", [(0, 2), (3, 4)]),
        (f"{2**62 - 1}", [(2**62 - 1, 2**62)]),
    ],
)
def test_seeds_are_ranges_inclusive_numbers_and_lists(text: str, ranges: list[tuple[int, int]]) -> None:
    assert parse_seeds(text) == tuple(range(*pair) for pair in ranges)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "1,,2", "1-2-3", "1.5", "0x1", "1 2", "1:3", "²"])
def test_what_is_no_list_of_seeds_is_shown_how(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_seeds(text)
    assert str(caught.value) == f"--seeds {text}: write A-B (inclusive), A, or a comma list such as 0-99,500"


def test_seeds_beyond_the_noise_or_all_measure_are_refused() -> None:
    with pytest.raises(ConfigError, match="more than 100,000,000 in one command: give fewer"):
        parse_seeds("5,7-100000007")
    with pytest.raises(ConfigError, match=r"seeds go up to 2\^62"):
        parse_seeds(f"0-{2**62}")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 60) | st.integers(2**61, 2**61 + 9), min_size=1))
def test_text_and_seeds_are_inverse(seeds: set[int]) -> None:
    parsed = parse_seeds(seeds_text(sorted(seeds)))
    assert [seed for part in parsed for seed in part] == sorted(seeds)
    assert all(a.stop < b.start for a, b in pairwise(parsed))  # merged
    assert seeds_text([seed for part in parsed for seed in part]) == seeds_text(sorted(seeds))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 12)), min_size=1, max_size=6), st.integers(1, 9))
def test_every_seed_is_asked_for_once_in_the_shard_of_its_number(pairs: list[tuple[int, int]], size: int) -> None:
    text = ",".join(f"{first}-{first + more}" for first, more in pairs)
    wanted = {seed for first, more in pairs for seed in range(first, first + more + 1)}
    target, ranges = sample_set("x", size), parse_seeds(text)
    shards = [(i, target.seeds_in(i, ranges)) for i in target.numbers(ranges)]
    assert [seed for _, seeds in shards for seed in seeds] == sorted(wanted)
    assert all(seeds and {seed // size for seed in seeds} == {i} for i, seeds in shards)
    assert [i for i, _ in shards] == sorted({seed // size for seed in wanted})


_RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)), max_size=6).map(
    lambda pairs: merged(range(first, first + count) for first, count in pairs)
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(_RANGES, _RANGES)
def test_what_is_left_of_ranges_is_what_is_left_of_their_seeds(
    asked: tuple[range, ...], taken: tuple[range, ...]
) -> None:
    left = without(asked, taken)
    assert {seed for part in left for seed in part} == {seed for part in asked for seed in part} - {
        seed for part in taken for seed in part
    }
    assert all(left) and all(a.stop <= b.start for a, b in pairwise(left))
    assert count_within(left, 5, 30) == sum(5 <= seed < 30 for part in left for seed in part)


# --- a set on its way ---


def test_a_complete_set_is_a_shard_set(url: str) -> None:
    target = sample_set(url)
    assert draw(target, "0-9") == 10
    assert finish(target, "0-9")
    shards = ShardSet.open(url)
    assert (shards.samples, shards.size, shards.channels, shards.classes) == (10, (4, 6), 3, None)
    assert tuple(shards.shard_samples) == (4, 4, 2)
    assert shards.settings == target.provenance
    assert integrity.verify(url) == []


def test_plain_webdataset_reads_images_seeds_and_labels(tmp_path: Path) -> None:
    target = sample_set(str(tmp_path))
    draw(target, "2-5", classes=3)
    assert finish(target, "2-5", classes=3)
    assert ShardSet.open(target.url).classes == ("class 0", "class 1", "class 2")
    tars = sorted(str(path) for path in tmp_path.glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{seed:09d}" for seed in range(2, 6)]
    for seed, sample in zip(range(2, 6), samples):
        assert sample["json"] == {"seed": seed, "label": seed % 3}
        assert sample["cls"] == seed % 3
        assert np.array_equal(sample["png"], image(seed))


def test_a_record_says_which_seeds_and_how(url: str) -> None:
    target = sample_set(url, size=100)
    draw(target, "3-5,9")
    record = files.read_json(files.join(url, "shard_000000.json"))
    assert (record["seeds"], record["count"]) == ("3-5,9", 4)
    assert (record["provenance"], record["environment"]) == (target.provenance, target.environment)
    assert (record["bytes"], record["samples"]) == (files.size(files.join(url, "shard_000000.tar")), 4)


def test_what_is_there_is_not_drawn_again(url: str) -> None:
    target = sample_set(url)
    assert draw(target, "0-9", only=[1]) == 4
    assert not finish(target, "0-9") and not files.exists(files.join(url, "index.json"))
    assert draw(target, "0-9") == 6
    assert finish(target, "0-9")
    assert draw(target, "0-9") == 0


def test_extending_a_set_rewrites_only_the_partial_shard(url: str) -> None:
    target = sample_set(url)
    draw(target, "0-5")
    finish(target, "0-5")
    before = files.read_bytes(files.join(url, "shard_000000.tar"))
    assert draw(target, "0-9") == 6  # shard 1 again, with all four, and shard 2
    assert finish(target, "0-9")
    assert files.read_bytes(files.join(url, "shard_000000.tar")) == before
    assert ShardSet.open(url).samples == 10
    assert integrity.verify(url) == []


def test_asking_for_fewer_takes_nothing_away(url: str) -> None:
    target = sample_set(url)
    draw(target, "0-9")
    finish(target, "0-9")
    assert draw(target, "2-3") == 0
    assert finish(target, "2-3")
    assert ShardSet.open(url).samples == 10


@pytest.mark.parametrize("format", ["tar", "png", "npz"])
def test_any_order_and_number_of_processes_give_the_same_bytes(format: Format, tmp_path: Path) -> None:
    one, many = sample_set(str(tmp_path / "one"), format=format), sample_set(str(tmp_path / "many"), format=format)
    draw(one, "0-9")
    finish(one, "0-9")
    for i in (2, 0, 2, 1):
        draw(replace(many, environment={"torch": "x"}), "0-9", only=[i])
        finish(many, "0-9")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "many").iterdir()} == expected


def test_a_shard_without_its_record_or_cut_short_is_drawn_again(url: str) -> None:
    target = sample_set(url)
    draw(target, "0-9")
    files.remove(files.join(url, f"{stem(0)}.json"))  # killed before the commit
    tar = files.join(url, f"{stem(1)}.tar")
    files.write_bytes(tar, files.read_bytes(tar)[:-512])
    assert (target.committed(0), target.committed(1), target.committed(2)) == (set(), set(), {8, 9})
    assert not finish(target, "0-9")
    assert draw(target, "0-9") == 8
    assert finish(target, "0-9") and integrity.verify(url) == []


@pytest.mark.parametrize("format", ["tar", "png", "npz"])
def test_a_failure_in_the_middle_commits_nothing(url: str, format: Format) -> None:
    def failing() -> Iterable[tuple[int, NDArray[np.uint8]]]:
        yield 0, image(0)
        raise DataError("no space left")

    target = sample_set(url, format=format)
    with pytest.raises(DataError):
        target.write(0, failing(), {})
    assert target.committed(0) == set()
    if format == "png":  # what is there is known to be ours, and how it was drawn
        assert files.read_json(files.join(url, "shard_000000.json"))["seeds"] == ""
        with pytest.raises(ConfigError, match="drawn differently"):
            sample_set(url, format=format, steps=20).check()
    else:
        assert not [name for name in files.listdir(url) if name.endswith((".tar", ".json", ".npz"))]
    target.check()
    assert draw(target, "0-3") == 4 and finish(target, "0-3")


@pytest.mark.parametrize("format", ["tar", "png", "npz"])
def test_samples_stay_while_their_shard_is_extended(url: str, format: Format) -> None:
    def failing() -> Iterable[tuple[int, NDArray[np.uint8]]]:
        yield from ((seed, image(seed)) for seed in range(2))
        raise DataError("no space left")

    target = sample_set(url, format=format)
    draw(target, "0-1")
    with pytest.raises(DataError):
        target.write(0, failing(), {})
    assert target.committed(0) == {0, 1} and finish(target, "0-1")


@pytest.mark.parametrize("format", ["tar", "png", "npz"])
def test_an_unfinished_set_says_which_seeds_are_missing(url: str, format: Format) -> None:
    target = replace(sample_set(url, format=format), asked=parse_seeds("2-29,40"))
    draw(target, "2-29,40", only=[0, 3, 4, 10])
    line = "are missing (18 in all): the same `ddpm sample` command draws them"
    assert index_is_incomplete(url) == (format == "tar") and verify(url) == [f"seeds 4-11,20-29 {line}"]
    damaged = files.join(url, {"tar": "shard_000003.tar", "png": "000000013.png", "npz": "shard_000003.npz"}[format])
    whole = files.read_bytes(damaged)
    files.write_bytes(damaged, whole[:-1] + b"x")
    assert verify(url) == [
        f"{damaged.rpartition('/')[2]}: does not have the sha256 of shard_000003.json", f"seeds 4-11,20-29 {line}"
    ]  # fmt: skip
    files.write_bytes(damaged, whole)
    draw(target, "2-29,40")
    assert format != "tar" or verify(url) == [
        "index.json: missing, the set is not finished: the same `ddpm sample` command finishes it"
    ]
    assert finish(target, "2-29,40") and not index_is_incomplete(url) and verify(url) == []
    more = replace(target, asked=parse_seeds("0-49"))  # another command extends it; the index is that of the first
    draw(more, "0-49", only=[12])
    assert index_is_incomplete(url) == (format == "tar")
    assert verify(url) == [f"seeds 0-1,30-39,41-47 {line.replace('18', '19')}"]


def test_a_long_list_of_seeds_is_not_repeated_in_each_record(url: str) -> None:
    asked = parse_seeds(",".join(map(str, range(0, 10_000, 2))))
    draw(replace(sample_set(url), asked=asked), "0-9", only=[0])
    record = files.read_json(files.join(url, "shard_000000.json"))
    assert "asked" not in record and ranges_text(asked).startswith("0,2,4,")
    assert verify(url) == ["index.json: missing, the set is not finished: the same `ddpm sample` command finishes it"]


@pytest.mark.parametrize("format", ["tar", "png", "npz"])
def test_images_are_read_back_as_they_were_drawn(url: str, format: Format) -> None:
    target = sample_set(url, format=format)
    draw(target, "1-2,5-9")
    found = target.read(range(7), 3)
    assert sorted(found) == [1, 2, 5, 6]
    assert all((found[seed] == image(seed)).all() for seed in found)


@pytest.mark.parametrize("format", ["png", "npz"])
def test_loose_files_are_checked_by_size_on_a_resume_and_by_hash_when_verified(url: str, format: Format) -> None:
    target = sample_set(url, format=format)
    draw(target, "0-9")
    assert verify(url) == []
    name = "000000005.png" if format == "png" else "shard_000001.npz"
    place = files.join(url, name)
    whole = files.read_bytes(place)
    files.write_bytes(place, whole[:-1] + b"x")
    assert verify(url) == [f"{name}: does not have the sha256 of shard_000001.json"]
    for damage in (lambda: files.write_bytes(place, whole[:-1]), lambda: files.remove(place)):
        damage()
        assert (target.committed(1), finish(target, "0-9")) == (set(), False)
        assert len(verify(url)) == 1
        assert draw(target, "0-9") == 4 and verify(url) == []
    files.write_bytes(files.join(url, f"000000777.{format}"), whole)
    (finding,) = verify(url)
    assert finding.startswith(f"000000777.{format}: in no record")


def test_of_two_jobs_that_draw_in_other_ways_the_second_to_commit_is_refused(url: str) -> None:
    """Both look at an empty place; the record of the first is there when the second wants to write its own."""
    for format in ("tar", "png", "npz"):
        place = files.join(url, format)
        first, second = sample_set(place, format=format), sample_set(place, format=format, checkpoint_sha256="cd" * 32)
        first.check()
        second.check()
        draw(first, "0-3")
        before = {name: files.read_bytes(files.join(place, name)) for name in files.listdir(place)}
        for i in (0, 1):
            with pytest.raises(ConfigError, match="drawn differently"):
                second.write(i, [(4 * i, image(4 * i))], {})
        assert {name: files.read_bytes(files.join(place, name)) for name in files.listdir(place)} == before


def test_the_size_of_the_shards_is_that_of_the_set_that_is_there(url: str) -> None:
    assert provenance(url) == {}
    draw(sample_set(url, size=4, shard_samples=4), "0-3")
    assert provenance(url)["shard_samples"] == 4


def test_png_is_one_file_a_seed_and_no_other(url: str) -> None:
    target = sample_set(url, format="png")
    draw(target, "0-5")
    assert finish(target, "0-5")
    pngs = [name for name in files.listdir(url) if name.endswith(".png")]
    assert pngs == [f"{seed:09d}.png" for seed in range(6)]
    for seed, name in enumerate(pngs):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(files.read_bytes(files.join(url, name))))), image(seed))
    assert draw(target, "0-5") == 0


def test_npz_holds_seeds_and_images_in_order(url: str) -> None:
    target = sample_set(url, format="npz")
    draw(target, "0-5")
    assert finish(target, "0-5")
    with np.load(io.BytesIO(files.read_bytes(files.join(url, "shard_000001.npz"))), allow_pickle=False) as arrays:
        assert arrays["seeds"].tolist() == [4, 5]
        assert np.array_equal(arrays["images"], np.stack([image(4), image(5)]))
    assert files.read_json(files.join(url, "shard_000001.json"))["seeds"] == "4-5"
    assert draw(target, "0-5") == 0


# --- refused ---


def test_samples_of_another_checkpoint_or_manner_are_refused(url: str) -> None:
    draw(sample_set(url), "0-3")
    other = sample_set(url, checkpoint_sha256="cd" * 32, steps=20)
    with pytest.raises(ConfigError) as caught:
        other.committed(0)
    message = str(caught.value)
    difference = f"checkpoint_sha256: {'ab' * 32} there, {'cd' * 32} now; steps: 50 there, 20 now"
    assert message.startswith(f"{url} holds samples drawn differently ({difference})")
    assert message.endswith("choose another --out")
    with pytest.raises(ConfigError):
        finish(other, "0-3")


def test_another_environment_is_written_down_but_not_refused(url: str) -> None:
    draw(sample_set(url), "0-3")
    assert replace(sample_set(url), environment={"torch": "y"}).committed(0) == {0, 1, 2, 3}


def test_other_seeds_drawn_in_another_manner_are_refused_too(url: str) -> None:
    """Two samples of one set agree in all that decides what a seed looks like."""
    draw(sample_set(url), "0-3")
    other = sample_set(url, checkpoint_sha256="cd" * 32)
    with pytest.raises(ConfigError, match="drawn differently"):
        other.check()
        draw(other, "4-7")
        finish(other, "4-7")


_FOREIGN = ("notes.txt", "photo.png", "train-000000.tar", "checkpoints", "config.yaml", "1.jpg", "000000001.png")


@pytest.mark.parametrize("name", [*_FOREIGN, "7.png", "index.json", "shard_000000.json", "shard_1.png"])
def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError) as caught:
        sample_set(str(tmp_path)).check()
    assert str(caught.value) == f"{tmp_path} exists and holds something else ({name}): choose another --out"


@pytest.mark.parametrize(
    "name", [".nfs0001", ".shard_000000.tar.0123abcd.tmp", "shard_000000.tar", "shard_1000000.npz"]
)
def test_what_a_killed_job_leaves_before_its_first_record_is_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    sample_set(str(tmp_path)).check()


def test_a_set_that_was_begun_and_has_no_record_yet_is_ours_with_the_same_settings(url: str) -> None:
    draw(sample_set(url), "0-5")
    for name in files.listdir(url):
        if name != "set.json":
            files.remove(files.join(url, name))
    sample_set(url).check()
    with pytest.raises(ConfigError, match="holds samples drawn differently"):
        sample_set(url, steps=99).check()


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(ConfigError, match="is a file: give --out a directory"):
        sample_set(str(tmp_path / "x")).check()


@pytest.mark.parametrize("format", ["tar", "png", "npz"])
def test_its_own_files_are_not_strange(url: str, format: Format) -> None:
    target = sample_set(url, format=format)
    target.check()
    draw(target, "0-5")
    target.check()
    finish(target, "0-5")
    target.check()


def test_shards_are_in_the_order_of_their_seeds(tmp_path: Path) -> None:
    target = sample_set(str(tmp_path), size=1)
    draw(target, "999999-1000000")
    finish(target, "999999-1000000")
    assert [record.stem for record in ShardSet.open(str(tmp_path)).shards] == ["shard_999999", "shard_1000000"]
