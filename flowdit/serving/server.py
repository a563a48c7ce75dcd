"""Starting the page: models, queue and server."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowdit.fields import FieldError
from flowdit.serving.config import ServeConfig
from flowdit.serving.draws import Models
from flowdit.serving.turns import Turns

MEGABYTE = 2**20
MOST_UPLOADED = 256 * MEGABYTE
"""Size of the files that are dropped in and not yet deleted, by Gradio after two minutes."""
SMALLEST_FILE = 2**16
"""A smaller file counts like one of this size, which limits their number."""


def check_installed() -> None:
    """Raise `ValueError` unless gradio is installed. Imports nothing."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("gradio: needed for the page, install it with: pip install -e '.[cpu,serve]'")


@contextmanager
def serving(models: Models, config: ServeConfig) -> Iterator[str]:
    """Serve the page while the block runs; the value is its address.

    Nothing is sent to or fetched from other machines. Needs gradio (`check_installed`). Raises `ValueError` if the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="flowdit-serve-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # files that are dropped in, until they are read
        logging.getLogger("uvicorn.error").addFilter(is_event)
        from flowdit.serving.events import Events
        from flowdit.serving.page import build_page
        from flowdit.serving.theme import asset, theme

        names = [model_name(name) for name in (config.checkpoint, config.compare) if name is not None]
        turns = Turns(config.max_waiting, config.max_waiting_each)
        events = Events(models, turns, names)
        page = build_page(models, events, config.title or names[0])
        page.queue(max_size=2 * config.max_waiting + 64, default_concurrency_limit=8)
        port = free_port(config.host, config.port)
        page.launch(
            server_name=config.host,
            server_port=port,
            root_path=config.root_path or None,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            inbrowser=False,
            footer_links=["api"],
            max_file_size=file_limit(models, config),
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            theme=theme(),
            css=asset("page.css"),
            app_kwargs={"middleware": [body_limit(config.max_upload * MEGABYTE, Path(folder))]},
        )
        try:
            yield f"http://{config.host if ':' not in config.host else f'[{config.host}]'}:{port}{config.root_path}"
        finally:
            page.close(verbose=False)


def model_name(name: str) -> str:
    """A short name of a checkpoint for people."""
    path = Path(name)
    return f"{path.parent.name} {path.name}" if path.name.isdigit() and path.parent.name else path.name or name


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises `FieldError` if it cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as problem:
            raise FieldError("host/port", f"{host}:{port} cannot be used: {problem.strerror or problem}") from None
        return probe.getsockname()[1]


def is_event(record: logging.LogRecord) -> bool:
    """Whether a line of the server is for its owner: not that somebody has sent something else than HTTP."""
    return record.getMessage() != "Invalid HTTP request received."


def file_limit(models: Models, config: ServeConfig) -> int:
    """Most bytes of a file that is dropped in: those of a PNG of the largest model with its recipe, at most a request."""
    size = max(sampler.trained.manifest.image_size for sampler in models.samplers)
    return min(MEGABYTE + 4 * size**2, config.max_upload * MEGABYTE)


def body_limit(most: int, folder: Path) -> Any:
    """Middleware that refuses a request before it is read, if its body is too large or the uploads fill the `folder`."""
    from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]

    return Middleware(BodyLimit, most=most, folder=folder)


class BodyLimit:
    """An ASGI application that passes on requests with bodies of at most `most` bytes.

    No file is taken while there are `MOST_UPLOADED` bytes of them in the `folder`.
    """

    def __init__(self, app: Any, most: int, folder: Path):
        self._app = app
        self._most = most
        self._folder = folder

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": f"{refusal}\n".encode()})
            return
        received = 0

        async def limited() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return {"type": "http.disconnect"} if received > self._most else message

        await self._app(scope, limited, send)

    def _refusal(self, scope: Any) -> str | None:
        length = dict(scope.get("headers", [])).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most:
            return f"at most {self._most} bytes"
        is_upload = scope["path"].rstrip("/").endswith("/upload")
        return "too many files were dropped in, try again in three minutes" if is_upload and self._is_full() else None

    def _is_full(self) -> bool:
        sizes = (size_of(file) for file in self._folder.rglob("*"))
        return sum(max(size, SMALLEST_FILE) for size in sizes) >= MOST_UPLOADED


def size_of(file: Path) -> int:
    """Size in bytes; 0 for a folder, and for a file that has just been deleted."""
    try:
        return file.stat().st_size if file.is_file() else 0
    except FileNotFoundError:
        return 0
