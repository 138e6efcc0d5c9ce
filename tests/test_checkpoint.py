"""Checkpoints: whatever happens while one is written, the loader finds the right step, and says what it ignored."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from pipeline import storage
from pipeline.errors import ConfigError, DataError, NoCheckpoint
from pipeline.run import checkpoint
from pipeline.run.checkpoint import find, keep, newest, retain, verify, write

FILES = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"]


def parts(step: int) -> dict[str, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(step)
    weights = {"conv.weight": torch.randn(3, 2, 2, generator=g), "conv.bias": torch.randn(3, generator=g)}
    ema = {name: value * 0.5 for name, value in weights.items()}
    optimizer = {"step.conv.bias": torch.tensor(float(step)), "exp_avg.conv.bias": torch.zeros(3)}
    return {"model": weights, "ema": ema, "optimizer": optimizer}


def save(run: str, step: int) -> checkpoint.Checkpoint:
    return write(run, step, parts(step), {"step": step, "config": "train: {}\n"})


def folder(run: str, step: int) -> str:
    return storage.join(run, "checkpoints", f"step_{step:08d}")


def content(run: str, step: int) -> dict[str, bytes]:
    path = folder(run, step)
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


# --- a process that dies ---


def die_at(operation: int, work: Callable[[], object], root: str) -> bool:
    """Run `work` in a child that is killed just before its n-th change under `root`; whether it lived to the end."""
    child = os.fork()
    if child == 0:
        count = 0

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            writes = event == "open" and str(arguments[0]).startswith(root) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        sys.addaudithook(audit)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, "the work itself failed"
    return status == 0


def crash_points(work: Callable[[], object], root: str, prepare: Callable[[], object]) -> Iterator[tuple[int, bool]]:
    """Prepare and die at operation 0, 1, …: yields each with whether `work` lived, which it does the last time."""
    operation, lived = 0, False
    while not lived:
        shutil.rmtree(root, ignore_errors=True)
        prepare()
        lived = die_at(operation, work, root)
        yield operation, lived
        operation += 1


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed save of step 20 leaves."""
    save(str(tmp_path / "undisturbed"), 20)
    return content(str(tmp_path / "undisturbed"), 20)


def test_killed_at_any_operation_of_a_save_the_run_goes_on_from_the_right_step(
    run: str, whole: dict[str, bytes]
) -> None:
    deaths, committed = 0, []
    for _, lived in crash_points(lambda: save(run, 20), run, lambda: save(run, 10)):
        deaths += not lived
        found, rejected = newest(run)
        complete = storage.exists(storage.join(folder(run, 20), "manifest.json"))
        committed.append(complete)
        assert_holds(found, 20 if complete else 10)
        begun = storage.exists(folder(run, 20))
        assert rejected == (["ignored step_00000020: no manifest.json"] if begun and not complete else [])
        save(run, 20)  # the next start
        assert content(run, 20) == whole
        assert verify(run) == []
    assert deaths >= 2 * len([*FILES, "manifest.json"])  # each file was begun and was named at least
    assert (
        committed == sorted(committed) and committed[-1] and not committed[-2]
    )  # the manifest's name is the last change


def test_killed_in_the_first_save_the_run_starts_anew(run: str, whole: dict[str, bytes]) -> None:
    for _, lived in crash_points(lambda: save(run, 20), run, lambda: None):
        found, _ = newest(run)
        assert found is None or storage.exists(storage.join(found.path, "manifest.json"))
        assert (found is not None) == lived
        save(run, 20)
        assert content(run, 20) == whole


def test_killed_while_a_damaged_checkpoint_is_replaced_nothing_is_lost(run: str, whole: dict[str, bytes]) -> None:
    def damaged() -> None:
        save(run, 10)
        save(run, 20)
        Path(folder(run, 20), "ema.safetensors").write_bytes(b"")

    for _, lived in crash_points(lambda: save(run, 20), run, damaged):
        assert_holds(newest(run)[0], 20 if lived else 10)
        save(run, 20)
        assert content(run, 20) == whole


