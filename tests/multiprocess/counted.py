"""`python -m tests.multiprocess.counted train …`: the command, but each rank notes what it asks of the storage.

`OPERATIONS` names the file that gets a line for each operation: rank, function of `storage.files`, path. Functions that
call others of these are not among them, so that nothing is counted twice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from pipeline import cli
from pipeline.storage import files

_COUNTED = ("exists", "is_dir", "listdir", "sizes", "size", "open_read", "_writing", "remove")
_LOG = os.open(os.environ["OPERATIONS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(url: str, *arguments: Any, **options: Any) -> Any:
        os.write(_LOG, f"{os.environ.get('RANK', '0')} {name} {url}\n".encode())
        return function(url, *arguments, **options)

    return call


for _name in _COUNTED:
    setattr(files, _name, _counted(_name, getattr(files, _name)))
if __name__ == "__main__":
    cli.main(["train", *sys.argv[1:]])
