"""Labelled images for training and evaluation: loading, checking, cropping, batching."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from datasets.utils.file_utils import xopen

from ..cli import first_line
from ..pictures import MAX_MEGAPIXELS, prepare_picture
from .folders import list_images, say_left_out


def is_saved_dataset(folder: str | Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return all(Path(folder, name).is_file() for name in ("state.json", "dataset_info.json")) or (
        Path(folder, "dataset_dict.json").is_file()
    )


def _list_rows(rows: Iterable[tuple[str, int]], **_: Any) -> Iterator[dict]:
    """What `datasets` makes its rows from."""
    for file, label in rows:
        yield {"image": {"path": file, "bytes": None}, "label": label}


def _load_folder(folder: str, labelled: bool, streaming: bool, cache_dir: str | None) -> Any:
    if Path(folder).is_dir() and is_saved_dataset(folder):
        data = datasets.load_from_disk(folder)
        data = data["train"] if isinstance(data, datasets.DatasetDict) else data
        return data.to_iterable_dataset(num_shards=min(64, len(data))) if streaming else data
    images = list_images(folder, labelled)
    say_left_out(folder, images)
    rows = list(zip(images.files, images.labels))
    label = datasets.ClassLabel(names=images.class_names) if labelled else datasets.Value("int64")
    features = datasets.Features(image=datasets.Image(decode=False), label=label)
    if streaming:
        # In one fixed shuffled order: a buffer would hold few classes of a sorted folder. Each image is a shard.
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
        return datasets.IterableDataset.from_generator(_list_rows, features, gen_kwargs={"rows": rows})
    # Sizes and times are not read: with them, changed images get rows of their own, which are checked anew.
    stats = [os.stat(file) for file, _ in rows]
    kwargs = {"rows": tuple(rows), "versions": tuple((stat.st_size, stat.st_mtime_ns) for stat in stats)}
    return datasets.Dataset.from_generator(_list_rows, features, cache_dir, gen_kwargs=kwargs)


def load_labelled_images(
    folder: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    cache_dir: str | None = None,
    streaming: bool = False,
) -> tuple[datasets.Dataset | datasets.IterableDataset, list[str] | None]:
    """Loads images with their classes. Of a Hub dataset or a saved `DatasetDict`, the `train` split is read.

    Args:
        folder (`str`, *optional*):
            a folder with one subfolder per class, read as [`~diffusers_dod.data.folders.list_images`] describes, or what
            `datasets.save_to_disk` wrote.
        dataset_name (`str`, *optional*): a Hub dataset, where no `folder` is given.
        dataset_config_name (`str`, *optional*): its configuration.
        image_column (`str`): column of the images.
        label_column (`str`, *optional*):
            column of the labels, names or integers from 0. `None` reads images alone, in any layout of folders.
        cache_dir (`str`, *optional*): where `datasets` keeps what it downloads and prepares.
        streaming (`bool`): read as training continues instead of preparing everything first.

    Returns:
        the dataset, with the columns `image` (undecoded) and, unless `label_column` is `None`, `label` (integers); and
        the class names, or `None` if there are none. The labels of a streamed dataset are not checked.

    Raises:
        ValueError: if there is nothing to load, or no column of images and one of classes.
    """
    source = dataset_name if folder is None else folder
    try:
        if folder is None:
            options = {"split": "train", "cache_dir": cache_dir, "streaming": streaming}
            data = datasets.load_dataset(dataset_name, dataset_config_name, **options)
        else:
            data = _load_folder(folder, label_column is not None, streaming, cache_dir)
    except Exception as error:  # `datasets` raises many unrelated kinds for what is missing, private or malformed
        raise ValueError(f"No images could be loaded from {source}: {first_line(error)}") from error

    if data.features is None:
        raise ValueError(f"The columns of {source} are not known before reading it: do without streaming.")
    columns = {image_column: "image"}
    if label_column is not None:
        columns[label_column] = "label"
    for column in columns:
        if column not in data.column_names:
            raise ValueError(f"{source} has no column {column!r}; its columns are {', '.join(data.column_names)}.")
    if not isinstance(data.features[image_column], datasets.Image):
        raise ValueError(f"Column {image_column!r} of {source} does not hold images.")
    if not streaming and len(data) == 0:
        raise ValueError(f"{source} holds no images.")

    names = None
    if label_column is not None:
        is_text = data.features[label_column] == datasets.Value("string")
        if is_text and streaming:
            raise ValueError(f"Column {label_column!r} of {source} is text, which cannot be numbered while streaming.")
        if is_text:
            data = data.class_encode_column(label_column)
        if not streaming and any(not isinstance(label, int) or label < 0 for label in data.unique(label_column)):
            raise ValueError(f"Column {label_column!r} of {source} must hold classes: names, or integers from 0.")
        names = getattr(data.features[label_column], "names", None)
    # First of all undecoded, for a stream would decode in order to rename.
    data = data.cast_column(image_column, datasets.Image(decode=False)).select_columns(list(columns))
    renamed = {old: new for old, new in columns.items() if old != new}
    return data.rename_columns(renamed) if renamed else data, names


def _open(value: dict) -> PIL.Image.Image:
    if value["bytes"] is not None:
        return PIL.Image.open(BytesIO(value["bytes"]))
    if value["path"] is None:
        raise ValueError("it has neither bytes nor a file")
    if Path(value["path"]).is_file():
        return PIL.Image.open(value["path"])
    with xopen(value["path"], "rb") as file:  # a stream's file, somewhere on the net
        return PIL.Image.open(BytesIO(file.read()))


def _read(value: dict, background: str | tuple[int, ...] = "white") -> PIL.Image.Image:
    """As [`read_image`], with errors that say what is wrong and not with which file."""
    try:
        with _open(value) as picture:
            return prepare_picture(picture, background)
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        reason = f"it is too large: make it smaller than {MAX_MEGAPIXELS} megapixels"
    except PIL.UnidentifiedImageError:
        reason = "it is not a picture that can be read"
    except Exception as error:  # whatever a decoder raises, the picture cannot be used
        reason = first_line(error)
    raise ValueError(reason)


def _name(value: dict) -> str:
    return value["path"] or "an unnamed image"


def read_image(value: dict, background: str | tuple[int, ...] = "white") -> PIL.Image.Image:
    """Reads a row's image: the one way for training, streaming, caching, evaluation and the demo.

    Args:
        value (`dict`): `path` and `bytes` of a file, one of which may be `None`.
        background (`str` or `tuple` of `int`, defaults to `"white"`): colour behind what is transparent.

    Returns:
        `PIL.Image.Image`: of mode `"L"` or `"RGB"`, as [`~diffusers_dod.pictures.prepare_picture`] makes it.

    Raises:
        ValueError: naming the file, if it is damaged, too large, too narrow, or not of 8 bits per channel.
    """
    try:
        return _read(value, background)
    except ValueError as error:
        raise ValueError(f"{_name(value)} cannot be read ({error})") from error


def _inspect(value: dict) -> dict:
    try:
        content = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        report = {"problem": "", "is_gray": _read(value).mode == "L"}
        return report | {"sha256": hashlib.sha256(content).hexdigest()}
    except (ValueError, OSError) as error:
        return {"problem": f"{_name(value)} ({error})", "is_gray": True, "sha256": ""}


def inspect_images(data: datasets.Dataset, num_proc: int = 0) -> datasets.Dataset:
    """Decodes every image once, with a progress bar.

    `datasets` caches the result, so the next run does not decode the same files again. The exception is a folder of
    `datasets.save_to_disk`, into which nothing is written.

    Args:
        data (`datasets.Dataset`): what [`load_labelled_images`] returned.
        num_proc (`int`, defaults to 0): worker processes; 0 decodes in this one.

    Returns:
        `datasets.Dataset`: a row for each image, of columns `problem`, empty for a good image, `is_gray`, and the file's
            `sha256`.
    """
    # The cache of a dataset that was read by `load_from_disk` would lie in the user's own folder.
    from_disk = any(is_saved_dataset(Path(file["filename"]).parent) for file in data.cache_files)
    return data.map(
        _inspect,
        input_columns=["image"],
        remove_columns=data.column_names,
        num_proc=min(num_proc, len(data)) or None,
        keep_in_memory=from_disk,
        desc="Checking images",
    )


def center_crop(image: PIL.Image.Image, size: int) -> PIL.Image.Image:
    """ADM's centre crop to a square (Dhariwal & Nichol 2021, arXiv 2105.05233).

    The shorter side is halved by a box filter while it is at least twice `size`, then brought to it by a bicubic one.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def collate_images(rows: list[dict], size: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of a `DataLoader` over [`load_labelled_images`].

    Args:
        rows (`list` of `dict`): rows of the dataset, with the decoded `picture` where there is one already.
        size (`int`): side of the images.
        channels (`int`): 3 for colours, 1 for grayscale.

    Returns:
        images, `(batch, channels, size, size)` in bytes, to be brought to [-1, 1] where the model is, and labels,
        `(batch,)`.
    """
    mode = {1: "L", 3: "RGB"}[channels]
    pictures = [row["picture"] if "picture" in row else read_image(row["image"]) for row in rows]
    images = np.stack([np.asarray(center_crop(picture.convert(mode), size)) for picture in pictures])
    pixels = torch.from_numpy(images).view(len(rows), size, size, channels).permute(0, 3, 1, 2)
    return pixels, torch.tensor([row["label"] for row in rows])
