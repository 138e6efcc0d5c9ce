"""A run that lives on an object store: killed, resumed, sampled; and stores that fail in the middle of a save."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import safetensors.torch
import torch
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.checkpoints.checkpoint import committed_step, newest_checkpoint, remove_old, write_checkpoint
from pipeline.errors import DataError
from pipeline.storage import files
from tests.launch import TINY, ddpm, kill, start, until
from tests.remote.faults import Faults

PARTS = {f"{part}.safetensors" for part in ("model", "ema", "optimizer")}


def test_a_run_there_is_killed_resumed_and_sampled(
    faulty: Faults, digits: Path, tiny_run: Path, tmp_path: Path
) -> None:
    run = "s3://pool/runs/tiny"
    arguments = (*TINY, f"data.shards={digits}", f"run.dir={run}", "train.steps=6")
    launcher = start(1, "train", *arguments, log=tmp_path / "log")
    assert until(lambda: committed_step(run) > 0, launcher), (tmp_path / "log").read_text()
    kill(launcher)
    reached = committed_step(run)
    assert 0 < reached < 6 and not files.exists(f"{run}/DONE"), "killed too late to show anything"
    resumed = ddpm("train", *arguments)
    assert resumed.returncode == 0, resumed.stderr
    faulty.rate = 0
    assert files.read_json(f"{run}/DONE")["step"] == 6
    last = f"{run}/checkpoints/step_00000006"
    assert set(files.listdir(last)) == PARTS | {"state.json", "manifest.json"}
    for name in PARTS:
        assert files.read_bytes(f"{last}/{name}") == (tiny_run / "checkpoints/step_00000006" / name).read_bytes()
    sampled = ddpm("sample", run, "--seeds", "0-3", "--format", "png", "--quiet", "--out", tmp_path / "samples")
    assert sampled.returncode == 0, sampled.stderr
    assert len(list((tmp_path / "samples").glob("*.png"))) == 4
    assert ddpm("verify", run).returncode == 0


@pytest.fixture
def run() -> Iterator[str]:
    url = f"memory://{uuid4().hex}"
    yield url
    files.remove(url)


WEIGHTS = safetensors.torch.save({"weight": torch.ones(3)})
FILES = {"state.json": [b"{}"], "model.safetensors": [WEIGHTS[:9], WEIGHTS[9:]], "ema.safetensors": [WEIGHTS]}


def fail_put(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> list[str]:
    """Let the uploads from the first-th to the last-th fail; the names of all are noted."""
    tried: list[str] = []

    def failing(method: str) -> None:
        put = getattr(MemoryFileSystem, method)

        def upload(self: MemoryFileSystem, *arguments: object, **settings: object) -> object:
            tried.append(str(arguments))
            if first <= len(tried) <= last:
                raise OSError("the store is unwell")
            return put(self, *arguments, **settings)

        monkeypatch.setattr(MemoryFileSystem, method, upload)

    failing("pipe_file")
    failing("put_file")
    return tried


@pytest.mark.parametrize("upload", range(1, 5))
def test_a_store_that_dies_during_a_save_costs_no_older_checkpoint(
    run: str, monkeypatch: pytest.MonkeyPatch, upload: int
) -> None:
    write_checkpoint(run, 1, FILES)
    monkeypatch.setenv("DDPM_IO_TIMEOUT", "0")
    with monkeypatch.context() as patch:
        tried = fail_put(patch, upload, 99)
        with pytest.raises(DataError, match=r"^cannot write memory://.*: the store is unwell: tried for 0 s"):
            write_checkpoint(run, 2, FILES)
        assert len(tried) == upload
    assert files.listdir(files.join(run, "checkpoints")) == ["step_00000001"], "no remains while there was time"
    found, _ = newest_checkpoint(run)
    assert found and found.step == 1 == committed_step(run)
    remove_old(run, 1, 0)
    write_checkpoint(run, 2, FILES)
    found, rejected = newest_checkpoint(run)
    assert found and found.step == 2 and not rejected
    remove_old(run, 1, 0)
    assert files.listdir(files.join(run, "checkpoints")) == ["step_00000002"]


@pytest.mark.parametrize("upload", range(1, 5))
def test_a_killed_upload_is_never_taken_for_a_checkpoint(
    run: str, monkeypatch: pytest.MonkeyPatch, upload: int
) -> None:
    """No time to tidy up: only what was uploaded before is there."""
    write_checkpoint(run, 1, FILES)
    with monkeypatch.context() as patch:
        fail_put(patch, upload, 99)
        patch.setattr(files, "remove", lambda url: None)
        patch.setenv("DDPM_IO_TIMEOUT", "0")
        with pytest.raises(DataError):
            write_checkpoint(run, 2, FILES)
    found, rejected = newest_checkpoint(run)
    assert found and found.step == 1 == committed_step(run)
    assert all("step_00000002" in line and "manifest" in line for line in rejected)
    remove_old(run, 1, 0)
    found, _ = newest_checkpoint(run)
    assert found and found.step == 1


def test_a_hiccup_is_not_noticed(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files.retries()
    tried = fail_put(monkeypatch, 2, 3)
    written = write_checkpoint(run, 1, FILES)
    assert len(tried) == 6 and files.retries() == before + 2
    assert newest_checkpoint(run) == (written, [])
