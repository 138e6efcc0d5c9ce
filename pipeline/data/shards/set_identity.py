"""`set.json`: what a set is made of. The job that commits the first shard creates it; others must agree.

Sets of version 0.1 have no such file: their index and their records say the same.
"""

from __future__ import annotations

import json
from typing import Any

from pipeline.errors import DataError
from pipeline.storage import files

FILE = "set.json"


def read(url: str) -> dict[str, Any] | None:
    """What the set in a directory is made of; None if no `set.json` says it, or another program wrote it."""
    try:
        value = files.read_json(files.join(url, FILE))
    except (OSError, DataError):
        return None
    return value if isinstance(value, dict) else None


def claim(url: str, identity: dict[str, Any]) -> dict[str, Any]:
    """Create `set.json` if there is none; returns what it says: the identity that the first of several jobs gave.

    Raises:
        DataError: no space left, not permitted, or `set.json` is damaged.
    """
    if stored := read(url):
        return stored
    files.create(files.join(url, FILE), (json.dumps(identity, indent=1) + "\n").encode())
    if stored := read(url):
        return stored
    raise DataError(f"{files.join(url, FILE)} is damaged: choose another --out, or give --overwrite")
