"""The shape of the house, read from the imports of every module: which room may import which.

    cli → jobs → training, sampling, evaluation → data, model, checkpoints, cluster, monitoring
        → diffusion, processes, storage, config → keyed_random, errors

A room is a directory of pipeline/, or a module that lies in pipeline/ itself. `MAY_IMPORT` names the rooms that each
room may import besides itself; jobs may import every room, but no job. A new room or job must be added here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "pipeline"
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
FRONT = {"cli", "commands", "notebook"}
JOBS = {"shard", "train", "sample", "verify", "index", "evaluate", "export", "import_model", "plan", "doctor",
        "report", "show", "runs", "init"}  # fmt: skip
BOTTOM = {"errors", "restricted_unpickler", "untrusted", "units", "keyed_random", "solvers"}
DATA = {"data.images", "data.sources", "data.shards", "data.loading"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "units": set(),
    "forecast": {"units"},
    "restricted_unpickler": set(),
    "keyed_random": set(),
    "solvers": set(),
    "untrusted": {"errors"},
    "messages": {"errors"},
    "model_section": set(),
    "config": {"model_section", "solvers", "units", "errors"},
    "config_file": {"config", "errors"},
    "storage": {"messages", "processes", "untrusted", "errors"},
    "arguments": {"config", "config_file", "storage", "units", "errors"},
    "processes": {"errors"},
    "diffusion": {"config", "solvers", "errors"},
    "data": set(),
    "data.images": BOTTOM,
    "data.sources": BOTTOM | {"data.images", "processes", "storage"},
    "path_kind": {"checkpoints", "config_file", "data.sources", "errors", "storage"},
    "data.shards": BOTTOM | {"data.images", "data.sources", "messages", "path_kind", "processes", "storage"},
    "data.loading": BOTTOM | {"data.images", "data.sources", "data.shards", "processes", "storage"},
    "model": BOTTOM | {"config", "messages", "storage"},
    "checkpoints": BOTTOM | {"storage"},
    "cluster": BOTTOM | {"checkpoints", "messages", "processes", "storage"},
    "monitoring": BOTTOM | {"checkpoints", "cluster", "messages", "storage"},
    "sampling": BOTTOM
    | DATA
    | {"checkpoints", "config", "config_file", "diffusion", "messages", "model", "path_kind", "storage"},
    "evaluation": BOTTOM | DATA | {"diffusion", "storage"},
    "reporting": BOTTOM | DATA | {"checkpoints", "cluster", "config", "config_file", "path_kind", "storage"},
    "training": BOTTOM
    | DATA
    | {
        "checkpoints",
        "cluster",
        "config",
        "config_file",
        "diffusion",
        "evaluation",
        "forecast",
        "messages",
        "model",
        "monitoring",
        "path_kind",
        "sampling",
        "storage",
    },
}
PURE = {
    "pipeline.units",
    "pipeline.forecast",
    "pipeline.config",
    "pipeline.model_section",
    "pipeline.config_file",
    "pipeline.keyed_random",
    "pipeline.solvers",
    "pipeline.errors",
    "pipeline.data.loading.order",
    "pipeline.data.images.preprocess",
    "pipeline.data.images.color",
    "pipeline.data.images.codec",
    "pipeline.data.images.png",
    "pipeline.data.images.tga",
    "pipeline.data.images.tiff",
    "pipeline.data.images.dedupe",
    "pipeline.data.images.contact_sheet",
    "pipeline.data.sources.labels.class_names",
    "pipeline.data.sources.urls",
    "pipeline.data.shards.seeds",
    "pipeline.data.shards.summary",
    "pipeline.monitoring.dashboard",
    "pipeline.reporting.curves",
    "pipeline.training.learning_rate",
    "pipeline.training.continuity",
    "pipeline.evaluation.moments",
    "pipeline.evaluation.frechet",
    "pipeline.evaluation.kernel_distance",
    "pipeline.evaluation.inception_score",
    "pipeline.evaluation.intervals",
    "pipeline.evaluation.neighbours",
    "pipeline.evaluation.precision_recall",
    "pipeline.evaluation.memorisation",
    "pipeline.evaluation.figures",
} | {name for name in MODULES if name.startswith("pipeline.diffusion")}
IMPURE = {
    "os", "sys", "pathlib", "time", "datetime", "fsspec", "socket", "subprocess", "random", "shutil", "tempfile",
    "multiprocessing", "threading", "platform",
}  # fmt: skip
DRAWERS = {"utils", "util", "helpers", "helper", "common", "base", "misc", "core", "tools", "lib", "shared"}
DELETERS = {"rename", "renames", "replace", "remove", "removedirs", "unlink", "rmdir", "rmtree", "move"}
MAX_LINES = 400
UNPICKLERS = [("pipeline.restricted_unpickler", {"pickle"})]  # CIFAR and weights are published so; nothing is run


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


def _room(name: str) -> str:
    """The room of a module: `data.images` of `pipeline.data.images.color`, `errors` of `pipeline.errors`."""
    parts = name.split(".")[1:]
    depth = 2 if parts[0] == "data" and len(parts) > 1 else 1
    return ".".join(parts[:depth])


def _advice(name: str, other: str, foot: bool) -> str | None:
    """What to do instead of importing `other` in `name`, or None if that is right."""
    room, used = _room(name), _room(other)
    if room == used or room in FRONT:
        return None
    if room in JOBS:
        if used in JOBS:
            return "jobs do not call each other: move what both need into a room"
        if used not in FRONT or foot:  # `python -m pipeline.train` is the command with its job given
            return None
    elif used in MAY_IMPORT[room]:
        return None
    return f"{room} may import {sorted(MAY_IMPORT.get(room, ()))}: take it from the caller, as a value or a callable"


def problems(name: str) -> list[str]:
    """What is wrong with the imports of a module, each with what to do instead."""
    return [
        f"{name}:{line} imports {other}: {advice}"
        for other, line, foot in _ours(name)
        if (advice := _advice(name, other, foot))
    ]


def test_imports_of_rooms_form_no_cycle() -> None:
    TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError


def test_a_module_imports_only_what_its_room_may_import() -> None:
    for name in MODULES.keys() - {"pipeline"}:
        room = _room(name)
        assert room in MAY_IMPORT or room in JOBS | FRONT, f"{name} has no place: list its room or job here"
        assert not problems(name), "\n".join(problems(name))


def test_the_package_and_its_rooms_import_nothing_by_themselves() -> None:
    """So that `ddpm --help` and the pure modules do not wait for torch; tests/test_notebook.py has the lazy names."""
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            allowed = {"typing", "pipeline.notebook", "pipeline.monitoring.machine"} if name == "pipeline" else set()
            found = {other for other, _, _ in _imports(_tree(name))}
            assert found <= allowed, f"{name}/__init__.py re-exports: import from the module itself"


def test_pure_modules_know_no_disk_clock_or_process() -> None:
    for name in sorted(PURE):
        for other, line, _ in _imports(_tree(name)):
            root = other.split(".")[0]
            assert root not in IMPURE and not other.startswith("pipeline.storage"), (
                f"{name}:{line} imports {other}: values in, values out: let its caller read or measure"
            )
        calls = [node.func for node in ast.walk(_tree(name)) if isinstance(node, ast.Call)]
        opened = [call.lineno for call in calls if isinstance(call, ast.Name) and call.id in ("open", "print", "input")]
        assert not opened, f"{name}:{opened} opens or prints: let its caller do that"


def test_only_keyed_random_draws() -> None:
    """Randomness is keyed. Torch's own seed, for weights and dropout, comes from `keyed_random.seed_from`."""
    drawing = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "bernoulli", "multinomial"}
    drawing.add("default_rng")
    for name in MODULES.keys() - {"pipeline.keyed_random"}:
        for node in ast.walk(_tree(name)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                method = node.func.attr
                if (name, method) == ("pipeline.model.kernels", "randint"):
                    continue  # dropout
                assert method not in drawing, (
                    f"{name}:{node.lineno} draws from a hidden state: use pipeline.keyed_random"
                )
                if method == "manual_seed":
                    seed = ast.unparse(node.args[0])
                    assert "seed_from(" in seed, (
                        f"{name}:{node.lineno} seeds with {seed}: use keyed_random.seed_from, sums collide"
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
            yield f"{name}:{node.lineno} calls {call}: use storage.files.remove or .publishing: nothing half done"


def test_only_storage_renames_and_deletes() -> None:
    for name in MODULES.keys() - {"pipeline.storage.files"}:
        assert not list(_deletions(name)), "\n".join(_deletions(name))


def test_a_module_is_one_concept_of_readable_size_that_says_what_it_is() -> None:
    for name, path in MODULES.items():
        assert ast.get_docstring(_tree(name)), f"{name}: begin with a docstring: what the module is, in a sentence"
        lines = len(path.read_text().splitlines())
        assert lines <= MAX_LINES, f"{name} has {lines} lines: split it where its docstring needs an `and`"
        drawer = DRAWERS & set(name.removeprefix("pipeline.").split("."))
        assert not drawer, (
            f"{name}: {drawer} names no concept: name it after what it holds, or put each part where it is used"
        )


def test_nothing_is_pickled() -> None:
    for name in MODULES:
        for node in ast.walk(_tree(name)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                pickles = names & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
                assert not pickles or (name, pickles) in UNPICKLERS, (
                    f"{name}:{node.lineno} imports {pickles}: use safetensors and JSON"
                )
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in ("torch.save", "torch.load"), (
                    f"{name}:{node.lineno} pickles: use checkpoints.checkpoint"
                )
                if call in ("np.load", "np.save"):
                    allow = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}.get("allow_pickle")
                    assert allow == "False", f"{name}:{node.lineno}: say allow_pickle=False"


# --- the rules can fail ---


@pytest.mark.parametrize(
    ("name", "source", "advice"),
    [
        ("pipeline.data.loading.order", "from pipeline.cluster import world", "data.loading may import"),
        ("pipeline.data.images.color", "from pipeline.data.sources.keys import split", "data.images may import"),
        ("pipeline.data.loading.order", "def f():\n    from pipeline.train import train", "data.loading may import"),
        ("pipeline.train", "from pipeline.sample import sample", "jobs do not call each other"),
        ("pipeline.train", "from pipeline import cli", "take it from the caller"),
        ("pipeline.sampling.generator", "from pipeline.training.trainer import Trainer", "sampling may import"),
        ("pipeline.keyed_random", "from pipeline import errors", "take it from the caller"),
        ("pipeline.config", "from pipeline.storage import files", "config may import"),
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
        "from pipeline.storage import files\nfrom pipeline.data.loading.order import Order\n"
        "text.replace('a', 'b'); files.remove(x); names.remove(y)\n"
        "if __name__ == '__main__':\n    from pipeline import cli\n    cli.main()\n"
    )
    monkeypatch.setitem(MODULES, "pipeline.train", right)
    assert problems("pipeline.train") == [] == list(_deletions("pipeline.train"))
