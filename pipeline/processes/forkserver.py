"""The fork server, from which worker processes are forked: stop signals do not reach it, and it ends with the job.

A fork of the job itself would copy the locks that threads of torch, NCCL and fsspec hold at that moment, and the
sockets and file locks of the rank.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from multiprocessing import forkserver, resource_tracker, util

from pipeline.errors import ConfigError

_LONGEST_SOCKET_NAME = 107  # bytes, without the closing zero of sun_path
_SOCKET_SUFFIX = len("/pymp-12345678/listener-12345678")
_SHORT_DIRS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108  mkdtemp makes a directory of this user's in it
_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}


def start_worker_server(preload: str = "pipeline.data.loading.batches") -> None:
    """Start the fork server if it is not running; returns at once.

    If a job calls this early, the imports of the server run in parallel with its own, and the first batch is ready a
    second sooner.

    Schedulers and `accelerate launch` signal whole process groups. Fork server, resource tracker and workers inherit a
    mask that blocks the stop signals; if they ignored them only later, a signal before that would kill them. A signal
    sent to this process meanwhile is delivered afterwards.

    Args:
        preload: the module that the workers will run, imported once for all of them.

    Raises:
        ConfigError: there is no directory for sockets.
    """
    _choose_socket_directory()
    multiprocessing.get_context("forkserver").set_forkserver_preload([preload])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # which unblocks SIGTERM and SIGINT
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _choose_socket_directory() -> None:
    """If TMPDIR is too long for the name of a socket, make multiprocessing put its sockets into a shorter directory.

    Other temporary files stay in TMPDIR. The workers inherit the choice.
    """
    base, own = tempfile.gettempdir(), tempfile.tempdir
    if len(os.fsencode(base)) + _SOCKET_SUFFIX <= _LONGEST_SOCKET_NAME:
        return
    try:
        tempfile.tempdir = next(path for path in _SHORT_DIRS if os.access(path, os.W_OK | os.X_OK))
        util.get_temp_dir()  # makes the directory, once in a process
    except (StopIteration, OSError):
        most = _LONGEST_SOCKET_NAME - _SOCKET_SUFFIX
        raise ConfigError(
            f"TMPDIR is {base}, too long for the name of a socket: set TMPDIR to a path of at most {most} bytes"
        ) from None
    finally:
        tempfile.tempdir = own


def exit_with_parent() -> None:
    """In a worker: exit as soon as the process that started it is gone.

    It is not enough to watch the fork server, which lives as long as any worker does.
    """

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
