"""The page: every stage as it ends, and the Python that draws the same."""

import base64
import html
import io
import random
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from ..pipeline_dod import DoDPipeline
from .drawing import Drawing, Finished, draw, open_picture


MAX_STAGES = 4
MAX_STEPS = 250  # of one stage
MAX_STEPS_IN_ALL = 300  # of one drawing, so that nobody waits long for another's
MAX_WAITING = 20  # drawings; who comes then is told that the queue is full
MAX_SEED = 2**31 - 1
NO_CLASS = -1  # a dropdown's value cannot be None
CSS = Path(__file__).with_name("style.css")


def class_choices(pipe: DoDPipeline) -> list[tuple[str, int]]:
    """Names and ids of the classes; the id goes with a name that several have."""
    names = pipe.config.id2label or {}
    ids = range(pipe.transformer.config.num_classes)
    short = [textwrap.shorten(names.get(str(i), f"class {i}"), 60, placeholder="…") for i in ids]
    count = Counter(short)
    return [("no class", NO_CLASS)] + [
        (f"{name} ({i})" if count[name] > 1 else name, i) for i, name in zip(ids, short)
    ]


def image_tag(image: Image.Image, css_class: str, text: str) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    sharp = " sharp" if max(image.size) <= 64 else ""
    return f'<img class="{css_class}{sharp}" alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def stages_html(drawing: Drawing, finished: list[Finished]) -> str:
    """All stages side by side, those to come as empty frames."""
    figures = []
    maps = finished[-1].code_maps if finished else []
    for stage in range(1, drawing.stages.stop):
        name = "Your picture" if stage < drawing.stages.start else f"Stage {stage}"
        if stage <= len(finished):
            picture = image_tag(finished[stage - 1].image, "sample", name)
            codes = image_tag(maps[stage - 1], "codes", f"{name}: codes")
        else:
            picture, codes = '<div class="sample waiting"></div>', '<div class="codes waiting"></div>'
        figures.append(f"<figure><figcaption>{name}{codes}</figcaption>{picture}</figure>")
    return f'<div class="stages" style="--columns: {len(figures)}">{"".join(figures)}</div>'


def message(text: str) -> str:
    return f'<p class="message" role="alert">{html.escape(text)}</p>'


def progress(text: str, fraction: float) -> str:
    return f'<label class="progress"><span>{text}</span><progress value="{fraction:.4f}"></progress></label>'


