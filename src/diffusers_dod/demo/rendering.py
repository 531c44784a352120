"""The page's HTML: samples with their codes, progress, messages."""

import base64
import html
import io

import numpy as np
from PIL import Image

from .drawing import Drawing


def image_tag(image: Image.Image, css_class: str, text: str) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    sharp = " sharp" if max(image.size) <= 64 else ""
    return f'<img class="{css_class}{sharp}" alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def code_cells(code_map: Image.Image, sample: int) -> str:
    """A map of codes as buttons, one per code."""
    cells = []
    for cell, (red, green, blue) in enumerate(np.asarray(code_map).reshape(-1, 3)):
        cells.append(
            f'<button class="cell" data-place="[{sample}, {cell}]" style="background: rgb({red}, {green}, {blue})" '
            f'aria-label="Sample {sample + 1}, code {cell + 1}"></button>'
        )
    style = f"grid-template-columns: repeat({code_map.width}, 1fr)"
    return f'<div class="codes" style="{style}">{"".join(cells)}</div>'


def samples_html(drawing: Drawing, code_maps: list[Image.Image], stages: dict[int, list[Image.Image]]) -> str:
    """Each sample with its codes and stages in their order; stages to come are empty frames."""
    cards = []
    for sample in range(drawing.num_samples):
        panels = []
        for stage in range(1, drawing.num_stages + 1):
            if code_maps and stage == drawing.first_stage_with_prior:
                panels.append(("codes", "Codes", code_cells(code_maps[sample], sample)))
            title = "Your picture" if stage < drawing.first_stage else f"Stage {stage}"
            text = title if drawing.num_samples == 1 else f"Sample {sample + 1}, {title.lower()}"
            tag = '<div class="sample waiting"></div>'
            if stage in stages:
                tag = image_tag(stages[stage][sample], "sample", text)
            panels.append(("picture", title, tag))
        figures = [
            f'<figure class="{kind}-panel"><figcaption>{title}</figcaption>{tag}</figure>'
            for kind, title, tag in panels
        ]
        cards.append(f'<div class="card">{"".join(figures)}</div>')
    return f'<div class="samples of-{drawing.num_samples}">{"".join(cards)}</div>'


def message(text: str) -> str:
    return f'<p class="message" role="alert">{html.escape(text)}</p>'


def progress(text: str, fraction: float) -> str:
    return f'<label class="progress"><span>{text}</span><progress value="{fraction:.4f}"></progress></label>'
