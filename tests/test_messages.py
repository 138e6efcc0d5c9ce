"""A message that cannot be written is lost silently; a result that cannot be written is an error."""

from __future__ import annotations

import io
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from pipeline import cli, messages
from pipeline.errors import DataError
from pipeline.monitoring.progress import Progress
from tests import warm
from tests.launch import ENVIRONMENT, TINY, command


def full() -> io.TextIOWrapper:
    return open("/dev/full", "w", buffering=1)


def closed_pipe() -> io.TextIOWrapper:
    ours, theirs = os.pipe()
    os.close(ours)
    return os.fdopen(theirs, "w", buffering=1)


def closed() -> io.TextIOWrapper:
    with open(os.devnull, "w") as stream:
        pass
    return stream


class _Terminal(io.StringIO):
    """A terminal that goes away after the first words."""

    gone = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("unwritable", [full, closed_pipe, closed, lambda: None])
def test_a_message_never_raises(unwritable, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    stream = unwritable()
    monkeypatch.setattr(sys, "stderr", stream)
    messages.info("a")
    messages.warning("b")
    messages.error("c")
    with Progress(2, "working", unit="steps", every_s=0) as progress:
        progress.info("d")
        progress.advance(2)
    monkeypatch.undo()
    if stream is not None:
        messages.flush_or_discard(stream)
        if not stream.closed:
            stream.close()  # the interpreter does the same at its end, and would leave with 120


def test_a_bar_outlives_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(3, "working", unit="steps") as progress:
        assert isinstance(progress._bar, tqdm)
        progress.advance()
        terminal.gone = True
        progress.info("above it")
        progress.advance(2)


def test_control_characters_in_a_message_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    messages.warning("\x1b[2Ja\rb: this\nand that")
    assert capsys.readouterr().err == "warning: \\x1b[2Ja\\rb: this\nand that\n"


def test_a_program_may_redirect_messages(capsys: pytest.CaptureFixture[str]) -> None:
    logger, lines = logging.getLogger("ddpm"), io.StringIO()
    broken = logging.Handler()
    broken.emit = lambda record: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    before, logger.handlers = logger.handlers, [logging.StreamHandler(lines), broken]
    try:
        messages.warning("it is 100 % full")
    finally:
        logger.handlers = before
    assert lines.getvalue() == "warning: it is 100 % full\n" and capsys.readouterr().err == ""


def test_a_result_that_cannot_be_written_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", full())
    monkeypatch.setattr("pipeline.verify.verify", lambda path, quiet: [])
    with pytest.raises(SystemExit) as left:
        cli.main(["verify", "anything"])
    assert left.value.code == DataError.exit_code
    assert "ddpm: cannot write the result to standard output: No space left on device" in capfd.readouterr().err
    messages.summary("of files that are there")
    messages.flush_or_discard(sys.stdout)
    monkeypatch.undo()


def test_a_run_whose_terminal_is_gone_and_whose_log_is_on_a_full_disk_ends_well(digits: Path, tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    settings = (f"data.shards={digits}", f"run.dir={tmp_path / 'run'}", "data.workers=0", "train.steps=4")
    with full() as log:
        job = warm.Popen(command("train", *TINY, *settings), env=ENVIRONMENT, stdout=log, stderr=terminal,
                         start_new_session=True)  # fmt: skip
    os.close(terminal)
    os.close(master)
    assert job.wait(120) == 0
    assert (tmp_path / "run/DONE").exists()


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """What C libraries write to number 2 would stand in the middle of an artefact."""
    code = (
        "from pipeline import messages; messages.prepare_streams(); "
        f"f = open('{tmp_path}/f', 'w'); print(f.fileno() > 2, file=f)"
    )
    closing = f'exec 1>&- 2>&-; exec {sys.executable} -c "{code}"'
    assert subprocess.run(["bash", "-c", closing], env=ENVIRONMENT, check=False).returncode == 0
    assert (tmp_path / "f").read_text() == "True\n"