def build(pipe: DoDPipeline, model: str) -> gr.Blocks:
    """The page for a pipeline; `model` is the name by which the code loads it."""
    choices = class_choices(pipe)
    names = {value: name for name, value in choices}
    source = None if pipe.code_transformer is None else "stage"

    def show_rows(num_stages: int, picture: str | None) -> list:
        """One row per stage that runs; a picture needs a stage 2, and is looked at right away."""
        first, preview = 1, ""
        if picture is not None:
            first, num_stages = 2, max(num_stages, 2)
            try:
                thumbnail = open_picture(picture, largest=256)
                preview = image_tag(thumbnail, "preview", "preview")
            except ValueError as error:
                preview = message(str(error))
        rows = [gr.Row(visible=first <= stage <= num_stages) for stage in range(1, MAX_STAGES + 1)]
        return [num_stages, preview, *rows]

    def generate(
        class_id: int, seed: int | None, random_seed: bool, num_stages: int, picture: str | None, *numbers: Any
    ) -> Iterator:
        if random_seed or seed is None:
            seed = random.randint(0, MAX_SEED)
        if num_stages is None:
            yield message("Choose the number of stages."), gr.skip(), gr.skip(), gr.skip()
            return
        # A field that was emptied is None, which the pipeline refuses with a message.
        steps, scales = [*numbers[:num_stages]], [*numbers[MAX_STAGES:][:num_stages]]
        drawing = Drawing(None if class_id == NO_CLASS else class_id, seed, steps, scales, picture, source)
        code = gr.Code(drawing.code(model, names[class_id], pipe.device.type), visible=True)
        finished: list[Finished] = []
        try:
            if sum(steps[stage - 1] or 0 for stage in drawing.stages) > MAX_STEPS_IN_ALL:
                raise ValueError(f"A drawing takes at most {MAX_STEPS_IN_ALL} steps in all.")
            # What is on the screen stays there until it is certain that there will be something new.
            for i, event in enumerate(draw(pipe, drawing)):
                bar = gr.skip()
                if isinstance(event, Finished):
                    finished.append(event)
                else:
                    bar = progress(f"Stage {event.stage} of {drawing.stages.stop - 1}", event.fraction)
                news = i == 0 or isinstance(event, Finished)
                shown = stages_html(drawing, finished) if news else gr.skip()
                yield (bar, shown, code, seed) if i == 0 else (bar, shown, gr.skip(), gr.skip())
            yield "", gr.skip(), gr.skip(), gr.skip()
        except ValueError as error:
            yield message(str(error)), gr.skip(), gr.skip(), gr.skip()

    with gr.Blocks(title="Diffusion on Diffusion", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            "# Diffusion on Diffusion\n"
            "Stage 1 sees the class only. Each later stage starts again from noise and also sees *codes*: the few numbers "
            "that the embedder extracts from the picture before, shown as a small map above it."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                class_id = gr.Dropdown(choices, value=choices[min(1, len(choices) - 1)][1], label="Class")
                with gr.Row(equal_height=True):
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120)
                    random_seed = gr.Checkbox(True, label="New seed each time", container=False, min_width=140)
                num_stages = gr.Radio(list(range(1, MAX_STAGES + 1)), value=2, label="Stages")
                rows, steps, scales = [], [], []
                with gr.Group():
                    for stage in range(1, MAX_STAGES + 1):
                        with gr.Row(visible=stage <= 2) as row:
                            label = f"Stage {stage} steps"
                            steps.append(
                                gr.Number(30, label=label, precision=0, min_width=120, minimum=1, maximum=MAX_STEPS)
                            )
                            label = f"Stage {stage} guidance"
                            scales.append(gr.Number(1.5, label=label, min_width=120, minimum=0, maximum=20, step=0.1))
                        rows.append(row)
                with gr.Accordion("Start from a picture of your own", open=False):
                    # Not gr.Image, which reads the file itself and says of a bad one only that it failed.
                    picture = gr.File(label="In the place of stage 1", file_types=["image"], height=120)
                    preview = gr.HTML()
            with gr.Column(scale=2, min_width=300):
                with gr.Row(equal_height=True):
                    button = gr.Button("Generate", variant="primary", scale=0, min_width=180)
                    status = gr.HTML(elem_id="status", min_width=180)
                stages = gr.HTML('<p class="hint">Choose a class and press Generate.</p>', elem_id="stages")
                code = gr.Code(language="python", label="The same in Python", interactive=False, visible=False)

        gr.on(
            [num_stages.input, picture.change],
            show_rows,
            [num_stages, picture],
            [num_stages, preview, *rows],
            show_progress="hidden",
            concurrency_limit=2,
        )
        button.click(
            generate,
            [class_id, seed, random_seed, num_stages, picture, *steps, *scales],
            [status, stages, code, seed],
            show_progress="minimal",
            show_progress_on=status,
            # Each drawing has a pipeline of its own (see `private_pipeline`); more than two at once only slow each other.
            concurrency_limit=2,
            api_name="generate",
        )
    return page.queue(max_size=MAX_WAITING)


def serve(model: str) -> None:
    """Opens the page of a pipeline, a folder or a repository of the Hub."""
    pipe = DoDPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from elsewhere
    build(pipe, model).launch(
        theme=gr.themes.Default(primary_hue="indigo", **fonts), css_paths=CSS, max_file_size="20mb", footer_links=[]
    )
