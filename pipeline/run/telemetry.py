"""Curves and pictures of a run: TensorBoard events, the same figures as JSON lines, preview files."""

from __future__ import annotations

import io
import json
import time
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from pipeline import storage


class Telemetry:
    """Writes what rank 0 has to say about a run.

    Args:
        run_dir: a local directory.
        step: the step the run goes on from; anything recorded after it by a start that was killed is hidden.
    """

    def __init__(self, run_dir: str, step: int) -> None:
        self._run_dir = run_dir
        self._events = SummaryWriter(storage.join(run_dir, "tensorboard"), purge_step=step + 1, flush_secs=10)
        self._log_path = storage.join(run_dir, "log.jsonl")
        self._forget_after(step)
        self._log = storage.local(self._log_path).open("a")

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.close()
        self._log.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Figures at a step; names carry their unit."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._log.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._log.flush()

    def preview(self, step: int, grid: NDArray[np.uint8]) -> str:
        """A picture grid, uint8 (H, W, C); returns the file it is also written to."""
        self._events.add_image("preview", grid, step, dataformats="HWC")
        path = storage.join(self._run_dir, "previews", f"step_{step:08d}.png")
        buffer = io.BytesIO()
        Image.fromarray(grid.squeeze()).save(buffer, "PNG")
        storage.write_bytes(path, buffer.getvalue())
        return path

    def _forget_after(self, step: int) -> None:
        if not storage.exists(self._log_path):
            return
        text = storage.read_bytes(self._log_path).decode()
        kept = [line for line in text.splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
        storage.write_bytes(self._log_path, "".join(line + "\n" for line in kept).encode())
