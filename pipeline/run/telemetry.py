"""Curves and pictures of a run: TensorBoard events, the same figures as JSON lines, preview files.

What cannot be written is said once and costs nothing but itself. A run on an object store is recorded beside the
program first, as such a store cannot append, and its files are uploaded from time to time.
"""

from __future__ import annotations

import errno
import io
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

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
        self._first, self._events = step + 1, ""
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
            self.upload()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Figures at a step; names carry their unit."""
        with self._costing_only_itself():
            line = json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n"
            self._append(_LOG, line.encode())
            self._record(step, [Summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def preview(self, step: int, grid: NDArray[np.uint8]) -> None:
        """A picture grid, uint8 (H, W, C)."""
        buffer, (height, width, channels) = io.BytesIO(), grid.shape
        Image.fromarray(grid.squeeze()).save(buffer, "PNG")
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=buffer.getvalue())
        with self._costing_only_itself():
            storage.write_bytes(storage.join(self._run_dir, "previews", f"step_{step:08d}.png"), buffer.getvalue())
            self._record(step, [Summary.Value(tag="preview", image=image)])

    def upload(self) -> None:
        """Bring a remote run up to date; nothing to do for a local one. Any thread may call this."""
        if not storage.is_remote(self._run_dir):
            return
        with self._costing_only_itself():
            for path in self._home.rglob("*"):
                if path.is_file():
                    name = path.relative_to(self._home).as_posix()
                    storage.write_bytes(storage.join(self._run_dir, name), path.read_bytes())

    def _record(self, step: int, values: list[Summary.Value]) -> None:
        """Add to this start's file of events; TensorBoard reads them in the order of the names, which is that of time.

        The library's own writer has a thread, which dies with a trace on a full disk.
        """
        now = time.time()
        if not self._events:
            name = f"{_EVENTS}/events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}"
            start = Event(wall_time=now, step=self._first, session_log=SessionLog(status=SessionLog.START))
            self._append(name, _framed(Event(wall_time=now, file_version="brain.Event:2"), start))
            self._events = name
        self._append(self._events, _framed(Event(wall_time=now, step=step, summary=Summary(value=values))))

    def _append(self, name: str, data: bytes) -> None:
        path = self._home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            except OSError:
                file.truncate(end)  # no line or record is cut
                raise

    def _forget_after(self, step: int) -> None:
        log = storage.join(self._run_dir, _LOG)
        if not storage.exists(log):
            return
        kept = [line for line in storage.read_bytes(log).splitlines() if _is_until(line, step)]
        storage.write_bytes(str(self._home / _LOG), b"".join(line + b"\n" for line in kept))

    @contextmanager
    def _costing_only_itself(self) -> Iterator[None]:
        try:
            yield
        except (OSError, DataError) as error:
            if not self._said:
                self._said = True
                self._say(f"warning: curves and pictures are not recorded, training goes on: {error}")


def _framed(*events: Event) -> bytes:
    buffer = io.BytesIO()
    for event in events:
        RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


def _is_until(line: bytes, step: int) -> bool:
    """Whether a line of the log is whole, and of no later step."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False
