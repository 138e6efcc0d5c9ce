"""From images to verified samples, with the commands of the README: shard, train, resume, sample, verify."""

from __future__ import annotations

import json
from pathlib import Path
from subprocess import CompletedProcess

from tests.conftest import ROOT
from tests.launch import TINY, ddpm


def test_digits_become_shards_a_run_that_resumes_and_verified_samples(tmp_path: Path) -> None:
    shards, run, samples = (tmp_path / name for name in ("shards", "run", "samples"))

    def succeeds(job: str, *arguments: object) -> CompletedProcess[str]:
        done = ddpm(job, *arguments)
        assert done.returncode == 0, done.stderr
        return done

    succeeds("shard", ROOT / "shards/digits.zip", "--out", shards, "--size", "8", "--channels", "1")
    train = ("train", *TINY, f"data.shards={shards}", f"run.dir={run}")
    assert "starting at step 0" in succeeds(*train, "train.steps=4").stderr
    assert "resuming at step 4 " in succeeds(*train, "train.steps=6").stderr
    losses = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses] == [1, 2, 3, 4, 5, 6]
    succeeds("sample", run, "--seeds", "0-9", "--out", samples, "--grid", tmp_path / "grid.png")
    assert json.loads((samples / "index.json").read_text())["samples"] == 10
    assert (tmp_path / "grid.png").stat().st_size > 0
    for artefact in (shards, run, samples):
        assert succeeds("verify", artefact).stdout == f"{artefact}: sound\n"
