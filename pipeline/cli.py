"""The `ddpm` command: parse, call one job, map errors to exit codes."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Annotated, NoReturn

import typer
from typer.main import get_command

from pipeline import messages
from pipeline.cluster.interrupt import signals_to
from pipeline.cluster.launch_environment import count, is_first_of_node, report_exit_code, tell_launcher
from pipeline.commands import data, help, interchange, models, runs, suggestions, workspace
from pipeline.commands.report import report
from pipeline.errors import ConfigError, DataError, NoCheckpoint, PipelineError, Stopped
from pipeline.monitoring.machine import own_version

_INTERRUPTED = 130
_SHARED = (ConfigError.exit_code, NoCheckpoint.exit_code, Stopped.exit_code)
"""Exit codes of errors that all processes of a job have alike."""
_HEAD_START_S = 2.0
"""Time for another process of the job to write the message that both have."""

app = typer.Typer(
    help="DDPM at cluster scale: images → shards → run → samples → figures.\n\n"
    "Exit codes: 0 done, 2 usage or configuration, 3 data refused, 4 no valid checkpoint, 75 stopped on request and "
    "resumable, 130 interrupted twice, 1 a bug.\n\n"
    "`ddpm COMMAND -h` shows the common options on one screen, `ddpm COMMAND --help` explains all.",
    pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
_COMMANDS: dict[str, Callable[..., None]] = {
    "shard": data.shard, "verify": data.verify, "index": data.index, "train": runs.train, "sample": models.sample,
    "evaluate": models.evaluate, "report": report, "export": interchange.export, "import": interchange.import_model,
    "plan": runs.plan, "doctor": runs.doctor, "show": workspace.show, "runs": workspace.runs, "init": workspace.init,
}  # fmt: skip
for _name, _command in _COMMANDS.items():
    app.command(_name, cls=help.Command)(_command)


def _print_version(asked: bool) -> None:
    if asked:
        messages.result(f"ddpm {own_version()}")
        raise typer.Exit


@app.callback()
def _before_any_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before the name of a command."""


def main(words: list[str] | None = None) -> NoReturn:
    """Run the command and exit with its exit code."""
    messages.prepare_streams()
    words = (sys.argv[1:] if words is None else words) or ["--help"]
    words = ["--help"] if words == ["-h"] else words
    is_later = not is_first_of_node()  # the first one writes what each of them would
    with signals_to(_exit_on_signal):  # until a job handles stop requests itself, nothing needs to be finished first
        try:
            code = app(words, prog_name="ddpm", standalone_mode=False)  # an exit code where the parser ends it
        except PipelineError as error:
            is_shared = error.exit_code in _SHARED and is_later
            _exit(str(error), error.exit_code, told_elsewhere=is_shared or error.is_told_elsewhere)
        except typer.Abort as error:  # typer raises it for an EOFError
            _exit(f"a file ends too early ({error.__cause__}): copy or make it again", DataError.exit_code)
        except Exception as error:
            if isinstance(error, OSError) and "--help" in words:
                _exit(f"the help cannot be written: {error.strerror}", DataError.exit_code)
            if not hasattr(error, "format_message"):  # not an error of the parser but a bug: show the traceback
                raise
            _exit(suggestions.explain(error, words, get_command(app)), 2, told_elsewhere=is_later)
    if code == _INTERRUPTED and not is_later:
        _exit("interrupted: finished parts stay, the same command continues from there", _INTERRUPTED)
    sys.exit(code or 0)


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    if not is_first_of_node():
        report_exit_code(Stopped.exit_code)
        sys.exit(Stopped.exit_code)
    _exit(f"stopped by {signal.Signals(number).name}: the same command continues from there", Stopped.exit_code)


def _exit(message: str, code: int, *, told_elsewhere: bool = False) -> NoReturn:
    """Exit with a message, unless another process of the job writes it."""
    report_exit_code(code)
    if told_elsewhere:
        time.sleep(_HEAD_START_S)  # the launcher ends all processes when the first one has ended
        sys.exit(code)
    rank = count("RANK", 0)
    for line in message.splitlines():
        messages.error(f"ddpm{f' (rank {rank})' if rank else ''}: {line}")
    tell_launcher(message)
    sys.exit(code)
