"""All commands agree about what a path is, and say it where they need something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import path_kind
from pipeline.path_kind import Kind
from pipeline.storage import files
from tests.launch import ddpm

GOLDEN = Path(__file__).parent / "golden" / "version_0_1"


def directory(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("run", Kind.RUN),
        ("run/checkpoints/step_00000004", Kind.CHECKPOINT),
        ("shards", Kind.SHARD_SET),
        ("samples", Kind.SAMPLE_SET),
        ("diffusers", Kind.DIFFUSERS),
        ("", Kind.RUNS),
        ("source.zip", Kind.SOURCE),
        ("config.yaml", Kind.CONFIGURATION),
        ("README.md", Kind.FILE),
        ("nowhere", Kind.NOTHING),
    ],
)
def test_what_version_0_1_wrote(name: str, kind: Kind) -> None:
    assert path_kind.of(str(GOLDEN / name if name else GOLDEN)) is kind


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["cat/1.jpg"], Kind.IMAGES),
        (["IMG_000001.jpg", "IMG_000001.json"], Kind.IMAGES),
        (["config.json", "1.png"], Kind.IMAGES),
        (["cats-000000.tar"], Kind.TARS),
        (["parts/a.parquet"], Kind.SOURCES),
        (["features-0123456789ab/a.safetensors"], Kind.FEATURES),
        (["s-000000.tar", "s-000000.npy", "s-000000.json"], Kind.SHARD_SET),
        (["index-000000.npy", "index-000000.json"], Kind.SHARD_SET),
        (["shard_000000.json", "000000001.png"], Kind.SAMPLE_SET),
        (["diffusion_pytorch_model.safetensors", "config.json"], Kind.DIFFUSERS),
        (["notes.txt"], Kind.DIRECTORY),
    ],
)
def test_a_directory_is_known_by_its_names(tmp_path: Path, names: list[str], kind: Kind) -> None:
    assert path_kind.of(str(directory(tmp_path / "x", *names))) is kind


def test_it_looks_into_few_directories_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory(tmp_path, *[f"{i:04d}/{j:04d}/notes.txt" for i in range(30) for j in range(30)])
    listed = []
    listdir = files.listdir
    monkeypatch.setattr(files, "listdir", lambda url: listed.append(url) or listdir(url))
    assert path_kind.of(str(tmp_path)) is Kind.DIRECTORY
    assert len(listed) < 300


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (GOLDEN / "shards", "is a shard set, not a model: train on it with `ddpm train --config C.yaml data.shards="),
        (GOLDEN / "samples", "is a sample set, not a model: give the run or the checkpoint that drew it"),
        (GOLDEN, f"is a directory of runs, not a model: give one of these runs, such as {GOLDEN}/run"),
        (GOLDEN / "source.zip", "is an archive or a table, not a model: give a run, a checkpoint or a diffusers dir"),
    ],
)
def test_a_command_for_models_says_what_it_was_given(source: Path, told: str, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for command in (
        ("sample", source, "--seeds", "0", "--out", out),
        ("export", source, "--out", out),
        ("evaluate", source, "--likelihood", digits),
    ):
        refused = ddpm(*command)
        assert refused.returncode == 2 and refused.stderr.startswith(f"ddpm: {source} {told}")
    assert not out.exists()


def test_a_command_for_runs_says_what_it_was_given(digits: Path, tmp_path: Path) -> None:
    refused = ddpm("report", digits, "--out", tmp_path / "page.html")
    assert refused.returncode == 2
    assert refused.stderr == f"ddpm: {digits} is a shard set, not a run: give the run.dir of a run\n"
