"""Writes a data set of the study as `datasets.save_to_disk` does, to train on with `diffusers-dod train`.

    python study/write_images.py characters --output_dir data/characters

`output_dir` receives `train` and `held_out`, each with the columns `image` and `label`; the classes keep their names.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from data_sets import DATA_SETS
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pictures


def write_images(images: torch.Tensor, labels: torch.Tensor, class_names: list[str], folder: Path) -> None:
    """Images are `(number, channels, size, size)` in [-1, 1]."""
    arrays = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()

    def rows():
        for pixels, label in zip(arrays, labels.tolist()):
            yield {"image": Pictures.fromarray(np.squeeze(pixels)), "label": label}

    features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
    Dataset.from_generator(rows, features=features, cache_dir=str(folder / "cache")).save_to_disk(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=DATA_SETS)
    parser.add_argument("--source", type=Path, help="where the pictures or typefaces are, see data_sets.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    data = DATA_SETS[args.data](args.source)
    write_images(data.images, data.labels, data.class_names, args.output_dir / "train")
    write_images(data.held_out_images, data.held_out_labels, data.class_names, args.output_dir / "held_out")
    print(f"{args.output_dir}: {len(data.images)} images to train on, {len(data.held_out_images)} held out")


if __name__ == "__main__":
    main()
