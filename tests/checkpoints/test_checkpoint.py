"""Checkpoints: whatever happens while one is written, the loader finds the right step, and says what it ignored."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline import config_file
from pipeline.checkpoints import checkpoint
from pipeline.checkpoints.checkpoint import (
    committed_step,
    find_checkpoint,
    keep_forever,
    newest_checkpoint,
    newest_safe_checkpoint,
    remove_old,
    verify_checkpoints,
    write_checkpoint,
)
from pipeline.checkpoints.safetensors_buffer import TensorFile
from pipeline.errors import ConfigError, DataError, NoCheckpoint, RunHeld
from pipeline.storage import files as storage
from pipeline.training.train_state import TrainState
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "golden" / "format_1"
FILES = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"]


def parts(step: int) -> dict[str, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(step)
    weights = {"conv.weight": torch.randn(3, 2, 2, generator=g), "conv.bias": torch.randn(3, generator=g)}
    ema = {name: value * 0.5 for name, value in weights.items()}
    optimizer = {"step.conv.bias": torch.tensor(float(step)), "exp_avg.conv.bias": torch.zeros(3)}
    return {"model": weights, "ema": ema, "optimizer": optimizer}


def files(parts: Mapping[str, Mapping[str, Tensor]], state: object) -> dict[str, list[bytes | memoryview]]:
    """What is written of them, as the saver lays it out."""
    laid_out = {part: TensorFile(tensors) for part, tensors in parts.items()}
    for part, tensors in parts.items():
        laid_out[part].fill(tensors)
    content = {f"{part}.safetensors": file.pieces() for part, file in laid_out.items()}
    return content | {"state.json": [json.dumps(state).encode()]}


def save(run: str, step: int) -> checkpoint.Checkpoint:
    return write_checkpoint(run, step, files(parts(step), {"step": step, "config": "train: {}\n"}))


def directory(run: str, step: int) -> str:
    return storage.join(run, "checkpoints", f"step_{step:08d}")


def content(run: str, step: int) -> dict[str, bytes]:
    path = directory(run, step)
    return {name: storage.read_bytes(storage.join(path, name)) for name in storage.listdir(path)}


def assert_holds(found: checkpoint.Checkpoint | None, step: int) -> None:
    """The checkpoint is that step, in every part."""
    assert found is not None and found.step == step == found.state()["step"]
    for part, expected in parts(step).items():
        got = found.tensors(part)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], value) for name, value in expected.items())


@pytest.fixture
def run(tmp_path: Path) -> Iterator[str]:
    """A run's directory; in memory if that is to be had, for thousands of files are flushed to the disk here."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as directory:
        yield f"{directory}/run"


# --- files that rot ---


def rot(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "flipped":
        data[len(data) // 2] ^= 16
    path.write_bytes(
        {"empty": b"", "torn": data[: len(data) // 2], "zeroed": bytes(len(data)), "longer": data + b"\n"}.get(
            how, data
        )
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "{} is missing"),
        ("empty", "{} has 0 bytes instead of "),
        ("torn", "{} has "),
        ("longer", "{} has "),
        ("flipped", "{} does not match its sha256"),
        ("zeroed", "{} does not match its sha256"),
    ],
)
def test_a_damaged_file_sends_the_run_to_the_checkpoint_before_and_says_why(
    run: str, name: str, how: str, reason: str
) -> None:
    save(run, 10)
    save(run, 20)
    rot(Path(directory(run, 20), name), how)
    found, rejected = newest_checkpoint(run)
    assert_holds(found, 10)
    (line,) = rejected
    assert line.startswith(f"ignored step_00000020: {reason.format(name)}") and "\n" not in line
    assert [finding.split(":")[0] for finding in verify_checkpoints(run)] == ["step_00000020"]
    assert_holds(find_checkpoint(run)[0], 10)
    with pytest.raises(NoCheckpoint, match=f"{name}.*give another checkpoint of the run"):
        find_checkpoint(directory(run, 20))


@pytest.mark.parametrize("how", ["empty", "torn", "zeroed"])
def test_a_damaged_manifest_does_too(run: str, how: str) -> None:
    save(run, 10)
    save(run, 20)
    rot(Path(directory(run, 20), "manifest.json"), how)
    found, rejected = newest_checkpoint(run)
    assert_holds(found, 10)
    assert rejected == ["ignored step_00000020: manifest.json is damaged"]


def test_every_bit_of_every_tensor_file_counts(run: str) -> None:
    save(run, 10)
    path = Path(save(run, 20).path, "model.safetensors")
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 7):  # 7: every position within a byte gets its turn
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        found, _ = newest_checkpoint(run)
        assert found is not None and found.step == 10
    path.write_bytes(data)
    assert_holds(newest_checkpoint(run)[0], 20)


