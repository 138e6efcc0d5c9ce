"""A seed gives the same image, bit for bit, for any number of processes, any range it is part of, and after kills."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tests import warm
from tests.launch import ENVIRONMENT, command, ddpm, kill, launch, start, until

SEEDS = "0-39"
FLAGS = ("--seeds", SEEDS, "--shard-samples", "8")


def hashes(samples: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(samples.glob("*.tar"))}


def images(samples: Path) -> dict[str, bytes]:
    found = {}
    for path in samples.glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= {m.name: tar.extractfile(m).read() for m in tar if m.name.endswith(".png")}  # type: ignore[union-attr]
    return found


@pytest.fixture(scope="module")
def alone(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "samples"
    ddpm("sample", tiny_run, *FLAGS, "--out", out).check_returncode()
    return out


def test_a_sample_set_is_a_sound_shard_set(alone: Path) -> None:
    index = json.loads((alone / "index.json").read_text())
    assert index["samples"] == 40
    assert len(index["shards"]) == 5
    result = ddpm("verify", alone)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_same_bytes(alone: Path, tiny_run: Path, tmp_path: Path, processes: int) -> None:
    out, log = tmp_path / "samples", tmp_path / "log"
    assert launch(processes, "sample", tiny_run, *FLAGS, "--out", out, log=log) == 0, log.read_text()
    assert hashes(out) == hashes(alone)
    assert (out / "index.json").read_bytes() == (alone / "index.json").read_bytes()


def test_a_killed_job_does_only_what_is_missing(alone: Path, tiny_run: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "samples", tmp_path / "log"
    job = start(1, "sample", tiny_run, *FLAGS, "--out", out, log=log)
    assert until(lambda: len(list(out.glob("shard_*.json"))) >= 2, job)
    kill(job)
    there = {path: path.stat().st_mtime_ns for path in out.glob("shard_*.json")}
    again = ddpm("sample", tiny_run, *FLAGS, "--out", out, "--json")
    assert json.loads(again.stdout)["drawn"] == 40 - 8 * len(there)
    assert all(path.stat().st_mtime_ns == time for path, time in there.items())
    assert hashes(out) == hashes(alone)


def test_processes_killed_at_random_make_the_set_of_an_undisturbed_one(tiny_run: Path, tmp_path: Path) -> None:
    """3 independent processes. `make soak` draws 5,000 seeds and kills 30 times."""
    seeds, kills = int(os.environ.get("DDPM_SEEDS", "160")), int(os.environ.get("DDPM_KILLS", "4"))
    out, moments = tmp_path / "samples", random.Random(kills)
    asked = ("--seeds", f"0-{seeds - 1}", "--shard-samples", "8")
    ddpm("sample", tiny_run, *asked, "--out", tmp_path / "alone", timeout_s=1800).check_returncode()
    with (tmp_path / "log").open("w") as log:

        def start_one() -> subprocess.Popen[bytes]:
            return warm.Popen(command("sample", tiny_run, *asked, "--out", out), env=ENVIRONMENT, stderr=log)

        jobs = [start_one() for _ in range(3)]
        for i in range(kills):  # spread over the set, each at a random moment of the work on a shard
            victim, wanted = moments.randrange(3), seeds // 8 * i // kills
            assert until(lambda wanted=wanted: len(list(out.glob("shard_*.json"))) >= wanted, jobs[victim])
            time.sleep(moments.uniform(0, 0.05))
            jobs[victim].kill()
            assert jobs[victim].wait(60) == -signal.SIGKILL
            jobs[victim] = start_one()
            if i == kills // 2:
                unfinished = ddpm("verify", out)
                assert unfinished.returncode == 3
                told = r"seeds [0-9,-]+( and \d+ ranges more)? are missing \(\d+ in all\): the same"
                assert re.search(told, unfinished.stdout), unfinished.stdout
        assert [job.wait(1800) for job in jobs] == [0, 0, 0]
    assert hashes(out) == hashes(tmp_path / "alone") and len(hashes(out)) == -(-seeds // 8)
    assert (out / "index.json").read_bytes() == (tmp_path / "alone" / "index.json").read_bytes()
    done = ddpm("verify", out)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_job_stopped_on_request_goes_on_from_there(
    alone: Path, tiny_run: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "samples"
    asked = command("sample", tiny_run, "--seeds", "0-1999", "--shard-samples", "8", "--out", out)
    with (tmp_path / "log").open("w") as log:
        job = warm.Popen(asked, env=ENVIRONMENT, stderr=log)
    assert until(lambda: bool(list(out.glob("shard_*.json"))), job)
    job.send_signal(number)
    assert job.wait(60) == 75
    told = (tmp_path / "log").read_text()
    assert f"stop requested ({number.name}): finished shards are kept" in told and "Traceback" not in told
    assert not list(out.glob(".*")) and not (out / "index.json").exists()
    there = len(list(out.glob("shard_*.json")))
    assert 0 < there < 250
    ddpm("sample", tiny_run, *FLAGS, "--out", out).check_returncode()
    whole = hashes(alone)
    assert {name: sha for name, sha in hashes(out).items() if name in whole} == whole


def test_the_tasks_of_an_array_make_one_set(alone: Path, tiny_run: Path, tmp_path: Path) -> None:
    out, jobs = tmp_path / "samples", []
    for task in ("1", "2"):
        array = {f"SLURM_ARRAY_TASK_{name}": value for name, value in (("ID", task), ("MIN", "1"), ("COUNT", "2"))}
        jobs.append(warm.Popen(command("sample", tiny_run, *FLAGS, "--out", out), env=ENVIRONMENT | array))
    assert [job.wait(120) for job in jobs] == [0, 0]
    assert hashes(out) == hashes(alone)
    assert (out / "index.json").read_bytes() == (alone / "index.json").read_bytes()


def test_a_seed_does_not_depend_on_the_range_it_is_asked_in(alone: Path, tiny_run: Path, tmp_path: Path) -> None:
    ddpm("sample", tiny_run, "--seeds", "5,17-22", "--shard-samples", "8", "--out", tmp_path / "few").check_returncode()
    few, all_of_them = images(tmp_path / "few"), images(alone)
    assert sorted(few) == [f"{seed:09d}.png" for seed in (5, 17, 18, 19, 20, 21, 22)]
    assert all(few[name] == all_of_them[name] for name in few)


def test_extending_a_set_rewrites_only_a_partial_shard(alone: Path, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    ddpm("sample", tiny_run, "--seeds", "0-19", "--shard-samples", "8", "--out", out).check_returncode()
    whole = {name: (out / name).stat().st_mtime_ns for name in ("shard_000000.tar", "shard_000001.tar")}
    ddpm("sample", tiny_run, *FLAGS, "--out", out).check_returncode()
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == whole
    assert hashes(out) == hashes(alone)
    assert json.loads((out / "index.json").read_text())["samples"] == 40


def test_another_batch_size_gives_nearly_the_same_images(alone: Path, tiny_run: Path, tmp_path: Path) -> None:
    ddpm("sample", tiny_run, *FLAGS, "--batch", "1", "--out", tmp_path / "one").check_returncode()
    one, four = images(tmp_path / "one"), images(alone)
    for name, data in one.items():
        a, b = (np.asarray(Image.open(io.BytesIO(x))).astype(int) for x in (data, four[name]))
        assert np.abs(a - b).max() <= 1


def test_loose_pngs_and_npz_hold_the_same_images(alone: Path, tiny_run: Path, tmp_path: Path) -> None:
    ddpm("sample", tiny_run, *FLAGS, "--format", "png", "--out", tmp_path / "png").check_returncode()
    ddpm("sample", tiny_run, *FLAGS, "--format", "npz", "--out", tmp_path / "npz").check_returncode()
    tars = images(alone)
    assert {path.name: path.read_bytes() for path in (tmp_path / "png").rglob("*.png")} == tars
    with np.load(tmp_path / "npz" / "shard_000002.npz") as shard:
        for seed, image in zip(shard["seeds"], shard["images"]):
            assert (np.asarray(Image.open(io.BytesIO(tars[f"{seed:09d}.png"]))) == image[..., 0]).all()


def test_labels_go_round_by_seed_or_are_the_one_asked_for(alone: Path, tiny_run: Path, tmp_path: Path) -> None:
    ddpm("sample", tiny_run, *FLAGS, "--label", "7", "--out", tmp_path / "seven").check_returncode()
    for out, label in ((alone, None), (tmp_path / "seven", 7)):
        for path in out.glob("*.tar"):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        meta = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                        assert meta["label"] == (meta["seed"] % 10 if label is None else label)


def test_other_settings_are_not_mixed_into_a_set(tiny_run: Path, alone: Path) -> None:
    before = hashes(alone)
    refused = ddpm("sample", tiny_run, *FLAGS, "--out", alone, "--guidance", "3")
    assert refused.returncode == 2
    assert "guidance: 1.0 there, 3.0 now" in refused.stderr
    assert hashes(alone) == before


def test_grid_and_video_show_the_images(tiny_run: Path, tmp_path: Path) -> None:
    result = ddpm("sample", tiny_run, "--seeds", "0-8", "--grid", tmp_path / "g.png", "--video", tmp_path / "v.mp4")
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / "g.png").size == (3 * 10 + 2, 3 * 10 + 2)
    with av.open(str(tmp_path / "v.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) >= 5
