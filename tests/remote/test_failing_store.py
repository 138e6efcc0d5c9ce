"""The jobs on an object store where one request in seven fails: the results are those of a disk, byte for byte."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.images.preprocess import encode
from pipeline.data.loading.batches import read_all
from pipeline.data.shards.shard_set import ShardSet
from pipeline.storage import files as storage
from tests import warm
from tests.conftest import ROOT
from tests.launch import ENVIRONMENT, TINY, command, ddpm, kill
from tests.remote.faults import Faults

SAMPLE = ("--seeds", "0-23", "--shard-samples", 4, "--quiet")


def files(url: str) -> dict[str, bytes]:
    """All files directly under a place."""
    return {name: storage.read_bytes(storage.join(url, name)) for name in storage.listdir(url)}


@pytest.fixture(scope="module")
def remote_digits(store: Faults, digits: Path) -> str:
    """The digits as they are, on the store."""
    for name, data in files(str(digits)).items():
        storage.write_bytes(f"s3://pool/digits/{name}", data)
    return "s3://pool/digits"


def test_a_shard_set_written_there_is_the_one_on_a_disk(faulty: Faults, digits: Path) -> None:
    out = "s3://pool/made/digits"
    source = ROOT / "shards" / "digits.zip"
    arguments = ("--size", 8, "--channels", 1, "--shard-samples", 300, "--workers", 2, "--quiet")
    done = ddpm("shard", source, "--out", out, *arguments)
    assert done.returncode == 0, done.stderr
    verified = ddpm("verify", out)
    assert verified.returncode == 0 and "sound" in verified.stdout, verified.stderr
    faulty.rate = 0
    assert files(out) == files(str(digits))


def test_images_are_found_and_read_there(faulty: Faults, tmp_path: Path) -> None:
    for i in range(12):
        image = encode(np.full((8, 8, 1), 20 * i, dtype=np.uint8), "png")
        storage.write_bytes(f"s3://pool/photos/{'ab'[i % 2]}/{i}.png", image)
    out = tmp_path / "set"
    done = ddpm("shard", "s3://pool/photos", "--out", out, "--size", 8, "--channels", 1, "--workers", 2)
    assert done.returncode == 0, done.stderr
    batch = read_all(ShardSet.open(str(out)))
    assert batch.images[:, 0, 0, 0].sort().values.tolist() == [20 * i for i in range(12)]
    assert torch.equal(batch.images[:, 0, 0, 0] // 20 % 2, batch.labels)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_same_batches_and_counts_its_retries(
    faulty: Faults, remote_digits: str, digits: Path, workers: int
) -> None:
    def batches(shards: object) -> tuple[dict[str, str], int]:
        command = [sys.executable, "-m", "tests.remote.batches_hash", str(shards), str(workers)]
        done = warm.run(command, env=ENVIRONMENT, cwd=ROOT, timeout_s=300)
        assert done.returncode == 0, done.stderr
        hashes, retries = json.loads(done.stdout)
        return hashes, retries

    there, retries = batches(remote_digits)
    assert retries > 0
    assert (there, 0) == batches(digits)


def test_a_run_trained_from_there_has_the_same_weights(
    faulty: Faults, remote_digits: str, tiny_run: Path, tmp_path: Path
) -> None:
    done = ddpm("train", *TINY, f"data.shards={remote_digits}", f"data.cache={tmp_path}/cache", "train.steps=6",
                f"run.dir={tmp_path}/run")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/cache: keeps up to " in done.stderr + done.stdout
    for part in ("model", "ema", "optimizer"):
        name = f"checkpoints/step_00000006/{part}.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (tiny_run / name).read_bytes(), part


def test_samples_written_there_and_resumed_after_a_kill_are_those_on_a_disk(
    faulty: Faults, tiny_run: Path, tmp_path: Path
) -> None:
    out = "s3://pool/made/samples"
    with (tmp_path / "log").open("wb") as log:
        job = warm.Popen(command("sample", tiny_run, *SAMPLE, "--out", out), env=ENVIRONMENT, stdout=log, stderr=log)
    while not any(name.endswith(".json") for name in storage.listdir(out)):
        assert job.poll() is None, (tmp_path / "log").read_text()
    kill(job)
    assert "index.json" not in storage.listdir(out), "killed too late to show anything"
    for place in (out, tmp_path / "samples"):
        done = ddpm("sample", tiny_run, *SAMPLE, "--out", place)
        assert done.returncode == 0, done.stderr
    faulty.rate = 0
    assert files(out) == files(str(tmp_path / "samples"))
    assert "sound" in ddpm("verify", out).stdout
