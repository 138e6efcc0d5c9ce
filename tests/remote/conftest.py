"""A real server that speaks S3, behind a proxy that can fail, and the environment that leads to it."""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import pytest

from tests.launch import ENVIRONMENT
from tests.remote.faults import Faults
from tests.remote.moto_server import moto_server

RATE = 0.15
"""Share of requests that go wrong."""


@pytest.fixture(scope="package")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    """S3 at `AWS_ENDPOINT_URL` with a bucket `pool`; nothing fails unless a test sets `rate`."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    with log, moto_server(log) as port:
        faults = Faults(port)
        environment = {
            "AWS_ENDPOINT_URL": faults.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # the retries of botocore, so that ours have something to do
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
                patch.setitem(ENVIRONMENT, name, value)
            fsspec.get_filesystem_class("s3").clear_instance_cache()  # of a server that is gone
            fsspec.filesystem("s3", skip_instance_cache=True).mkdir("pool")
            yield faults
        faults.shutdown()


@pytest.fixture
def faulty(store: Faults) -> Iterator[Faults]:
    """The same while one request in seven goes wrong; they must have, by the end of the test."""
    store.injected.clear()
    store.rate = RATE
    yield store
    store.rate = 0
    assert store.injected.total() > 0, "nothing went wrong, so nothing was tested"
