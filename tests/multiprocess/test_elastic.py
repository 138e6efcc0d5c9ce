"""Stopped on four processes, a run goes on with two, one and four again: the same data and noise, in the same order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.launch import TINY, committed_step, ddpm, kill, launch, start, until

STEPS = 16
SETTINGS = ("train.micro_batch=3", "run.checkpoint_every=1", f"train.steps={STEPS}", "data.workers=0")


def trace(directory: Path) -> list[list[object]]:
    """What the steps were made of, in order; of a step that was done twice, the second time."""
    steps: dict[int, list[list[object]]] = {}
    starts: dict[int, int] = {}
    for path in sorted(directory.glob("*.jsonl"), key=lambda path: tuple(map(int, path.stem.split("-")))):
        begun = int(path.stem.split("-")[0])
        for line in path.read_text().splitlines():
            if not line.endswith("]]"):
                continue  # cut by the kill
            step, *sample = json.loads(line)
            if starts.get(step) != begun:
                starts[step], steps[step] = begun, []
            steps[step].append(sample)
    return [sample for step in sorted(steps) for sample in sorted(steps[step])]


@pytest.fixture(scope="module")
def root(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Undisturbed runs on four and on two processes, and one that was killed and continued on 4, 2, 1 and 4."""
    root = tmp_path_factory.mktemp("elastic")

    def begin(name: str, processes: int, number: int) -> int:
        (root / f"trace-{name}").mkdir(exist_ok=True)
        environment = {"TRACE": str(root / f"trace-{name}"), "START": str(number)}
        arguments = (*TINY, f"data.shards={digits}", f"run.dir={root / name}", *SETTINGS)
        launcher = start(
            processes, "traced", *arguments, log=root / f"log-{name}", package="tests.multiprocess", **environment
        )
        if name == "elastic" and number < 3:
            target = committed_step(root / name) + 3
            until(lambda: committed_step(root / name) >= target, launcher)
            kill(launcher)
            return 0
        return launcher.wait(180)

    for name, worlds in (("four", [4]), ("two", [2]), ("elastic", [4, 2, 1, 4])):
        for number, processes in enumerate(worlds):
            assert begin(name, processes, number) == 0, (root / f"log-{name}").read_text()[-4000:]
        assert (root / name / "DONE").exists()
    return root


def test_samples_timesteps_and_noise_come_in_the_same_order(root: Path) -> None:
    undisturbed = trace(root / "trace-four")
    assert len(undisturbed) == STEPS * 12
    assert [sample[0] for sample in undisturbed] == list(range(STEPS * 12))
    assert trace(root / "trace-two") == undisturbed
    assert trace(root / "trace-elastic") == undisturbed
    assert len(list((root / "trace-elastic").glob("*.jsonl"))) == 4 + 2 + 1 + 4


def test_weights_end_as_near_as_those_of_another_number_of_processes(root: Path) -> None:
    four, two, elastic = (
        load_file(root / name / f"checkpoints/step_{STEPS:08d}/ema.safetensors") for name in ("four", "two", "elastic")
    )

    def distance(other: dict) -> float:
        return sum(float((other[name] - four[name]).double().square().sum()) for name in four) ** 0.5

    assert distance(two) > 0
    assert distance(elastic) <= 2 * distance(two)


def test_the_global_batch_may_change_where_the_lanes_divide_it(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (*TINY, f"data.shards={digits}", f"run.dir={run}")
    assert ddpm("train", *arguments, "train.steps=2").returncode == 0
    refused = ddpm("train", *arguments, "train.steps=4", "train.global_batch=10", "train.micro_batch=auto")
    assert refused.returncode == 2
    assert "in 12 lanes: use a multiple of 12" in refused.stderr
    grown = ddpm("train", *arguments, "train.steps=4", "train.global_batch=24")
    assert grown.returncode == 0, grown.stderr
    position = json.loads((run / "checkpoints/step_00000004/state.json").read_text())["position"]
    assert position["samples"] == 2 * 12 + 2 * 24
    assert launch(2, "train", *arguments, "train.steps=6", "train.global_batch=36", log=tmp_path / "log") == 0
