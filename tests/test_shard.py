"""The sharding job: same bytes however it is run or interrupted; every misuse is one line and an exit code."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.loading.batches import read_all
from pipeline.data.shards.build import ShardSetBuilder
from pipeline.data.shards.image_task import ImageTask, NumberedInput, Outcome
from pipeline.data.shards.shard_set import ShardSet
from pipeline.data.shards.summary import Summary
from pipeline.data.shards.verify import verify
from pipeline.data.sources.listing import list_inputs
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.evaluation import features, result_file
from pipeline.processes.pool import CheckStop
from pipeline.storage import files
from tests import warm
from tests.data.shards.test_build import settings, write, write_images
from tests.evaluation.test_features import npz, resnet_weights
from tests.jobs import shard
from tests.launch import ENVIRONMENT, command, ddpm

DIGITS = str(Path(__file__).parent.parent / "shards" / "digits.zip")
MESSY = Path(__file__).parent.parent.parent / "shared" / "data" / "messy" / "messy.tar"


def hashes(out: Path) -> dict[str, str]:
    """Of tars and sidecars; the records say where the source was."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(out.iterdir())
        if p.suffix in (".tar", ".npy")
    }


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    out = tmp_path_factory.mktemp("one") / "set"
    return out, shard([DIGITS], str(out), size=8, channels=1, shard_samples=200, workers=1, quiet=True)


def finish(out: Path, **options: object) -> Summary:
    return shard(
        [DIGITS], str(out), **{"size": 8, "channels": 1, "shard_samples": 200, "workers": 2, "quiet": True, **options}
    )


def test_the_digits_are_taken_whole(digits: tuple[Path, Summary]) -> None:
    out, summary = digits
    assert (summary.inputs, summary.taken, summary.rejected, summary.shards) == (1797, 1797, {}, 9)
    assert summary.classes == dict(zip("0123456789", [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]))
    assert verify(str(out)) == []
    assert "class 9" in summary.as_text() and json.loads(json.dumps(summary.as_dict()))["shards_made"] == 9


def test_any_number_of_workers_gives_the_same_bytes(digits: tuple[Path, Summary], tmp_path: Path) -> None:
    finish(tmp_path / "set", workers=3)
    assert hashes(tmp_path / "set") == hashes(digits[0])
    assert (tmp_path / "set" / "index.json").read_bytes() == (digits[0] / "index.json").read_bytes()


ARGUMENTS = ("--size", "8", "--channels", "1", "--shard-samples", "200", "--workers", "2")


def start(*arguments: object) -> subprocess.Popen[str]:
    """The job in a session of its own, as a terminal or SLURM starts it."""
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return warm.Popen(command(*arguments), env=ENVIRONMENT, **options)


def start_digits(out: Path) -> subprocess.Popen[str]:
    return start("shard", DIGITS, "--out", out, *ARGUMENTS)


