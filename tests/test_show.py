"""`ddpm show` knows what it is given and how far it is; `ddpm runs` lists runs by the state that their files tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import runs as runs_job
from pipeline import show as show_job
from pipeline.cluster import lease as leases
from pipeline.cluster.lease import Lease
from pipeline.errors import ConfigError
from pipeline.storage import files
from tests.launch import ddpm

GOLDEN = Path(__file__).parent / "golden" / "version_0_1"


def shown(path: object, preview: Path | None = None) -> dict[str, Any]:
    return show_job.as_json(show_job.show(str(path), str(preview) if preview else None))


# --- what a path is ---


def test_a_finished_run(tiny_run: Path) -> None:
    found = shown(tiny_run)
    last = json.loads((tiny_run / "log.jsonl").read_text().splitlines()[-1])
    assert (found["kind"], found["state"]) == ("run", "done")
    assert (found["step"], found["steps"], found["checkpoint"]) == (6, 6, "step_00000006")
    assert found["loss"] == last["train/loss"]
    assert (found["size"], found["classes"]) == ((8, 8), 10)
    assert found["next"].startswith(f"ddpm sample {tiny_run} ")


def test_a_finished_set_with_its_classes_and_rejected_inputs(digits: Path) -> None:
    found, index = shown(digits), json.loads((digits / "index.json").read_text())
    assert (found["kind"], found["state"], found["images"]) == ("shard set", "finished", 1797)
    assert (found["size"], found["channels"], found["shards"]) == ((8, 8), 1, 6)
    assert found["classes"] == index["counts"]["classes"]
    assert found["bytes"] == sum(path.stat().st_size for path in digits.glob("*.tar"))


@pytest.mark.parametrize(
    ("name", "kind", "state", "facts"),
    [
        ("run", "run", "stopped", {"step": 4, "steps": 8, "checkpoint": "step_00000004"}),
        ("run/checkpoints/step_00000004", "checkpoint", "finished", {"step": 4}),
        ("shards", "shard set", "unfinished: 12 of 24 inputs", {"images": 12, "shards": 2, "size": (8, 8)}),
        ("samples", "sample set", "unfinished", {"images": 8, "format": "tar"}),
        ("source.zip", "source", "images for a shard set", {}),
        ("config.yaml", "configuration", "of a run", {}),
        ("diffusers", "diffusers model", "finished", {"network": "UNet2DModel", "channels": 1}),
        ("", "runs", "1 runs", {}),
    ],
)
def test_what_version_0_1_wrote(name: str, kind: str, state: str, facts: dict[str, Any]) -> None:
    found = shown(GOLDEN / name if name else GOLDEN)
    assert (found["kind"], found["state"]) == (kind, state)
    assert facts.items() <= found.items()
    assert found["next"]


def test_directories_of_images_tars_features_and_nothing(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "cat/2.png", "dog/3.JPG", "notes.txt"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    found = shown(tmp_path / "photos")
    assert (found["kind"], found["state"], found["directories"]) == ("images", "3 of them", {"cat": 2, "dog": 1})
    assert found["next"] == f"ddpm shard {tmp_path}/photos --out SHARDSET --size 64"
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars/a.tar").touch()
    assert shown(tmp_path / "tars")["kind"] == "tars" and "ddpm index" in shown(tmp_path / "tars")["next"]
    (tmp_path / "cache/features-0123456789ab").mkdir(parents=True)
    (tmp_path / "cache/features-0123456789ab/a.safetensors").touch()
    assert shown(tmp_path / "cache")["state"] == "1 shards computed"
    assert shown(tmp_path / "cache/features-0123456789ab")["kind"] == "features"
    (tmp_path / "step_00000002").mkdir()
    assert shown(tmp_path / "step_00000002")["state"] == "unfinished: its save was killed"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is neither a run, a set, a model nor a directory of images: give"):
        shown(tmp_path / "empty")
    with pytest.raises(ConfigError, match="no such file or directory: give"):
        shown(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no command here reads"):
        shown(tmp_path / "photos/notes.txt")


def test_a_checkpoint_that_lost_bytes(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "run/checkpoints/step_00000004", tmp_path / "step_00000004")
    model = tmp_path / "step_00000004/model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    assert shown(tmp_path / "step_00000004")["state"].startswith("damaged: model.safetensors")


def test_an_imported_run(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "run", tmp_path / "run")
    (tmp_path / "run/imported.json").write_text(json.dumps({"from": "diffusers", "source": "here", "taken": {}}))
    found = shown(tmp_path / "run")
    assert (found["state"], found["imported_from"]) == ("imported", "diffusers, here")


def test_previews(digits: Path, tmp_path: Path) -> None:
    def sheet(path: object) -> np.ndarray[Any, Any]:
        shown(path, tmp_path / "p.png")
        return np.asarray(Image.open(tmp_path / "p.png"))

    assert sheet(digits).shape == (102, 102)  # 10 x 10 of 8 px with gaps of 2
    assert sheet(GOLDEN / "shards").shape == (32, 42)  # unfinished: 12 images
    assert sheet(GOLDEN / "samples").ndim >= 2
    shutil.copytree(GOLDEN / "run", tmp_path / "run")
    with pytest.raises(ConfigError, match="has no preview yet"):
        shown(tmp_path / "run", tmp_path / "q.png")
    (tmp_path / "run/previews").mkdir()
    for step in (4, 12):
        (tmp_path / f"run/previews/step_{step:08d}.png").write_bytes(b"%d" % step)
    shown(tmp_path / "run", tmp_path / "q.png")
    assert (tmp_path / "q.png").read_bytes() == b"12"
    with pytest.raises(ConfigError, match="is neither a run nor a set"):
        shown(GOLDEN / "source.zip", tmp_path / "r.png")
    assert not (tmp_path / "r.png").exists()


def test_the_command_prints_lines_or_json(tiny_run: Path) -> None:
    text, as_json = ddpm("show", tiny_run), ddpm("show", tiny_run, "--json")
    assert text.stdout.splitlines()[0] == f"{tiny_run}: run, done"
    assert json.loads(as_json.stdout)["step"] == 6
    assert ddpm("show", "/nowhere").returncode == 2


# --- runs ---


def _run(path: Path, **control: object) -> Path:
    shutil.copytree(GOLDEN / "run", path)
    for name, content in control.items():
        file = path / {"failed": "FAILED.json", "done": "DONE", "stopped": "control/stopped.json"}[name]
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return path


def test_runs_are_listed_with_their_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    _run(tmp_path / "a/deep/done", done={"step": 4})
    failure = {"rank": 1, "host": "n", "step": 3, "phase": "data", "error": "disk gone", "trace": "", "exit_code": 3}
    _run(tmp_path / "failed", failed=failure)
    _run(tmp_path / "stopped", stopped={"reason": "SIGTERM", "step": 4})
    _run(tmp_path / "new")
    shutil.rmtree(tmp_path / "new/checkpoints")
    (tmp_path / "failed/log.jsonl").write_text('ot,cut\n{"step": 5, "time": 1.0, "train/loss": 0.25}\n{"step": 6, "ti')
    (tmp_path / "no run").mkdir()
    _run(tmp_path / "killed")
    with Lease(str(_run(tmp_path / "running")), print), Lease(str(tmp_path / "killed"), print) as killed:
        dead = json.loads((tmp_path / "killed/control/lease-000001.json").read_text()) | {"pid": 1 << 30}
        killed.lost = True  # it beats no more
        (tmp_path / "killed/control/lease-000001.json").write_text(json.dumps(dead))
        found = {Path(run["path"]).name: run for run in runs_job.runs(str(tmp_path))}
        text = runs_job.as_text(list(found.values()))
    states = {name: run["state"] for name, run in found.items()}
    assert states == {
        "done": "done", "failed": "failed", "killed": "stopped", "new": "new", "running": "running",
        "stopped": "stopped",
    }  # fmt: skip
    assert found["failed"]["reason"] == "rank 1 at step 3: disk gone" and "failed: rank 1 at step 3: disk gone" in text
    assert found["stopped"]["reason"] == "on request (SIGTERM)"
    assert found["killed"]["reason"].endswith("was killed")
    assert [found["failed"][key] for key in ("step", "loss", "checkpoint")] == [5, 0.25, "step_00000004"]
    assert (found["new"]["step"], found["new"]["checkpoint"]) == (0, None)
    assert found["failed"]["age_s"] > 1e9 and found["done"]["age_s"] is None


def test_a_holder_on_another_machine_is_alive_if_its_counter_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    counter = iter(range(1000))
    with Lease(str(tmp_path / "run"), print):
        pass
    original = files.read_json

    def other_machine(url: str) -> Any:
        moved = {"count": next(counter) if moves else 0, "released": False, "machine": "elsewhere"}
        return original(url) | moved if "lease-" in url else original(url)

    monkeypatch.setattr(files, "read_json", other_machine)
    moves = True
    assert leases.living_holders([str(tmp_path / "run")])
    moves = False
    assert not leases.living_holders([str(tmp_path / "run")])


def test_runs_on_an_object_store(tmp_path: Path) -> None:
    url = "memory://show-runs/a"
    for path in (GOLDEN / "run").rglob("*"):
        if path.is_file():
            files.write_bytes(f"{url}/{path.relative_to(GOLDEN / 'run')}", path.read_bytes())
    (found,) = runs_job.runs("memory://show-runs")
    assert (found["path"], found["state"], found["checkpoint"]) == (url, "stopped", "step_00000004")
    assert shown(url)["kind"] == "run"


def test_no_runs_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        runs_job.runs(str(tmp_path))
    with pytest.raises(ConfigError, match="no such directory"):
        runs_job.runs(str(tmp_path / "nowhere"))
