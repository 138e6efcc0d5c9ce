"""Every hostile file of `attacks.py` is refused in one line, with little time and memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.attacks import ATTACKS, GIB

_CPU_S = 10
_VALID = {"directories_1500_deep"}  # unusual, but valid


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (3 * GIB, 3 * GIB))
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.attacks", str(tmp_path_factory.mktemp("attacks"))],
        capture_output=True, text=True, preexec_fn=_limited, cwd=Path(__file__).parents[1], check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_answered(name: str, answers: dict[str, dict[str, Any]]) -> None:
    answer = answers[name]["answer"]
    is_refused = answer.startswith(("DataError", "ConfigError", "found: ")) or "rejected: " in answer
    assert is_refused or name in _VALID, answer
    assert answer.isprintable()
    assert "pwned" not in answer or "\\x1b" in answer


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_costs_little(name: str, answers: dict[str, dict[str, Any]]) -> None:
    assert answers[name]["cpu_s"] < _CPU_S
    assert answers[name]["peak_kb"] < 1024 * 1024
