"""Files that version 0.1 made are continued, sampled and verified, and give what version 0.1 would have given."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.data.loading.batches import read_all
from pipeline.data.shards.shard_set import ShardSet
from tests.launch import ddpm

GOLDEN = Path(__file__).parent / "golden" / "version_0_1"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
CHECKPOINT = "run/checkpoints/step_00000004"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, as the working directory: the shard set knows its source by its relative path."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def done(job: str, *arguments: object) -> str:
    ran = ddpm(job, *arguments)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def finish_shards() -> None:
    done("shard", "source.zip", "--out", "shards", "--size", 8, "--channels", 1, "--shard-samples", 6)


def assert_same_images(samples: str, expected: str) -> None:
    """Up to one level of 256: another processor may round otherwise."""
    images: NDArray[np.uint8] = read_all(ShardSet.open(samples)).images.numpy()[:, 0]
    np.testing.assert_allclose(images.astype(int), np.array(EXPECTED[expected]), rtol=0, atol=1)


def test_a_half_written_shard_set_is_finished_to_the_same_bytes(files: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (files / "shards").glob("*.tar")}
    finish_shards()
    index = json.loads((files / "shards/index.json").read_text())
    assert [shard["sha256"] for shard in index["shards"]] == EXPECTED["shard_sha256"]
    assert {name: (files / "shards" / name).stat().st_mtime_ns for name in before} == before  # not written again
    done("verify", "shards")


@pytest.mark.parametrize("config", ["config.yaml", "run/config.yaml"])
def test_a_run_resumes_with_the_losses_it_would_have_had(files: Path, config: str) -> None:
    finish_shards()
    assert "resuming at step 4" in done("train", "--config", config)
    losses = [json.loads(line)["train/loss"] for line in (files / "run/log.jsonl").read_text().splitlines()]
    assert losses == pytest.approx(EXPECTED["losses"][4:], rel=1e-4)
    done("verify", "run")


def test_a_half_drawn_sample_set_is_finished_with_the_images_it_would_have_had(files: Path) -> None:
    done("sample", CHECKPOINT, "--seeds", "0-15", "--out", "samples", "--shard-samples", 4)
    assert_same_images("samples", "samples")
    done("verify", "samples")


def test_a_run_and_a_diffusers_directory_are_sampled_as_before(files: Path) -> None:
    ddim = ("--sampler", "ddim", "--steps", 5, "--spacing", "uniform", "--batch", 4)
    done("sample", "diffusers", "--seeds", "0-3", "--out", "d", "--label", 1, "--guidance", 2, *ddim)
    assert_same_images("d", "diffusers_samples")
    ancestral = ("--sampler", "ddpm", "--steps", 10, "--spacing", "uniform", "--batch", 4)
    done("sample", "run", "--seeds", "0-3", "--out", "a", *ancestral)
    assert_same_images("a", "ddpm_10_steps")
    done("sample", "run", "--seeds", "0-15", "--out", "r")  # the run's own sampler, with its own spacing
    assert_same_images("r", "samples")


def test_a_new_run_that_starts_from_an_old_one_takes_its_norm_groups_and_says_what_they_cost(files: Path) -> None:
    finish_shards()
    said = done("train", "--config", "config.yaml", "run.dir=new", "train.init_from=run", "train.steps=1")
    assert "new: starting at step 0 with the weights of run (step " in said
    assert "norm_groups: 32" in (files / "new/config.yaml").read_text()
    assert "model.norm_groups=32 leaves one channel a group" in said
