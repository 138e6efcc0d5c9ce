"""The shape of the house, read from the imports of every module: what may know what, and where disks are touched.

    cli → jobs → joints → rooms → config(file), noise, storage, errors

Imports point downward only. Jobs are the front doors; joints bring rooms together for them; rooms do not know each
other. A module that is not listed here is a room's if it lies in a folder, and must be added here if it does not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "pipeline"
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
CLI = {"pipeline.cli"}
_JOB_NAMES = ("shard", "train", "sample", "verify", "index", "evaluate", "export", "plan", "doctor")
JOBS = {f"pipeline.{job}" for job in _JOB_NAMES}
JOINTS = {"pipeline.trainer", "pipeline.generator", "pipeline.scorer", "pipeline.footprint"}
ROOMS = {"data", "diffusion", "model", "run", "score"}
BOTTOM = {
    "pipeline.config": {"pipeline.errors"},
    "pipeline.configfile": {"pipeline.config", "pipeline.errors"},
    "pipeline.remote": {"pipeline.errors"},
    "pipeline.storage": {"pipeline.remote", "pipeline.errors"},
    "pipeline.noise": set(),
    "pipeline.errors": set(),
}
JOINT_MAY_USE = {"pipeline.trainer": {"pipeline.generator"}}
PURE = {
    "pipeline.config",
    "pipeline.configfile",
    "pipeline.noise",
    "pipeline.errors",
    "pipeline.data.order",
    "pipeline.data.images",
    "pipeline.data.colour",
    "pipeline.data.dedupe",
    "pipeline.data.summary",
    "pipeline.data.grid",
    "pipeline.run.learning_rate",
    "pipeline.run.continuity",
    "pipeline.score.moments",
} | {name for name in MODULES if name.startswith("pipeline.diffusion")}
IMPURE = {
    "os", "sys", "pathlib", "time", "datetime", "fsspec", "socket", "subprocess", "random", "shutil", "tempfile",
    "multiprocessing", "threading", "platform",
}  # fmt: skip
DRAWERS = {"utils", "util", "helpers", "helper", "common", "base", "misc", "core", "tools", "lib", "shared"}
DELETERS = {"rename", "renames", "replace", "remove", "removedirs", "unlink", "rmdir", "rmtree", "move"}
MAX_LINES = 400
UNPICKLERS = [("pipeline.data.cifar", {"pickle"})]  # CIFAR is published so; nothing that it names is run


def _tree(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(), str(MODULES[name]))


def _is_foot(node: ast.AST) -> bool:
    """`if __name__ == "__main__":`."""
    return isinstance(node, ast.If) and "__name__" in ast.dump(node.test)


def _imports(node: ast.AST, foot: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether in the foot) of every import at any depth, also within functions and for types only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno, foot) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: write imports from `pipeline`, so that grep finds them"
            for alias in child.names:  # `from pipeline import storage` imports a module, others a name in one
                inner = f"{child.module}.{alias.name}"
                yield inner if inner in MODULES else str(child.module), child.lineno, foot
        yield from _imports(child, foot or _is_foot(child))


def _ours(name: str) -> Iterator[tuple[str, int, bool]]:
    for other, line, foot in _imports(_tree(name)):
        if other.split(".")[0] == "pipeline" and other != name:
            yield other, line, foot


def _room(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


def _tier(name: str) -> int:
    """0 at the bottom; a module may import what has a lower number. -1: it has no place."""
    if name in BOTTOM:
        return 0
    if _room(name):
        return 1
    return next((tier for tier, members in ((2, JOINTS), (3, JOBS), (4, CLI)) if name in members), -1)


def _advice(name: str, other: str, foot: bool) -> str | None:
    """What to do instead of importing `other` in `name`, or None if that is right."""
    if name in BOTTOM:
        return None if other in BOTTOM[name] else "the bottom knows nothing above it: take the value as an argument"
    if foot and name in JOBS and other in CLI:
        return None  # `python -m pipeline.train` is the command with its job given
    if name in JOBS and other in JOBS:
        return "jobs do not call each other: move what both need into a room, or into a joint"
    if _room(name) and _room(other):
        same = _room(name) == _room(other)
        return None if same else "rooms do not know each other: let the job or a joint pass the value in"
    if other in JOINT_MAY_USE.get(name, set()) or _tier(other) < _tier(name):
        return None
    return "imports point downward: take it from above as a value or a callable"


def problems(name: str) -> list[str]:
    """What is wrong with the imports of a module, each with what to do instead."""
    return [
        f"{name}:{line} imports {other}: {advice}"
        for other, line, foot in _ours(name)
        if (advice := _advice(name, other, foot))
    ]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "pipeline"])
def test_imports_point_downward_and_rooms_do_not_know_each_other(name: str) -> None:
    assert _tier(name) >= 0, f"{name} has no place: put it into a room (a folder), or list it here as a job or joint"
    assert not problems(name), "\n".join(problems(name))


def test_the_package_and_its_rooms_import_nothing_by_themselves() -> None:
    """So that `ddpm --help` and the pure modules do not wait for torch."""
    for name in ("pipeline", *(f"pipeline.{room}" for room in ROOMS)):
        if name in MODULES:
            assert not list(_imports(_tree(name))), f"{name}/__init__.py re-exports: import from the module itself"


@pytest.mark.parametrize("name", [name for name in sorted(PURE) if name in MODULES])
def test_pure_modules_know_no_disk_clock_or_process(name: str) -> None:
    for other, line, _ in _imports(_tree(name)):
        root = other.split(".")[0]
        assert root not in IMPURE and other != "pipeline.storage", (
            f"{name}:{line} imports {other}: values in, values out: let its caller read or measure, and pass that in"
        )
    calls = [node.func for node in ast.walk(_tree(name)) if isinstance(node, ast.Call)]
    opened = [call.lineno for call in calls if isinstance(call, ast.Name) and call.id in ("open", "print", "input")]
    assert not opened, f"{name}:{opened} opens or prints: let its caller do that"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "pipeline.noise"])
def test_only_the_noise_module_draws(name: str) -> None:
    """Randomness is keyed. What is left is torch's own seed, for weights and dropout, and it comes from `noise.mix`."""
    drawing = {
        "rand",
        "randn",
        "randint",
        "randperm",
        "rand_like",
        "randn_like",
        "bernoulli",
        "multinomial",
        "default_rng",
    }
    for node in ast.walk(_tree(name)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = node.func.attr
            if (name, method) == ("pipeline.model.kernels", "randint"):
                continue  # dropout
            assert method not in drawing, f"{name}:{node.lineno} draws from a hidden state: use pipeline.noise, keyed"
            if method == "manual_seed":
                seed = ast.unparse(node.args[0])
                assert "mix(" in seed, (
                    f"{name}:{node.lineno} seeds with {seed}: use noise.mix of its parts, sums collide"
                )


def _deletions(name: str) -> Iterator[str]:
    """Calls that rename or delete files: of os and shutil, and the methods of Path that nothing else has."""
    tree = _tree(name)
    direct = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "shutil")
        for alias in node.names
        if alias.name in DELETERS
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        owner, _, method = call.rpartition(".")
        of_a_path = method in ("unlink", "rmdir", "rmtree", "rename")
        if call in direct or of_a_path or (owner in ("os", "shutil") and method in DELETERS):
            yield f"{name}:{node.lineno} calls {call}: use storage.remove or storage.publishing: nothing half done"


