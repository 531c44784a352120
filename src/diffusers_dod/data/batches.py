"""From the options of a training to its batches: labelled images, streams or cached latents, and their latents."""

import argparse
import signal
import warnings
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets.distributed import split_dataset_by_node
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch.utils.data import DataLoader, default_collate

from ..autoencoding import encode_images
from ..cli import BadData, BadInput, WorkerLost, bad_input
from ..files import json_sha256
from ..pipeline_dod import DoDPipeline
from .cache import CachedLatents, sample_posterior, select_flip
from .checking import check_images
from .classes import match_classes, position_table, relabel_rows
from .features import REPAEncoder
from .images import collate_images, load_labelled_images, read_image
from .order import BatchSampler, EpochOrder
from .streaming import ShuffledStream, StreamedRows


logger = get_logger(__name__, log_level="INFO")


class TrainingData(NamedTuple):
    """`rows` are undecoded images, or latents as [`CachedLatents`] has them; `size` is their number and
    `sha256` the sum of all of them with their classes, in order; both are unknown for a stream.
    """

    rows: Any
    num_classes: int
    id2label: dict[int, str] | None
    is_gray: bool
    size: int | None
    are_latents: bool = False
    sha256: str | None = None


def load_data(args: argparse.Namespace, accelerator: Accelerator) -> TrainingData:
    """The images to train on, of which broken ones were left out or refused unless they are streamed; or latents.

    Where a saved model is trained whose classes have names, labels are the model's.
    """
    data = load_images(args, accelerator) if args.latents_dir is None else load_latents(args)
    return name_classes(args, data)


def load_images(args: argparse.Namespace, accelerator: Accelerator) -> TrainingData:
    """The images of a folder, a saved dataset or the Hub."""
    with bad_input(ValueError), accelerator.main_process_first():
        data, class_names = load_labelled_images(
            args.train_data_dir,
            args.dataset_name,
            args.dataset_config_name,
            args.image_column,
            None if args.num_classes == 0 else args.label_column,
            args.cache_dir,
            args.streaming,
        )
    id2label = dict(enumerate(class_names)) if class_names else None

    if args.streaming:
        if args.num_classes is None and class_names is None:
            raise BadInput("a stream does not tell how many classes there are: give --num_classes")
        if next(iter(data), None) is None:
            raise BadInput("the stream holds no images")
        # One image says nothing about the others: a stream is in colour unless the model's channels are given.
        is_gray, num_classes, size, sha256 = False, len(class_names or ()), None, None
    else:
        rows, is_gray, sums = check_images(args, data, accelerator)
        data = data.select(rows)
        sha256 = json_sha256([sums, data["label"][:] if "label" in data.column_names else None])
        labels = data.unique("label") if "label" in data.column_names else [-1]
        num_classes, size = len(class_names) if class_names else max(labels) + 1, len(data)
    if args.num_classes is not None:
        if args.num_classes < num_classes:
            raise BadInput(f"the data has {num_classes} classes, so --num_classes cannot be {args.num_classes}")
        num_classes = args.num_classes
    return TrainingData(data, num_classes, id2label, is_gray, size, sha256=sha256)


def name_classes(args: argparse.Namespace, data: TrainingData) -> TrainingData:
    """The data with the labels of the saved model that is trained, where both have names of their classes."""
    source = getattr(args, "pipeline", None) or args.pretrained_model_name_or_path
    if source is None or data.num_classes == 0:
        return data
    # Missing, private, offline, another class: the libraries raise many kinds.
    with bad_input(Exception, what=f"{source} cannot be loaded as DoDPipeline"):
        config: Any = DoDPipeline.load_config(source, cache_dir=args.cache_dir)
        id2label = {int(class_id): label for class_id, label in (config.get("id2label") or {}).items()}
    if not id2label or not data.id2label:
        return data._replace(id2label=id2label or data.id2label)
    names = [data.id2label[class_id] for class_id in sorted(data.id2label)]
    with bad_input(ValueError):
        ids = match_classes(names, id2label)
    if ids is None:
        logger.warning(position_table(names, id2label))
        return data._replace(id2label={**id2label, **data.id2label})
    rows = data.rows
    if ids != list(range(len(ids))):
        logger.info(f"{len(ids)} classes of the data go by their names, which are among the model's {len(id2label)}.")
        if data.are_latents:
            rows.class_ids = torch.tensor(ids)
        else:
            rows = relabel_rows(rows, ids)
    num_classes = max(data.num_classes, max(ids) + 1)
    if args.num_classes not in (None, num_classes):
        raise BadInput(f"the data has class {max(ids)} of the model, so --num_classes cannot be {args.num_classes}")
    return data._replace(rows=rows, id2label=id2label, num_classes=num_classes)


def load_latents(args: argparse.Namespace) -> TrainingData:
    """Cached latents, whose resolution becomes `args.resolution`."""
    with bad_input():
        cache = CachedLatents(args.latents_dir)
    if args.random_flip and not cache.flips:
        raise BadInput(
            f"{args.latents_dir} holds no mirrored images: make a new cache with --flips, or leave out --random_flip"
        )
    if args.repa_encoder is not None and not cache.settings["features"]:
        raise BadInput(f"{args.latents_dir} holds no features: make a new cache with --repa_encoder")
    resolution = cache.settings["resolution"]
    if args.resolution not in (None, resolution):
        raise BadInput(
            f"{args.latents_dir} is of resolution {resolution}, so --resolution cannot be {args.resolution}"
        )
    args.resolution = resolution
    num_classes = cache.num_classes if args.num_classes is None else args.num_classes
    if 0 < num_classes < cache.num_classes:
        raise BadInput(f"the data has {cache.num_classes} classes, so --num_classes cannot be {num_classes}")
    id2label = dict(enumerate(cache.class_names)) if cache.class_names and num_classes else None
    return TrainingData(cache, num_classes, id2label, False, len(cache), True, cache.manifest["settings_sha256"])


