"""A generator that runs ahead in a thread while its items are used."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

Item = TypeVar("Item")
_POLL_S = 0.05


@dataclass
class _End:
    error: BaseException | None = None


def prefetch(items: Generator[Item, Any, Any], depth: int) -> Generator[Item, None, None]:
    """Run a generator in a thread and yield its items; close it to end the thread.

    Args:
        items: started, continued and closed in the thread. Its exception is raised here.
        depth: items that wait in the queue, at most.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(depth)
    stopped = threading.Event()

    def fill() -> None:
        end = _End()
        try:
            with closing(items):
                for item in items:
                    ready.put(item)
                    if stopped.is_set():
                        break
        except BaseException as error:
            end.error = error
        ready.put(end)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error:
            raise item.error
    finally:
        stopped.set()
        while thread.is_alive():  # it may wait for space in the queue
            with suppress(queue.Empty):
                ready.get(timeout=_POLL_S)
