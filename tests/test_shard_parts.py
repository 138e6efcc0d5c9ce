"""Jobs with `--part` on directories: one of them lists the inputs, and all make the bytes of one job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import shard as shard_job
from pipeline.data.shards.verify import verify
from pipeline.data.sources.directory import Directory
from pipeline.errors import ConfigError
from tests import warm
from tests.data.shards.test_build import write_images
from tests.jobs import shard
from tests.launch import ENVIRONMENT, command

OPTIONS = {"size": 8, "shard_samples": 10, "workers": 1, "quiet": True}


@pytest.fixture
def source(tmp_path: Path) -> str:
    write_images(tmp_path / "in" / "cats", [f"{i:02}.png" for i in range(30)])
    write_images(tmp_path / "in" / "dogs", [f"{i:02}.png" for i in range(27)])
    (tmp_path / "in" / "cats" / "03.txt").write_text("a cat")
    return str(tmp_path / "in")


def content(out: Path) -> dict[str, bytes]:
    assert not (out / ".listing").exists()
    return {path.name: path.read_bytes() for path in out.iterdir()}


def whole(source: str, place: Path) -> dict[str, bytes]:
    shard([source], str(place / "set"), **OPTIONS)
    return content(place / "set")


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories that were listed."""
    walked: list[str] = []
    walk = Directory._walk

    def counted(self: Directory, *arguments: object) -> None:
        walked.append(self._root)
        walk(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Directory, "_walk", counted)
    return walked


def test_the_first_part_lists_and_the_others_do_not(source: str, tmp_path: Path, walks: list[str]) -> None:
    expected, out = whole(source, tmp_path / "one"), tmp_path / "set"
    walks.clear()
    for part in (2, 0, 3, 1):
        shard([source], str(out), part=f"{part}/4", **OPTIONS)
        assert walks == [source]
    assert content(out) == expected and verify(str(out)) == []
    shard([source], str(out), part="1/4", **OPTIONS)  # nothing to do, but the source could have changed
    assert walks == [source] * 2 and content(out) == expected


def start(*arguments: object) -> subprocess.Popen[str]:
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return warm.Popen(command("shard", *arguments), env=ENVIRONMENT, **options)


def test_parts_that_start_at_once_share_one_list(source: str, tmp_path: Path) -> None:
    out = tmp_path / "set"
    arguments = ("--out", out, "--size", 8, "--shard-samples", 10, "--workers", 1)
    jobs = [start(source, *arguments, "--part", f"{part}/3") for part in range(3)]
    errors = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 3, errors
    assert content(out) == whole(source, tmp_path / "one") and verify(str(out)) == []


KILLED = """
import os, signal, sys
from pipeline.data.sources import row_file
from tests import jobs
from tests.test_shard_parts import OPTIONS
copy = row_file.RowFile.copy_to
def killed(self, file):
    copy(self, file)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
row_file.RowFile.copy_to = killed
jobs.shard(sys.argv[1:2], sys.argv[2], part="0/2", **OPTIONS)
"""


def test_a_job_killed_while_it_writes_the_list_leaves_nothing_that_is_believed(source: str, tmp_path: Path) -> None:
    out = tmp_path / "set"
    job = subprocess.run([sys.executable, "-c", KILLED, source, str(out)], check=False)
    assert job.returncode == -signal.SIGKILL
    assert [path.suffix for path in (out / ".listing").glob(".*")] == [".tmp"]
    write_images(Path(source) / "cats", ["new.png"])  # the list that was not written lacks it
    started = time.monotonic()
    for part in range(2):
        shard([source], str(out), part=f"{part}/2", **OPTIONS)
    assert time.monotonic() - started < 20  # the lease of the dead job is not waited for
    assert content(out) == whole(source, tmp_path / "one")


def test_the_list_holds_until_the_set_is_finished_and_a_job_without_part_looks_again(
    source: str, tmp_path: Path
) -> None:
    expected, out = whole(source, tmp_path / "one"), tmp_path / "set"
    shard([source], str(out), part="0/2", **OPTIONS)
    added = Path(source) / "dogs" / "zz.png"
    write_images(added.parent, [added.name])
    with pytest.raises(ConfigError, match="the source had 58 files, now 59"):
        shard([source], str(out), **OPTIONS)
    shard([source], str(out), part="1/2", **OPTIONS)
    assert content(out) == expected
    with pytest.raises(ConfigError, match="the source had 58 files, now 59"):
        shard([source], str(out), part="1/2", **OPTIONS)


def test_a_part_whose_inputs_have_changed_is_refused(source: str, tmp_path: Path) -> None:
    out = tmp_path / "set"
    shard([source], str(out), part="0/2", **OPTIONS)
    for path in Path(source, "dogs").iterdir():
        os.utime(path, (1, 1))
    with pytest.raises(ConfigError, match="files of the source have other names, times or labels"):
        shard([source], str(out), part="1/2", **OPTIONS)
    shard([source], str(out), overwrite=True, **OPTIONS)
    assert content(out) == whole(source, tmp_path / "one")


def test_overwriting_removes_a_list_of_no_shard(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(shard_job, "_make_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            shard([source], str(out), part="0/2", **OPTIONS)
    assert (out / ".listing").exists()
    assert shard([source], str(out), overwrite=True, **OPTIONS).shards == 6
    assert content(out) == whole(source, tmp_path / "one")


def test_nothing_is_written_to_a_directory_of_something_else(source: str, tmp_path: Path) -> None:
    out = tmp_path / "photos"
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(ConfigError, match=r"holds something else \(mine.txt\)"):
        shard([source], str(out), part="0/2", **OPTIONS)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
