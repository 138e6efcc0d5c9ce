"""The verify job: it knows what it is given, and its exit code tells."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline.data.shards.sample_set import Format
from pipeline.errors import ConfigError, Stopped
from pipeline.verify import verify
from tests.data.shards.test_sample_set import draw, finish, sample_set
from tests.data.shards.test_shard_set import write_set
from tests.launch import ddpm


def test_shard_sets_are_checked_to_the_byte(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    assert verify(str(tmp_path)) == []
    path = Path(shards.tar(2))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert len(verify(str(tmp_path))) == 2


def test_runs_are_known_by_their_checkpoints(tiny_run: Path) -> None:
    assert verify(str(tiny_run)) == []
    for checkpoint in (tiny_run / "checkpoints").iterdir():
        assert verify(str(checkpoint)) == []


@pytest.mark.parametrize("which", [0, -1])
def test_a_lost_manifest_and_a_damaged_file_are_findings(tiny_run: Path, tmp_path: Path, which: int) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    checkpoint = sorted((run / "checkpoints").iterdir())[which]
    path = checkpoint / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert verify(str(run)) == [f"{checkpoint.name}: ema.safetensors does not match its sha256"]
    (finding,) = verify(str(checkpoint))
    assert finding.startswith(f"{checkpoint}: ema.safetensors does not match its sha256")
    (checkpoint / "manifest.json").unlink()
    assert verify(str(run)) == [f"{checkpoint.name}: no manifest.json"]


def test_a_first_save_that_was_killed_is_no_finding(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    assert verify(str(tmp_path)) == []


@pytest.mark.parametrize("format", ["png", "npz"])
def test_loose_samples_are_known_by_their_records(tmp_path: Path, format: Format) -> None:
    draw(sample_set(str(tmp_path), format=format, shard_samples=4), "0-9")
    assert verify(str(tmp_path)) == []
    next(tmp_path.glob(f"*3.{format}" if format == "png" else "*.npz")).unlink()
    assert len(verify(str(tmp_path))) == 1


_RECORD = {"seeds": "0", "count": 1, "provenance": {}, "files": {}}
_NONE = [{"seeds": 3}, {"seeds": "x"}, {"provenance": 5}, {"count": "many"}, {"files": 3}]


@pytest.mark.parametrize("record", ["{", "[]", "{}", *(json.dumps(_RECORD | change) for change in _NONE)])
def test_records_that_are_none_are_findings(tmp_path: Path, record: str) -> None:
    (tmp_path / "shard_000000.json").write_text(record)
    assert verify(str(tmp_path)) == ["shard_000000.json: not the record of a shard of samples"]


def test_shards_far_beyond_a_million_are_checked_too(tmp_path: Path) -> None:
    target = sample_set(str(tmp_path), size=2, shard_samples=2)
    draw(target, "4000000-4000003")
    assert finish(target, "4000000-4000003")
    assert verify(str(tmp_path)) == []


def test_a_stop_request_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "set")
    monkeypatch.setenv("DDPM_DEADLINE", "1")
    with pytest.raises(Stopped, match="stopped by the deadline: not all files were checked"):
        verify(str(tmp_path / "set"))


def test_an_unfinished_set_is_a_finding(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "index.json").unlink()
    (finding,) = verify(str(tmp_path))
    assert "is an unfinished shard set (no index.json)" in finding


def test_anything_else_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="nowhere: no such directory: give a shard set, a sample set, a run or a checkpoint"
    ):
        verify(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="is a directory: give a shard set, a sample set, a run or a checkpoint"):
        verify(str(tmp_path))


def test_the_command_ends_in_3_if_there_are_findings(tmp_path: Path) -> None:
    Path(write_set(tmp_path).tar(1)).unlink()
    damaged = ddpm("verify", tmp_path, "--json", "--quiet")
    assert damaged.returncode == 3
    assert json.loads(damaged.stdout)["findings"] == ["set-000001.tar: missing"]
    assert damaged.stderr.startswith("ddpm: ") and damaged.stderr.count("\n") == 1


def test_quiet_says_nothing_of_a_sound_set_and_otherwise_the_progress_is_shown(tmp_path: Path) -> None:
    write_set(tmp_path)
    silent, spoken = ddpm("verify", tmp_path, "--quiet"), ddpm("verify", tmp_path)
    assert (silent.returncode, silent.stdout, silent.stderr) == (0, "", "")
    assert spoken.stdout == f"{tmp_path}: sound\n"
    assert spoken.stderr.startswith("verifying: 3/3 shards")
