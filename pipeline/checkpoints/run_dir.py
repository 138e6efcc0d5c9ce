"""The names of all files in a run directory, in one place. No other module joins them by hand.

RUN/config.yaml  DONE  FAILED.json  log.jsonl  imported.json
    checkpoints/step_00012000/  previews/step_00012000.png  tensorboard/
    ema_snapshots/step_00012000.safetensors  .json
    control/  lease-000007.json  nodes/00008.json  starts.jsonl  stop  stopped.json  requeues.jsonl
"""

from __future__ import annotations

import re

from pipeline.storage import files

_CHECKPOINT = re.compile(r"step_(\d{8,})")
_PREVIEW = re.compile(r"step_(\d{8,})\.png")
_LEASE = re.compile(r"lease-(\d{6,})\.json")


class RunDir:
    """Paths in the directory of one run.

    Args:
        path: the run directory, a local path or a URL; it need not exist.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.config = files.join(path, "config.yaml")
        """The resolved configuration."""
        self.done = files.join(path, "DONE")
        """Exists when the run has finished all of its steps."""
        self.failed = files.join(path, "FAILED.json")
        """The error that ended the last start."""
        self.imported = files.join(path, "imported.json")
        """Exists in a run that `ddpm import` has made of a model from elsewhere: what it was made of."""
        self.log = files.join(path, "log.jsonl")
        """The curves as JSON, one line a step."""
        self.tensorboard = files.join(path, "tensorboard")
        self.evaluation = files.join(self.tensorboard, "evaluation")
        """Event files of `ddpm evaluate --log`, which may run while the run is trained."""
        self.best = files.join(path, "best.json")
        """The step with the lowest Fréchet distance of `run.evaluate_every`; its checkpoint is kept."""
        self.checkpoints = files.join(path, "checkpoints")
        self.previews = files.join(path, "previews")
        self.control = files.join(path, "control")
        self.stop = files.join(self.control, "stop")
        """A user creates this file to stop the run."""
        self.stopped = files.join(self.control, "stopped.json")
        """Why the last start was stopped on request, and at which step."""
        self.nodes = files.join(self.control, "nodes")
        """The heartbeats of all ranks, a file for each node."""
        self.diagnosing = files.join(self.control, "diagnosing.json")
        """Created by the first rank that looks for the rank which is gone."""
        self.ranks = files.join(self.control, "ranks")
        """Where version 0.1 wrote the heartbeats, a file for each rank."""
        self.starts = files.join(self.control, "starts.jsonl")
        """When and where the run was started each time, and how the start before ended."""
        self.requeues = files.join(self.control, "requeues.jsonl")
        """The step that each start of a batch job has reached."""

    def checkpoint(self, step: int) -> str:
        """The checkpoint directory of a step."""
        return files.join(self.checkpoints, checkpoint_name(step))

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a checkpoint directory, in ascending order; the checkpoints may be incomplete or damaged."""
        return _numbers(self.checkpoints, _CHECKPOINT)

    def ema_snapshot(self, step: int, extension: str) -> str:
        """A file of the snapshot of the averages at a step: `safetensors`, or the `json` that commits it."""
        return files.join(self.path, "ema_snapshots", f"{checkpoint_name(step)}.{extension}")

    def ema_snapshot_steps(self, extension: str) -> list[int]:
        """Steps that have this file of a snapshot, in ascending order."""
        return _numbers(files.join(self.path, "ema_snapshots"), re.compile(rf"step_(\d{{8,}})\.{extension}"))

    def preview(self, step: int) -> str:
        """The preview image of a step."""
        return files.join(self.previews, f"{checkpoint_name(step)}.png")

    def preview_steps(self) -> list[int]:
        """Steps that have a preview image, in ascending order."""
        return _numbers(self.previews, _PREVIEW)

    def newest_preview(self) -> str | None:
        """The preview image of the last step that has one."""
        steps = self.preview_steps()
        return self.preview(steps[-1]) if steps else None

    def node_heartbeats(self, first_rank: int) -> str:
        """The heartbeats of the node whose first rank this is."""
        return files.join(self.nodes, f"{first_rank:05d}.json")

    def lease(self, generation: int) -> str:
        """The lease file of a generation: the first job that trains the run has generation 1."""
        return files.join(self.control, f"lease-{generation:06d}.json")

    def lease_generations(self) -> list[int]:
        """Generations that have a lease file, in ascending order."""
        return _numbers(self.control, _LEASE)


def checkpoint_name(step: int) -> str:
    """The name of a step's checkpoint directory."""
    return f"step_{step:08d}"


def advice_for_missing(path: str) -> str:
    """What to do where a run is expected and nothing is."""
    return f"train it first (ddpm train --config CONFIG.yaml run.dir={path}), or see `ddpm runs DIR`"


def step_of(checkpoint_path: str) -> int | None:
    """The step in the name of a checkpoint directory; None for another name."""
    match = _CHECKPOINT.fullmatch(checkpoint_path.rstrip("/").rpartition("/")[2])
    return int(match[1]) if match else None


def _numbers(directory: str, pattern: re.Pattern[str]) -> list[int]:
    return sorted({int(match[1]) for name in files.listdir(directory) if (match := pattern.fullmatch(name))})
