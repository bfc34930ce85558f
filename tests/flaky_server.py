"""A file server on this machine that breaks as real ones do, over real sockets.

with FlakyServer(folder, share=0.2) as server:
    read(f"{server.url}/x.tar")
"""

import os
import random
import socket
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

# unavailable: 503. reset: the connection breaks in the middle. stall: it stays open and silent in the middle. short:
# fewer bytes than announced. unannounced: no Content-Length, and fewer bytes than there are. wrong: a flipped bit.
FAULTS = ("unavailable", "reset", "stall", "short", "unannounced", "wrong")


class FlakyServer:
    """Serves the files of a folder.

    Args:
        root: the folder.
        share: of the requests that fail.
        faults: how they fail.
        in_a_row: the same bytes fail at most so many times in a row.
        ranges: whether it knows the Range header.
        announced: whether it sends Content-Length.

    Attributes:
        url: of the folder.
        requests: number of requests for each (file name, Range header).
        sent: bytes of bodies.
        paths: every path as it came, with its query.
    """

    def __init__(
        self,
        root: Path,
        *,
        share: float = 0.0,
        faults: Sequence[str] = FAULTS,
        in_a_row: int = 3,
        ranges: bool = True,
        announced: bool = True,
    ) -> None:
        self.root, self.share, self.faults, self.in_a_row = root, share, faults, in_a_row
        self.ranges, self.announced = ranges, announced
        self.requests: Counter[tuple[str, str]] = Counter()
        self.failed: Counter[tuple[str, str]] = Counter()  # in a row
        self.paths: list[str] = []
        self.sent = 0
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.flaky = self  # type: ignore[attr-defined]  # for the handler
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> "FlakyServer":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def fault(self, name: str, wanted: str) -> str | None:
        """How this request fails: a function of what is asked for and how often it was."""
        number = self.requests[name, wanted] = self.requests[name, wanted] + 1
        chance = random.Random(zlib.crc32(f"{name} {wanted} {number}".encode()))
        if chance.random() >= self.share or self.failed[name, wanted] >= self.in_a_row:
            self.failed[name, wanted] = 0
            return None
        self.failed[name, wanted] += 1
        return chance.choice(list(self.faults))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    flaky: FlakyServer

    def do_GET(self) -> None:
        server: FlakyServer = self.server.flaky  # type: ignore[attr-defined]
        server.paths.append(self.path)
        name, wanted = os.path.basename(self.path.partition("?")[0]), self.headers.get("Range", "")
        fault = server.fault(name, wanted)
        file = server.root / self.path.partition("?")[0].lstrip("/")
        if fault == "unavailable" or not file.is_file():
            self.send_response(503 if fault else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        total, first, last = len(data), 0, len(data) - 1
        partial = server.ranges and bool(wanted)
        if partial:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
            if first > last:
                self.send_error(416)
                return
            data = data[first : last + 1]
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        announced = server.announced and fault != "unannounced"
        if announced:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        self._send(data, fault, server)

    def _send(self, data: bytes, fault: str | None, server: FlakyServer) -> None:
        if fault == "wrong":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
        elif fault:
            data = data[: len(data) // 2]
        try:
            self.wfile.write(data)
            self.wfile.flush()
        except OSError:  # who asked has gone
            return
        server.sent += len(data)
        if fault == "stall":
            server.closing.wait(20)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if fault not in (None, "wrong"):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None: ...

    def handle(self) -> None:
        with suppress(OSError, ValueError):  # the connection that was reset
            super().handle()