@pytest.mark.parametrize("name", [name for name in MODULES if name != "pipeline.storage"])
def test_only_storage_renames_and_deletes(name: str) -> None:
    assert not list(_deletions(name)), "\n".join(_deletions(name))


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_one_concept_of_readable_size_that_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(_tree(name)), f"{name}: begin with a docstring: what the module is, in a sentence"
    lines = len(MODULES[name].read_text().splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines: split it where its docstring needs an `and`"
    drawer = DRAWERS & set(name.removeprefix("pipeline.").split("."))
    assert not drawer, (
        f"{name}: {drawer} names no concept: name it after what it holds, or put each part where it is used"
    )


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_pickled(name: str) -> None:
    for node in ast.walk(_tree(name)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            pickles = names & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
            assert not pickles or (name, pickles) in UNPICKLERS, (
                f"{name}:{node.lineno} imports {pickles}: use safetensors and JSON"
            )
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call not in ("torch.save", "torch.load"), f"{name}:{node.lineno} pickles: use run.checkpoint"
            if call in ("np.load", "np.save"):
                allow = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("allow_pickle")
                assert allow == "False", f"{name}:{node.lineno}: say allow_pickle=False"


# --- the rules can fail ---


@pytest.mark.parametrize(
    ("name", "source", "advice"),
    [
        ("pipeline.data.order", "from pipeline.run import checkpoint", "rooms do not know each other"),
        ("pipeline.data.order", "from pipeline.train import train", "imports point downward"),
        ("pipeline.data.order", "def f():\n    from pipeline import generator", "imports point downward"),
        ("pipeline.train", "from pipeline.sample import sample", "jobs do not call each other"),
        ("pipeline.train", "from pipeline import cli", "imports point downward"),
        ("pipeline.generator", "from pipeline.trainer import Trainer", "imports point downward"),
        ("pipeline.noise", "from pipeline import errors", "the bottom knows nothing"),
        ("pipeline.config", "from pipeline import storage", "the bottom knows nothing"),
    ],
)
def test_a_wrong_import_is_found_and_told_what_to_do(
    name: str, source: str, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(source)
    monkeypatch.setitem(MODULES, name, wrong)
    (problem,) = problems(name)
    assert problem.startswith(f"{name}:") and advice in problem


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.replace(a, b)",
        "from shutil import rmtree\nrmtree(x)",
        "Path(x).unlink()",
        "from os import remove as r\nr(x)",
    ],
)
def test_a_deletion_is_found(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(source)
    monkeypatch.setitem(MODULES, "pipeline.train", wrong)
    assert len(list(_deletions("pipeline.train"))) == 1


def test_what_is_right_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tmp_path / "right.py"
    right.write_text(
        "from pipeline import generator, storage\nfrom pipeline.data.order import Order\n"
        "text.replace('a', 'b'); storage.remove(x); names.remove(y)\n"
        "if __name__ == '__main__':\n    from pipeline import cli\n    cli.main()\n"
    )
    monkeypatch.setitem(MODULES, "pipeline.train", right)
    assert problems("pipeline.train") == [] == list(_deletions("pipeline.train"))