def test_killed_at_any_operation_of_retention_the_newest_stay(run: str) -> None:
    def prepare() -> None:
        for step in (10, 20, 30, 40):
            save(run, step)
            for name in FILES:  # newer than the manifest: a directory may list, and so lose, the newest first
                path = Path(folder(run, step), name)
                data = path.read_bytes()
                path.unlink()
                path.write_bytes(data)

    deaths = 0
    for _, lived in crash_points(lambda: retain(run, 2, 0), run, prepare):
        deaths += not lived
        found, rejected = newest(run)
        assert_holds(found, 40)
        assert rejected == []
        assert all(finding.endswith("no manifest.json") for finding in verify(run))  # no half checkpoint looks whole
        retain(run, 2, 0)
        assert_holds(find(folder(run, 30))[0], 30)
        assert {30, 40} <= set(kept(run))
    assert deaths >= 12


def test_the_remains_of_a_killed_retention_are_removed_by_the_next(run: str) -> None:
    for step in (10, 20, 30):
        save(run, step)
    storage.remove(storage.join(folder(run, 10), "manifest.json"))  # killed here
    retain(run, 2, 0)
    assert kept(run) == [20, 30]


def test_a_disk_that_fails_at_any_write_leaves_the_older_checkpoint_and_no_remains(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for failing in range(len(FILES) + 1):
        shutil.rmtree(run, ignore_errors=True)
        save(run, 10)
        calls, write_bytes = 0, storage.write_bytes

        def full(url: str, data: bytes, failing: int = failing, write_bytes: Callable[..., None] = write_bytes) -> None:
            nonlocal calls
            calls += 1
            if calls > failing:
                raise DataError(f"cannot write {url}: no space left")
            write_bytes(url, data)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_bytes", full)
            with pytest.raises(DataError, match="no space left"):
                save(run, 20)
        assert not storage.exists(folder(run, 20))  # so that it does not hold the space the next attempt needs
        assert_holds(newest(run)[0], 10)
        save(run, 20)
        assert_holds(newest(run)[0], 20)


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
    rot(Path(folder(run, 20), name), how)
    found, rejected = newest(run)
    assert_holds(found, 10)
    (line,) = rejected
    assert line.startswith(f"ignored step_00000020: {reason.format(name)}") and "\n" not in line
    assert [finding.split(":")[0] for finding in verify(run)] == ["step_00000020"]
    assert_holds(find(run)[0], 10)
    with pytest.raises(NoCheckpoint, match=f"{name}.*take another checkpoint of the run"):
        find(folder(run, 20))


@pytest.mark.parametrize("how", ["empty", "torn", "zeroed"])
def test_a_damaged_manifest_does_too(run: str, how: str) -> None:
    save(run, 10)
    save(run, 20)
    rot(Path(folder(run, 20), "manifest.json"), how)
    found, rejected = newest(run)
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
        found, _ = newest(run)
        assert found is not None and found.step == 10
    path.write_bytes(data)
    assert_holds(newest(run)[0], 20)


def test_no_flipped_bit_in_a_manifest_is_believed_or_crashes(run: str) -> None:
    save(run, 10)
    path = Path(save(run, 20).path, "manifest.json")
    data, wrong = path.read_bytes(), []
    for bit in range(0, 8 * len(data), 3):  # 3: every position within a byte gets its turn
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found, _ = newest(run)
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
    for look in (newest, find):
        with pytest.raises(NoCheckpoint) as caught:
            look(run)
        message = str(caught.value)
        assert message.startswith(f"{run}: no valid checkpoint (ignored step_00000020: ema.safetensors does not match")
        assert "step_00000010" in message and "restore one, or move the run away" in message and "\n" not in message


def test_a_newer_format_is_refused_with_both_versions(run: str) -> None:
    path = Path(save(run, 10).path, "manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    for look in (newest, find):
        with pytest.raises(ConfigError, match=r"format 2, this version reads up to 1: upgrade ddpm-pipeline"):
            look(run)


# --- what is where ---


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"


def test_what_is_saved_is_found_locally_and_remotely(place: str) -> None:
    assert newest(place) == (None, [])
    for step in (10, 20):
        assert_holds(save(place, step), step)
        assert_holds(find(place)[0], step)
    assert newest(place) == find(folder(place, 20))
    assert sorted(content(place, 20)) == sorted([*FILES, "manifest.json"])
    storage.remove(storage.join(folder(place, 20), "manifest.json"))
    assert_holds(find(place)[0], 10)


def test_tensors_keep_type_and_shape(run: str) -> None:
    tensors = {
        "f32": torch.randn(2, 3),
        "bf16": torch.randn(4).bfloat16(),
        "f64": torch.randn(1).double(),
        "i64": torch.tensor([2**40]),
        "bool": torch.tensor([True]),
        "scalar": torch.tensor(0.1),
        "empty": torch.zeros(0, 3),
    }
    got = write(run, 1, {"model": tensors}, {}).tensors("model")
    assert got.keys() == tensors.keys()
    for name, value in tensors.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value) and got[name].shape == value.shape


def test_equal_tensors_give_equal_bytes_whatever_their_history(run: str, tmp_path: Path) -> None:
    """No clock, order of insertion, memory layout or autograd history is in the files."""
    x, y = torch.randn(4, 3, 2, 2), torch.randn(5)
    plain = {"x": x, "y": y}
    other = {"y": y.clone().requires_grad_(), "x": x.to(memory_format=torch.channels_last)}
    first = write(run, 7, {"model": plain, "ema": plain, "optimizer": plain}, {"world_size": 1})
    second = write(
        str(tmp_path / "elsewhere"), 7, {"optimizer": other, "ema": other, "model": other}, {"world_size": 2}
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
    assert (manifest["version"], manifest["step"]) == (1, 10)
    assert manifest["files"] == {
        n: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in files.items()
    }


def test_a_checkpoint_is_identified_by_what_it_holds(run: str, tmp_path: Path) -> None:
    same, other = (
        save(str(tmp_path / "a"), 10),
        write(str(tmp_path / "b"), 10, parts(11), {"step": 10, "config": "train: {}\n"}),
    )
    assert save(run, 10).manifest_sha256 == same.manifest_sha256 != other.manifest_sha256
    assert find(run)[0].manifest_sha256 == same.manifest_sha256


def test_a_valid_checkpoint_is_never_overwritten(run: str) -> None:
    save(run, 10)
    before = content(run, 10)
    write(run, 10, parts(99), {"step": 99})
    assert content(run, 10) == before


def test_steps_are_ordered_as_numbers_and_other_names_ignored(run: str) -> None:
    for step in (99_999_999, 100_000_000):
        save(run, step)
    for name in ("step_5", "latest", "step_00000001.bak", ".step_99999999"):
        Path(run, "checkpoints", name).mkdir()
    assert_holds(newest(run)[0], 100_000_000)
    assert verify(run) == []


def test_what_is_not_there_is_told_apart(run: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such run or checkpoint"):
        find(str(tmp_path / "nowhere"))
    with pytest.raises(NoCheckpoint, match="holds no checkpoint yet: train first"):
        find(str(tmp_path))


# --- retention ---


def kept(run: str) -> list[int]:
    return [int(name.removeprefix("step_")) for name in storage.listdir(storage.join(run, "checkpoints"))]


def test_retention_keeps_the_newest_milestones_and_what_was_marked(place: str) -> None:
    for step in range(10, 100, 10):
        found = save(place, step)
        if step == 20:
            keep(found)
    retain(place, keep_last=2, keep_every=40)
    assert kept(place) == [20, 40, 80, 90]
    assert verify(place) == []
    retain(place, keep_last=2, keep_every=0)
    assert kept(place) == [20, 80, 90]  # 40 was a milestone, 20 is marked for good
    assert_holds(find(folder(place, 20))[0], 20)


def test_remains_of_failed_saves_do_not_push_a_good_one_out(place: str) -> None:
    for step in (10, 20, 30, 40):
        save(place, step)
    for step in (30, 40):
        storage.remove(storage.join(folder(place, step), "manifest.json"))
    retain(place, keep_last=2, keep_every=0)
    assert_holds(newest(place)[0], 20)
    assert_holds(find(folder(place, 10))[0], 10)


def test_retention_of_few_or_none_removes_nothing(run: str) -> None:
    retain(run, 2, 0)
    save(run, 10)
    retain(run, 2, 0)
    assert kept(run) == [10]


def test_damaged_checkpoints_do_not_push_a_good_one_out(run: str) -> None:
    for step in (10, 20, 30, 40):
        save(run, step)
    for step in (30, 40):
        rot(Path(folder(run, step), "model.safetensors"), "empty")
    retain(run, keep_last=2, keep_every=0)
    assert_holds(newest(run)[0], 20)