def collate_rows(rows: list[dict], size: int, channels: int, num_classes: int) -> dict:
    """Rows to a batch: `pixels` and `label` as [`collate_images`] makes them, and `name`, for messages."""
    rows = [{"label": 0, **row} for row in rows]
    names = [row["image"]["path"] or "an unnamed image" for row in rows]
    for name, row in zip(names, rows):
        if not 0 <= row["label"] < max(num_classes, 1):
            raise ValueError(f"{name} has class {row['label']}, but the model knows 0 to {num_classes - 1}")
    pixels, labels = collate_images(rows, size, channels)
    return {"pixels": pixels, "label": labels, "name": names}


def with_picture(row: dict, skip_broken: bool) -> dict | None:
    """A row with its decoded `picture`; `None` for a broken one that is skipped."""
    try:
        return {**row, "picture": read_image(row["image"])}
    except ValueError as error:
        if not skip_broken:
            raise ValueError(f"{error}: pass --on_broken_image skip to train on the others") from error
        warnings.warn(f"Skipped: {error}.", stacklevel=2)
        return None


def collate_streamed(item: tuple[list[dict], str], skip_broken: bool, **kwargs: Any) -> dict:
    """The same for a stream, with its `state`. Good rows of the batch stand in for broken ones."""
    rows, state = item
    good = [row for row in (with_picture(row, skip_broken) for row in rows) if row is not None]
    if not good:
        raise ValueError(f"none of {len(rows)} images in a row can be read")
    rows = [good[i % len(good)] for i in range(len(rows))]
    return {**collate_rows(rows, **kwargs), "state": state}


def collate_latents(rows: list[dict], has_classes: bool) -> dict:
    """Rows of a cache to a batch, with a `name` of each for messages."""
    batch = default_collate(rows)
    if not has_classes:
        batch["label"] = torch.zeros_like(batch["label"])
    return {**batch, "name": [f"image {number}" for number in batch["id"].tolist()]}


def ignore_interrupts(_: int) -> None:
    """Workers leave it to the training process to end well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def make_collate(args: argparse.Namespace, data: TrainingData, channels: int) -> Callable[[list[dict]], dict]:
    """Turns rows of images or latents into a batch."""
    if data.are_latents:
        return partial(collate_latents, has_classes=data.num_classes > 0)
    return partial(collate_rows, size=args.resolution, channels=channels, num_classes=data.num_classes)


def make_batches(
    args: argparse.Namespace, data: TrainingData, channels: int, accelerator: Accelerator, step: int, state: str | None
) -> Generator[dict[str, Any], None, None]:
    """This process's batches without end, from `step` on, or for a stream from `state`."""
    options = {"num_workers": args.dataloader_num_workers, "worker_init_fn": ignore_interrupts}
    options["pin_memory"] = accelerator.device.type == "cuda"
    if args.streaming:
        part = split_dataset_by_node(data.rows, accelerator.process_index, accelerator.num_processes)
        options["sampler"] = ShuffledStream(part, args.train_batch_size, args.shuffle_buffer_size, args.seed, state)
        kwargs = {"size": args.resolution, "channels": channels, "num_classes": data.num_classes}
        collate = partial(collate_streamed, skip_broken=args.on_broken_image == "skip", **kwargs)
        loader = DataLoader(StreamedRows(), batch_size=None, collate_fn=collate, **options)
    else:
        labels = None
        if args.sampling == "balanced":
            labels = data.rows.labels.tolist() if data.are_latents else data.rows["label"][:]
        options["batch_sampler"] = BatchSampler(
            EpochOrder(len(data.rows), args.seed, labels),
            args.train_batch_size,
            accelerator.num_processes,
            accelerator.process_index,
            args.gradient_accumulation_steps,
            first_step=step,
        )
        loader = DataLoader(data.rows, collate_fn=make_collate(args, data, channels), **options)
    try:
        yield from loader
    except ValueError as error:  # from a worker with its traceback before it
        raise BadData(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
    except (ConnectionError, EOFError) as error:  # of the pipe to it
        raise WorkerLost("a dataloader worker was killed, maybe for want of memory") from error


def to_latents(
    batch: dict, vae: ModelMixin | None, mirrored: torch.Tensor, generators: list[torch.Generator]
) -> torch.Tensor:
    """Clean latents of a batch in float32, the `mirrored` rows flipped, posteriors sampled by the rows' generators."""
    if "mean" in batch:
        mean, std = select_cached(batch["mean"], mirrored), batch.get("std")
        if std is None:
            return sample_posterior(mean)
        noise = randn_tensor(mean.shape, generator=generators, device=mean.device)
        return sample_posterior(mean, select_cached(std, mirrored), noise)
    with torch.no_grad():
        return encode_images(vae, to_images(batch, mirrored), generators, sample_posterior=True).float()


def to_images(batch: dict, mirrored: torch.Tensor) -> torch.Tensor:
    """A batch's images in [-1, 1], the `mirrored` rows flipped."""
    images = batch["pixels"].float() / 127.5 - 1
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def select_cached(values: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Of each row, the image or its mirror image; a cache without those has none to mirror."""
    return select_flip(values, mirrored if values.shape[1] == 2 else None)


def to_features(
    batch: dict, encoder: REPAEncoder | None, grid: tuple[int, int], mirrored: torch.Tensor
) -> torch.Tensor:
    """What REPA aligns hidden states with, `(batch, tokens, width)`: cached, or encoded from the images."""
    if encoder is None:
        return select_cached(batch["features"], mirrored).float()
    return encoder(to_images(batch, mirrored), grid)
