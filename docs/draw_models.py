"""Draws docs/images/models.png, the README's picture of the models in examples/pretrained/: `python docs/draw_models.py`."""

from pathlib import Path

import torch
from PIL import Image

from diffusers_dod import DoDPipeline
from diffusers_dod.viz import code_maps, stage_grid


ROOT = Path(__file__).parents[1]
MODELS = {
    "digits": list("0123456789"),
    "letters": list("ABCDEFGHIJ"),
    "emoji": ["clock", "clock", "face", "face", "flag", "flag", "heart", "heart", "person", "person"],
}
SEED, SAMPLES = 0, 2


def draw_model(folder: Path, labels: list[str]) -> Image.Image:
    """Codes of some classes, one per column, and samples from them."""
    pipe = DoDPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(labels, generator=torch.Generator().manual_seed(SEED))
    rows = [output.images]
    for seed in range(SEED + 1, SEED + SAMPLES):
        rows.append(pipe(labels, codes=output.codes, generator=torch.Generator().manual_seed(seed)).images)
    size = pipe.transformer.config.sample_size
    grid = pipe.latent_embedder.code_grid(size, size)
    maps = [tile.resize(rows[0][0].size, Image.Resampling.NEAREST) for tile in code_maps(output.codes, grid)]
    scale = max(1, round(112 / rows[0][0].width))
    return stage_grid([maps, *rows], labels, scale=scale, row_names=["codes", *["samples"] * SAMPLES])


def main() -> None:
    pictures = [draw_model(ROOT / "examples/pretrained" / name, labels) for name, labels in MODELS.items()]
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height
    whole.save(ROOT / "docs/images/models.png", optimize=True)


if __name__ == "__main__":
    main()
