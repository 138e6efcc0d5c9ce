"""The manifests of launch/kubernetes and launch/skypilot.yaml: fields, policies and commands, without a cluster.

The fields of a Job below were taken from Kubernetes 1.37, and those of a JobSet from its v1alpha2; both manifests were
validated in full against these, see docs/cluster.md.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from typer.main import get_command

from pipeline import config_file
from pipeline.cli import app
from pipeline.cluster.launch_environment import ProcessRank, in_turn
from pipeline.errors import ConfigError, NoCheckpoint, Stopped

LAUNCH = Path(__file__).parents[2] / "launch"
SHARD, SAMPLE, TRAIN = (
    yaml.safe_load((LAUNCH / f"kubernetes/{name}.yaml").read_text()) for name in ("shard", "sample", "train")
)
SKY = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
JOBS = {
    "shard": SHARD["spec"],
    "sample": SAMPLE["spec"],
    "train": TRAIN["spec"]["replicatedJobs"][0]["template"]["spec"],
}
FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {
        "completionMode", "completions", "parallelism", "backoffLimit", "backoffLimitPerIndex", "podReplacementPolicy",
        "podFailurePolicy", "template",
    },
    "podFailurePolicy": {"rules"},
    "rules": {"action", "onPodConditions", "onExitCodes"},
    "onPodConditions": {"type", "status"},
    "onExitCodes": {"containerName", "operator", "values"},
    "template": {"spec", "metadata"},
    "template.spec": {"restartPolicy", "terminationGracePeriodSeconds", "containers", "volumes"},
    "containers": {"name", "image", "env", "command", "args", "resources", "volumeMounts"},
}  # fmt: skip
every = pytest.mark.parametrize("name", JOBS)


def _unknown(spec: dict[str, Any], path: str) -> Iterator[str]:
    """Fields that Kubernetes does not have there."""
    known = FIELDS.get("template.spec" if path == "spec" and "containers" in spec else path)
    for name, value in spec.items() if known else ():
        if name not in (known or ()):
            yield f"{path}.{name}"
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                yield from _unknown(part, name)


def _rules(name: str) -> list[dict[str, Any]]:
    return list(JOBS[name]["podFailurePolicy"]["rules"])


def _words(name: str) -> list[str]:
    (container,) = JOBS[name]["template"]["spec"]["containers"]
    assert container["command"] == ["bash", "-c"]
    (script,) = container["args"]
    return shlex.split(script)


@every
def test_a_job_has_only_fields_that_exist(name: str) -> None:
    assert list(_unknown(JOBS[name], "spec")) == []
    assert list(_unknown({"complections": 1}, "spec")) == ["spec.complections"]  # it can fail


@every
def test_what_kubernetes_asks_of_a_pod_failure_policy(name: str) -> None:
    """Neither it nor its schema says a word before the manifest is applied."""
    job, pod = JOBS[name], JOBS[name]["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and job["podReplacementPolicy"] == "Failed"
    assert job["completionMode"] == "Indexed" and job["parallelism"] <= job["completions"]
    (container,) = pod["containers"]
    for rule in _rules(name):
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        for condition in rule.get("onPodConditions", ()):
            assert condition == {"type": "DisruptionTarget", "status": "True"}
        if codes := rule.get("onExitCodes"):
            assert codes["containerName"] == container["name"] and codes["operator"] == "In"
            assert codes["values"] == sorted(set(codes["values"])) and 0 not in codes["values"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("name", ["shard", "sample"])
def test_preemption_is_no_failure_and_a_usage_error_ends_the_job(name: str) -> None:
    disrupted, stopped, usage = _rules(name)
    assert disrupted["action"] == stopped["action"] == "Ignore" and "onPodConditions" in disrupted
    assert stopped["onExitCodes"]["values"] == [Stopped.exit_code]
    assert usage["action"] == "FailJob"
    assert usage["onExitCodes"]["values"] == [ConfigError.exit_code, NoCheckpoint.exit_code]
    assert JOBS[name]["backoffLimitPerIndex"] == 3 and "backoffLimit" not in JOBS[name]


def test_a_preempted_training_job_restarts_and_does_not_count() -> None:
    assert TRAIN["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert all(rule["action"] == "FailJob" for rule in _rules("train"))
    assert [rule["onExitCodes"]["values"] for rule in _rules("train") if "onExitCodes" in rule] == [[Stopped.exit_code]]
    policy = TRAIN["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 5 and JOBS["train"]["backoffLimit"] == 0
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]


@pytest.mark.parametrize("name", ["shard", "sample"])
def test_the_command_has_options_that_exist_and_the_number_of_tasks_is_said_once(name: str) -> None:
    assert _words(name)[:3] == ["exec", "ddpm", name]
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, _words(name)[3:])
    variables = {entry["name"]: entry["value"] for entry in JOBS[name]["template"]["spec"]["containers"][0]["env"]}
    assert variables == {"JOB_COMPLETIONS": str(JOBS[name]["completions"])}
    if name == "shard":
        assert _words(name)[-2:] == ["--part", "$JOB_COMPLETION_INDEX/$JOB_COMPLETIONS"]


@pytest.mark.parametrize(
    "words", [_words("train"), shlex.split(SKY["run"].replace("\\\n", " "))], ids=["jobset", "skypilot"]
)
def test_training_starts_under_the_supervisor_with_options_that_accelerate_has(words: list[str]) -> None:
    words = words[words.index("exec") :]
    assert words[:6] == ["exec", "python", "-m", "pipeline.cluster.supervise", "accelerate", "launch"]
    known = {flag for action in launch_command_parser()._actions for flag in action.option_strings}
    inner = words.index("pipeline.train")
    assert {word for word in words[6:inner] if word.startswith("--")} <= known
    assert words[inner + 1] == "--config"
    file, *settings = words[inner + 2 :]
    config = LAUNCH.parent / "configs" / Path(file).name
    loaded = config_file.load(str(config), settings, lambda name: Path(name).read_text())
    assert loaded.run.dir.endswith("/runs/mine")


def test_the_ranks_of_a_jobset_follow_from_its_numbers() -> None:
    words, name = _words("train"), TRAIN["metadata"]["name"]
    variables = {entry["name"]: entry["value"] for entry in JOBS["train"]["template"]["spec"]["containers"][0]["env"]}
    assert int(variables["NODES"]) == JOBS["train"]["completions"] == JOBS["train"]["parallelism"]
    limits = JOBS["train"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(variables["GPUS"]) == limits["nvidia.com/gpu"]
    master = words[words.index("--main_process_ip") + 1]
    assert master == f"{name}-{TRAIN['spec']['replicatedJobs'][0]['name']}-0-0.{name}"
    grace = JOBS["train"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert int(variables["PET_SHUTDOWN_TIMEOUT"]) < grace


def test_skypilot_recovers_a_stopped_run_and_not_a_killed_one() -> None:
    recovery = SKY["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 3, "recover_on_exit_codes": [Stopped.exit_code]}
    assert SKY["resources"]["use_spot"] is True
    assert set(SKY) <= {"name", "num_nodes", "resources", "file_mounts", "workdir", "setup", "run", "envs"}
    assert set(re.findall(r"\$\(*(SKYPILOT_\w+)", SKY["run"])) <= {
        "SKYPILOT_NUM_NODES", "SKYPILOT_NUM_GPUS_PER_NODE", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS",
    }  # fmt: skip


@pytest.mark.parametrize("tasks", [1, 3, 16])
def test_each_index_starts_at_its_own_place_and_covers_all_shards(tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = list(range(48))
    for name in ("ID", "MIN", "COUNT"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)
    monkeypatch.setenv("JOB_COMPLETIONS", str(tasks))
    starts = []
    for index in range(tasks):
        monkeypatch.setenv("JOB_COMPLETION_INDEX", str(index))
        order = in_turn(shards, ProcessRank())
        assert sorted(order) == shards
        starts.append(order[0])
    assert starts == [48 * index // tasks for index in range(tasks)]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "4")
    assert in_turn(shards, ProcessRank())[0] == 24  # a job array of SLURM comes first