def test_no_flipped_bit_in_a_manifest_is_believed_or_crashes(run: str) -> None:
    save(run, 10)
    path = Path(save(run, 20).path, "manifest.json")
    data, wrong = path.read_bytes(), []
    for bit in range(0, 8 * len(data), 3):  # 3: every position within a byte gets its turn
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found, _ = newest_checkpoint(run)
            if found is None or found.step not in (10, 20) or found.state()["step"] != found.step:
                wrong.append(f"{bytes(flipped[max(0, bit // 8 - 12) : bit // 8 + 12])!r}: {found}")
        except ConfigError as error:  # a version that looks newer
            assert "upgrade ddpm-pipeline" in str(error)
        except Exception as error:
            wrong.append(f"{bytes(flipped[max(0, bit // 8 - 12) : bit // 8 + 12])!r}: {error!r}")
    assert wrong == []


def test_without_any_valid_checkpoint_a_run_does_not_start_at_zero(run: str) -> None:
    for step in (10, 20):
        rot(Path(save(run, step).path, "ema.safetensors"), "flipped")
    for search in (newest_checkpoint, find_checkpoint):
        with pytest.raises(NoCheckpoint) as caught:
            search(run)
        message = str(caught.value)
        assert message.startswith(f"{run}: no valid checkpoint (ignored step_00000020: ema.safetensors does not match")
        assert (
            "step_00000010" in message
            and "restore a checkpoint, or choose another run.dir" in message
            and "\n" not in message
        )


