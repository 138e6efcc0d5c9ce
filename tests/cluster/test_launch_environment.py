"""The environment of a launcher makes this process one of several only if its variables are complete."""

from __future__ import annotations

import os

import pytest

from pipeline.cluster import launch_environment
from pipeline.cluster.launch_environment import ProcessRank
from pipeline.errors import ConfigError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is set is set by the test; changes that the code makes end with it."""
    for name in list(os.environ):
        if name in NAMES or name.startswith(("ACCELERATE_", "PMI_", "OMPI_", "MV2_", "MPI_")):
            monkeypatch.setenv(name, "")  # remembered, so that it is restored
            monkeypatch.delenv(name)
    for name in (*NAMES, "PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "left_over",
    [
        {},
        {"RANK": ""},
        {"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": ""},
        {"WORLD_SIZE": " "},
        {"RANK": "0"},
        {"LOCAL_RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "any"},
        {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"PMI_SIZE": "", "OMPI_COMM_WORLD_SIZE": "unknown"},
        {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"},
        {"ACCELERATE_USE_DEEPSPEED": "false", "ACCELERATE_USE_FSDP": ""},
    ],
)
def test_leftover_variables_leave_one_process(left_over: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, left_over)
    assert launch_environment.prepare_training() == launch_environment.process_rank() == ProcessRank(0, 1, 0)
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & os.environ.keys()  # accelerate would take each for a launch


def test_complete_variables_make_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, WHOLE)
    assert launch_environment.prepare_training() == launch_environment.process_rank() == ProcessRank(1, 2, 1)


@pytest.mark.parametrize(
    ("left_over", "named"),
    [
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK is 3"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK is 1, but WORLD_SIZE is 1"),
        (WHOLE | {"RANK": "2"}, "RANK is 2"),
        (WHOLE | {"RANK": ""}, "RANK are not set"),
        (WHOLE | {"LOCAL_RANK": ""}, "LOCAL_RANK are not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"RANK": "²"}, "RANK is"),
    ],
)
def test_a_contradiction_is_refused(left_over: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, left_over)
    with pytest.raises(ConfigError, match=named):
        launch_environment.process_rank()


@pytest.mark.parametrize(
    ("left_over", "named"),
    [
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "PMI_SIZE is 2"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4"),
        (WHOLE | {"MASTER_ADDR": ""}, "MASTER_ADDR are not set"),
        (WHOLE | {"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED"),
        ({"ACCELERATE_USE_FSDP": "1"}, "ACCELERATE_USE_FSDP"),
    ],
)
def test_an_environment_for_another_way_to_train_is_refused(
    left_over: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, left_over)
    with pytest.raises(ConfigError, match=named):
        launch_environment.prepare_training()


def test_settings_of_accelerate_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_TORCH_DEVICE": "cuda:7", "PMI_SIZE": "x",
              "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "", "ACCELERATE_CPU_AFFINITY": "1"}  # fmt: skip
    set_all(monkeypatch, settings)
    assert launch_environment.dynamo_backend() == "INDUCTOR"
    launch_environment.clear_settings()
    assert {name for name in settings if name in os.environ} == {"ACCELERATE_CPU_AFFINITY"}
