"""Elements of the page. All text goes through `text`: class names, paths and messages come from files of others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from pipeline.errors import printable

_MOST_TEXT = 600


def text(value: object) -> str:
    """Text of a run, made safe for a page: escaped, without control characters, cut in the middle if it is long."""
    return escape(printable(str(value), _MOST_TEXT))


def paragraph(content: str) -> str:
    """A paragraph."""
    return f"<p>{text(content)}</p>"


def section(title: str, body: str) -> str:
    """A section with its heading; `body` is HTML."""
    return f"<section><h2>{title}</h2>\n{body}\n</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """A table; the columns of `numbers` are aligned at the right. A cell that is a pair has small text under it."""

    def cell(kind: str, i: int, value: object) -> str:
        shown, under = value if isinstance(value, tuple) else (value, "")
        small = f"<small>{text(under)}</small>" if under else ""
        return f"<{kind}{' class=n' if i in numbers else ''}>{text(shown)}{small}</{kind}>"

    lines = [("th", head), *(("td", row) for row in rows)]
    body = "".join(f"<tr>{''.join(cell(kind, i, value) for i, value in enumerate(row))}</tr>" for kind, row in lines)
    return f'<div class="scroll"><table>{body}</table></div>'
