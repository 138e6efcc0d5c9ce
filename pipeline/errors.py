"""The errors a user can cause, and the exit code each one ends a command with.

    PipelineError            1   never raised itself; anything unforeseen is a bug and exits 1 too
    ├── ConfigError          2   wrong usage or configuration
    ├── RunHeld              2   another job trains this run
    ├── Diverged             2   the weights give no finite loss; training cannot continue
    ├── DataError            3   data is unreadable or damaged, or output cannot be written
    ├── NoCheckpoint         4   no valid checkpoint where one is needed
    ├── RankLost             1   another process of the job is gone or stuck; start the job again
    └── Stopped             75   stopped on request, resumable (EX_TEMPFAIL)

A second interrupt ends the command with 130, as in a shell.
A message is one line: what is wrong, where, and what to do about it. `cli.main` prints it without a traceback.
"""

MAX_CHARACTERS = 1500
"""Longest line of a message: the content of a file may be longer than any screen."""


def printable(text: str, max_characters: int = MAX_CHARACTERS) -> str:
    """Make text safe for a message or a terminal.

    Args:
        text: from a file, a file name or another package. Control characters and characters that UTF-8 cannot encode
            are escaped.
        max_characters: the middle of longer text is left out.
    """
    if len(text) > max_characters:
        text = f"{text[: max_characters * 2 // 3]} … {text[-(max_characters // 3) :]}"
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return shown if len(shown) <= 2 * max_characters else shown[:max_characters]


class PipelineError(Exception):
    """An error that one line explains to the user."""

    exit_code = 1
    is_told_elsewhere = False
    """Whether another process of the job has the same error and writes its message."""

    def __init__(self, message: str = "") -> None:
        super().__init__("\n".join(map(printable, message.split("\n"))))


class ConfigError(PipelineError):
    """A flag, a configuration key or a path is wrong."""

    exit_code = 2


class RunHeld(PipelineError):  # noqa: N818  the state is the name
    """Another job holds the lease of this run."""

    exit_code = 2


class Diverged(PipelineError):  # noqa: N818  the state is the name
    """The weights of a run give no finite loss, so that training cannot continue."""

    exit_code = 2


class DataError(PipelineError):
    """Input that is missing, damaged or unsuitable, or output that cannot be written."""

    exit_code = 3

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))  # one line: file names and file content may hold line breaks


class NoCheckpoint(PipelineError):  # noqa: N818  the state is the name
    """No valid checkpoint was found."""

    exit_code = 4


class RankLost(PipelineError):  # noqa: N818  the state is the name
    """Another process of the job is gone, stuck or out of reach."""


class Stopped(PipelineError):  # noqa: N818  not a failure
    """The job was asked to stop; the same command resumes it."""

    exit_code = 75
