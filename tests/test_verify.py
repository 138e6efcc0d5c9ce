"""The verify job: it knows what it is given, and its exit code tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.verify import verify
from tests.launch import ddpm
from tests.test_shardset import write_set


def test_shard_sets_are_checked_to_the_byte(tmp_path: Path) -> None:
    shards = write_set(tmp_path)
    assert verify(str(tmp_path)) == []
    path = Path(shards.tar(2))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert len(verify(str(tmp_path))) == 2


def test_runs_are_known_by_their_checkpoints(tiny_run: Path) -> None:
    assert verify(str(tiny_run)) == []


def test_an_unfinished_set_is_a_finding(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "index.json").unlink()
    (finding,) = verify(str(tmp_path))
    assert "has no index.json: it is unfinished" in finding


def test_anything_else_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such directory: give a shard set, a sample set or a run"):
        verify(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="is neither a shard set, a sample set nor a run: give one of these"):
        verify(str(tmp_path))


def test_the_command_ends_in_3_if_there_are_findings(tmp_path: Path) -> None:
    Path(write_set(tmp_path).tar(1)).unlink()
    damaged = ddpm("verify", tmp_path, "--json")
    assert damaged.returncode == 3
    assert json.loads(damaged.stdout)["findings"] == ["set-000001.tar: missing"]
    assert damaged.stderr.startswith("ddpm: ") and damaged.stderr.count("\n") == 1
