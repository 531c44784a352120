"""Encoding a data set to cached latents, shared among processes shard by shard."""

import argparse
import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import diffusers
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from diffusers import AutoModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..autoencoding import encode_posterior, vae_spatial_factor
from ..cli import BadData, BadInput, bad_input
from ..compatibility import DTYPE_ARGUMENT
from ..files import json_sha256, weights_sha256
from ..processes import end_together
from .cache_writing import LatentCacheWriter, cache_settings
from .checking import check_images
from .features import REPAEncoder
from .images import collate_images, load_labelled_images


def load_images(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[datasets.Dataset, list[int], list[str] | None]:
    """The images, the rows of those that can be read, and the names of the classes."""
    with bad_input(ValueError), accelerator.main_process_first():
        data, class_names = load_labelled_images(
            args.train_data_dir,
            args.dataset_name,
            args.dataset_config_name,
            args.image_column,
            args.label_column,
            args.cache_dir,
        )
    rows, _, _ = check_images(args, data, accelerator)
    return data, rows, class_names


def image_names(data: datasets.Dataset, folder: str | None) -> list[str]:
    """The file of every row, relative to the data's folder; the row's number where there is no file."""
    paths = data.flatten().select_columns("image.path")["image.path"]
    names = [path if path is None or folder is None else os.path.relpath(path, folder) for path in paths]
    return [str(row) if name is None else Path(name).as_posix() for row, name in enumerate(names)]


def cache(args: argparse.Namespace) -> None:
    """What `diffusers-dod cache` does; `args` are its options."""
    # The slowest process may be hours behind at the end.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])

    # 1. Images and models
    data, rows, class_names = load_images(args, accelerator)
    every_name, every_label = image_names(data, args.train_data_dir), data["label"][:]
    names, labels = [every_name[row] for row in rows], [every_label[row] for row in rows]
    # Missing, private, offline, another class: the libraries raise many kinds.
    with bad_input(Exception, what=f"{args.vae_name_or_path} cannot be loaded"):
        where = {"subfolder": args.vae_subfolder, "cache_dir": args.cache_dir}
        vae = AutoModel.from_pretrained(args.vae_name_or_path, **where, **{DTYPE_ARGUMENT: torch.float32})
    vae.requires_grad_(False).eval().to(accelerator.device)
    factor = vae_spatial_factor(vae)
    encoder, multiple = None, factor
    features: dict[str, Any] | None = None
    if args.repa_encoder is not None:
        with bad_input(Exception, what=f"{args.repa_encoder} cannot be loaded"):
            encoder = REPAEncoder.from_pretrained(args.repa_encoder, cache_dir=args.cache_dir).to(accelerator.device)
        multiple *= args.patch_size
        grid = [args.resolution // multiple] * 2
        features = {
            "encoder_class": type(encoder.model).__name__,
            "encoder_weights_sha256": weights_sha256(encoder),
            "grid": grid,
            "width": encoder.width,
        }
    if args.resolution % multiple:
        raise BadInput(f"--resolution {args.resolution} must be a multiple of {multiple}")

    # 2. The cache, new or to be resumed; nothing was written until here
    settings = cache_settings(
        vae,
        args.resolution,
        names,
        labels,
        class_names,
        flips=args.flips,
        dtype=args.dtype,
        shard_size=args.shard_size,
        features=features,
    )
    vae_config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    origin = {"vae_name_or_path": args.vae_name_or_path, "vae_subfolder": args.vae_subfolder}
    origin |= {"vae_config_sha256": json_sha256(vae_config), "repa_encoder": args.repa_encoder}
    origin |= {"versions": {module.__name__: module.__version__ for module in (diffusers, torch)}}
    with bad_input():
        writer = LatentCacheWriter(args.output_dir, settings, origin)
    entries, problems = {}, []
    for number in range(accelerator.process_index, writer.num_shards, accelerator.num_processes):
        try:
            entries[number] = writer.find(number)
        except ValueError as error:
            problems.append(str(error))
    problems = gather_object(problems)
    if problems:
        raise BadInput(problems[0])
    found = dict(gather_object(list(entries.items())))
    missing = [number for number in sorted(found) if found[number] is None][
        accelerator.process_index :: accelerator.num_processes
    ]
    if accelerator.is_main_process:
        writer.begin()
    accelerator.wait_for_everyone()

    # 3. Encoding, shard by shard; no batch crosses from one to the next
    batches = [batch for number in missing for batch in torch.tensor(writer.rows(number)).split(args.batch_size)]
    dataloader = DataLoader(
        data.select(rows),
        batch_sampler=[batch.tolist() for batch in batches],
        collate_fn=partial(collate_images, size=args.resolution, channels=3),
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    loaded, written = iter(dataloader), []
    progress = tqdm(total=len(batches), unit="batch", disable=not accelerator.is_local_main_process)
    for number in missing:
        shard_rows, parts = writer.rows(number), []
        for _ in range(0, len(shard_rows), args.batch_size):
            pixels, _ = next(loaded)
            images = pixels.to(accelerator.device).float() / 127.5 - 1
            flips = []
            for view in [images, images.flip(-1)] if args.flips else [images]:
                with torch.no_grad():
                    mean, std = encode_posterior(vae, view)
                flips.append({"mean": mean} if std is None else {"mean": mean, "std": std})
                if encoder is not None:
                    flips[-1]["features"] = encoder(view, grid)
            parts.append({name: torch.stack([flip[name] for flip in flips], dim=1).cpu() for name in flips[0]})
            progress.update()
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        tensors["label"] = torch.tensor([labels[row] for row in shard_rows])
        tensors["id"] = torch.tensor([rows[row] for row in shard_rows])
        try:
            written.append((number, writer.write(number, tensors, [names[row] for row in shard_rows])))
        except ValueError as error:
            raise BadData(str(error)) from error
    progress.close()

    # 4. The manifest
    found.update(gather_object(written))
    if accelerator.is_main_process:
        writer.finish(list(found.values()))
        print(f"{args.output_dir} holds the latents of {len(rows)} images in {len(found)} shards.")
    end_together(accelerator)
