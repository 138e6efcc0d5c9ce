"""The errors a user can cause, and the exit code each one ends a command with.

    PipelineError            1   never raised itself; anything unforeseen is a bug and exits 1 too
    ├── ConfigError          2   usage or configuration; Superseded: another job holds the run
    ├── DataError            3   data refused: unreadable, damaged, or no room to write it
    ├── NoCheckpoint         4   no valid checkpoint where one is needed
    ├── RankLost             1   another process of the job is gone or stuck; start again
    └── Stopped             75   stopped on request, resumable (EX_TEMPFAIL)

Two interrupts end with 130, as everywhere.
A message is one line: what is wrong, where, and what to do about it. `cli.main` prints it without a traceback.
"""


class PipelineError(Exception):
    """A failure that is explained to the user in one line."""

    exit_code = 1


class ConfigError(PipelineError):
    """A flag, a key or a path that cannot be used as given."""

    exit_code = 2


class Superseded(ConfigError):  # noqa: N818  the state is the name
    """Another job holds this run."""


class DataError(PipelineError):
    """Input that is missing, damaged or unsuitable, or output that cannot be written."""

    exit_code = 3


class NoCheckpoint(PipelineError):  # noqa: N818  the state is the name
    """A run without a valid checkpoint."""

    exit_code = 4


class RankLost(PipelineError):  # noqa: N818  the state is the name
    """A process that this one has to wait for is gone, stuck or out of reach."""


class Stopped(PipelineError):  # noqa: N818  not a failure
    """The job ended early because it was asked to; the same command goes on from there."""

    exit_code = 75
