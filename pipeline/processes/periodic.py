"""A function that a thread calls at regular intervals."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Periodic:
    """Calls `action` every `seconds` in its own thread, until `stop` is called. `action` must not raise."""

    def __init__(self, seconds: float, action: Callable[[], None], name: str) -> None:
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(seconds, action), name=name, daemon=True)
        self._thread.start()

    def _run(self, seconds: float, action: Callable[[], None]) -> None:
        while not self._stopped.wait(seconds):
            action()

    def stop(self) -> None:
        """Stop the thread. When this returns, no call is running and none will begin."""
        self._stopped.set()
        self._thread.join()
