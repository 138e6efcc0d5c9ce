"""An object store on this machine that counts its requests and answers after a given time: moto's S3 behind a proxy."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import fsspec

sys.path.append(str(Path(__file__).parents[1]))  # for `tests`, which is not installed

from tests.remote.faults import Faults
from tests.remote.moto_server import moto_server

BUCKET = "pool"


class Request(NamedTuple):
    """One request that came."""

    at_s: float
    """Since the last `take`."""
    method: str
    path: str
    range: str


class CountingStore(Faults):
    """The proxy. `latency_s` is how long it waits before it asks the store behind it."""

    def __init__(self, store_port: int) -> None:
        super().__init__(store_port)
        self.latency_s = 0.0
        self._requests: list[Request] = []
        self._since = time.perf_counter()
        self._taking = threading.Lock()

    def draw(self, request: str) -> str:
        """Note a request, and wait; none fails."""
        method, path, ranged = request.split(" ", 2)
        with self._taking:
            self._requests.append(Request(time.perf_counter() - self._since, method, path, ranged))
        time.sleep(self.latency_s)
        return ""

    def take(self) -> list[Request]:
        """The requests since the last call, in the order in which they came."""
        with self._taking:
            taken, self._requests, self._since = self._requests, [], time.perf_counter()
        return taken

    def methods(self) -> dict[str, int]:
        """How many of each method since the last `take`; a GET that lists names, 1,000 at a time, counts as LIST."""
        return dict(Counter("LIST" if "list-type=" in path else method for _, method, path, _ in self.take()))


@contextmanager
def store() -> Iterator[CountingStore]:
    """A store with one bucket, at `s3://pool`, for this process and those that it starts."""
    with moto_server() as port:
        counting = CountingStore(port)
        os.environ.update(
            AWS_ENDPOINT_URL=counting.url, AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing",
            AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true",
        )  # fmt: skip
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(BUCKET)
        counting.take()
        yield counting
        counting.shutdown()
