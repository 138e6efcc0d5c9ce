"""All files below a remote directory, page by page, as a prefix of an object store may have a hundred million.

fsspec's `find` holds what the store says of all files, 1 KB for each. S3 is asked for pages of 1,000 files, as many
requests as `find` sends. Other stores are asked for one directory after another: the largest must fit in memory, and
many small ones cost a request each. A web server has no directories, only pages with links, so `find` reads it whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import fsspec

from pipeline.storage import files, remote

Infos = dict[str, dict[str, Any]]
"""Path relative to the directory → `fsspec`'s info."""
_WEB = ("http://", "https://")


def pages(url: str) -> Iterator[Infos]:
    """Every file below a remote directory, a page at a time; none if there is no such directory.

    Raises:
        DataError: the store cannot be read.
    """
    if url.startswith(_WEB):
        yield files.find(url)
        return
    with suppress(FileNotFoundError):
        yield from _s3_pages(url) if url.startswith(("s3://", "s3a://")) else _directories(url)


def _s3_pages(url: str) -> Iterator[Infos]:
    token: str | None = ""
    while token is not None:
        infos, token = remote.attempt(url, partial(_s3_page, token=token))
        yield infos


def _s3_page(fs: fsspec.AbstractFileSystem, path: str, *, token: str) -> tuple[Infos, str | None]:
    """One page, and the token of the next; None at the end."""
    bucket, key, _ = fs.split_path(path)
    prefix = key.strip("/") + "/" if key.strip("/") else ""
    more = {"ContinuationToken": token} if token else {}
    answer = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **fs.req_kw, **more)
    infos = {
        entry["Key"][len(prefix) :].lstrip("/"): entry | {"size": entry["Size"], "type": "file"}
        for entry in answer.get("Contents", ())
    }
    return infos, answer["NextContinuationToken"] if answer.get("IsTruncated") else None


def _directories(url: str) -> Iterator[Infos]:
    waiting = [""]
    while waiting:
        directory = waiting.pop()
        listed = remote.attempt(files.join(url, directory) if directory else url, _listed)
        yield {directory + name: info for name, info in listed.items() if info["type"] != "directory"}
        inner = (f"{directory}{name}/" for name, info in listed.items() if info["type"] == "directory")
        waiting += sorted(inner, reverse=True)  # the last is next, so that the files come in order


def _listed(fs: fsspec.AbstractFileSystem, path: str) -> Infos:
    path = path.rstrip("/")
    infos = fs.ls(path, detail=True)
    fs.invalidate_cache(path)  # it holds every directory that was ever listed
    named = {info["name"].rstrip("/")[len(path) :].lstrip("/"): info for info in infos}
    return {name: info for name, info in named.items() if name}
