"""Curves and images of a run: TensorBoard events, the same figures as JSON lines, preview files.

A figure or image that cannot be written is lost, with one warning, and training continues. The files of a run on an
object store, which cannot append, are written to a local directory and uploaded after each save.
"""

from __future__ import annotations

import errno
import io
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from pipeline.checkpoints.run_dir import RunDir
from pipeline.errors import DataError
from pipeline.monitoring import dashboard
from pipeline.storage import files


class Telemetry(AbstractContextManager["Telemetry"]):
    """Writes the curves and preview images of a run.

    Args:
        run_dir: the run.
        step: at which the run resumes; figures that a killed start has recorded after it are hidden.
        warn: gets a line at the first figure or image that cannot be written.
        config: section → key → JSON value, for the tab HParams; left without an error, the run has ended well there.
    """

    def __init__(
        self, run_dir: str, step: int, warn: Callable[[str], None], config: Mapping[str, Any] | None = None
    ) -> None:
        self._run, self._warn, self._has_warned = RunDir(run_dir), warn, False
        self._first, self._last, self._events = step + 1, step, ""
        self._settings = dashboard.hyperparameters(config or {})
        self._temporary = ExitStack()
        self._local = RunDir(str(files.local(run_dir)))
        if files.is_remote(run_dir):
            self._local = RunDir(self._temporary.enter_context(tempfile.TemporaryDirectory(prefix="ddpm-")))
        with self._best_effort():
            self._cut_log(step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._temporary, self._best_effort():
            if self._settings and self._events and error is None:
                self._record(self._last, dashboard.session_end(time.time()))
            self.upload()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Record figures of a step. Each name ends with its unit."""
        with self._best_effort():
            line = json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n"
            self._append(self._local.log, line.encode())
            self._record(step, _scalars(values))

    def preview(self, step: int, grid: NDArray[np.uint8]) -> None:
        """Record a grid of images, uint8 (H, W, C)."""
        buffer, (height, width, channels) = io.BytesIO(), grid.shape
        Image.fromarray(grid.squeeze()).save(buffer, "PNG")
        image = Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=buffer.getvalue())
        with self._best_effort():
            files.write_bytes(self._run.preview(step), buffer.getvalue())
            self._record(step, [Summary.Value(tag=dashboard.PREVIEW, image=image)])

    def upload(self) -> None:
        """Upload the files of a remote run; does nothing for a local run. Any thread may call this."""
        if not files.is_remote(self._run.path):
            return
        with self._best_effort():
            for path in Path(self._local.path).rglob("*"):
                if path.is_file():
                    name = path.relative_to(self._local.path).as_posix()
                    files.write_bytes(files.join(self._run.path, name), path.read_bytes())

    def _record(self, step: int, values: list[Summary.Value]) -> None:
        """Append to this start's event file. TensorBoard reads event files in the order of their names, thus of time.

        TensorBoard's own writer has a thread that dies with a traceback on a full disk.
        """
        now, self._last = time.time(), step
        if not self._events:
            name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}"
            start = Event(wall_time=now, step=self._first, session_log=SessionLog(status=SessionLog.START))
            path = files.join(self._local.tensorboard, name)
            table = dashboard.session_start(self._settings, now) if self._settings else []
            show = Event(wall_time=now, step=self._first, summary=Summary(value=[dashboard.layout(), *table]))
            self._append(path, _framed(Event(wall_time=now, file_version="brain.Event:2"), start, show))
            self._events = path
        self._append(self._events, _framed(Event(wall_time=now, step=step, summary=Summary(value=values))))

    def _append(self, path: str, data: bytes) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            except OSError:
                file.truncate(end)  # leave no half line or record
                raise

    def _cut_log(self, last_step: int) -> None:
        """Keep the lines of the log until a step; drop damaged lines."""
        if not files.exists(self._run.log):
            return
        lines = [line for line in files.read_bytes(self._run.log).splitlines() if _is_until(line, last_step)]
        files.write_bytes(self._local.log, b"".join(line + b"\n" for line in lines))

    @contextmanager
    def _best_effort(self) -> Iterator[None]:
        try:
            yield
        except (OSError, DataError) as error:
            if not self._has_warned:
                self._has_warned = True
                self._warn(f"curves and images are not recorded, training continues: {error}")


def record_evaluation(run_dir: str, step: int, curves: dict[str, float]) -> None:
    """Write the figures of an evaluation as curves of a run, in an event file and directory of their own.

    A job that trains the run may be writing to its other files.

    Args:
        run_dir: the run.
        step: of the checkpoint that drew the samples.
        curves: by name.

    Raises:
        DataError: there is no space left, or no permission.
    """
    now = time.time()
    values = _scalars(curves)
    name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}"
    data = _framed(
        Event(wall_time=now, file_version="brain.Event:2"),
        Event(wall_time=now, step=step, summary=Summary(value=values)),
    )
    files.write_bytes(files.join(RunDir(run_dir).evaluation, name), data)


def _scalars(values: Mapping[str, float]) -> list[Summary.Value]:
    return [Summary.Value(tag=dashboard.tag(name), simple_value=value) for name, value in values.items()]


def _framed(*events: Event) -> bytes:
    buffer = io.BytesIO()
    for event in events:
        RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


def _is_until(line: bytes, step: int) -> bool:
    """Whether a line of the log is complete and not of a later step."""
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False
