"""The fork server that worker processes come from: out of reach of every stop signal, and gone with the job.

A plain fork would copy whatever locks the threads of torch, NCCL and fsspec hold at that moment, and the rank's
sockets and file locks with them.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker

_STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}


def start_worker_server(preload: str = "pipeline.data.batches") -> None:
    """Start the server that worker processes are forked from, unless it runs; returns at once.

    Called early in a job, its imports run beside the job's own, and the first batch comes a second sooner.

    Schedulers and `accelerate launch` signal whole process groups. Server, tracker and workers inherit a mask that
    blocks the stop signals; ignoring them later would leave a time in which they are deadly. A signal sent to this
    process meanwhile is delivered afterwards.

    Args:
        preload: the module that the workers will run, imported once for all of them.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([preload])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # which unblocks SIGTERM and SIGINT
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def exit_with_parent() -> None:
    """In a worker: end when the process that started it is gone, whatever this one is doing.

    The fork server lives as long as any worker does, so a watch on that is not enough.
    """

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
