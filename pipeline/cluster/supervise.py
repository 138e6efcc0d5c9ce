"""Run a launcher so that its job may be stopped, and end with the exit code of its ranks.

    python -m pipeline.cluster.supervise accelerate launch … -m pipeline.train …

For the first process of a container: Kubernetes tells only that process to stop, and decides by its exit code what to
do. A launcher exits with 1 whatever its ranks exit with. So each rank writes its exit code into a directory, and a
signal to stop becomes a file that the ranks poll: all of them save the same step and end with 75.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from pipeline.cluster.interrupt import signals_to
from pipeline.cluster.launch_environment import EXIT_CODES
from pipeline.errors import ConfigError, DataError, NoCheckpoint, Stopped

_DECISIVE = (*(error.exit_code for error in (ConfigError, NoCheckpoint, DataError)), 130, Stopped.exit_code)
"""Of several exit codes of ranks the first of these counts: the others have lost contact with a rank that failed."""


def supervise(command: Sequence[str]) -> int:
    """Run a command to its end.

    Args:
        command: a launcher with its arguments, or a single training process.

    Returns:
        Its exit code; if that is not 0, the one that its ranks have written, if any.
    """
    with tempfile.TemporaryDirectory(prefix="ddpm-") as directory:
        stop_file, codes = Path(directory, "stop"), Path(directory, "exit_codes")
        codes.mkdir()
        environment = os.environ | {"DDPM_STOP_FILE": str(stop_file), EXIT_CODES: str(codes)}
        with signals_to(lambda number, frame: stop_file.touch()):
            # In a session of its own, so that a terminal's signal does not reach the launcher either.
            launcher = subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603
            code = launcher.wait()
        return code and _of_ranks([int(file.read_text()) for file in codes.iterdir()], code)


def _of_ranks(codes: Collection[int], code: int) -> int:
    """The exit code that says why ranks ended; the launcher's own, as a shell gives it, if they have written none."""
    return next((known for known in _DECISIVE if known in codes), code if code > 0 else 128 - code)


def main() -> None:
    """Run the command that the arguments give."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m pipeline.cluster.supervise COMMAND [ARGUMENT …]")
    try:
        code = supervise(sys.argv[1:])
    except FileNotFoundError:
        sys.exit(f"{sys.argv[1]}: no such command")
    sys.exit(code)


if __name__ == "__main__":
    main()
