"""Names in URLs: percent-encoded and perhaps with a query on web servers, plain in object stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from urllib.parse import unquote

from pipeline.untrusted import printable

_WEB = ("http://", "https://")


def is_web(url: str) -> bool:
    """Whether a URL is of a web server."""
    return url.startswith(_WEB)


def without_query(url: str) -> str:
    """A URL that ends with the name of its file: `data.zip` of `data.zip?download=true`."""
    return url.partition("?")[0] if is_web(url) else url


def name(url: str) -> str:
    """The name of the file or directory."""
    last = without_query(url).rstrip("/").rpartition("/")[2]
    return decoded(last) if is_web(url) else last


def names(paths: Iterable[str]) -> dict[str, str]:
    """Paths in web URLs → decoded names without query; a path stays unchanged where two names would be equal."""
    paths = list(paths)
    shown = {path: decoded(path.partition("?")[0]) for path in paths}
    counts = Counter(shown.values())
    unique = {path: path if counts[name] > 1 else name for path, name in shown.items()}
    return unique if len(set(unique.values())) == len(unique) else {path: path for path in paths}


def decoded(path: str) -> str:
    """A path without percent-encoding; parts stay encoded that would contain a slash or unprintable characters."""
    return "/".join(_decoded(part) for part in path.split("/"))


def _decoded(part: str) -> str:
    try:
        text = unquote(part, errors="strict")
    except UnicodeDecodeError:
        return part
    return text if "/" not in text and text not in (".", "..") and printable(text) == text else part
