"""docs/troubleshooting.md has a row for every error that a user can cause; the messages are read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
ERRORS = {"ConfigError", "DataError", "NoCheckpoint", "RunHeld", "Diverged", "RankLost", "Stopped"}
GAP = "…"


def rows(text: str) -> list[list[re.Pattern[str]]]:
    """The words of each row; `…` in them stands for anything."""
    cells = re.findall(r"^\| (`.+?`) \| .+ \| .+ \|$", text, re.MULTILINE)
    words = [re.findall(r"`([^`]+)`", cell) for cell in cells]
    return [[re.compile(".*".join(map(re.escape, word.split(GAP)))) for word in row] for row in words]


def template(node: ast.AST, names: dict[str, ast.expr]) -> str:
    """The text of a message, with `…` for what is known only when it is raised."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts) | ast.Call(args=parts) | ast.BoolOp(values=parts):
            return "".join(template(part, names) for part in parts)
        case ast.BinOp(left=a, right=b) | ast.IfExp(body=a, orelse=b):
            return f"{template(a, names)} {template(b, names)}"
        case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name) if name in names:
            return template(names[name], {key: value for key, value in names.items() if key != name})
    return GAP


@cache
def sources() -> dict[str, ast.Module]:
    """The modules of the pipeline, by path."""
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.glob("pipeline/**/*.py"))}


@cache
def messages() -> dict[str, str]:
    """Message → where it is raised, for all that have words of their own."""
    found = {}
    for path, tree in sources().items():
        names = dict(_assigned(tree))
        for value in _told(tree, path):
            if re.search("[a-z]{3}", text := template(value, names)):
                found[text] = f"{path}:{value.lineno}"
    return found


def _told(tree: ast.Module, path: str) -> Iterator[ast.expr]:
    """What errors are raised with, and what is wrong with a configuration."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name), args=[value, *_]) if name in ERRORS:
                yield value
            case ast.Yield(value=ast.expr() as value) if path == "pipeline/config.py":
                yield value


def _assigned(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Names that stand for text."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.JoinedStr() | ast.Constant(value=str()) as text):
                yield name, text


def row_of(text: str, known: list[list[re.Pattern[str]]]) -> int | None:
    """The first row with words of this message: the reader's too."""
    return next((i for i, row in enumerate(known) if any(words.search(text) for words in row)), None)


def test_every_error_has_a_row() -> None:
    known = rows(PAGE.read_text())
    without = [f"{place}: {text}" for text, place in messages().items() if row_of(text, known) is None]
    assert len(messages()) > 300 and not without, "\n".join(["docs/troubleshooting.md has no words of:", *without])


def test_all_words_are_of_a_message_in_the_code() -> None:
    nodes = [node for tree in sources().values() for node in ast.walk(tree)]
    texts = {template(node, {}) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)} | set(messages())
    in_vain = [words.pattern for row in rows(PAGE.read_text()) for words in row
               if not any(words.search(text) for text in texts)]  # fmt: skip
    assert not in_vain, f"no message has these words: {in_vain}"


def test_a_row_is_short_enough_to_read() -> None:
    assert max(map(len, rows(PAGE.read_text()))) <= 8
