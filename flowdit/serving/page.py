"""The Gradio page: its parts and their layout, and what they call."""

from __future__ import annotations

import html
from typing import Any, NamedTuple

import gradio as gr  # pyright: ignore[reportMissingImports]
import jax

from flowdit.diffusion.sampling import SOLVERS
from flowdit.inference.sampler import Sampler
from flowdit.serving.api import add_api
from flowdit.serving.draws import Models
from flowdit.serving.events import Events
from flowdit.serving.theme import asset

SEED_JS = "() => Math.floor(Math.random() * 4294967296)"
"""A new seed is chosen in the browser."""


SCROLL_JS = "() => innerWidth < 800 && document.getElementById('fd-status').scrollIntoView({behavior: 'smooth'})"
"""On a phone the line and the pictures are below the controls."""


class Controls(NamedTuple):
    """The settings of a draw by the names of the API; None for those that the model does not take."""

    label: Any
    prompt: Any
    negative_prompt: Any
    seed: Any
    count: Any
    solver: Any
    steps: Any
    guidance: Any
    internal_guidance: Any
    guidance_low: Any
    guidance_high: Any

    def shown(self) -> dict[str, Any]:
        return {name: part for name, part in self._asdict().items() if part is not None}


def build_page(models: Models, events: Events, title: str) -> gr.Blocks:
    """The page with its endpoints. `events` does the work."""
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(60, 120), fill_width=True) as page:
        gr.HTML(heading(models, title), elem_id="fd-heading")
        with gr.Row(elem_id="fd-main"):
            with gr.Column(scale=0, min_width=320, elem_id="fd-controls"):
                controls, new_seed, draw, stop = control_column(models)
                gr.HTML("Or drop a PNG of this page, or a recipe, to draw its image again:", elem_id="fd-hint")
                types = [".png", ".json"]
                dropped = gr.File(file_types=types, show_label=False, height=84, elem_id="fd-recipe")
            with gr.Column(scale=1, min_width=320, elem_id="fd-results"):
                status = gr.HTML(events.idle(), elem_id="fd-status")
                result = gr.HTML(
                    html_template=asset("result.html"), js_on_load=asset("result.js"), elem_id="fd-result", value=None
                )
                history = gr.HTML(
                    html_template=asset("history.html"),
                    js_on_load=asset("history.js"),
                    elem_id="fd-history",
                    value=None,
                )
        shown = controls.shown()
        options = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
        new_seed.click(None, None, controls.seed, js=SEED_JS, api_visibility="private")
        names, inputs = list(shown), list(shown.values())
        triggers = [draw.click, *(part.submit for part in (controls.prompt, controls.negative_prompt) if part)]
        draw.click(None, None, None, js=SCROLL_JS, api_visibility="private")
        # Names of their own, as those of the API are taken in order.
        options["api_name"] = "page_draw"
        drawing = gr.on(triggers, events.drawing(names), inputs, [status, result], trigger_mode="once", **options)
        outputs = [status, result, *inputs]
        options["api_name"] = "page_redraw"
        uploaded = dropped.upload(events.dropping(names), dropped, [*outputs, dropped], **options)
        again = history.redraw(events.redrawing(names), None, outputs, **options)
        stop.click(
            events.stopped, None, status, cancels=[drawing, uploaded, again], api_visibility="private", queue=False
        )
        add_api(events)
    return page


def control_column(models: Models) -> tuple[Controls, gr.Button, gr.Button, gr.Button]:
    """The settings, with the previews' as defaults, and the buttons for a new seed, draw and stop."""
    sampler, limits = models.samplers[0], models.config
    config = sampler.sampler_config({})
    takes = sampler.trained.conditioning.request_args
    label = prompt = negative = None
    if "labels" in takes:
        choices = class_choices(sampler.trained.manifest.class_names)
        info = f"{len(choices)} classes; type to search"
        first = sampler.requests(1, {}).arguments(0)["labels"]  # of the previews
        label = gr.Dropdown(choices, value=first, label="Class", info=info, filterable=True, elem_id="fd-label")
    if "prompts" in takes:
        prompt = gr.Textbox(label="Prompt", lines=3, max_length=limits.max_prompt, elem_id="fd-prompt")
    if "negative_prompt" in takes:
        negative = gr.Textbox(label="Negative prompt", lines=1, max_length=limits.max_prompt, elem_id="fd-negative")
    count = gr.Slider(1, limits.max_images, min(4, limits.max_images), step=1, label="Images", elem_id="fd-count")
    with gr.Row(elem_id="fd-seed-row"):
        seed = gr.Number(0, label="Seed", precision=0, min_width=120, elem_id="fd-seed")
        new_seed = gr.Button("New seed", size="sm", min_width=90, scale=0, elem_id="fd-new-seed")
    steps = gr.Slider(
        1, limits.max_steps, min(config.steps, limits.max_steps), step=1, label="Steps", elem_id="fd-steps"
    )
    guidance = gr.Slider(1, 15, config.guidance, step=0.1, label="Guidance", info="1: none", elem_id="fd-guidance")
    internal = None
    if sampler.trained.config.model.guidance_head is not None:
        options = {"label": "Internal guidance", "info": "1: none", "elem_id": "fd-internal"}
        internal = gr.Slider(1, 4, config.internal_guidance, step=0.1, **options)
    with gr.Accordion("Solver and interval", open=False, elem_id="fd-more"):
        solver = gr.Dropdown(list(SOLVERS), value=config.solver, label="Solver", filterable=False, elem_id="fd-solver")
        text = "flow time, 1: noise, 0: image"
        low = gr.Slider(0, 1, config.guidance_low, step=0.05, label="Guidance down to", info=text, elem_id="fd-low")
        high = gr.Slider(0, 1, config.guidance_high, step=0.05, label="Guidance from", info=text, elem_id="fd-high")
    with gr.Row(elem_id="fd-buttons"):
        draw = gr.Button("Draw", variant="primary", size="lg", elem_id="fd-draw")
        stop = gr.Button("Stop", size="lg", scale=0, min_width=80, elem_id="fd-stop")
    controls = Controls(
        label=label,
        prompt=prompt,
        negative_prompt=negative,
        seed=seed,
        count=count,
        solver=solver,
        steps=steps,
        guidance=guidance,
        internal_guidance=internal,
        guidance_low=low,
        guidance_high=high,
    )  # fmt: wide
    return controls, new_seed, draw, stop


def num_parameters(sampler: Sampler) -> int:
    return sum(array.size for array in jax.tree.leaves(sampler.trained.model))


def class_choices(names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Class names with their numbers; a name of several classes is told apart by its number."""
    return [(f"{name} ({i})" if names.count(name) > 1 else name, i) for i, name in enumerate(names)]


def heading(models: Models, title: str) -> str:
    """Title, and what is loaded."""
    lines = []
    for letter, sampler in zip("AB", models.samplers, strict=False):
        trained = sampler.trained
        facts = [f"step {trained.step:,}", f"{num_parameters(sampler) / 1e6:.1f} M parameters"]
        facts += [f"{trained.manifest.image_size} px", trained.config.model.name]
        lines.append((f"{letter}: " if len(models.samplers) > 1 else "") + " · ".join(facts))
    credit = models.samplers[0].trained.manifest.attribution or models.samplers[0].trained.manifest.license
    shown = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    source = f"<p class='fd-credit'>Trained on: {html.escape(credit)}</p>" if credit else ""
    return f"<h1>{html.escape(title)}</h1>{shown}{source}"
