"""An object store that speaks as much S3 as p2pnet does, over real HTTP on loopback.

Conditional writes are atomic, as Amazon's are. Faults are put in by tests: answers
of a given status, cut short, or lost after the work is done.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 100  # keys of one answer to a listing
DATE = "Sun, 22 Nov 2026 20:00:00 GMT"

# (method, key) -> "" or what goes wrong: "503", "403", "short", "lost"
Fault = Callable[[str, str], str]


class S3Server:
    """One bucket in memory.

    Attributes:
        objects: by key.
        requests: (method, key) so far.
        fault: asked at every request.
    """

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.fault: Fault = lambda method, key: ""
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"s3": self})
        )
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    @contextmanager
    def running(self) -> Iterator[S3Server]:
        thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()

    def put(self, key: str, data: bytes, *, only_if_new: bool) -> bool:
        with self.lock:
            if only_if_new and key in self.objects:
                return False
            self.objects[key] = data
            return True


class _Handler(BaseHTTPRequestHandler):
    s3: S3Server
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = self._begin()
        if key is None:
            return
        only_if_new = self.headers.get("If-None-Match") == "*"
        if not self.s3.put(key, data, only_if_new=only_if_new):
            self._answer(412, _error("PreconditionFailed"))
        else:
            self._answer(200, b"", ETag=_etag(data))

    def do_GET(self) -> None:
        key = self._begin()
        if key is None:
            return
        if not key:
            self._list(parse_qs(urlsplit(self.path).query))
            return
        data = self.s3.objects.get(key)
        if data is None:
            self._answer(404, _error("NoSuchKey"))
        else:
            self._answer(200, data, ETag=_etag(data), Last_Modified=DATE)

    do_HEAD = do_GET

    def _begin(self) -> str | None:
        """The key; None where the answer has been given already."""
        bucket, _, key = unquote(urlsplit(self.path).path).lstrip("/").partition("/")
        self.s3.requests.append((self.command, key))
        if bucket != self.s3.bucket:
            self._answer(404, _error("NoSuchBucket"))
        elif "Authorization" not in self.headers:
            self._answer(403, _error("AccessDenied"))
        else:
            self._fault = self.s3.fault(self.command, key)
            if not self._fault.isdigit():
                return key
            self._answer(int(self._fault), _error("Fault"))
        return None

    _fault = ""

    def _list(self, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        after = query.get("continuation-token", query.get("start-after", [""]))[0]
        keys = sorted(key for key in self.s3.objects if key.startswith(prefix) and key > after)
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-11-22T20:00:00.000Z"
            f"</LastModified><ETag>{_etag(self.s3.objects[key])}</ETag>"
            f"<Size>{len(self.s3.objects[key])}</Size></Contents>"
            for key in keys[:PAGE]
        )
        more = len(keys) > PAGE
        token = f"<NextContinuationToken>{keys[PAGE - 1]}</NextContinuationToken>" if more else ""
        body = f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{rows}"
        self._answer(200, f"{body}</ListBucketResult>".encode())

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        if self._fault == "lost":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            if self._fault == "short":
                body = body[: len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
