"""The demo's web page, in Gradio. It loads nothing from another host: it has the system's fonts and no analytics."""

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from fastflowgrpo.config import DemoConfig, Dynamics
from fastflowgrpo.demonstration.generation import MAX_PROMPT, MAX_SEED, Comparison, Demo, Images, Request
from fastflowgrpo.errors import UserError
from fastflowgrpo.prompts import Prompt
from fastflowgrpo.sampling.coefficients import DYNAMICS

SMALL = 128  # pixels: images below are enlarged with sharp pixels
THEME = gr.themes.Default(
    primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
# Gradio's gallery has a fixed height, and labels that cover the images. Here captions are below them.
STYLE = """
.images .grid-wrap { padding-top: 40px; max-height: none !important; overflow: visible; }
.images .grid-container { grid-template: none; grid-template-columns: repeat(auto-fill, minmax(min(150px, 100%), 1fr));
    grid-auto-rows: auto; }
.images .thumbnail-item { aspect-ratio: auto; height: auto; }
.images .caption-label { position: static; max-width: none; white-space: normal; border: 0; text-align: center; }
body:has(.pixels) .images img { image-rendering: pixelated; }
.scores table, .scores tr, .scores tr > * { border: 0 !important; }
.scores tr > * { padding: 2px 8px !important; text-align: right; font-variant-numeric: tabular-nums; }
.scores tr > :first-child { padding-left: 0 !important; text-align: left; }
.scores tr + tr > * { border-top: 1px solid var(--border-color-primary) !important; }
.scores p { margin: 6px 0; overflow-wrap: anywhere; color: var(--body-text-color-subdued); }
"""


class Cancelled(Exception):
    """A visitor has ended a request."""


class Jobs:
    """The requests that are being computed, by the session of their visitor, so that a visitor can end the own one."""

    def __init__(self) -> None:
        self.ended: dict[str, threading.Event] = {}

    @contextmanager
    def running(self, session: str) -> Iterator[threading.Event]:
        """Yield the event that `end` sets for this session."""
        event = self.ended[session] = threading.Event()
        try:
            yield event
        finally:
            if self.ended.get(session) is event:
                del self.ended[session]

    def end(self, session: str | None) -> None:
        """End the request of a session after its present denoising step; without a request nothing happens."""
        if event := self.ended.get(session or ""):
            event.set()


def build_page(demo: Demo, config: DemoConfig, examples: Mapping[str, Sequence[Prompt]]) -> gr.Blocks:
    """The page, with a queue from which one request is computed at a time.

    Args:
        demo: makes the images.
        config: what the inputs begin with, and their limits.
        examples: prompts to click on, by title.
    """
    jobs, trained = Jobs(), bool(demo.checkpoints())
    with gr.Blocks(title="FastFlowGRPO", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"## FastFlowGRPO: {'before and after training' if trained else 'a model without trained weights'}")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                first = next(iter(examples.values()))[0].text
                prompt = gr.Textbox(first, label="Prompt", lines=2, max_lines=4, max_length=MAX_PROMPT)
                with gr.Row():
                    generate = gr.Button("Generate", variant="primary", min_width=120)
                    cancel = gr.Button("Cancel", min_width=120)
                inputs = {"prompt": prompt, **_settings(demo, config)}
            with gr.Column(scale=5, min_width=280):
                with gr.Row():
                    galleries = [_gallery("Base")] + ([_gallery("Trained")] if trained else [])
                summary = gr.HTML(elem_classes="scores")
        for title, prompts in examples.items():
            gr.Examples([[prompt.text] for prompt in prompts], [prompt], label=title, examples_per_page=12)

        answer = _answer(demo, jobs)
        drawing = gr.on(
            [generate.click, prompt.submit],
            answer,
            list(inputs.values()),
            [*galleries, summary],
            api_name="generate",
            trigger_mode="once",
            concurrency_limit=1,
            show_progress_on=galleries,
        )
        cancel.click(_end(jobs), cancels=drawing, queue=False, api_name="cancel")
        page.unload(_end(jobs))
        page.load(
            lambda: _checkpoint_choices(demo),
            outputs=inputs["checkpoint"],
            show_progress="hidden",
            queue=False,
            api_visibility="private",
        )
        inputs["dynamics"].change(
            lambda dynamics: gr.update(interactive=dynamics != "ode"),
            inputs["dynamics"],
            inputs["noise_level"],
            api_visibility="private",
            queue=False,
        )
    return page.queue(max_size=config.queue)


def launch(page: gr.Blocks, config: DemoConfig) -> tuple[str, str | None]:
    """Start to serve the page in the background.

    Returns:
        Its address, and with `config.share` the public one.

    Raises:
        UserError: the address cannot be used.
    """
    try:
        _, url, public = page.launch(
            server_name=config.host,
            server_port=config.port,
            share=config.share,
            prevent_thread_lock=True,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            show_error=True,
            max_file_size=1,  # nothing is uploaded
            footer_links=[],
            theme=THEME,
            css=STYLE,
        )
    except OSError as error:
        reason = str(error).split(". ")[0]  # without the advice on Gradio's own settings
        raise UserError(f"port: cannot listen on {config.host}:{config.port or '7860-7959'}: {reason}") from error
    return url, public


def _settings(demo: Demo, config: DemoConfig) -> dict[str, Any]:
    """The inputs below the prompt, in the order of the arguments of `_answer`'s function."""
    checkpoint = _checkpoint_choices(demo)
    new_seed = gr.Button("New seed", size="sm")
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, buttons=[new_seed])
    new_seed.click(lambda: random.randint(0, MAX_SEED), outputs=seed, queue=False, api_visibility="private")
    num_images = gr.Slider(1, config.max_images, config.num_images, step=1, label="Images")
    names = list(demo.scoring)
    rewards = gr.CheckboxGroup(names, value=names, label="Rewards", visible=len(names) > 1)
    with gr.Accordion("Sampling", open=False):
        num_steps = gr.Slider(1, config.max_steps, config.num_steps, step=1, label="Steps")
        guidance_scale = gr.Slider(0, 15, config.guidance_scale, step=0.1, label="Guidance scale (1: none)")
        dynamics = gr.Dropdown(sorted(DYNAMICS, key="ode".__ne__), value="ode", label="Sampler")
        noise_level = gr.Slider(0, 1, config.noise_level, step=0.05, label="Noise level", interactive=False)
    return {
        "checkpoint": checkpoint,
        "seed": seed,
        "num_images": num_images,
        "rewards": rewards,
        "num_steps": num_steps,
        "guidance_scale": guidance_scale,
        "dynamics": dynamics,
        "noise_level": noise_level,
    }


