"""Curves and pictures of a run: TensorBoard events, the same figures as JSON lines, preview files.

What cannot be written is said once and costs nothing but itself. A run on an object store is recorded beside the
program first, as such a store cannot append, and its files are uploaded from time to time.
"""

from __future__ import annotations

import errno
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from pipeline import storage
from pipeline.errors import DataError

_EVENTS, _LOG = "tensorboard", "log.jsonl"


class Telemetry:
    """Writes what rank 0 has to say about a run.

    Args:
        run_dir: the run.
        step: the step the run goes on from; anything recorded after it by a start that was killed is hidden.
        say: told what cannot be written.
    """

    def __init__(self, run_dir: str, step: int, say: Callable[[str], None]) -> None:
        self._run_dir, self._say, self._said = run_dir, say, False
        self._purge_from: int | None = step + 1
        self._events: SummaryWriter | None = None
        self._temporary = ExitStack()
        self._home = storage.local(run_dir)
        if storage.is_remote(run_dir):
            self._home = Path(self._temporary.enter_context(tempfile.TemporaryDirectory(prefix="ddpm-")))
        with self._costing_only_itself():
            self._forget_after(step)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._temporary, self._costing_only_itself():
            if self._events:
                self._events.close()
            self.upload()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Figures at a step; names carry their unit."""
        with self._costing_only_itself():
            self._append({"step": step, "time": round(time.time(), 3), **values})
            for name, value in values.items():
                self._writer().add_scalar(name, value, step)

    def preview(self, step: int, grid: NDArray[np.uint8]) -> None:
        """A picture grid, uint8 (H, W, C)."""
        buffer = io.BytesIO()
        Image.fromarray(grid.squeeze()).save(buffer, "PNG")
        with self._costing_only_itself():
            storage.write_bytes(storage.join(self._run_dir, "previews", f"step_{step:08d}.png"), buffer.getvalue())
            self._writer().add_image("preview", grid, step, dataformats="HWC")

    def upload(self) -> None:
        """Bring a remote run up to date; nothing to do for a local one. Any thread may call this."""
        if not storage.is_remote(self._run_dir):
            return
        with self._costing_only_itself():
            for path in self._home.rglob("*"):
                if path.is_file():
                    name = path.relative_to(self._home).as_posix()
                    storage.write_bytes(storage.join(self._run_dir, name), path.read_bytes())

    def _writer(self) -> SummaryWriter:
        if self._events is None:
            self._events = SummaryWriter(str(self._home / _EVENTS), purge_step=self._purge_from, flush_secs=10)
            self._purge_from = None
        return self._events

    def _append(self, line: dict[str, float]) -> None:
        self._home.mkdir(parents=True, exist_ok=True)
        with (self._home / _LOG).open("ab", buffering=0) as log:
            end = log.tell()
            text = (json.dumps(line) + "\n").encode()
            try:
                if log.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._home / _LOG))
            except OSError:
                log.truncate(end)  # no line is cut
                raise

    def _forget_after(self, step: int) -> None:
        log = storage.join(self._run_dir, _LOG)
        if not storage.exists(log):
            return
        lines = storage.read_bytes(log).decode().splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        storage.write_bytes(str(self._home / _LOG), "".join(line + "\n" for line in kept).encode())

    @contextmanager
    def _costing_only_itself(self) -> Iterator[None]:
        try:
            yield
        except (OSError, DataError) as error:
            self._events = None  # a writer that has failed writes no more; the next figures get another
            if not self._said:
                self._said = True
                self._say(f"warning: curves and pictures are not recorded, training goes on: {error}")
