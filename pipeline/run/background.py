"""Something done again and again beside the work of this process, until it is over."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Every:
    """Calls `action` every `seconds` in a thread of its own, from now on until `stop`. `action` must not raise."""

    def __init__(self, seconds: float, action: Callable[[], None], name: str) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(seconds, action), name=name, daemon=True)
        self._thread.start()

    def _run(self, seconds: float, action: Callable[[], None]) -> None:
        while not self._over.wait(seconds):
            action()

    def stop(self) -> None:
        """No call begins after this returns, and none is under way."""
        self._over.set()
        self._thread.join()
