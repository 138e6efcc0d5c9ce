"""A proxy before an object store that fails as stores and networks do: keyed, counted, and only when told to."""

from __future__ import annotations

import hashlib
import http.client
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_INTERNAL = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive", "date", "server"}


class Faults(ThreadingHTTPServer):
    """Listens on a free port of this machine; `url` is the endpoint to give to clients.

    Whether the n-th request of a method for a path and range fails, and how, is a function of just these: it does not
    depend on what other processes ask for at the same time.
    """

    daemon_threads = True
    kinds = ("slow down", "internal error", "reset", "answer lost", "short", "delay")

    def __init__(self, store_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.store_port = store_port
        self.rate = 0.0
        self.injected: Counter[str] = Counter()
        self.creating = threading.Lock()
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def draw(self, request: str) -> str:
        """What is to go wrong with this request; empty: nothing."""
        with self._lock:
            self._seen[request] += 1
            digest = hashlib.blake2b(f"{request} {self._seen[request]}".encode(), digest_size=16).digest()
        chance, which = int.from_bytes(digest[:8]) / 2**64, int.from_bytes(digest[8:])
        return self.kinds[which % len(self.kinds)] if chance < self.rate else ""

    def count(self, kind: str) -> None:
        with self._lock:
            self.injected[kind] += 1

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed says nothing of the proxy."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faults

    def serve(self) -> None:
        body = self._body()
        ranged = self.headers.get("Range", "")
        fault = self.server.draw(f"{self.command} {self.path} {ranged}")
        if fault in ("slow down", "internal error"):
            self.server.count(fault)
            code, answer = (503, _SLOW_DOWN) if fault == "slow down" else (500, _INTERNAL)
            return self._answer(code, {"Content-Type": "application/xml"}, b"" if self.command == "HEAD" else answer)
        if fault == "delay":
            self.server.count(fault)
            time.sleep(0.05)
        # moto looks for the file and writes it in two steps; S3 does both in one (If-None-Match).
        with self.server.creating if "If-None-Match" in self.headers else nullcontext():
            status, headers, data = self._forward(body)
        if fault == "answer lost":  # what was asked for is done
            self.server.count(fault)
            return self._cut()
        if fault == "reset" and len(data) > 1:
            self.server.count(fault)
            self._answer(status, headers, data, send=len(data) // 2)
            return self._cut()
        if fault == "short" and ranged and len(data) > 1:
            self.server.count(fault)
            headers = {k: v for k, v in headers.items() if "checksum" not in k.lower()}
            data = data[: len(data) // 3]
        return self._answer(status, headers, data)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = serve

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """What the store answers to this request: status, headers, body."""
        store = http.client.HTTPConnection("127.0.0.1", self.server.store_port)
        store.request(
            self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() != "connection"}
        )
        response = store.getresponse()
        data = response.read()
        headers = {k: v for k, v in response.getheaders() if k.lower() not in _HOP_BY_HOP}
        if self.command == "HEAD":
            headers["Content-Length"] = response.getheader("Content-Length", "0")
        store.close()
        return response.status, headers, data

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        del self.headers["Transfer-Encoding"]
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: int, headers: dict[str, str], data: bytes, send: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers and status != 204:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:send])

    def _cut(self) -> None:
        """Ends the connection with a reset."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""
