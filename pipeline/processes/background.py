"""A call that goes on in a thread while the caller does something else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

Result = TypeVar("Result")


class Background(Generic[Result]):
    """Calls a function in a thread, which does not delay the end of the process."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error

    def result(self) -> Result:
        """Wait for the function; return its result, or raise its exception."""
        self._thread.join()
        if self._error:
            raise self._error
        return cast(Result, self._result)
