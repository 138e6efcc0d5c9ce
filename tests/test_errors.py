"""The tree of errors is what scripts and schedulers act on: codes are fixed, messages are one line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import errors
from pipeline.errors import PipelineError

SOURCES = sorted(Path(errors.__file__).parent.rglob("*.py"))
CODES = {
    "PipelineError": 1, "ConfigError": 2, "RunHeld": 2, "Diverged": 2, "DataError": 3, "NoCheckpoint": 4,
    "RankLost": 1, "Stopped": 75,
}  # fmt: skip


def _raised(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(class, call) of every `raise SomePipelineError(...)`."""
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in CODES:
            yield call.func.id, call


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_exit_codes_are_those_of_the_manual(name: str, code: int) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, PipelineError)
    assert kind("x").exit_code == code


def test_no_error_is_missing_from_the_table() -> None:
    assert {name for name, value in vars(errors).items() if isinstance(value, type)} == CODES.keys()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_raised_messages_are_one_line_and_not_a_tuple(path: Path) -> None:
    for kind, call in _raised(ast.parse(path.read_text())):
        where = f"{path.name}:{call.lineno}"
        assert kind != "PipelineError", f"{where}: raise a subclass: its exit code tells the caller what to do"
        assert len(call.args) == 1, f"{where}: one argument, the message; two print as a tuple"
        literals = [part.value for part in ast.walk(call.args[0]) if isinstance(part, ast.Constant)]
        lines = [text for text in literals if isinstance(text, str) and "\n" in text]
        joins = isinstance(call.args[0], ast.Call)  # config joins one line a problem
        assert joins or not lines, f"{where}: one line: what is wrong, where, what to do"
