"""The HTTP API beside the page, with plain names: `/draw`, `/redraw` and `/model`, also for Gradio's client."""

from __future__ import annotations

from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from flowdit.serving.events import Events, visitor_of

OPTIONS = {"concurrency_limit": None}


def add_api(events: Events) -> None:
    """Add the endpoints to the page that is being built."""

    async def draw(
        request: gr.Request,
        label: str | None = None,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        seed: int = 0,
        count: int = 1,
        solver: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        internal_guidance: float | None = None,
        guidance_low: float | None = None,
        guidance_high: float | None = None,
        time_shift: float | None = None,
        rtol: float | None = None,
    ) -> dict[str, Any]:
        """Draw images. A class model takes a label, a text model a prompt; null means the default of the page."""
        settings = {
            "label": label,
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "seed": seed,
            "count": count,
            "solver": solver,
            "steps": steps,
            "guidance": guidance,
            "internal_guidance": internal_guidance,
            "guidance_low": guidance_low,
            "guidance_high": guidance_high,
            "time_shift": time_shift,
            "rtol": rtol,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        return await events.draw_result(given, visitor_of(request))

    async def redraw(request: gr.Request, recipe: str) -> dict[str, Any]:
        """Draw the image of a recipe, a JSON text, again."""
        return await events.redraw_result(recipe, visitor_of(request))

    def model() -> dict[str, Any]:
        """What is loaded: names, steps, classes and limits."""
        return events.describe()

    for function in (draw, redraw, model):
        gr.api(function, api_name=function.__name__, api_description=function.__doc__, **OPTIONS)
