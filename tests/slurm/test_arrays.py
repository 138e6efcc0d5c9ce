"""Job arrays on a real SLURM: no task owns anything by its number, and a part is a part of one whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluation.test_features import npz, resnet_weights
from tests.launch import ddpm
from tests.slurm.cluster import ROOT, Cluster, Job, thaw

pytestmark = pytest.mark.timeout(1800)  # the other file of this directory may have the cluster
SHARDS = 6
SLOW = ("--shard-samples", "16", "--sampler", "ddpm", "--steps", "100")


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "index.json"}


def test_a_sampling_task_may_be_stopped_and_killed_and_the_set_is_whole(
    cluster: Cluster, tiny_run: Path, tmp_path: Path
) -> None:
    out, once = tmp_path / "samples", tmp_path / "once"
    asked = (tiny_run, "--seeds", f"0-{16 * SHARDS - 1}", *SLOW)
    script = ("launch/slurm/sample.sbatch", *asked, "--out", out)
    array = cluster.submit("--array=0-1", *script, log=tmp_path / "%a.log")
    tasks = [Job(cluster, f"{array.number}_{task}", tmp_path / f"{task}.log") for task in (0, 1)]
    held, stopped = (task.freeze("sample", count=1)[0] for task in tasks)
    tasks[1].cancel("--batch", "--signal=USR2")
    tasks[1].until(lambda: Path(stopped.environ()["DDPM_STOP_FILE"]).exists())
    thaw([stopped])
    tasks[1].until(
        lambda: tasks[1]["Restarts"] == "1" and tasks[1]["JobState"] == "RUNNING"
    )  # it requeues itself alone
    assert tasks[0]["Restarts"] == "0"
    (killed,) = tasks[1].freeze("sample", count=1)
    killed.kill()
    assert tasks[1].end() == "FAILED" and tasks[1]["Restarts"] == "1"
    assert not (out / "index.json").exists()

    alone = cluster.submit("--array=1", *script, log=tmp_path / "again.log")
    again = Job(cluster, f"{alone.number}_1", tmp_path / "again.log")
    assert again.end() == "COMPLETED", again.text()
    assert ddpm("verify", out).returncode == 0
    ddpm("sample", *asked, "--out", once).check_returncode()
    tars = {name: data for name, data in files(once).items() if name.endswith(".tar")}
    assert len(tars) == SHARDS
    assert {name: data for name, data in files(out).items() if name.endswith(".tar")} == tars

    thaw([held])  # a slow task finds all done, and harms nothing
    assert tasks[0].end() == "COMPLETED", tasks[0].text()
    assert ddpm("verify", out).returncode == 0
    assert {name: data for name, data in files(out).items() if name.endswith(".tar")} == tars


def test_an_evaluation_may_be_stopped_and_its_figures_are_those_of_one_process(
    cluster: Cluster, digits: Path, tmp_path: Path
) -> None:
    npz(tmp_path / "resnet.npz", resnet_weights())
    asked = (digits, "--against", digits, "--features", tmp_path / "resnet.npz", "--cache")
    script = ("launch/slurm/evaluate.sbatch", *asked, tmp_path / "cache")
    array = cluster.submit("--array=0", *script, log=tmp_path / "log")
    task = Job(cluster, f"{array.number}_0", tmp_path / "log")
    (held,) = task.freeze("evaluate", count=1)
    task.cancel("--batch", "--signal=USR2")
    task.until(lambda: Path(held.environ()["DDPM_STOP_FILE"]).exists())
    thaw([held])
    assert task.end() == "COMPLETED" and task["Restarts"] == "1", task.text()
    assert "stop requested" in task.text() and "frechet distance" in task.text()
    ddpm("evaluate", *asked, tmp_path / "alone").check_returncode()
    figures = [(tmp_path / name / "evaluation.json").read_bytes() for name in ("cache", "alone")]
    assert figures[0] == figures[1]


def test_parts_of_a_shard_set_are_the_bytes_of_one_job(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits"
    script = ("launch/slurm/shard.sbatch", ROOT / "shards/digits.zip", "--out", out, "--size", "8", "--channels", "1",
              "--shard-samples", "300", "--workers", "1")  # fmt: skip
    array = cluster.submit("--array=0-1", *script, log=tmp_path / "%a.log")
    tasks = [Job(cluster, f"{array.number}_{task}", tmp_path / f"{task}.log") for task in (0, 1)]
    assert [task.end() for task in tasks] == ["COMPLETED", "COMPLETED"], tasks[0].text() + tasks[1].text()
    assert ddpm("verify", out).returncode == 0
    assert files(out) == files(digits)
    assert (out / "index.json").read_bytes() == (digits / "index.json").read_bytes()


def test_a_part_alone_must_say_of_how_many(cluster: Cluster, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "digits"
    script = ("launch/slurm/shard.sbatch", ROOT / "shards/digits.zip", "--out", out, "--size", "8", "--channels", "1",
              "--shard-samples", "300", "--workers", "1")  # fmt: skip
    wrong = cluster.submit("--array=1", *script, log=tmp_path / "wrong.log")
    assert Job(cluster, f"{wrong.number}_1", tmp_path / "wrong.log").end() == "FAILED"
    assert "PARTS=N" in (tmp_path / "wrong.log").read_text() and not out.exists()
    right = cluster.submit("--array=1", *script, log=tmp_path / "right.log", PARTS="2")
    task = Job(cluster, f"{right.number}_1", tmp_path / "right.log")
    assert task.end() == "COMPLETED", task.text()
    tars = {name for name in files(out) if name.endswith(".tar")}
    assert tars == {name for name in files(digits) if name.endswith(".tar")} - {f"digits-{i:06d}.tar" for i in range(3)}
