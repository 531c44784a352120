"""The page: samples with their codes, which can be redrawn, mixed and painted on, and the Python that draws the same."""

import html
import random
import secrets
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from ..pipeline_dod import DoDPipeline
from .codes import check_path, paint
from .drawing import Drawing
from .rendering import image_tag, message, progress
from .studio import MAX_STAGES, NO_CLASS, NUM_STEPS, Result, Studio, class_choices, default_settings
from .turns import Turn
from .uploads import open_picture


MAX_OPEN, MAX_WAITING = 8, 20  # drawings that have begun, and requests behind them; later ones are refused
MAX_SEED = 2**31 - 1
SAMPLES = [1, 4, 9]
FOLDER = Path(__file__).parent
STARTS = {
    "codes": "Codes of the code model",
    "stage": "Stage 1, which sees the class only",
    "picture": "Your own picture",
}
ABOUT = {
    True: "Diffusion on Diffusion: a small model draws a few numbers per picture, its codes, and the picture is then drawn "
    "from them.",
    False: "Diffusion on Diffusion: stage 1 sees the class only. Later stages start again from noise and also see codes, "
    "the few numbers that are extracted from the picture before.",
}
HINT = {
    True: "Click a cell of the codes to draw a new code there, or drag from one cell to others to copy its code.",
    False: "Drag from one cell of the codes to others to copy its code.",
}


def model_name(model: str) -> str:
    """A folder's name, or the repository's."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def shown(result: Result) -> str:
    """The result's HTML; never the same text twice, or the browser would keep cells as a stroke has coloured them."""
    return f"{result.html}<!-- {secrets.token_hex(4)} -->"


