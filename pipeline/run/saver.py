"""Saving while training goes on: a copy to the host at the step boundary, and one thread that writes it."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.run import checkpoint
from pipeline.run.tensorfile import TensorFile

_NICENESS = 10


@dataclass(frozen=True)
class _Saved:
    """How a save ended."""

    step: int
    committed: bool
    seconds: float
    problem: str | None


class Saver:
    """Writes the checkpoints of a run, one at a time, in the background. A save that fails costs itself, not the run.

    Args:
        run_dir: the run.
        keep_last: newest checkpoints to keep.
        keep_every: checkpoints at multiples of this step stay for good; 0: none.
        generation: of this job's hold on the run.
        may_write: raises if the run has gone over to another job.
        afterwards: called in the background after each save that succeeded.
        say: told of the first save that fails.
        patience_s: how long a save waits for the one before it.
        sound: the checkpoint that the run goes on from; it has been read in full.
    """

    def __init__(
        self,
        run_dir: str,
        *,
        keep_last: int,
        keep_every: int,
        generation: int,
        may_write: Callable[[], None],
        afterwards: Callable[[], None],
        say: Callable[[str], None],
        patience_s: float,
        sound: str | None = None,
    ) -> None:
        self._run_dir, self._keep_last, self._keep_every = run_dir, keep_last, keep_every
        self._generation, self._may_write, self._afterwards = generation, may_write, afterwards
        self.figures = {"checkpoint/failed": 0.0}
        """For the curves: how many saves failed; seconds that the last one took, and that training waited for it."""
        self.problem: str | None = None
        """Why the save that has ended or was left out last failed; None if it did not."""
        self._say = say
        self._patience_s, self._sound = patience_s, {sound} if sound else set()
        self._parts: dict[str, TensorFile] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", initializer=_step_back)
        self._pending: Future[_Saved] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()

    def save(self, step: int, parts: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> bool:
        """Copy what is to be saved and return; the step may change the tensors from then on.

        If the save before it has not ended after `patience_s`, this one is left out and has failed.

        Args:
            step: finished steps.
            parts: file stem → name → live tensor; the same names and shapes each time.
            state: JSON values.

        Returns:
            Whether it is under way.
        """
        asked = time.monotonic()
        if self._pending and not wait([self._pending], self._patience_s).done:
            self.problem = f"the save before it has not ended in {self._patience_s:.0f} s"
            self._complain(f"step {step} is not saved", self.problem)
            return False
        self.ended()
        on_gpu = any(tensor.is_cuda for tensors in parts.values() for tensor in tensors.values())
        for part, tensors in parts.items():
            if part not in self._parts:
                self._parts[part] = TensorFile(tensors, pin=on_gpu)
            self._parts[part].fill(tensors)
        if on_gpu:
            torch.cuda.synchronize()
        self.figures["checkpoint/stall_s"] = time.monotonic() - asked
        self._pending = self._thread.submit(self._write, step, json.dumps(state, indent=1).encode() + b"\n")
        return True

    def ended(self, *, wait_for_it: bool = False) -> None:
        """Note how the save that was under way has ended, if it has; any error but a failure to write is raised."""
        if self._pending is None or not (wait_for_it or self._pending.done()):
            return
        saved, self._pending = self._pending.result(), None
        self.problem = None if saved.committed else saved.problem
        if saved.committed:
            self.figures["checkpoint/save_s"] = saved.seconds
        if saved.problem:
            what = "is saved, but not all that follows was done" if saved.committed else "is not saved"
            self._complain(f"step {saved.step} {what}", saved.problem)

    def _complain(self, what: str, problem: str) -> None:
        self.figures["checkpoint/failed"] += 1
        if self.figures["checkpoint/failed"] == 1:
            self._say(f"warning: {what}, training goes on (checkpoint/failed counts): {problem}")

    def _write(self, step: int, state: bytes) -> _Saved:
        started, committed, problem = time.monotonic(), False, None
        files = {f"{part}.safetensors": file.pieces() for part, file in self._parts.items()} | {"state.json": [state]}
        try:
            written = checkpoint.write(
                self._run_dir, step, files, generation=self._generation, may_write=self._may_write
            )
            committed = True
            self._sound.add(written.path)
            checkpoint.retain(self._run_dir, self._keep_last, self._keep_every, sound=self._sound)
            self._afterwards()
        except (PipelineError, OSError) as error:
            problem = str(error)
        return _Saved(step, committed, time.monotonic() - started, problem)


def _step_back() -> None:
    """On a CPU the writer competes with the threads that train; Linux keeps a niceness for each thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
