"""An S3 server for tests: moto's, in a thread of the test process. It can be busy (503), slow, and gone for a while."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fsspec
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class ObjectStore:
    """A running server with one bucket, `bucket`. The objects stay when it is stopped and started again."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._application = DomainDispatcherApplication(create_backend_app)
        self._port = 0
        self.is_busy = False
        self.before: Callable[[str], None] = lambda path: None
        """Called with the path of every object that is read."""
        self.num_refused = 0
        self.start()
        # Every server of a process has the same objects, so another one may have made the bucket.
        self.files.makedirs("bucket", exist_ok=True)

    def __call__(self, request: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        if request["REQUEST_METHOD"] == "GET":
            self.before(request["PATH_INFO"])
        if not self.is_busy:
            return self._application(request, respond)
        self.num_refused += 1
        request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
        respond("503 Slow Down", [("Content-Type", "application/xml")])
        return [] if request["REQUEST_METHOD"] == "HEAD" else [BUSY]

    def start(self) -> None:
        self._server = make_server("127.0.0.1", self._port, self, threaded=True)
        self._port = self._server.port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Close the port: connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which clients find the server."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/nonexistent",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def files(self) -> Any:
        """s3fs, as the test's own client."""
        options = {"endpoint_url": self.environment["AWS_ENDPOINT_URL"], "key": "test", "secret": "test"}
        return fsspec.filesystem("s3", **options, use_listings_cache=False)

    def upload(self, folder: Path, name: str) -> str:
        """Copy a folder to `s3://bucket/<name>`, and return that."""
        self.files.put(f"{folder}/", f"bucket/{name}/", recursive=True)
        return f"s3://bucket/{name}"

    def download(self, name: str, folder: Path) -> Path:
        """Copy the folder `s3://bucket/<name>` to a local one, and return that."""
        self.files.get(f"bucket/{name}/", f"{folder}/", recursive=True)
        return folder
