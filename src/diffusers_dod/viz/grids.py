"""Pictures of stages side by side, and of what a stage changed."""

import math

from diffusers.utils import make_image_grid
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps


MIN_TILE = 84  # pixels; a smaller picture is enlarged by a whole number
FONT_SIZE = 13
GAP = 2  # pixels around a tile of a titled grid


def stage_grid(
    stages: list[list[Image.Image]],
    labels: list[str] | None = None,
    first_stage: int = 1,
    scale: int | None = None,
    row_names: list[str] | None = None,
) -> Image.Image:
    """One RGB picture of all stages: one row per stage, one column per sample.

    Args:
        stages (`list` of `list` of `PIL.Image.Image`):
            Pictures of one size and mode by stage, as `DoDPipelineOutput.stages` has them.
        labels (`list` of `str`, *optional*):
            Titles of the columns, cut to their width; the stages are then titled too. By default there is no text. With k
            times as many pictures as labels, each stage has k rows.
        first_stage (`int`, defaults to 1): The first row's number, 2 for samples of a picture as the prior.
        scale (`int`, *optional*):
            Whole factor that enlarges a picture; by default the least that makes its shorter side at least 84 pixels.
        row_names (`list` of `str`, *optional*): Titles of the rows instead of the stages' numbers; not without `labels`.

    Raises:
        ValueError: if there is no picture, or the rows or the labels differ in length.
    """
    if not stages or not stages[0] or any(len(row) != len(stages[0]) for row in stages):
        raise ValueError("`stages` must be rows of equally many pictures, at least one.")
    columns = len(stages[0]) if labels is None else len(labels)
    if not columns or len(stages[0]) % columns:
        raise ValueError(f"{columns} labels for {len(stages[0])} columns: pass one per column.")
    rows = len(stages[0]) // columns

    width, height = stages[0][0].size
    scale = scale or max(1, math.ceil(MIN_TILE / min(width, height)))
    size = (width * scale, height * scale)
    tiles = [tile.resize(size, Image.Resampling.NEAREST) for row in stages for tile in row]
    if labels is not None:
        tiles = [ImageOps.expand(tile.convert("RGB"), GAP, "white") for tile in tiles]
    grid = make_image_grid(tiles, rows=len(stages) * rows, cols=columns)
    if labels is None:
        return grid

    width, height = tiles[0].size
    font = ImageFont.load_default(FONT_SIZE)
    names = row_names or [f"stage {first_stage + i}" for i in range(len(stages))]
    left, top = math.ceil(max(map(font.getlength, names))) + 12, FONT_SIZE + 10
    titled = Image.new("RGB", (left + grid.width, top + grid.height), "white")
    titled.paste(grid, (left, top))
    draw = ImageDraw.Draw(titled)
    for stage, name in enumerate(names):
        draw.text((left - 6, top + (stage + 0.5) * rows * height), name, "black", font, anchor="rm")
        if stage and rows > 1:
            draw.line((0, top + stage * rows * height, titled.width, top + stage * rows * height), "black")
    for column, label in enumerate(labels):
        draw.text((left + (column + 0.5) * width, top / 2), _fit(label, width - 4, font), "black", font, anchor="mm")
    return titled


def _fit(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The longest start of a text that fits a width."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def stage_differences(stages: list[list[Image.Image]]) -> list[list[Image.Image]]:
    """What each stage changed in the sample of the one before.

    Middle gray (128) is no change; brighter and darker are half of what was added and taken away, for each channel.

    Args:
        stages (`list` of `list` of `PIL.Image.Image`): at least two stages, as for [`stage_grid`].

    Returns:
        one row less than `stages`, the first for stage 2.
    """
    if len(stages) < 2:
        raise ValueError("A difference needs two stages: sample with `num_stages=2` or more.")
    return [
        [ImageChops.subtract(new, old, scale=2, offset=128) for old, new in zip(before, after)]
        for before, after in zip(stages, stages[1:])
    ]