def build(pipe: DoDPipeline, model: str) -> gr.Blocks:
    """The page for a pipeline."""
    studio = Studio(pipe, model)
    choices, first, has_code_model = class_choices(pipe), studio.first(), pipe.code_transformer is not None

    def update(results: Generator, old: Result, turn: Turn) -> Iterator:
        """Outputs of all drawings: status, samples, code, seed, result. A refused one leaves the old result as it is."""
        current, mine = old, turn.take()
        try:
            with closing(results):
                for news in results:
                    if turn.latest != mine:
                        break
                    if isinstance(news, Result):
                        current = news
                        yield gr.skip(), shown(news), news.code, news.drawing.seed, news
                    else:
                        yield progress(*news), *[gr.skip()] * 4
            if turn.latest == mine:
                yield "", *[gr.skip()] * 4
            elif turn.stopped:
                yield '<p class="hint">Stopped.</p>', shown(current), *[gr.skip()] * 3
        except ValueError as error:
            yield message(str(error)), shown(current), *[gr.skip()] * 3

    def again(old: Result, codes: torch.Tensor | None = None, seed: int | None = None, **options: Any) -> Generator:
        """The old result's drawing, of its own or of other codes."""
        codes = old.codes if codes is None else codes
        if codes is None:
            raise ValueError("One stage without codes cannot be drawn again: draw two stages.")
        drawing = old.drawing.from_codes(pipe, codes)
        yield from studio.results(drawing if seed is None else replace(drawing, seed=seed), **options)

    def generate(
        turn: Turn,
        result: Result,
        class_id: int,
        num_samples: int,
        same_codes: bool,
        code_guidance: float,
        seed: int | None,
        random_seed: bool,
        start: str,
        num_stages: int,
        picture: str | None,
        *numbers: Any,
    ) -> Iterator:
        def results() -> Generator:
            # Limits of the fields themselves would end in an error of gradio's in the place of the result.
            if start == "picture" and picture is None:
                raise ValueError("Choose a picture to start from.")
            if num_stages is None:
                raise ValueError("Choose the number of stages.")
            chosen = random.randint(0, MAX_SEED) if random_seed or seed is None else seed
            if not 0 <= chosen <= MAX_SEED:
                raise ValueError(f"The seed must be from 0 to {MAX_SEED}.")
            # A field that was emptied is None, which the pipeline refuses with a message.
            steps, scales = [*numbers[:num_stages]], [*numbers[MAX_STAGES:][:num_stages]]
            yield from studio.results(
                Drawing(
                    None if class_id == NO_CLASS else class_id,
                    chosen,
                    num_samples,
                    steps,
                    scales,
                    start,
                    same_codes and start == "codes",
                    code_guidance,
                    picture if start == "picture" else None,
                )
            )

        yield from update(results(), result, turn)

    def redraw(turn: Turn, result: Result) -> Iterator:
        seed = random.randint(0, MAX_SEED)
        yield from update(again(result, seed=seed, unmixed=result.unmixed), result, turn)

    def mix(turn: Turn, result: Result, class_id: int, share: float) -> Iterator:
        def results() -> Generator:
            drawn = result.drawing
            others = studio.new_codes(
                None if class_id == NO_CLASS else class_id, drawn.seeds, drawn.code_guidance_scale
            )
            if result.unmixed is None or not 0 <= share <= 1:
                raise ValueError("Codes are mixed by a share from 0 to 1.")
            yield from again(result, torch.lerp(result.unmixed, others, share), unmixed=result.unmixed)

        yield from update(results(), result, turn)

    def paint_codes(turn: Turn, result: Result, event: gr.EventData) -> Iterator:
        def results() -> Generator:
            if result.codes is None:
                raise ValueError("There are no codes to change.")
            path = check_path(result.codes, event.path)
            codes = paint(result.codes, path)
            if len(path) == 1:
                seed = random.randint(0, MAX_SEED)
                drawn = result.drawing
                new = studio.new_codes(drawn.class_id, range(seed, seed + 1), drawn.code_guidance_scale)
                codes[path[0]] = new[0, path[0][1]]
            yield from again(result, codes)

        yield from update(results(), result, turn)

    def show_rows(start: str, num_stages: int) -> list:
        """One row per stage that runs; a picture needs a stage 2."""
        first_stage = 2 if start == "picture" else 1
        num_stages = max(num_stages, first_stage)
        return [num_stages, *(gr.Row(visible=first_stage <= i <= num_stages) for i in range(1, MAX_STAGES + 1))]

    def show_settings(start: str) -> list:
        num_stages, guidance = default_settings(start)
        from_codes = start == "codes"
        visible = [
            gr.Column(visible=start == "picture"),
            gr.Checkbox(visible=from_codes),
            gr.Number(visible=from_codes),
        ]
        return [*visible, *guidance, *show_rows(start, num_stages)]

    def show_preview(picture: str | None) -> str:
        if picture is None:
            return ""
        try:
            return image_tag(open_picture(picture, largest=256), "preview", "preview")
        except ValueError as error:
            return message(str(error))

    name = model_name(model)
    start_value = first.drawing.start
    num_stages_value, guidance_values = default_settings(start_value)
    class_value = choices[min(1, len(choices) - 1)][1]
    with gr.Blocks(title=f"{name} – Diffusion on Diffusion", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f"<h1>{html.escape(name)}</h1><p>{ABOUT[has_code_model]}</p>", elem_id="title")
        turn, result = gr.State(Turn()), gr.State(first)
        with gr.Row():
            with gr.Column(scale=5, min_width=320, elem_id="results"):
                samples = gr.HTML(first.html, elem_id="samples", js_on_load=(FOLDER / "painting.js").read_text())
                gr.HTML(f'<p class="hint">{HINT[has_code_model]}</p>', elem_id="hint")
                with gr.Row(elem_id="toolbar"):
                    generate_button = gr.Button("Generate", variant="primary", scale=0, min_width=110)
                    redraw_button = gr.Button("Redraw", scale=0, min_width=80)
                    stop_button = gr.Button("Stop", scale=0, min_width=60)
                    status = gr.HTML(elem_id="status", min_width=180)
            with gr.Column(scale=2, min_width=320):
                with gr.Group():
                    class_id = gr.Dropdown(choices, value=class_value, label="Class")
                    num_samples = gr.Radio(SAMPLES, value=1, label="Samples")
                    same_codes = gr.Checkbox(False, label="The same codes for all", visible=has_code_model)
                    code_guidance = gr.Number(
                        pipe.config.code_guidance_scale,
                        label="Guidance of the codes (1: varied, 3: clear)",
                        step=0.25,
                        visible=has_code_model,
                    )
                    seed = gr.Number(0, label="Seed", precision=0)
                    random_seed = gr.Checkbox(True, label="New seed each time")
                with gr.Accordion("Mix codes", visible=has_code_model):
                    mix_class = gr.Dropdown(choices, value=choices[-1][1], label="With codes of")
                    share = gr.Slider(0, 1, 0.5, step=0.05, label="Share")
                    mix_button = gr.Button("Mix")
                with gr.Accordion("Stages, steps and guidance", open=False):
                    starts = [(label, value) for value, label in STARTS.items() if value != "codes" or has_code_model]
                    start = gr.Radio(starts, value=start_value, label="Start from")
                    with gr.Column(visible=False) as picture_column:
                        # Not gr.Image, which reads the file itself and says of a bad one only that it failed.
                        picture = gr.File(label="Picture", file_types=["image"], height=120)
                        preview = gr.HTML()
                    num_stages = gr.Radio(list(range(1, MAX_STAGES + 1)), value=num_stages_value, label="Stages")
                    rows, steps, scales = [], [], []
                    for stage, guidance in enumerate(guidance_values, start=1):
                        with gr.Row(visible=stage <= num_stages_value) as row:
                            steps.append(
                                gr.Number(NUM_STEPS, label=f"Stage {stage} steps", precision=0, min_width=120)
                            )
                            scales.append(
                                gr.Number(
                                    guidance,
                                    label=f"Stage {stage} guidance",
                                    step=0.05,
                                    min_width=120,
                                    visible=pipe.guider is None,
                                )
                            )
                        rows.append(row)
        with gr.Accordion("The same in Python", open=False):
            code = gr.Code(first.code, language="python", show_label=False, interactive=False)

        quick = {"show_progress": "hidden", "concurrency_limit": 2, "api_visibility": "private"}
        start.input(
            show_settings, start, [picture_column, same_codes, code_guidance, *scales, num_stages, *rows], **quick
        )
        num_stages.input(show_rows, [start, num_stages], [num_stages, *rows], **quick)
        picture.change(show_preview, picture, preview, **quick)

        # Not gradio's limit, behind which a user's new wish would wait for the old one (see `Studio.results`).
        shared = {"show_progress": "hidden", "concurrency_id": "drawing", "concurrency_limit": MAX_OPEN}
        states, outputs = [turn, result], [status, samples, code, seed, result]
        settings = [class_id, num_samples, same_codes, code_guidance, seed, random_seed, start, num_stages, picture]
        settings += [*steps, *scales]
        generate_button.click(generate, [*states, *settings], outputs, **shared)
        redraw_button.click(redraw, states, outputs, **shared)
        mix_button.click(mix, [*states, mix_class, share], outputs, **shared)
        # A stroke while another is drawn is drawn next.
        samples.select(paint_codes, states, outputs, trigger_mode="always_last", api_visibility="private", **shared)
        stop_button.click(Turn.stop, turn, queue=False, **quick)
    return page.queue(max_size=MAX_WAITING)


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Opens the page in its own look; `options` are those of gradio's `launch`."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from elsewhere
    theme = gr.themes.Default(primary_hue="indigo", **fonts)
    return page.launch(theme=theme, css_paths=FOLDER / "style.css", max_file_size="20mb", footer_links=[], **options)


def serve(model: str) -> None:
    """Opens the page of a pipeline, from a folder or a Hub repository."""
    pipe = DoDPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
    launch(build(pipe, model))
