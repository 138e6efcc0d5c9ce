"""Job: look at every byte of a shard set, a sample set or a run, and name what is wrong."""

from __future__ import annotations

from pipeline import storage
from pipeline.data import integrity
from pipeline.errors import ConfigError
from pipeline.run import checkpoint


def verify(path: str) -> list[str]:
    """Check a shard set, a sample set (which is a shard set) or a run.

    Args:
        path: directory or URL.

    Returns:
        One line a finding, naming the file and where in it; none if all is sound.

    Raises:
        ConfigError: there is nothing of this name, or it is none of the three.
    """
    if not storage.is_dir(path):
        raise ConfigError(f"{path}: no such directory: give a shard set, a sample set or a run")
    names = set(storage.listdir(path))
    if names & {"config.yaml", "checkpoints"}:
        return checkpoint.verify(path)
    if "index.json" in names or any(name.endswith(".tar") for name in names):
        return integrity.verify(path)
    raise ConfigError(f"{path} is neither a shard set, a sample set nor a run: give one of these")