def _checkpoint_choices(demo: Demo) -> gr.Dropdown:
    names = demo.checkpoints()
    return gr.Dropdown(names, value=names[-1] if names else None, label="Trained weights", visible=bool(names))


def _gallery(label: str) -> gr.Gallery:
    return gr.Gallery(
        label=label,
        format="png",
        object_fit="contain",
        min_width=130,
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes="images",
    )


def _answer(demo: Demo, jobs: Jobs) -> Callable[..., tuple[Any, ...]]:
    """The function behind the button: from the values of the inputs to those of the outputs."""

    def answer(
        prompt: str,
        checkpoint: str | None,
        seed: float,
        num_images: float,
        rewards: list[str],
        num_steps: float,
        guidance_scale: float,
        dynamics: Dynamics,
        noise_level: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  how Gradio asks for it
    ) -> tuple[Any, ...]:
        begin = time.perf_counter()
        wanted = Request(
            prompt=prompt,
            seed=int(seed or 0),
            num_images=int(num_images),
            num_steps=int(num_steps),
            guidance_scale=guidance_scale,
            dynamics=dynamics,
            noise_level=noise_level,
            rewards=rewards,
            checkpoint=checkpoint,
        )
        with jobs.running(request.session_hash or "") as ended:

            def on_step(done: int, total: int) -> None:
                if ended.is_set():
                    raise Cancelled
                progress((done, total), unit="steps")

            try:
                comparison = demo.generate(wanted, on_step)
            except Cancelled:
                return *(gr.skip() for _ in ("base", "trained")[: 1 + bool(checkpoint)]), "<p>Cancelled.</p>"
            except UserError as error:
                raise gr.Error(escape(str(error)), print_exception=False) from error
        seconds = time.perf_counter() - begin
        about = [f"{wanted.num_images} images", f"seed {wanted.seed}", f"{seconds:.1f} s"]
        galleries = [_captioned(images, rewards) for images in comparison.columns.values()]
        return *galleries, summary_table(comparison, ", ".join([checkpoint, *about] if checkpoint else about))

    return answer


def _end(jobs: Jobs) -> Callable[[gr.Request], None]:
    def end(request: gr.Request) -> None:
        jobs.end(request.session_hash)

    return end


def _captioned(images: Images, rewards: Sequence[str]) -> list[tuple[Image.Image, str]]:
    """Each picture with its scores; a mark says whether GenEval finds everything that the prompt asks for."""
    pictures = [Image.fromarray(pixels.numpy()) for pixels in images.pixels.permute(0, 2, 3, 1)]
    captions = []
    for row in range(len(pictures)):
        parts = []
        for name in rewards:
            if name in images.scores:
                strict = images.scores.get(f"{name}/strict")
                mark = "" if strict is None else " \u2713" if strict[row] == 1 else " \u2717"
                parts.append(f"{name} {_number(images.scores[name][row])}{mark}")
        captions.append(" \u00b7 ".join(parts))
    return list(zip(pictures, captions, strict=True))


def summary_table(comparison: Comparison, about: str) -> str:
    """HTML: the mean of each score in each column, the change, and why a reward gave no score. All text is escaped.

    The class of its outermost element tells the style sheet that the images are small.
    """
    columns = comparison.columns
    names = list(next(iter(columns.values())).scores)
    rows = []
    if names:
        change = ["change"] if len(columns) == 2 else []
        rows.append("".join(f"<th>{cell}</th>" for cell in ["mean", *columns, *change]))
    for name in names:
        means = [images.scores[name].nanmean().item() for images in columns.values()]
        cells = [_number(mean) for mean in means] + [_number(means[-1] - means[0], sign=True)] * (len(means) == 2)
        rows.append(f"<td>{escape(name).replace('/', '/<wbr>')}</td>" + "".join(f"<td>{cell}</td>" for cell in cells))
    table = f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>" if rows else ""
    notes = [f"{name} gives no score: {reason}" for name, reason in comparison.not_scored.items()]
    small = min(columns["base"].pixels.shape[-2:]) < SMALL
    lines = "".join(f"<p>{escape(text)}</p>" for text in [about, *notes])
    return f'<div class="{"pixels" if small else "smooth"}">{table}{lines}</div>'


def _number(value: Any, sign: bool = False) -> str:
    return "\u2013" if math.isnan(value) else f"{float(value):{'+' if sign else ''}.3g}"
