"""Starting the page: models, queue and server."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flowdit.command import wants_traceback
from flowdit.fields import FieldError
from flowdit.serving.config import ServeConfig
from flowdit.serving.draws import Models
from flowdit.serving.turns import Turns

MEGABYTE = 2**20


@contextmanager
def serving(models: Models, config: ServeConfig) -> Iterator[str]:
    """Serve the page while the block runs; the value is its address.

    Nothing is sent to or fetched from other machines. Raises `ValueError` if gradio is missing or the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with tempfile.TemporaryDirectory(prefix="flowdit-serve-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # files that are dropped in, until they are read
        if not wants_traceback():
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of requests that are no call of ours
        try:
            from flowdit.serving.events import Events
            from flowdit.serving.page import build_page
            from flowdit.serving.theme import asset, theme
        except ModuleNotFoundError as problem:
            if (problem.name or "").partition(".")[0] != "gradio":
                raise
            raise ValueError("gradio: needed for the page, install it with: pip install 'flowdit[serve]'") from None
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
            max_file_size=config.max_upload * MEGABYTE,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            theme=theme(),
            css=asset("page.css"),
            app_kwargs={"middleware": [body_limit(config.max_upload * MEGABYTE)]},
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


def body_limit(most: int) -> Any:
    """Middleware that refuses a request with a body of more than `most` bytes, before it is read to memory."""
    from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]

    return Middleware(BodyLimit, most=most)


class BodyLimit:
    """An ASGI application that passes on requests with bodies of at most `most` bytes."""

    def __init__(self, app: Any, most: int):
        self._app = app
        self._most = most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        length = dict(scope.get("headers", [])).get(b"content-length", b"0")
        if scope["type"] == "http" and (not length.isdigit() or int(length) > self._most):
            await send({"type": "http.response.start", "status": 413, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": f"at most {self._most} bytes\n".encode()})
            return
        received = 0

        async def limited() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return {"type": "http.disconnect"} if received > self._most else message

        await self._app(scope, limited, send)
