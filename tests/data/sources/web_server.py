"""A web server of a folder for tests, in a thread of the test process. It can be busy, and refuse parts of files."""

from __future__ import annotations

import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class WebServer:
    """A running server. The next `busy` requests are answered with 503; `cuts` answers end in the middle."""

    def __init__(self, folder: Path):
        self.sends_parts = True
        self.says_size = True
        self.busy = 0
        self.cuts = 0
        self.requests: list[tuple[str, str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, owner: WebServer, *args: Any, **kwargs: Any):
        self.owner = owner
        super().__init__(*args, **kwargs)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        owner, asked = self.owner, self.headers.get("Range", "")
        owner.requests.append((self.command, self.path, asked))
        path = Path(self.translate_path(self.path))
        if owner.busy:
            owner.busy -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        start, stop = 0, size
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", asked) if owner.sends_parts else None
        if part is None:
            self.send_response(200)
        else:
            start, stop = int(part[1]), min(int(part[2] or size) + 1, size)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        if owner.says_size:
            self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        if with_body and owner.cuts and stop - start > 1:
            owner.cuts -= 1
            stop = (start + stop) // 2
            self.close_connection = True
        if with_body:
            with path.open("rb") as file:
                file.seek(start)
                self.wfile.write(file.read(stop - start))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""
