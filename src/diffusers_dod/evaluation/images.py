"""Sets of images to evaluate: a folder, an `.npz` of ADM, or a dataset, as batches of uint8."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.folders import list_images, say_left_out
from ..data.images import center_crop, is_saved_dataset, load_labelled_images, read_image
from .metrics import FeatureStatistics


# Ways to read a row; a worker process may have to import them.
def _from_array(row: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(row.squeeze())


def _from_file(row: str) -> PIL.Image.Image:
    return read_image({"path": row, "bytes": None})


def _from_row(row: dict) -> PIL.Image.Image:
    return read_image(row["image"])


class _Pictures(Dataset):
    """Images one by one as `(3, height, width)` of uint8."""

    def __init__(self, rows: Any, read: Callable[[Any], PIL.Image.Image], resolution: int | None):
        self.rows, self.read, self.resolution = rows, read, resolution

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = self.read(self.rows[index]).convert("RGB")
        if self.resolution is not None:
            image = center_crop(image, self.resolution)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class ImageSet:
    """Images to evaluate, and statistics that came with them.

    Args:
        source (`str`):
            a folder of images (also in subfolders), an `.npz` of ADM's evaluation (`arr_0` of `(samples, height, width,
            channels)` in uint8, and `mu`, `sigma`, `mu_s`, `sigma_s` where it is a reference), a folder of
            `datasets.save_to_disk`, or a Hub dataset.
        resolution (`int`, *optional*): side to which images are cropped as ADM does; as they are by default.

    Raises:
        ValueError: if there are no images, or statistics, to be had.
    """

    def __init__(self, source: str, resolution: int | None = None):
        self.source, self.statistics = source, {}
        self.read: Callable[[Any], PIL.Image.Image]
        path = Path(source)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                for name, mean, covariance in (("features", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
                    if mean in arrays:
                        values = (torch.from_numpy(arrays[key]).double() for key in (mean, covariance))
                        self.statistics[name] = FeatureStatistics(*values)
                images = arrays["arr_0"] if "arr_0" in arrays else np.zeros((0, 1, 1, 3), np.uint8)
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
                raise ValueError(f"{source}: arr_0 must be (samples, height, width, 3 or 1) in uint8, as ADM's.")
            self.rows, self.read = images, _from_array
        elif path.is_dir() and not is_saved_dataset(path):
            try:
                images = list_images(path, labelled=False)
            except ValueError as error:
                raise ValueError(f"No images could be loaded from {source}: {error}") from error
            say_left_out(source, images)
            self.rows, self.read = images.files, _from_file
        else:
            data, _ = (
                load_labelled_images(folder=source, label_column=None)
                if path.is_dir()
                else load_labelled_images(dataset_name=source, label_column=None)
            )
            self.rows, self.read = data, _from_row
        if not len(self.rows) and not self.statistics:
            raise ValueError(f"{source} holds no images.")
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, batch_size: int, num_workers: int = 0) -> Iterator[torch.Tensor]:
        """Batches of `(batch, 3, height, width)` in uint8, in order.

        Raises:
            ValueError: if the images differ in size and no `resolution` was given, or naming one that cannot be read.
        """
        pictures = _Pictures(self.rows, self.read, self.resolution)
        try:
            yield from DataLoader(pictures, batch_size=batch_size, num_workers=num_workers)
        except RuntimeError as error:
            if "equal size" not in str(error):
                raise
            raise ValueError(f"The images of {self.source} differ in size: give a resolution.") from error
        except ValueError as error:  # from a worker with its traceback before it
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
