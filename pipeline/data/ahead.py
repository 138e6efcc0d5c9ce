"""An iterator that goes on in a thread of its own while what it gave is worked on."""

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


def ahead(items: Generator[Item, Any, Any], depth: int) -> Generator[Item, None, None]:
    """The same items, at most so many of them ready and waiting; close it to end the thread.

    Whatever `items` raises is raised here. It is begun, continued and closed in the thread.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(depth)
    over = threading.Event()

    def pump() -> None:
        end = _End()
        try:
            with closing(items):
                for item in items:
                    ready.put(item)
                    if over.is_set():
                        break
        except BaseException as error:
            end.error = error
        ready.put(end)

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error:
            raise item.error
    finally:
        over.set()
        while thread.is_alive():  # it may be waiting for room
            with suppress(queue.Empty):
                ready.get(timeout=_POLL_S)
