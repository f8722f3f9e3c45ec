"""A server of files on this machine that breaks connections when told to."""

import hashlib
import json
import re
import threading
from abc import ABC, abstractmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "d" * 40


class LocalServer(ABC):
    """HTTP on this machine: every request goes to `answer`."""

    def __init__(self) -> None:
        local = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                local.answer(self)

            do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()  # close() waits so long
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @abstractmethod
    def answer(self, request: BaseHTTPRequestHandler) -> None:
        """Every request comes here."""


class Flaky(LocalServer):
    """Serves `files` by path, and as a data set OWNER/NAME of Hugging Face.

    cut: after how many bytes the connection breaks, one download after another. asked: (path, first byte) of each.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: list[int] = []
        self.asked: list[tuple[str, int]] = []
        self.headers: list[dict[str, str]] = []
        self.dataset: dict[str, bytes] = {}
        self.altered: dict[str, bytes] = {}
        self.ranges, self.lfs = True, True
        super().__init__()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        if path == "/api/datasets/someone/news":
            siblings = [{"rfilename": name, "size": len(data), "blobId": "0" * 40}
                        | ({"lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}}
                           if self.lfs else {})
                        for name, data in self.dataset.items()]  # fmt: skip
            card = {"license": "cc-by-4.0"}
            return self.send(request, json.dumps({"id": "someone/news", "sha": COMMIT, "siblings": siblings,
                                                  "cardData": card}).encode())  # fmt: skip
        if match := re.fullmatch(rf"/datasets/someone/news/resolve/{COMMIT}/(.+)", path):
            return self.send_file(request, match[1], self.altered.get(match[1], self.dataset.get(match[1])))
        return self.send_file(request, path, self.files.get(path))

    def send(self, request: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
        request.send_response(status)
        for header in {"Content-Length": str(len(body)), **headers}.items():
            request.send_header(*header)
        request.end_headers()
        request.wfile.write(body)

    def send_file(self, request: BaseHTTPRequestHandler, name: str, data: bytes | None) -> None:
        if data is None:
            return self.send(request, b"no such file", 404, **{"X-Error-Code": "RepoNotFound"})
        tag = f'"{hashlib.sha1(data).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")) if self.ranges else None
        if asked and request.headers.get("If-Range", tag) != tag:
            asked = None  # another file than the one that was begun
        start = int(asked[1]) if asked else 0
        self.asked.append((name, start))
        self.headers.append(dict(request.headers))
        if start >= len(data) > 0:
            return self.send(request, b"", 416, **{"Content-Range": f"bytes */{len(data)}"})
        request.send_response(206 if asked else 200)
        request.send_header("ETag", tag)
        request.send_header("Content-Length", str(len(data) - start))
        if asked:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        broken = self.cut.pop(0) if self.cut else None
        request.wfile.write(data[start:broken])
        if broken is not None:
            request.wfile.flush()
            request.close_connection = True
            request.connection.shutdown(2)
        return None
