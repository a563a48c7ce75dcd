"""What the page calls: a draw as a stream of status lines that ends with pictures. Errors become one line."""

from __future__ import annotations

import asyncio
import dataclasses
import html
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from flowdit.command import one_line
from flowdit.fields import FieldError
from flowdit.inference.recipe import MOST_BYTES, Recipe, read_recipe, solver
from flowdit.serving.draws import NAMES, Models, Picture, Work
from flowdit.serving.turns import Turns
from flowdit.storage import reason

POLL_SECONDS = 0.1


class Events:
    """The functions behind the page and its API, for one queue of draws."""

    def __init__(self, models: Models, turns: Turns, names: list[str]):
        self._models = models
        self._turns = turns
        self._names = names

    def idle(self) -> str:
        return status("idle", "Choose what to draw.")

    def stopped(self) -> str:
        return status("idle", "Stopped waiting; a draw that has begun runs to its end.")

    def drawing(self, names: list[str]) -> Callable[..., Any]:
        """The function of the button Draw, for inputs with these names."""

        async def draw(request: gr.Request, *values: Any) -> AsyncIterator[tuple[Any, Any]]:
            settings = dict(zip(names, values, strict=True))
            async for parts in self._shown(lambda: self._models.draw(settings), request):
                yield parts

        return draw

    def dropping(self, names: list[str]) -> Callable[..., Any]:
        """The function of a file that is dropped in. Its outputs are status, result, the controls, and the empty drop."""

        async def drop(request: gr.Request, path: str | None) -> AsyncIterator[tuple[Any, ...]]:
            async for parts in self._redrawn(lambda: _dropped(path), names, request):
                yield *parts, None

        return drop

    def redrawing(self, names: list[str]) -> Callable[..., Any]:
        """The function of an entry of the history, which sends its recipe."""

        async def redraw(event: gr.EventData, request: gr.Request) -> AsyncIterator[tuple[Any, ...]]:
            read = lambda: str(event.recipe)[: MOST_BYTES + 1].encode()
            async for parts in self._redrawn(read, names, request):
                yield parts

        return redraw

    async def result(self, prepare: Callable[[], Work], visitor: str) -> dict[str, Any]:
        """The pictures of a draw for the API. Raises `gr.Error` with one line."""
        try:
            work = prepare()
            job = self._turns.submit(visitor, work.run)
            try:
                parts = await asyncio.wrap_future(job.future)
            finally:
                self._turns.leave(job)
        except Exception as problem:
            raise gr.Error(failure(problem), print_exception=False) from None
        return {"notes": work.notes, "models": self._as_json(parts)}

    def draw_result(self, settings: dict[str, Any], visitor: str) -> Any:
        return self.result(lambda: self._models.draw(settings), visitor)

    def redraw_result(self, recipe: str, visitor: str) -> Any:
        return self.result(lambda: self._models.redraw(read_recipe(recipe.encode())), visitor)

    def describe(self) -> dict[str, Any]:
        """Of the loaded models, for the API."""
        return self._models.describe(self._names)

    async def _redrawn(
        self, read: Callable[[], bytes], names: list[str], request: Any
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Status, result and controls. The controls take the settings of the recipe once it is accepted."""
        recipes: list[Recipe] = []

        def prepare() -> Work:
            recipe = read_recipe(read())
            work = self._models.redraw(recipe)
            recipes.append(recipe)
            return work

        unchanged = [gr.skip() for _ in names]
        async for parts in self._shown(prepare, request):
            controls = controls_of(recipes.pop(), names) if recipes else unchanged
            yield *parts, *controls

    async def _shown(self, prepare: Callable[[], Work], request: Any) -> AsyncIterator[tuple[Any, Any]]:
        """Status and result, while a draw waits and runs. A visitor who goes leaves the queue."""
        began = time.monotonic()
        try:
            work = prepare()
            job = self._turns.submit(visitor_of(request), work.run)
        except Exception as problem:
            yield status("error", failure(problem)), gr.skip()
            return
        try:
            while not job.future.done():
                yield self._progress(job, began), gr.skip()
                await asyncio.wait([asyncio.wrap_future(job.future)], timeout=POLL_SECONDS)
            parts = job.future.result()
        except Exception as problem:  # the page must say that the draw has ended
            yield status("error", failure(problem)), gr.skip()
            return
        finally:
            self._turns.leave(job)
        count = sum(len(part) for part in parts)
        line = f"{count} image{'s' if count > 1 else ''} in {time.monotonic() - began:.1f} s"
        shown = {"groups": self._as_json(parts), "frames": self._models.config.frames}
        yield status("done", " ".join([f"{line}.", *work.notes])), shown

    def _progress(self, job: Any, began: float) -> str:
        seconds = time.monotonic() - began
        if (ahead := self._turns.ahead(job)) > 0:
            return status("waiting", f"Waiting: {ahead} draw{'s' if ahead > 1 else ''} before yours · {seconds:.0f} s")
        if job.progress == 0:
            return status("drawing", f"Starting; new steps or counts are compiled once · {seconds:.0f} s", 0.02)
        if job.progress >= 0.999:
            return status("drawing", f"Decoding · {seconds:.0f} s", 1.0)
        return status("drawing", f"Drawing, {100 * job.progress:.0f} % · {seconds:.0f} s", job.progress)

    def _as_json(self, parts: list[list[Picture]]) -> list[dict[str, Any]]:
        names = self._names if len(parts) == len(self._names) else [""]
        shown = [[picture.as_json() for picture in part] for part in parts]
        return [{"model": name, "pictures": part} for name, part in zip(names, shown, strict=True)]


def failure(problem: Exception) -> str:
    """One line for the visitor: of a wrong request, or that the draw failed on the device."""
    line = one_line(problem)
    return line if isinstance(problem, ValueError | OSError) else f"this draw failed: {line}"


def status(kind: str, line: str, fraction: float | None = None) -> str:
    """The line above the pictures, with a bar while something runs. Escapes the text."""
    bar = "" if fraction is None else f"<div class='fd-bar'><div style='width:{100 * fraction:.0f}%'></div></div>"
    role = "alert" if kind == "error" else "status"
    return f"<div class='fd-line fd-{kind}' role='{role}'><span>{html.escape(line)}</span>{bar}</div>"


def visitor_of(request: Any) -> str:
    """Who asks: the address, which a proxy on this machine may pass on."""
    client = getattr(request, "client", None)
    return getattr(client, "host", None) or "unknown"


def controls_of(recipe: Recipe, names: list[str]) -> list[Any]:
    """The values of the controls with these names in a recipe, and of its solver also what it does not name; others stay."""
    asked = {NAMES.get(name, name): value for name, value in recipe.request.items()}
    values = {**asked, **dataclasses.asdict(solver(recipe)), "seed": recipe.seed}
    return [values.get(name, gr.skip()) for name in names]


def _dropped(path: str | None) -> bytes:
    """The content of an uploaded file. It is not removed, as other visitors may have dropped the same one."""
    try:
        return Path(path or "").read_bytes()
    except OSError as problem:
        raise FieldError("recipe", f"the file cannot be read, drop it again: {reason(problem)}") from None