def test_a_newer_format_is_refused_with_both_versions(run: str) -> None:
    path = Path(save(run, 10).path, "manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    for search in (newest_checkpoint, find_checkpoint):
        with pytest.raises(ConfigError, match=r"format 2, this version reads up to 1: upgrade ddpm-pipeline"):
            search(run)


def test_a_manifest_of_another_step_is_not_believed(run: str) -> None:
    save(run, 10)
    shutil.copytree(directory(run, 10), directory(run, 20))
    found, rejected = newest_checkpoint(run)
    assert_holds(found, 10)
    assert rejected == ["ignored step_00000020: manifest.json is damaged"]


def test_a_checkpoint_of_format_1_loads_for_ever() -> None:
    """Made when the format was. If this fails, runs that people have can not go on: mend the reader, not the files."""
    found, rejected = find_checkpoint(str(GOLDEN))
    assert (found.step, rejected, verify_checkpoints(str(GOLDEN))) == (12, [], [])
    count = torch.arange(12.0)
    expected = {
        "model": {"conv.weight": count.reshape(3, 2, 1, 2) / 8, "conv.bias": count[:3] - 1},
        "ema": {"conv.weight": count.reshape(3, 2, 1, 2) / 16, "conv.bias": count[:3]},
        "optimizer": {
            "exp_avg.conv.bias": count[:3] / 4,
            "exp_avg_sq.conv.bias": count[:3].square(),
            "step.conv.bias": torch.tensor(12.0),
        },
    }
    for part, tensors in expected.items():
        live = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        found.restore(part, live)
        assert all(torch.equal(live[name], tensor) for name, tensor in tensors.items())
        assert found.tensors(part).keys() == tensors.keys()
    state = found.state()
    position = TrainState(**state["position"])
    assert (position.step, position.samples, position.lanes, state["data_samples"]) == (12, 144, 12, 1797)
    assert config_file.parse_stored(state["config"]).train.global_batch == 12


# --- what is where ---


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"


def test_what_is_saved_is_found_locally_and_remotely(place: str) -> None:
    assert newest_checkpoint(place) == (None, [])
    for step in (10, 20):
        assert_holds(save(place, step), step)
        assert_holds(find_checkpoint(place)[0], step)
    assert newest_checkpoint(place) == find_checkpoint(directory(place, 20))
    assert sorted(content(place, 20)) == sorted([*FILES, "manifest.json"])
    storage.remove(storage.join(directory(place, 20), "manifest.json"))
    assert_holds(find_checkpoint(place)[0], 10)


def test_equal_tensors_give_equal_bytes_whatever_their_history(run: str, tmp_path: Path) -> None:
    """No clock, order of insertion, memory layout or autograd history is in the files."""
    x, y = torch.randn(4, 3, 2, 2), torch.randn(5)
    plain = {"x": x, "y": y}
    other = {"y": y.clone().requires_grad_(), "x": x.to(memory_format=torch.channels_last)}
    first = write_checkpoint(run, 7, files({"model": plain, "ema": plain, "optimizer": plain}, {"world_size": 1}))
    second = write_checkpoint(
        str(tmp_path / "elsewhere"),
        7,
        files({"optimizer": other, "ema": other, "model": other}, {"world_size": 2}),
        generation=3,
    )
    for part in ("model", "ema", "optimizer"):
        one, two = (storage.read_bytes(f"{found.path}/{part}.safetensors") for found in (first, second))
        assert one == two


def test_files_are_safetensors_and_json_and_nothing_else(run: str) -> None:
    for name, data in content(save(run, 10).path.partition("/checkpoints")[0], 10).items():
        if name.endswith(".json"):
            json.loads(data)
            continue
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert "__metadata__" not in header
        assert max(entry["data_offsets"][1] for entry in header.values()) == len(data) - 8 - length
        assert safetensors.torch.load(data).keys() == header.keys()


def test_the_manifest_says_size_and_hash_of_each_file(run: str) -> None:
    save(run, 10)
    files = content(run, 10)
    manifest = json.loads(files.pop("manifest.json"))
    assert (manifest["version"], manifest["step"], manifest["generation"]) == (1, 10, 0)
    assert manifest["files"] == {
        n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()
    }


def test_a_checkpoint_is_identified_by_what_it_holds(run: str, tmp_path: Path) -> None:
    same, other = (
        save(str(tmp_path / "a"), 10),
        write_checkpoint(str(tmp_path / "b"), 10, files(parts(11), {"step": 10, "config": "train: {}\n"})),
    )
    assert save(run, 10).manifest_sha256 == same.manifest_sha256 != other.manifest_sha256
    assert find_checkpoint(run)[0].manifest_sha256 == same.manifest_sha256


def test_a_step_that_is_written_again_is_replaced_completely(place: str) -> None:
    """After a rollback past a damaged one: no file of the earlier attempt is left among the new ones."""
    write_checkpoint(place, 20, files(parts(99) | {"scaler": parts(99)["model"]}, {"step": 99}))
    assert_holds(save(place, 20), 20)
    assert_holds(newest_checkpoint(place)[0], 20)
    assert sorted(content(place, 20)) == sorted([*FILES, "manifest.json"])


def test_a_full_disk_is_reported_in_bytes_before_anything_is_changed(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 10)
    needed = sum(map(len, content(run, 10).values())) - len(content(run, 10)["manifest.json"])
    monkeypatch.setattr(storage, "free_bytes", lambda url: needed - 1)
    with pytest.raises(DataError) as caught:
        save(run, 20)
    assert str(caught.value) == (
        f"cannot write {directory(run, 20)}: it takes {needed:,} bytes and {needed - 1:,} are free: make room"
    )
    assert storage.listdir(storage.join(run, "checkpoints")) == ["step_00000010"]
    monkeypatch.setattr(storage, "free_bytes", lambda url: needed)
    assert_holds(save(run, 20), 20)


def test_a_job_that_has_lost_the_lease_commits_nothing_however_late_it_notices(place: str) -> None:
    """And removes nothing: what lies there may be the next holder's by then."""
    for told_at in range(2 * len(FILES) + 2):  # before and after each file is written, too
        save(place, 10)
        calls = 0

        def check_lease(told_at: int = told_at) -> None:
            nonlocal calls
            calls += 1
            if calls > told_at:
                raise RunHeld("another job")

        with pytest.raises(RunHeld):
            write_checkpoint(place, 20, files(parts(20), {"step": 20}), check_lease=check_lease)
        assert not storage.exists(storage.join(directory(place, 20), "manifest.json"))
        assert len(storage.listdir(directory(place, 20))) == max(0, (told_at - 1) // 2)
        assert_holds(newest_checkpoint(place)[0], 10)
        storage.remove(place)


def test_the_newest_committed_step_is_known_without_reading_it(place: str) -> None:
    assert committed_step(place) == 0
    for step in (10, 20, 30):
        save(place, step)
    storage.remove(storage.join(directory(place, 30), "manifest.json"))
    storage.write_bytes(storage.join(directory(place, 20), "model.safetensors"), b"")
    assert committed_step(place) == 20


def test_steps_are_ordered_as_numbers_and_other_names_ignored(run: str) -> None:
    for step in (99_999_999, 100_000_000):
        save(run, step)
    for name in ("step_5", "latest", "step_00000001.bak", ".step_99999999"):
        Path(run, "checkpoints", name).mkdir()
    assert_holds(newest_checkpoint(run)[0], 100_000_000)
    assert verify_checkpoints(run) == []


def test_a_missing_source_and_a_run_without_checkpoint_are_different_errors(run: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint: train it first \(.* run\.dir=.*\), or see `ddpm runs DIR`"):
        find_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(NoCheckpoint, match="holds no checkpoint yet: train first"):
        find_checkpoint(str(tmp_path))


# --- weights that are not finite, and rows of bad steps ---


def save_at(run: str, step: int, *, bad_in_a_row: int = 0, updates: int | None = None) -> None:
    position = {"bad_in_a_row": bad_in_a_row, "ema_updates": step if updates is None else updates}
    write_checkpoint(run, step, files(parts(step), {"step": step, "position": position}))


def test_the_best_checkpoint_stays_until_another_one_is_best(run: str) -> None:
    for step in range(10, 60, 10):
        save_at(run, step)
    storage.write_json(storage.join(run, "best.json"), {"step": 20, "frechet_distance": 1.5})
    remove_old(run, keep_last=2, keep_every=0)
    assert checkpoint.RunDir(run).checkpoint_steps() == [20, 40, 50]
    assert checkpoint.best_checkpoint(run) == directory(run, 20) and checkpoint.lowest_distance(run) == 1.5
    storage.write_json(storage.join(run, "best.json"), {"step": 40, "frechet_distance": 1.25})
    remove_old(run, keep_last=1, keep_every=0)
    assert checkpoint.RunDir(run).checkpoint_steps() == [40, 50]


def spoil(run: str, step: int, part: str, value: float) -> None:
    """Write a checkpoint again with one value of one tensor changed; all of its files agree."""
    spoiled = parts(step)
    spoiled[part]["conv.bias"][1] = value
    write_checkpoint(run, step, files(spoiled, {"step": step}))


def test_a_file_that_holds_no_tensors_is_no_checkpoint_though_its_hash_agrees(run: str) -> None:
    save(run, 10)
    write_checkpoint(run, 20, {"state.json": [b"{}"], "model.safetensors": [b"no tensors"]})
    found, rejected = newest_checkpoint(run)
    assert_holds(found, 10)
    assert rejected == ["ignored step_00000020: model.safetensors is damaged"]


def test_an_optimizer_that_is_not_finite_is_not_gone_on_with(run: str) -> None:
    spoiled = parts(1)
    spoiled["optimizer"]["exp_avg.conv.bias"][1] = torch.nan
    saved = write_checkpoint(run, 1, files(spoiled, {"step": 1}))
    with pytest.raises(NoCheckpoint, match=r"optimizer.safetensors is not finite \(exp_avg.conv.bias\): remove it"):
        saved.restore("optimizer", parts(1)["optimizer"])


@pytest.mark.parametrize("part", ["model", "ema"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_no_checkpoint(run: str, part: str, value: float) -> None:
    for step in (10, 20, 30):
        save(run, step)
    spoil(run, 30, part, value)
    reason = f"{part}.safetensors holds weights that are not finite (conv.bias)"
    found, rejected = newest_checkpoint(run)
    assert_holds(found, 20)
    assert rejected == [f"ignored step_00000030: {reason}"] and verify_checkpoints(run) == [f"step_00000030: {reason}"]
    with pytest.raises(NoCheckpoint, match=r"not finite \(conv.bias\): give another checkpoint of the run"):
        find_checkpoint(directory(run, 30))
    remove_old(run, keep_last=2, keep_every=0)
    assert kept(run) == [10, 20, 30]
    for step in (10, 20):
        spoil(run, step, part, value)
    with pytest.raises(NoCheckpoint, match="no valid checkpoint"):
        newest_checkpoint(run)


def test_checkpoints_in_a_row_of_bad_steps_push_no_good_one_out(run: str) -> None:
    save_at(run, 10)
    save_at(run, 20)
    for step in range(30, 70, 10):
        save_at(run, step, bad_in_a_row=step - 20, updates=20)
        remove_old(run, keep_last=2, keep_every=40)
        assert kept(run) == sorted({10, 20, step} | ({40} if step >= 40 else set()))
    save_at(run, 70)
    save_at(run, 80)
    remove_old(run, keep_last=2, keep_every=0)
    assert kept(run) == [70, 80]


def test_the_newest_sound_checkpoint_is_one_that_a_good_step_was_taken_from(run: str) -> None:
    save_at(run, 10)
    save_at(run, 20)
    save_at(run, 21, bad_in_a_row=1, updates=20)
    save_at(run, 30, updates=29)
    save_at(run, 31, bad_in_a_row=1, updates=29)
    assert newest_safe_checkpoint(run, 30) == "step_00000030"
    assert newest_safe_checkpoint(run, 29) == "step_00000020"
    rot(Path(directory(run, 20), "model.safetensors"), "flipped")
    assert newest_safe_checkpoint(run, 29) == "step_00000010"
    assert newest_safe_checkpoint(run, 10) is None


# --- retention ---


def kept(run: str) -> list[int]:
    return [int(name.removeprefix("step_")) for name in storage.listdir(storage.join(run, "checkpoints"))]


def test_retention_keeps_the_newest_milestones_and_marked_checkpoints(place: str) -> None:
    for step in range(10, 100, 10):
        found = save(place, step)
        if step == 20:
            keep_forever(found)
    remove_old(place, keep_last=2, keep_every=40)
    assert kept(place) == [20, 40, 80, 90]
    assert verify_checkpoints(place) == []
    remove_old(place, keep_last=2, keep_every=0)
    assert kept(place) == [20, 80, 90]  # 40 was a milestone, 20 is marked for good
    assert_holds(find_checkpoint(directory(place, 20))[0], 20)


def test_remains_of_failed_saves_do_not_push_a_good_one_out(place: str) -> None:
    for step in (10, 20, 30, 40):
        save(place, step)
    for step in (30, 40):
        storage.remove(storage.join(directory(place, step), "manifest.json"))
    remove_old(place, keep_last=2, keep_every=0)
    assert_holds(newest_checkpoint(place)[0], 20)
    assert_holds(find_checkpoint(directory(place, 10))[0], 10)


def test_retention_of_few_or_none_removes_nothing(run: str) -> None:
    remove_old(run, 2, 0)
    save(run, 10)
    remove_old(run, 2, 0)
    assert kept(run) == [10]


def test_damaged_checkpoints_do_not_push_a_good_one_out(run: str) -> None:
    for step in (10, 20, 30, 40):
        save(run, step)
    for step in (30, 40):
        rot(Path(directory(run, step), "model.safetensors"), "empty")
    remove_old(run, keep_last=2, keep_every=0)
    assert_holds(newest_checkpoint(run)[0], 20)


def test_retention_reads_only_checkpoints_that_are_not_verified(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing gigabytes after each save would take longer than the save."""
    paths = [save(run, step).path for step in (10, 20, 30, 40)]
    hashed, sha256 = [], storage.sha256

    def counting(url: str) -> str:
        hashed.append(url.rpartition("/")[0])
        return sha256(url)

    monkeypatch.setattr(storage, "sha256", counting)
    remove_old(run, 3, 0, verified_paths=[paths[3], paths[1]])
    assert kept(run) == [20, 30, 40]
    assert hashed == [paths[2]] * len(FILES)
