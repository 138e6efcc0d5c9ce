"""Save while training continues: copy the tensors to the host between two steps, and write them in one thread."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoints import ema_snapshots
from pipeline.checkpoints.checkpoint import keep_forever, newest_safe_checkpoint, remove_old, write_checkpoint
from pipeline.checkpoints.run_dir import RunDir
from pipeline.checkpoints.safetensors_buffer import TensorFile
from pipeline.errors import PipelineError
from pipeline.storage import files

_NICENESS = 10


@dataclass(frozen=True)
class _Result:
    """The outcome of a save."""

    step: int
    committed: bool
    seconds: float
    problem: str | None


class Saver(AbstractContextManager["Saver"]):
    """Writes the checkpoints of a run, one at a time, in the background. A save that fails does not end the run.

    Args:
        run_dir: the run.
        keep_last: number of newest checkpoints to keep.
        keep_every: keep checkpoints at multiples of this step; 0: none.
        generation: of this job's lease.
        check_lease: raises RunHeld if another job has taken the run over.
        on_saved: called in the background after each successful save.
        warn: gets a line at the first save that fails.
        patience_s: seconds that a save waits for the previous save.
        verified_path: the checkpoint that the run has resumed from: it was read in full.
        is_milestone: whether to keep the checkpoint of a step for ever, also if `keep_every` changes later.
    """

    def __init__(
        self,
        run_dir: str,
        *,
        keep_last: int,
        keep_every: int,
        generation: int,
        check_lease: Callable[[], None],
        on_saved: Callable[[], None],
        warn: Callable[[str], None],
        patience_s: float,
        verified_path: str | None = None,
        is_milestone: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self._run_dir, self._keep_last, self._keep_every = run_dir, keep_last, keep_every
        self._generation, self._check_lease, self._on_saved = generation, check_lease, on_saved
        self.figures = {"checkpoint/failed": 0.0}
        """For TensorBoard: number of failed saves; seconds that the last save took, and that training waited for it."""
        self.problem: str | None = None
        """Why the last save that has ended or was skipped failed; None if it succeeded."""
        self._warn, self._is_milestone = warn, is_milestone
        self._patience_s, self._verified_paths = patience_s, {verified_path} if verified_path else set()
        self._parts: dict[str, TensorFile] = {}
        self._thread = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="checkpoint", initializer=lower_thread_priority
        )
        self._pending: Future[_Result] | None = None

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def save(
        self,
        step: int,
        parts: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        snapshot_updates: int | None = None,
        best: Mapping[str, Any] | None = None,
    ) -> bool:
        """Copy the tensors, and write them in the background. The caller may change them when this returns.

        If the previous save has not ended after `patience_s`, this save is skipped and counts as failed.

        Args:
            step: number of finished steps.
            parts: file stem → name → live tensor; the same names and shapes at each call.
            state: JSON values.
            best: what to write into `best.json` when the checkpoint is there; None if it is not the best one.
            snapshot_updates: also keep a snapshot of the part `ema_snapshots.PART`, which has had so many updates.

        Returns:
            Whether the save has begun.
        """
        called = time.monotonic()
        if self._pending and not wait([self._pending], self._patience_s).done:
            self.problem = f"the previous save has not ended in {self._patience_s:.0f} s"
            self._count_failure(f"step {step} is not saved", self.problem)
            return False
        self.collect_result()
        on_gpu = any(tensor.is_cuda for tensors in parts.values() for tensor in tensors.values())
        for part, tensors in parts.items():
            if part not in self._parts:
                self._parts[part] = TensorFile(tensors, pin=on_gpu)
            self._parts[part].fill(tensors)
        if on_gpu:
            torch.cuda.synchronize()
        self.figures["checkpoint/stall_s"] = time.monotonic() - called
        text = json.dumps(state, indent=1).encode() + b"\n"
        self._pending = self._thread.submit(self._write, step, text, snapshot_updates, best)
        return True

    def collect_result(self, *, wait: bool = False) -> None:
        """Update `figures` and `problem` if the save in the background has ended.

        Args:
            wait: wait for its end.

        Raises:
            Exception: any error of the save except a failure to write.
        """
        if self._pending is None or not (wait or self._pending.done()):
            return
        result, self._pending = self._pending.result(), None
        self.problem = None if result.committed else result.problem
        if result.committed:
            self.figures["checkpoint/save_s"] = result.seconds
        if result.problem:
            what = "is saved, but cleaning up after it failed" if result.committed else "is not saved"
            self._count_failure(f"step {result.step} {what}", result.problem)

    def newest_safe_checkpoint(self, good_steps: int) -> str | None:
        """`checkpoint.newest_safe_checkpoint`, after the end of the save in the background."""
        self.collect_result(wait=True)
        return newest_safe_checkpoint(self._run_dir, good_steps)

    def _count_failure(self, what: str, problem: str) -> None:
        self.figures["checkpoint/failed"] += 1
        if self.figures["checkpoint/failed"] == 1:
            self._warn(f"{what}, training continues (checkpoint/failed counts): {problem}")

    def _write(self, step: int, state: bytes, snapshot_updates: int | None, best: Mapping[str, Any] | None) -> _Result:
        started, committed, problem = time.monotonic(), False, None
        contents = {f"{part}.safetensors": file.pieces() for part, file in self._parts.items()}
        contents["state.json"] = [state]
        try:
            if snapshot_updates is not None:  # before the checkpoint, after which a resume would not write it again
                pieces = self._parts[ema_snapshots.PART].as_float16()
                ema_snapshots.write(self._run_dir, step, pieces, snapshot_updates, self._check_lease)
            written = write_checkpoint(
                self._run_dir, step, contents, generation=self._generation, check_lease=self._check_lease
            )
            committed = True
            self._verified_paths.add(written.path)
            if best is not None:
                files.write_json(RunDir(self._run_dir).best, dict(best))
            if self._is_milestone(step):
                keep_forever(written)
            remove_old(self._run_dir, self._keep_last, self._keep_every, verified_paths=self._verified_paths)
            self._on_saved()
        except (PipelineError, OSError) as error:
            problem = str(error)
        return _Result(step, committed, time.monotonic() - started, problem)


def lower_thread_priority() -> None:
    """Give way to the threads that train on the same CPU. Linux keeps a niceness for each thread."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
