"""What a start does to a directory: nothing to a foreign or a finished one, and to a run only what it may."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import pytest

from pipeline import config_file
from pipeline.checkpoints.checkpoint import remove_old, verify_checkpoints, write_checkpoint
from pipeline.config import Config
from pipeline.errors import ConfigError, NoCheckpoint
from pipeline.storage import files as storage
from pipeline.train import train
from pipeline.training.start import ResumePoint, check_run_dir, find_resume_point, is_finished, start_run
from tests.checkpoints.test_checkpoint import directory, files, parts
from tests.launch import TINY, ddpm

DATA = ("ab" * 32, 1797)
HERE = {"torch": "2.13.0", "device": "x86_64"}


def config(run: str, *settings: str) -> Config:
    loaded = config_file.load(
        TINY[1], (f"run.dir={run}", "data.shards=digits", *settings), lambda n: Path(n).read_text()
    )
    return loaded.in_steps(DATA[1])


def settled(config: Config) -> Config:
    """With the groups of the norms that an open configuration gets when a run starts."""
    return config.model_copy(update={"model": config.model.model_copy(update={"norm_groups": config.model.groups})})


def nothing_to_say(line: str) -> None:
    raise AssertionError(line)


def saved(run: str, step: int, trained: Config | None = None, lanes: int = 12) -> None:
    """A checkpoint as the trainer writes it."""
    trained = settled(trained or config(run))
    state = {"step": step, "config": config_file.dump(trained), "data_sha256": DATA[0], "data_samples": DATA[1],
             "environment": HERE, "position": {"step": step, "lanes": lanes}}  # fmt: skip
    write_checkpoint(run, step, files(parts(step), state))


def snapshot(place: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(place.rglob("*")) if p.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> str:
    return str(tmp_path / "run")


# --- the place ---


@pytest.mark.parametrize("names", [[], ["control/stop"], ["logs/train-1.out"], ["control/x", "logs/y"], [".nfs0001"]])
def test_a_place_that_a_batch_script_has_prepared_may_become_a_run(run: str, names: list[str]) -> None:
    for name in names:
        storage.write_bytes(f"{run}/{name}", b"x")
    check_run_dir(run)


@pytest.mark.parametrize(
    "names", [["thesis.tex"], ["control/stop", "photo.jpg"], ["checkpoints/best.pt"], ["logs.txt"]]
)
def test_a_foreign_directory_is_refused_and_untouched(run: str, names: list[str]) -> None:
    for name in names:
        storage.write_bytes(f"{run}/{name}", b"x")
    before = snapshot(Path(run))
    with pytest.raises(ConfigError, match=r"not a run.*: choose another run.dir"):
        check_run_dir(run)
    assert snapshot(Path(run)) == before


@pytest.mark.parametrize("text", [b"name: somebody else's\n", b"train: {lr: 0.1}\n", b"\xff\xfe", b"", b"- 1\n"])
def test_a_foreign_config_yaml_is_refused_and_untouched(run: str, digits: Path, text: bytes) -> None:
    storage.write_bytes(f"{run}/config.yaml", text)
    before = snapshot(Path(run))
    with pytest.raises(ConfigError, match=r"is not the configuration of a run: choose another run\.dir"):
        train(config(run, f"data.shards={digits}"), quiet=True)
    assert snapshot(Path(run)) == before


def test_a_run_that_was_killed_before_its_first_save_is_a_run(run: str) -> None:
    start_run(ResumePoint(config(run), None), nothing_to_say)
    check_run_dir(run)


def test_no_place_and_a_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.dir is not set"):
        check_run_dir("")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file: give a directory"):
        check_run_dir(str(tmp_path / "file"))


# --- where it stands ---


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_run_goes_on_from_its_newest_checkpoint_and_says_what_it_passes_over(run: str, where: str) -> None:
    place = run if where == "local" else f"memory://{uuid.uuid4().hex}/run"
    assert find_resume_point(config(place), DATA, HERE, (), nothing_to_say) == ResumePoint(settled(config(place)), None)
    for step in (2, 4):
        saved(place, step)
    point = find_resume_point(config(place), DATA, HERE, (), nothing_to_say)
    assert point.checkpoint and (point.checkpoint.step, point.state["step"]) == (4, 4)
    storage.write_bytes(storage.join(directory(place, 4), "ema.safetensors"), b"")
    said: list[str] = []
    point = find_resume_point(config(place), DATA, HERE, (), said.append)
    assert point.checkpoint and point.checkpoint.step == 2
    assert len(said) == 1 and said[0].startswith(f"{place}: ignored step_00000004: ema.safetensors has 0 bytes")


def test_other_software_or_another_device_is_said_and_not_refused(run: str) -> None:
    saved(run, 2)
    said: list[str] = []
    assert find_resume_point(config(run), DATA, HERE | {"torch": "2.14.0"}, (), said.append).checkpoint
    assert len(said) == 1 and "(torch: 2.13.0 -> 2.14.0)" in said[0]


def test_looking_writes_nothing(run: str) -> None:
    saved(run, 2)
    before = snapshot(Path(run))
    find_resume_point(config(run), DATA, HERE, (), nothing_to_say)
    assert snapshot(Path(run)) == before


def test_a_run_without_a_valid_checkpoint_does_not_start_at_zero(run: str) -> None:
    for step in (2, 4):
        saved(run, step)
        storage.write_bytes(f"{directory(run, step)}/model.safetensors", b"")
    with pytest.raises(NoCheckpoint):
        find_resume_point(config(run), DATA, HERE, (), nothing_to_say)


def test_other_data_are_refused_unless_overridden(run: str) -> None:
    saved(run, 2)
    other = ("cd" * 32, 1800)
    with pytest.raises(ConfigError, match=r"1800 samples, then 1797\): restore it, .*--override data.shards"):
        find_resume_point(config(run), other, HERE, (), nothing_to_say)
    assert find_resume_point(config(run), other, HERE, ["data.shards"], nothing_to_say).checkpoint


@pytest.mark.parametrize("global_batch", [12, 24, 60])
def test_the_global_batch_may_change_to_what_the_lanes_divide(run: str, global_batch: int) -> None:
    saved(run, 2)
    assert find_resume_point(
        config(run, f"train.global_batch={global_batch}"), DATA, HERE, (), nothing_to_say
    ).checkpoint


@pytest.mark.parametrize("global_batch", [6, 13, 18])
def test_no_other_global_batch_is_taken(run: str, global_batch: int) -> None:
    saved(run, 2)
    with pytest.raises(ConfigError) as caught:
        find_resume_point(
            config(run, f"train.global_batch={global_batch}", "train.micro_batch=1"), DATA, HERE, (), nothing_to_say
        )
    assert str(caught.value) == (
        f"train.global_batch is {global_batch}, but {run} reads its data in 12 lanes: use a multiple of 12"
    )


def test_more_steps_under_a_cosine_are_worth_a_warning_and_under_a_constant_rate_are_not(run: str) -> None:
    saved(run, 2, config(run, "train.lr_schedule=cosine"))
    said: list[str] = []
    find_resume_point(config(run, "train.lr_schedule=cosine", "train.steps=40"), DATA, HERE, (), said.append)
    assert said == [f"{run}: with train.steps=40 the finished steps would have had other learning rates"]
    storage.remove(run)
    saved(run, 2)
    find_resume_point(config(run, "train.steps=40"), DATA, HERE, (), nothing_to_say)


# --- what a start leaves ---


def test_a_start_forgets_how_the_last_one_ended_and_nothing_else(run: str) -> None:
    saved(run, 2)
    stale = ["FAILED.json", "control/stopped.json", "control/nodes/00008.json", "control/diagnosing.json",
             "control/ranks/00007.json"]  # fmt: skip
    kept = ["control/requeues.jsonl", "control/lease-000003.json", "log.jsonl", "previews/step_00000002.png"]
    for name in (*stale, *kept):
        storage.write_bytes(f"{run}/{name}", b"{}")
    start_run(find_resume_point(config(run, "run.keep_last=5"), DATA, HERE, (), nothing_to_say), nothing_to_say)
    assert not any(storage.exists(f"{run}/{name}") for name in stale)
    assert all(storage.exists(f"{run}/{name}") for name in kept)
    stored = config_file.parse_stored(Path(run, "config.yaml").read_text())
    assert stored == settled(config(run, "run.keep_last=5"))


def test_a_finished_run_that_goes_on_keeps_its_model_and_is_no_longer_done(run: str) -> None:
    saved(run, 20)
    storage.write_json(f"{run}/DONE", {"step": 20})
    longer = config(run, "train.steps=40")
    assert is_finished(config(run)) and not is_finished(longer)
    start_run(find_resume_point(longer, DATA, HERE, (), nothing_to_say), nothing_to_say)
    assert not storage.exists(f"{run}/DONE") and not is_finished(config(run))
    for step in (22, 24, 26):
        saved(run, step)
    remove_old(run, 2, 0)
    assert storage.exists(f"{directory(run, 20)}/manifest.json")


def test_a_warm_up_longer_than_the_run_is_worth_a_warning(run: str) -> None:
    said: list[str] = []
    start_run(ResumePoint(config(run, "train.steps=2"), None), said.append)
    assert len(said) == 1 and "train.warmup_steps 2 is no shorter than the run (2 steps)" in said[0]


def test_done_without_its_checkpoint_is_not_finished(run: str) -> None:
    storage.write_json(f"{run}/DONE", {"step": 20})
    assert not is_finished(config(run))
    saved(run, 18)
    assert not is_finished(config(run))
    saved(run, 20)
    assert is_finished(config(run))


# --- the job ---


def of(run: Path, digits: Path) -> Config:
    settings = (f"run.dir={run}", f"data.shards={digits}", "train.steps=6", "data.workers=0")
    return config_file.load(TINY[1], settings, lambda n: Path(n).read_text())


def test_a_finished_run_that_is_started_again_stays_as_it_is_to_the_last_byte(
    tiny_run: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before, names = snapshot(run), sorted(run.rglob("*"))
    train(of(run, digits))
    assert snapshot(run) == before and sorted(run.rglob("*")) == names
    assert "done at step 6, nothing to do" in capsys.readouterr().err


def test_a_finished_run_whose_end_is_damaged_goes_on_from_before_it(
    tiny_run: Path, digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = storage.read_bytes(f"{directory(str(run), 6)}/model.safetensors")
    storage.write_bytes(f"{directory(str(run), 6)}/model.safetensors", before[:-1])
    ddpm("train", *TINY, f"data.shards={digits}", f"run.dir={run}", "train.steps=6").check_returncode()
    assert storage.read_bytes(f"{directory(str(run), 6)}/model.safetensors") == before  # what it would have been
    assert verify_checkpoints(str(run)) == [] and is_finished(of(run, digits))
    lease: dict[str, Any] = json.loads(max((run / "control").glob("lease-*.json")).read_text())
    assert lease["released"]


def test_first_saves_that_were_killed_at_different_steps_do_not_make_a_run_unstartable(run: str) -> None:
    for step in (500, 120):
        storage.write_bytes(f"{directory(run, step)}/model.safetensors", b"cut")
        point = find_resume_point(config(run), DATA, HERE, (), lambda _: None)
        assert point == ResumePoint(settled(config(run)), None)
        start_run(point, lambda _: None)
    assert storage.listdir(f"{run}/checkpoints") == []
