"""Files that lines are appended to, on a local disk or in an object store."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from typing import BinaryIO

from etils import epath

from flowdit import stores
from flowdit.storage import is_remote, reason

logger = logging.getLogger(__name__)

UPLOAD_SHARE = 0.1
"""Fraction of the time, at most, in which a file is being uploaded."""
RETRY_SECONDS = 5.0
FLUSH_SECONDS = stores.PATIENCE + 30.0
"""How long the end of a run, and a checkpoint, wait for the lines before them: longer than one request may take."""


class LineFile:
    """A JSONL file on a local disk. Lines are written at once."""

    def __init__(self, file: epath.Path):
        self.file = file

    def append(self, line: str) -> None:
        """Append a line. Raises `OSError`."""
        append_line(self.file, line)

    def flush(self) -> None:
        """Wait until the lines are stored."""

    def close(self) -> None:
        """The same, at the end of a run."""


class UploadedLines(LineFile):
    """A JSONL file in an object store, which cannot be appended to: the whole object is replaced in the background.

    The lines are kept in memory until the end. Several lines may share an upload, so that uploads take a tenth of the
    time at most. Lines that cannot be stored are tried again; at the end they are left in a local file, with a warning.
    """

    def __init__(self, file: epath.Path):
        super().__init__(file)
        content = file.read_bytes() if file.exists() else b""
        self._content = bytearray(content[: content.rfind(b"\n") + 1])
        self._stored = len(self._content)
        self._changed = threading.Condition()
        self._is_flushing = False
        self._is_closed = False
        self._failure = ""
        threading.Thread(target=self._upload_in_background, name="upload", daemon=True).start()

    def append(self, line: str) -> None:
        with self._changed:
            self._content += f"{line}\n".encode()
            self._changed.notify_all()

    def flush(self) -> None:
        with self._changed:
            self._is_flushing = True
            self._changed.notify_all()
            if not self._changed.wait_for(self._is_stored, FLUSH_SECONDS):
                cause = self._failure or "no answer"
                logger.warning("%s cannot be written (%s): going on, its last lines are kept", self.file, cause)
            self._is_flushing = False

    def close(self) -> None:
        self.flush()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            if self._is_stored():
                return
            with tempfile.NamedTemporaryFile(prefix="metrics-", suffix=".jsonl", delete=False) as copy:
                copy.write(self._content)
        cause = self._failure or "no answer"
        logger.warning("%s cannot be written (%s): its lines are in %s", self.file, cause, copy.name)

    def _is_stored(self) -> bool:
        return self._stored == len(self._content)

    def _upload_in_background(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or not self._is_stored())
                if self._is_closed:
                    return
                content = bytes(self._content)
            began = time.monotonic()
            try:
                self.file.write_bytes(content)
            except Exception as problem:  # the thread must go on, whatever a store's client raises
                if not self._failure:
                    logger.warning("%s cannot be written (%s): tried again", self.file, reason(problem))
                self._failure = reason(problem)
            else:
                self._failure = ""
            with self._changed:
                if not self._failure:
                    self._stored = len(content)
                    self._changed.notify_all()
                pause = RETRY_SECONDS if self._failure else (time.monotonic() - began) / UPLOAD_SHARE
                self._changed.wait_for(self._is_urgent, pause)

    def _is_urgent(self) -> bool:
        """Whether the next upload must not wait; one that has failed is not tried again at once."""
        return self._is_closed or (self._is_flushing and not self._failure and not self._is_stored())


def open_lines(file: epath.Path) -> LineFile:
    """The file to append lines to; it need not exist. Raises `OSError` if an object is there and cannot be read."""
    return UploadedLines(file) if is_remote(file) else LineFile(file)


def append_line(file: epath.PathLike, line: str) -> None:
    """Append a line to a JSONL file whose last line may be truncated, by a full disk or a kill.

    A truncated line is removed, as it would corrupt the new one as well.
    """
    with open(file, "ab+") as stream:  # local: epath opens no file for reading and appending
        stream.truncate(_end_of_last_line(stream))
        stream.write(f"{line}\n".encode())


def _end_of_last_line(stream: BinaryIO, block: int = 1 << 16) -> int:
    end = stream.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - block)
        stream.seek(start)
        if (found := stream.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0
