"""`--dry-run`: the numbers are those of the command that follows, nothing is written, and what would fail fails."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.forecast import Forecast
from tests.evaluation.test_features import npz, resnet_weights
from tests.launch import TINY

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "shards" / "digits.zip"


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    paths = (path for path in directory.rglob("*") if not path.is_dir())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


class DryRun:
    """Runs a job in this process with `--dry-run`, and checks that no file of a directory changes."""

    def __init__(self, capfd: pytest.CaptureFixture[str], directory: Path) -> None:
        self._capfd, self._directory = capfd, directory

    def __call__(self, job: str, *arguments: object, code: int = 0) -> str:
        before = snapshot(self._directory)
        with pytest.raises(SystemExit) as left:
            main([job, *map(str, arguments), "--dry-run"])
        assert snapshot(self._directory) == before
        captured = self._capfd.readouterr()
        assert left.value.code == code, captured.err
        return captured.out if code == 0 else captured.err

    def json(self, job: str, *arguments: object) -> dict[str, Any]:
        return dict(json.loads(self(job, *arguments, "--json")))


@pytest.fixture
def dry(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> DryRun:
    return DryRun(capfd, tmp_path)


def run(job: str, *arguments: object) -> None:
    with pytest.raises(SystemExit) as left:
        main([job, *map(str, arguments), "--quiet"])
    assert left.value.code == 0


def test_sharding(dry: DryRun, tmp_path: Path) -> None:
    arguments = (DIGITS, "--out", tmp_path / "s", "--size", 8, "--channels", 1, "--shard-samples", 300, "--workers", 1)
    found = dry.json("shard", *arguments)
    assert (found["units"], found["unit"]) == (1797, "images") and found["work"].startswith("6 of 6 shards to make")
    assert "measured on 64 inputs" in found["basis"] and found["per_s"] > 0
    assert not list(tmp_path.iterdir())
    run("shard", *arguments)
    written = sum(path.stat().st_size for path in (tmp_path / "s").glob("*.tar"))
    assert found["bytes"] == pytest.approx(written, rel=0.1)
    assert "all 6 shards are there, nothing to do" in dry("shard", *arguments)
    (tmp_path / "s" / "s-000002.json").unlink()
    assert dry.json("shard", *arguments)["units"] == 300
    assert "was made from other sources or settings" in dry("shard", *arguments[:-6], "--channels", 3, code=2)
    assert dry.json("shard", *arguments[:-6], "--channels", 3, "--overwrite")["units"] == 1797
    (tmp_path / "s" / "thesis.tex").touch()
    assert "holds something else (thesis.tex)" in dry("shard", *arguments, "--overwrite", code=2)
    assert "no such" in dry("shard", "/nowhere", *arguments[1:], code=2)


def test_training(dry: DryRun, digits: Path, tiny_run: Path, tmp_path: Path) -> None:
    arguments = (*TINY, f"data.shards={digits}", f"run.dir={tmp_path / 'run'}", "data.workers=0")
    text = dry("train", *arguments)
    assert f"{tmp_path}/run: 20 of 20 steps to train, from step 0\n" in text
    assert "steps/s (measured on 2 steps of 12 images, 1 process on cpu" in text
    assert text.endswith("dry run: all checks passed, nothing was written\n")
    assert "holds 8x8" in dry("train", *arguments, "data.size=16", code=2)
    before = snapshot(tiny_run)
    resumed = (*TINY, f"data.shards={digits}", f"run.dir={tiny_run}", "data.workers=0")
    text = dry("train", *resumed)
    assert f"14 of 20 steps to train, from {tiny_run}/checkpoints/step_00000006" in text
    checkpoint = tiny_run / "checkpoints/step_00000006"
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    (mib,) = re.findall(r"disk  about ([\d.]+) MiB", text)
    assert float(mib) * 2**20 == pytest.approx(2 * size, rel=0.1)  # keep_last: 2
    assert "nothing to do" in dry("train", *resumed, "train.steps=6")
    assert "train.seed: 0 -> 5" in dry("train", *resumed, "train.seed=5", code=2)
    assert snapshot(tiny_run) == before


def test_sampling(dry: DryRun, tiny_run: Path, tmp_path: Path) -> None:
    arguments = (tiny_run, "--seeds", "0-9", "--out", tmp_path / "o", "--shard-samples", 4)
    found = dry.json("sample", *arguments)
    assert (found["units"], found["bytes_are"]) == (10, "at most")
    assert found["work"] == "10 of 10 images to draw, in 3 batches of 4"
    assert "of one batch, one process on cpu" in found["basis"] and found["seconds"] > 0
    run("sample", *arguments)
    rows = [np.load(path) for path in sorted((tmp_path / "o").glob("*.npy"))]
    written = sum(int(row["length"].sum()) for row in rows)
    assert written <= found["bytes"] <= 1.5 * written
    os.unlink(tmp_path / "o/shard_000001.json")
    assert dry.json("sample", *arguments)["units"] == 4
    assert "drawn differently" in dry("sample", *arguments, "--steps", 3, code=2)
    assert "classes 0 to 9" in dry("sample", *arguments, "--label", 10, code=2)
    assert "10 of 10" in dry("sample", tiny_run, "--seeds", "0-9", "--grid", tmp_path / "g.png")


def test_evaluating_the_likelihood(dry: DryRun, digits: Path, tiny_run: Path, tmp_path: Path) -> None:
    arguments = (tiny_run, "--likelihood", digits, "--cache", tmp_path / "cache")
    found = dry.json("evaluate", *arguments)
    assert (found["units"], found["bytes"]) == (1797, 1797 * 4 * 101) and found["per_s"] > 0
    assert "measured on 5 of 100 passes" in found["basis"]
    assert "no such" in dry("evaluate", tiny_run, "--likelihood", "/nowhere", code=3)


def test_evaluating_features(dry: DryRun, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz(tmp_path / "resnet.npz", resnet_weights())
    arguments = (digits, "--against", digits, "--cache", tmp_path / "cache", "--features")
    found = dry.json("evaluate", *arguments, tmp_path / "resnet.npz")
    assert found["units"] == 1797 and found["per_s"] > 0 and "measured on a batch" in found["basis"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert "after the network of inception is fetched" in dry("evaluate", *arguments, "inception")
    assert "no such directory" in dry("evaluate", "/nowhere", *arguments[1:], DIGITS, code=2)


def test_text_names_what_is_unknown_and_what_is_too_large() -> None:
    unknown = Forecast("out", "work", 5, "images", None, "no network", 10.0, free_bytes=None)
    assert "  time  unknown (no network)\n  disk  about 10 bytes\n" in unknown.as_text()
    large = Forecast("out", "work", 5, "images", 2.0, "a test", 3000.0, free_bytes=2048)
    assert "about 2 s, 2 images/s (a test)" in large.as_text()
    assert "about 2.9 KiB; 2.0 KiB are free: TOO LITTLE" in large.as_text()