def wait_for_tars(out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_killed_job_continues_to_the_same_bytes(digits: tuple[Path, Summary], tmp_path: Path) -> None:
    out = tmp_path / "set"
    for count in (1, 5):
        job = start_digits(out)
        wait_for_tars(out, count)
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
        with pytest.raises(DataError, match=r"is an unfinished shard set \(no index.json\)"):
            ShardSet.open(str(out))
    assert 0 < finish(out).shards_made < 9
    assert hashes(out) == hashes(digits[0])
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    assert verify(str(out)) == []


def test_a_job_killed_at_any_moment_continues_to_the_same_bytes(tmp_path: Path) -> None:
    """Also with what one shard has to know of those before it."""
    source = images_twice(tmp_path / "in")
    command = ["shard", source, "--out", tmp_path / "set", "--size", "24", "--shard-samples", "25", "--workers", "2"]
    command += ["--dedupe", "near", "--max-bad-fraction", "1", "--quiet"]
    ddpm(*command[:3], tmp_path / "whole" / "set", *command[4:]).check_returncode()
    killed, moments = 0, random.Random(3)
    for tars in (0, 0, 1, 3, 6, 9):
        job = start(*command)
        wait_for_tars(tmp_path / "set", tars)
        time.sleep(moments.uniform(0, 0.05) if tars else moments.uniform(0.2, 0.8))
        os.killpg(job.pid, signal.SIGKILL)
        job.communicate()
        killed += job.returncode == -signal.SIGKILL
    assert killed >= 3
    ddpm(*command).check_returncode()
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "set").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == whole


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_ends_in_75_with_nothing_half_written(
    digits: tuple[Path, Summary], tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "set"
    job = start_digits(out)
    wait_for_tars(out, 2)
    os.killpg(job.pid, number)
    _, errors = job.communicate(timeout=30)
    assert job.returncode == 75
    assert f"stopped by {number.name} with " in errors and "the same command continues from there" in errors
    assert "Traceback" not in errors
    assert not [name for name in os.listdir(out) if name.startswith(".") or name == "index.json"]
    assert 0 < finish(out).shards_made < 9
    assert hashes(out) == hashes(digits[0])


def test_a_second_run_says_that_all_is_there(digits: tuple[Path, Summary], tmp_path: Path) -> None:
    out = tmp_path / "set"
    shutil.copytree(digits[0], out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert finish(out).as_text().startswith(f"{out}: all 9 shards are there, nothing to do")
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_overwriting_gives_the_bytes_of_a_fresh_job(digits: tuple[Path, Summary], tmp_path: Path) -> None:
    finish(tmp_path / "set", size=4, shard_samples=150)
    finish(tmp_path / "set", overwrite=True)
    assert hashes(tmp_path / "set") == hashes(digits[0])


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources with something wrong in them."""
    place = tmp_path_factory.mktemp("bad")
    for name in ("empty", "text"):
        (place / name).mkdir()
    (place / "text" / "a").write_text("a")
    (place / "text" / "b").write_text("b")
    (place / "cut.zip").write_bytes(Path(DIGITS).read_bytes()[:5000])
    write_images(place / "mixed", [f"{i}.png" for i in range(9)])
    (place / "mixed" / "bad.png").write_bytes(b"bad")
    return place


@pytest.mark.parametrize(
    ("source", "options", "kind", "message"),
    [
        ("nowhere", {}, ConfigError, "nowhere: no such file or "),
        ("text/a", {}, ConfigError, "text/a is not of a kind that is read: give a "),
        ("mixed", {"pad": True}, ConfigError, "--pad keeps images whole: give --crop none with it"),
        ("mixed", {"part": "0/2", "dedupe": "near"}, ConfigError, "--dedupe near compares each image with all befo"),
        ("mixed", {"crop": "random", "dedupe": "exact"}, ConfigError, "--dedupe exact compares images as they are c"),
        (
            "mixed",
            {"labels": "no.csv"},
            ConfigError,
            "--labels no.csv: there is no such file: give ",
        ),
        ("mixed", {"features": "no.npz"}, ConfigError, "no.npz cannot be read (No such file or directory): give an"),
        (".", {}, ConfigError, "lies inside the source"),
        ("mixed", {"size": 0}, ConfigError, "--size 0x0: 1 to 16383 pixels a side"),
        ("mixed", {"background": "rainbow"}, ConfigError, "--background rainbow: write a color as in CSS, such as"),
        ("mixed", {"part": "3/3"}, ConfigError, "--part 3/3: write I/N with I from 0 to N - 1, as in 3/16"),
        ("mixed", {"size": 20000}, ConfigError, "--size 20000x20000: 1 to 16383 pixels a side"),
        ("mixed", {"part": "1"}, ConfigError, "--part 1: write I/N"),
        ("mixed", {"part": "0/2", "overwrite": True}, ConfigError, "--overwrite: with --part each job would delete"),
        ("mixed", {"channels": 2}, ConfigError, "--channels 2: 3 for color or 1 for grey"),
        ("empty", {}, DataError, "empty: not a single file in it: give a "),
        ("cut.zip", {}, DataError, "cut.zip cannot be read as a zip archive"),
        ("text", {}, DataError, "not one of 2 inputs is a readable image (2 not_an_image): {out}/rejected.jsonl nam"),
        ("mixed", {}, DataError, "1 of 10 inputs were rejected (1 not_an_image), more than --max-bad-fraction 0.05"),
    ],
)
def test_misuse_is_one_line(
    bad: Path, source: str, options: dict[str, object], kind: type[PipelineError], message: str
) -> None:
    out = bad / "out"
    with pytest.raises(kind) as refused:
        shard([str(bad / source)], str(out), **{"size": 8, "workers": 1, "quiet": True, **options})
    assert message.format(out=out) in str(refused.value) and "\n" not in str(refused.value)
    assert (out / "index.json").exists() == ("max-bad" in message)
    files.remove(str(out))


def test_the_exit_code_tells_and_the_line_is_the_only_one(bad: Path, tmp_path: Path) -> None:
    for source, code in [("nowhere", 2), ("mixed", 3)]:
        done = ddpm("shard", bad / source, "--out", tmp_path / "out", "--size", "8", "--quiet", "--workers", "1")
        assert done.returncode == code
        assert done.stderr.startswith("ddpm: ") and done.stderr.count("\n") == 1


def test_archives_in_a_directory_are_named_with_the_way_to_give_them(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"; a.tar.gz holds images itself: .* as in 'DIRECTORY/\*.tar.gz'$"):
        shard([str(tmp_path / "in")], str(tmp_path / "set"), size=8, workers=1, quiet=True)


def test_the_bad_fraction_is_judged_again_without_work(bad: Path, tmp_path: Path) -> None:
    def again(**options: float) -> Summary:
        return shard([str(bad / "mixed")], str(tmp_path / "set"), size=8, workers=1, quiet=True, **options)

    for _ in range(2):
        with pytest.raises(DataError, match="1 of 10 inputs were rejected"):
            again()
    summary = again(max_bad_fraction=0.1)
    assert summary.shards_made == 0 and summary.rejected == {"not_an_image": 1}
    assert verify(str(tmp_path / "set")) == []


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_parts_in_any_order_give_the_bytes_of_one_job(digits: tuple[Path, Summary], tmp_path: Path, parts: int) -> None:
    order, out = [*range(1, parts - 1), 0, parts - 1], tmp_path / "set"
    summaries = [finish(out, part=f"{i}/{parts}") for i in order]
    assert sum(summary.shards_made for summary in summaries) == 9
    assert [summary.shards_there for summary in summaries][-1] == 9
    assert " of 9 shards made in " in summaries[0].as_text()
    for summary in summaries[:-1]:
        assert summary.shards_there < 9 and "the job that makes the last one finishes the set" in summary.as_text()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in digits[0].iterdir()}


def test_a_part_that_ends_early_leaves_no_index(tmp_path: Path) -> None:
    assert finish(tmp_path / "set", part="0/3").shards_there == 3
    assert not (tmp_path / "set" / "index.json").exists()
    assert finish(tmp_path / "set").shards_made == 6  # without --part: what is left
    assert verify(str(tmp_path / "set")) == []


def test_two_jobs_on_one_set_are_harmless(digits: tuple[Path, Summary], tmp_path: Path) -> None:
    jobs = [start_digits(tmp_path / "set") for _ in range(2)]
    for job in jobs:
        _, errors = job.communicate(timeout=120)
        assert job.returncode == 0, errors
    made = {p.name: p.read_bytes() for p in (tmp_path / "set").iterdir()}
    assert made == {p.name: p.read_bytes() for p in digits[0].iterdir()}


def test_of_two_jobs_with_other_settings_the_second_to_commit_is_refused(
    digits: tuple[Path, Summary], tmp_path: Path
) -> None:
    """Both look at an empty place; the record of the first is there when the second wants to write its own."""
    out = tmp_path / "set"
    listing = list_inputs([DIGITS])
    first, second = (
        ShardSetBuilder(str(out), settings(channels=1, shard_samples=200, format=kind), [DIGITS], listing)
        for kind in ("png", "webp")
    )
    write(first, first.tasks[:1], listing, channels=1, shard_samples=200)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for task in second.tasks[:2]:
        with pytest.raises(ConfigError, match=r"set was made from other sources or settings .format was png, now webp"):
            write(second, [task], listing, channels=1, shard_samples=200, format="webp")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert finish(out).shards_made == 8
    assert hashes(out) == hashes(digits[0])


def test_a_record_of_another_set_is_never_indexed(tmp_path: Path) -> None:
    """Two jobs that commit in the same instant: the mixture is noticed before there is an index."""
    out, listing = tmp_path / "set", list_inputs([DIGITS])
    images = ShardSetBuilder(str(out), settings(channels=1, shard_samples=200), [DIGITS], listing)
    other = ShardSetBuilder(str(tmp_path / "x" / "set"), settings(shard_samples=200), [DIGITS], listing)
    write(images, images.tasks[:1], listing, channels=1, shard_samples=200)
    write(other, other.tasks[1:2], listing, shard_samples=200)
    for path in (tmp_path / "x" / "set").iterdir():
        path.rename(out / path.name)
    with pytest.raises(ConfigError, match=r"set was made from other sources or settings .channels was 3, now 1"):
        images.refresh()


def test_a_directory_without_an_image_is_an_empty_class_with_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "in", ["a/1.png", "b/2.png"])
    (tmp_path / "in" / "notes").mkdir()
    (tmp_path / "in" / "notes" / "read.me").write_text("text")
    summary = shard([str(tmp_path / "in")], str(tmp_path / "set"), size=8, workers=1, max_bad_fraction=1, quiet=True)
    assert summary.classes == {"a": 1, "b": 1, "notes": 0}
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: 1 of 3 classes have no image: notes;")


CLASS_LINES = {
    "directories": (
        ["cat/1.png", "dog/2.png", "3.png"],
        {},
        "2 classes: 0 cat (1), 1 dog (1); without a class: 1; from directories",
    ),
    "none wanted": (["cat/1.png"], {"labels": "none"}, "no classes: --labels none"),
    "flat": (["1.png"], {}, "no classes: the images lie in no directory, and nothing else says their classes"),
    "many": (
        [f"c{i:02d}/1.png" for i in range(30)],
        {},
        f"30 classes: {', '.join(f'{i} c{i:02d} (1)' for i in range(10))} and 20 more; from directories",
    ),
}


@pytest.mark.parametrize("kind", CLASS_LINES)
def test_the_last_line_says_the_classes_or_why_there_are_none(tmp_path: Path, kind: str) -> None:
    names, options, line = CLASS_LINES[kind]
    write_images(tmp_path / "in", names)
    summary = shard([str(tmp_path / "in")], str(tmp_path / "set"), size=8, workers=1, quiet=True, **options)
    *_, classes, command = summary.as_text().splitlines()
    assert classes == line
    count = len(summary.classes or {})
    assert command.startswith("next: ddpm train --config configs/demo.yaml ")
    assert command.endswith(f" data.size=8 data.channels=3 model.num_classes={count} run.dir=runs/set")


def test_files_of_labels_end_as_lines_that_do_not_count_as_bad(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["0.png", "1.png"])
    (tmp_path / "in" / "metadata.csv").write_text("file_name,label\n0.png,cat\n1.png,dog\n9.png,dog\n")
    summary = shard([str(tmp_path / "in")], str(tmp_path / "set"), size=8, workers=1, quiet=True)
    assert summary.rejected == {"label_file": 1} and summary.classes == {"cat": 1, "dog": 1}
    assert summary.as_text().splitlines()[-2].endswith("from metadata.csv")


def test_a_set_begun_with_another_order_of_its_classes_continues_and_other_classes_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "in", [f"{i}/1.png" for i in range(11)])
    listing = list_inputs(
        [str(tmp_path / "in")], existing_classes=sorted(map(str, range(11)))
    )  # as version 0.1 had them
    images = ShardSetBuilder(str(tmp_path / "set"), settings(), [str(tmp_path / "in")], listing)
    write(images, images.tasks[:1], listing)
    made = {"size": 8, "shard_samples": 4, "workers": 1, "quiet": True}
    assert shard([str(tmp_path / "in")], str(tmp_path / "set"), **made).shards_made == 2
    assert ShardSet.open(str(tmp_path / "set")).classes == ("0", "1", "10", *"23456789")
    (tmp_path / "in" / "metadata.csv").write_text("file_name,label\n0/1.png,cat\n")
    with pytest.raises(ConfigError, match=r"classes were 0, 1, 10, 2, 3, .*, now cat; the source had 11 files"):
        shard([str(tmp_path / "in")], str(tmp_path / "set"), **made)


def test_a_stop_asked_for_while_the_sources_are_listed_ends_in_75(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["1.png", "2.png"])
    (tmp_path / "stop").touch()
    arguments = ("shard", tmp_path / "in", "--out", tmp_path / "set", "--size", "8")
    done = ddpm(*arguments, DDPM_STOP_FILE=str(tmp_path / "stop"))
    assert done.returncode == 75
    assert "stopped by the stop file before the first shard" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "set").exists()


def images_twice(directory: Path) -> Path:
    """150 images, then 50 of them again, as bytes, as other files of the same pixels, and compressed with losses."""
    directory.mkdir(parents=True)
    for i in range(150):
        coarse = Image.fromarray(np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8))
        image = coarse.resize((60, 60), Image.Resampling.BICUBIC)
        image.save(directory / f"a{i:03}.png")
        if i % 3 == 0:
            shutil.copy(directory / f"a{i:03}.png", directory / f"b{i:03}.png")
            image.save(directory / f"c{i:03}.bmp")
            image.save(directory / f"d{i:03}.jpg", quality=80)
    return directory


@pytest.mark.parametrize(("dedupe", "dropped"), [("exact", 100), ("near", 150), ("none", 0)])
def test_repetitions_are_rejected_and_name_what_was_kept(tmp_path: Path, dedupe: str, dropped: int) -> None:
    source, out = images_twice(tmp_path / "in"), tmp_path / "set"
    summary = shard(
        [str(source)], str(out), size=24, shard_samples=40, workers=2, dedupe=dedupe, max_bad_fraction=1, quiet=True
    )
    assert (summary.inputs, summary.taken) == (300, 300 - dropped)
    assert summary.rejected == ({"duplicate": dropped} if dropped else {})
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["detail"] == f"of {int(line['source'][1:4]):09d}"  # its position among the sorted names
    assert Counter(line["source"][0] for line in lines) == dict.fromkeys("bcd"[: dropped // 50], 50)
    assert verify(str(out)) == []


def test_a_shard_made_again_finds_the_same_repetitions(tmp_path: Path) -> None:
    source, out = images_twice(tmp_path / "in"), tmp_path / "set"
    options = {"size": 24, "shard_samples": 40, "workers": 2, "dedupe": "near", "max_bad_fraction": 1, "quiet": True}
    shard([str(source)], str(out), **options)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in ("set-000000.tar", "set-000005.json"):
        (out / name).unlink()
        assert shard([str(source)], str(out), **options).shards_made == 1
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_padded_images_are_whole_and_never_enlarged(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["large.png"], side=(40, 20))
    write_images(tmp_path / "in", ["small.png"], side=(4, 6))
    out = tmp_path / "set"
    shard([str(tmp_path / "in")], str(out), size=(10, 16), crop="none", pad=True, background="#102030", quiet=True)
    large, small = read_all(ShardSet.open(str(out))).images.permute(0, 2, 3, 1).numpy()
    empty = (large == (16, 32, 48)).all(axis=-1)
    assert not empty[:, 5:10].any() and empty[:, :5].all() and empty[:, 11:].all()
    np.testing.assert_array_equal(small[3:7, 5:11], np.asarray(Image.open(tmp_path / "in" / "small.png")))


def test_labels_from_a_file_and_images_that_it_does_not_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "in", [f"{i}.png" for i in range(4)])
    (tmp_path / "labels.csv").write_text("id,label\n0,frog\n1,cat\n3,frog\n7,dog\n")
    options = {"size": 8, "labels": str(tmp_path / "labels.csv"), "max_bad_fraction": 1, "quiet": True}
    summary = shard([str(tmp_path / "in")], str(tmp_path / "set"), **options)
    assert summary.rejected == {"no_label": 1}
    assert summary.classes is not None and {name: n for name, n in summary.classes.items() if n} == {
        "cat": 1,
        "frog": 2,
    }
    assert "1 rows of " in capfd.readouterr().err
    (tmp_path / "labels.csv").write_text("id,label\n0,frog\n1,dog\n3,frog\n7,dog\n")
    with pytest.raises(ConfigError, match=r"\(classes were cat, dog, frog, now dog, frog\): choose another --out"):
        shard([str(tmp_path / "in")], str(tmp_path / "set"), **options)


def test_the_table_ends_with_sizes_and_classes(tmp_path: Path) -> None:
    for side, names in ((9, ["a/1", "a/2", "b/3"]), (70, ["a/4"])):
        write_images(tmp_path / "in", names, side=(side, 100))
    summary = shard([str(tmp_path / "in")], str(tmp_path / "set"), size=16, quiet=True)
    assert summary.sizes == {"8": 3, "64": 1}
    lines = [line.split() for line in summary.as_text().splitlines()]
    assert ["short", "side", "8", "to", "15", "px", "3", "#" * 40] in lines
    assert ["short", "side", "64", "to", "127", "px", "1", "#" * 14] in lines
    assert ["class", "1", "b", "1", "#" * 14] in lines and ["made", "smaller", "1"] in lines
    assert (Path(__file__).parents[1] / shlex.split(summary.next)[3]).exists()


def test_a_preview_shows_images_of_all_classes(digits: tuple[Path, Summary], tmp_path: Path) -> None:
    shutil.copytree(digits[0], tmp_path / "set")
    finish(tmp_path / "set", preview=str(tmp_path / "sheet.png"))
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (102, 102)  # ten times ten images of 8 px with gaps of 2
    expected = read_all(ShardSet.open(str(digits[0])), 100).images.numpy()
    np.testing.assert_array_equal(sheet[12:20, 2:10], expected[10, 0])


def test_features_lie_beside_the_index_and_are_computed_once(tmp_path: Path) -> None:
    write_images(tmp_path / "in", [f"{i}.png" for i in range(30)])
    network = npz(tmp_path / "resnet.npz", resnet_weights())
    options = {"size": 16, "shard_samples": 20, "features": str(network), "quiet": True}
    shard([str(tmp_path / "in")], str(tmp_path / "set"), **options)
    places = sorted((tmp_path / "set").glob("features-*/set-00000?-*.safetensors"))
    found = np.concatenate([result_file.parse(str(place))[1]["features"] for place in places])
    shards, extractor = ShardSet.open(str(tmp_path / "set")), features.load(str(network), torch.device("cpu"), (16, 16))
    np.testing.assert_allclose(found, extractor(read_all(shards).images).features.numpy(), atol=1e-5)
    assert len(places) == 2 and verify(str(tmp_path / "set")) == []
    before = [place.stat().st_mtime_ns for place in places]
    shard([str(tmp_path / "in")], str(tmp_path / "set"), **options)
    assert [place.stat().st_mtime_ns for place in places] == before
    shard([str(tmp_path / "in")], str(tmp_path / "set"), size=24, overwrite=True, quiet=True)
    assert not list((tmp_path / "set").glob("features-*"))


def test_the_job_starts_without_torch() -> None:
    code = "import sys, pipeline.cli, pipeline.shard; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def deadly(image_task: ImageTask, items: Sequence[NumberedInput], check_stop: CheckStop) -> Iterator[Outcome]:
    """What a decoder does that crashes at some images and never ends at others."""
    for item in items:
        if "crash" in item.input.name:
            os.abort()
        while "hang" in item.input.name:
            pass
        yield from image_task.make([item])


DEADLY = """
import functools, sys
from pipeline import shard
from pipeline.processes import pool
from tests import jobs
from tests.test_shard import deadly
shard.ImageTask.make = deadly
shard.pool.run = functools.partial(pool.run, cpu_limit_s=1)
print(jobs.shard(sys.argv[1:2], sys.argv[2], size=8, workers=2, shard_samples=10, max_bad_fraction=1).rejected)
"""


def test_a_decoder_that_dies_costs_one_file(tmp_path: Path) -> None:
    names = [f"{i:02}.png" for i in range(25)]
    write_images(tmp_path / "in", names)
    shard([str(tmp_path / "in")], str(tmp_path / "whole" / "set"), size=8, shard_samples=10, quiet=True)
    (tmp_path / "in" / "03.png").rename(tmp_path / "in" / "03crash.png")
    (tmp_path / "in" / "17.png").rename(tmp_path / "in" / "17hang.png")
    command = [sys.executable, "-c", DEADLY, str(tmp_path / "in"), str(tmp_path / "set")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'decoder_crashed': 1, 'decoder_hung': 1}"
    lines = [json.loads(line) for line in (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()]
    assert [(line["source"], line["reason"], line["detail"]) for line in lines] == [
        ("03crash.png", "decoder_crashed", "SIGABRT"), ("17hang.png", "decoder_hung", ""),
    ]  # fmt: skip
    assert verify(str(tmp_path / "set")) == []
    left = read_all(ShardSet.open(str(tmp_path / "set"))).images.numpy()
    whole = read_all(ShardSet.open(str(tmp_path / "whole" / "set"))).images.numpy()
    np.testing.assert_array_equal(left, np.delete(whole, (3, 17), axis=0))


FULL_DISK = """
import os, subprocess, sys
from pipeline.errors import DataError
from tests.test_shard import Path, finish
out = Path(sys.argv[1], "set")
try:
    finish(out)
except DataError as error:
    print(error)
print([name for name in os.listdir(out) if name[0] == "."])
subprocess.run(["mount", "-o", "remount,size=50m", sys.argv[1]], check=True)
print(finish(out).shards_made)
"""


def test_a_full_disk_is_one_line_and_the_job_continues_when_there_is_room(tmp_path: Path) -> None:
    unshare = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    mount = f'mount -t tmpfs -o size=2m tmpfs "{tmp_path}"'
    if not shutil.which("unshare") or subprocess.run([*unshare, "sh", "-c", mount], check=False).returncode:
        pytest.skip("no right to mount a small file system here")
    job = ["sh", "-c", f'{mount} && exec "$0" -c "$1" "$2"', sys.executable, FULL_DISK, str(tmp_path)]
    done = subprocess.run([*unshare, *job], check=True, capture_output=True, text=True)
    message, leftovers, made = done.stdout.splitlines()
    assert message.startswith(f"cannot write {tmp_path}/set/set-0000")
    assert "no space left" in message and message.endswith("then run the same command again")
    assert leftovers == "[]"
    assert 0 < int(made) < 9


@pytest.mark.skipif(not MESSY.exists(), reason="the collection of messy images is not on this machine")
def test_messy_files_end_as_samples_or_reasons(tmp_path: Path) -> None:
    summary = shard([str(MESSY)], str(tmp_path / "set"), size=32, workers=2, max_bad_fraction=1, quiet=True)
    assert summary.inputs == 816
    assert summary.taken >= 700
    assert summary.taken + sum(summary.rejected.values()) == 816
    assert verify(str(tmp_path / "set")) == []
