"""Where pipeline/ asks for CUDA, found in its syntax; and which of these lines run."""

from __future__ import annotations

import ast
import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType
from typing import NamedTuple

ROOT = Path(__file__).parents[2] / "pipeline"


class Line(NamedTuple):
    """A line of code."""

    file: str
    number: int


def lines() -> dict[Line, str]:
    """Each line that mentions CUDA, or asks whether a device is the CPU → its function, `module.Class.name`.

    Annotations and docstrings are left out.
    """
    found: dict[Line, str] = {}
    for path in sorted(ROOT.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        _visit(ast.parse(path.read_text()), module, str(path), found)
    return found


def _visit(node: ast.AST, name: str, file: str, found: dict[Line, str]) -> None:
    if _asks(node):
        found[Line(file, node.lineno)] = name  # type: ignore[attr-defined]
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                named = isinstance(child, ast.FunctionDef | ast.ClassDef)
                _visit(child, f"{name}.{child.name}" if named else name, file, found)  # type: ignore[attr-defined]


def _asks(node: ast.AST) -> bool:
    match node:
        case ast.Attribute(attr="is_cuda") | ast.Constant(value="cuda"):
            return True
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="torch"), attr="cuda")):
            return True
        case ast.Call(func=ast.Name(id="on_cpu") | ast.Attribute(attr="on_cpu")):
            return True
        case ast.Compare(left=ast.Attribute(attr="type"), comparators=[ast.Constant(value="cpu")]):
            return True
    return False


@contextmanager
def recorded(wanted: dict[Line, str], ran: set[Line]) -> Iterator[None]:
    """Context: add to `ran` those of the wanted lines that run, in any thread.

    The code of their functions is replaced by the same code that also notes each of these expressions: a trace of all
    lines would take most of the time.
    """
    originals, codes = [], {}
    for file in {line.file for line in wanted}:
        importlib.import_module(".".join(Path(file).relative_to(ROOT.parent).with_suffix("").parts))
        codes |= _codes(compile(_Noting(file).visit(ast.parse(Path(file).read_text())), file, "exec"))
    for function in [each for each in gc.get_objects() if type(each) is FunctionType]:
        code = function.__code__
        if replacement := codes.get((code.co_filename, code.co_qualname, code.co_firstlineno)):
            originals.append((function, code))
            function.__globals__[_NOTE] = lambda file, number, value: ran.add(Line(file, number)) or value
            function.__code__ = replacement
    try:
        yield
    finally:
        for function, code in originals:
            function.__code__ = code
            function.__globals__.pop(_NOTE, None)


_NOTE = "_note_for_rehearsal"


class _Noting(ast.NodeTransformer):
    """Wraps what `_asks` in a call that notes it; annotations, targets and defaults stay."""

    def __init__(self, file: str) -> None:
        self._file = file

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.AnnAssign):
            node.value = node.value and self.visit(node.value)  # type: ignore[assignment]
            return node
        if isinstance(node, ast.arguments):
            return node
        is_noted = _asks(node) and not isinstance(getattr(node, "ctx", None), ast.Store)
        node = self.generic_visit(node)
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if not is_noted:
            return node
        arguments = [ast.Constant(self._file), ast.Constant(node.lineno), node]  # type: ignore[attr-defined]
        call = ast.copy_location(ast.Call(ast.Name(_NOTE, ast.Load()), arguments, []), node)  # type: ignore[arg-type]
        return ast.fix_missing_locations(call)


def _codes(code: CodeType) -> dict[tuple[str, str, int], CodeType]:
    """All code objects within one, by file, qualified name and first line."""
    found = {(code.co_filename, code.co_qualname, code.co_firstlineno): code}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _codes(constant)
    return found
