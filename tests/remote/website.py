"""A web server for a directory, with parts of files or, as Python's own, without."""

from __future__ import annotations

import functools
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Website(ThreadingHTTPServer):
    """Serves a directory at `url`; a context manager that ends it."""

    daemon_threads = True

    def __init__(self, directory: Path, *, gives_parts: bool = True) -> None:
        handler = _InParts if gives_parts else _Whole
        super().__init__(("127.0.0.1", 0), functools.partial(handler, directory=str(directory)))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.held, self._held_ending, self._closing = 0, "", threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def hold(self, ending: str) -> None:
        """Answer no further request for names that end so; `held` counts those requests."""
        self._held_ending = ending

    def wait_if_held(self, path: str) -> None:
        if self._held_ending and path.endswith(self._held_ending):
            self.held += 1
            self._closing.wait()

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self.shutdown()
        self.server_close()


class _Whole(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


class _InParts(_Whole):
    protocol_version = "HTTP/1.1"
    server: Website

    def do_GET(self) -> None:
        self.server.wait_if_held(self.path)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not asked or not path.is_file():
            return super().do_GET()
        first, last = int(asked[1]), int(asked[2])
        data = path.read_bytes()[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{path.stat().st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return None
