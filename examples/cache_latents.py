"""Caches the latents of labelled images, so that a training needs neither the images nor the VAE's encoder.

    accelerate launch examples/cache_latents.py --train_data_dir imagenet/train --resolution 256 --flips \
        --vae_name_or_path stabilityai/sd-vae-ft-ema --batch_size 64 --dataloader_num_workers 8 --output_dir latents

Images come from a folder with one subfolder a class, a folder of `datasets.save_to_disk` or a dataset of the Hub. What
is stored is the VAE's posterior, mean and standard deviation, normalized as the diffusion model sees latents: a training
draws a fresh sample each time (`diffusers_dod.latent_cache.CachedLatents`). `--repa_encoder` stores the features of a
vision model beside them.

`accelerate launch`, `python -m torch.distributed.run` and plain `python` start it; the shards are shared among the
processes. The same command goes on where an interrupted one stopped, and checks what is there by its checksum; run
after the end, it only checks.
"""

import argparse
import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path

import datasets
import diffusers
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from diffusers import AutoModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_dod.autoencoding import encode_posterior, vae_spatial_factor
from diffusers_dod.fingerprints import json_sha256, weights_sha256
from diffusers_dod.image_data import collate_images, inspect_images, load_labelled_images
from diffusers_dod.latent_cache_writing import DTYPES, LatentCacheWriter, cache_settings
from diffusers_dod.process_group import drain_process_group
from diffusers_dod.repa import REPAEncoder


class BadInput(Exception):
    """Something that the user must change; printed as one line."""


class OwnBadInput(BadInput):
    """One that only this process met, so that it has to tell."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="folder with a subfolder a class, or one that `datasets.save_to_disk` wrote")
    add("--dataset_name", help="dataset of the Hub, its `train` split")
    add("--dataset_config_name")
    add("--image_column", default="image")
    add("--label_column", default="label")
    add("--cache_dir", help="where downloads and prepared data are kept")
    add("--resolution", type=positive, default=256, help="side of the square images, by ADM's centre crop")
    add("--flips", action="store_true", help="cache the mirror images too: twice the size")
    add("--on_broken_image", choices=("skip", "stop"), default="stop", help="an image that cannot be read")
    add("--dataloader_num_workers", type=int, default=0)
    add = parser.add_argument_group("encoding").add_argument
    add("--vae_name_or_path", required=True, help="autoencoder of diffusers")
    add("--vae_subfolder")
    add("--batch_size", type=positive, default=16, help="images a process")
    add(
        "--repa_encoder",
        help="vision model of transformers whose patch features are cached too, the size of many latents",
    )
    add("--patch_size", type=positive, default=2, help="of the transformer, to whose tokens the features belong")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True)
    add("--dtype", choices=tuple(DTYPES), default="float16", help="of the stored numbers")
    add("--shard_size", type=positive, default=2048, help="images a shard, the most that an interruption loses")
    args = parser.parse_args(argv)
    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise BadInput("give either --train_data_dir or --dataset_name")
    if args.train_data_dir is not None:
        args.train_data_dir = os.path.abspath(args.train_data_dir)
    return args


def load_images(
    args: argparse.Namespace, accelerator: Accelerator
) -> tuple[datasets.Dataset, list[int], list[str] | None]:
    """The images, the rows of those that can be read, and the names of the classes."""
    try:
        with accelerator.main_process_first():
            data, class_names = load_labelled_images(
                *(args.train_data_dir, args.dataset_name, args.dataset_config_name),
                *(args.image_column, args.label_column, args.cache_dir),
            )
    except ValueError as error:
        raise BadInput(str(error)) from error
    share = data.shard(accelerator.num_processes, accelerator.process_index, contiguous=True)
    problems = gather_object(inspect_images(share, args.dataloader_num_workers)["problem"][:])
    broken = [problem for problem in problems if problem]
    if broken and (args.on_broken_image == "stop" or len(broken) == len(problems)):
        skip = "pass --on_broken_image skip to cache the others"
        raise BadInput(f"{len(broken)} of {len(problems)} images cannot be read, the first is {broken[0]}: {skip}")
    if broken and accelerator.is_main_process:
        print("\n  ".join([f"Skipped {len(broken)} images:", *broken]), file=sys.stderr)
    return data, [row for row, problem in enumerate(problems) if not problem], class_names


def image_names(data: datasets.Dataset, folder: str | None) -> list[str]:
    """The file of every row, relative to the data's folder; the row's number where there is no file."""
    paths = data.flatten().select_columns("image.path")["image.path"]
    names = [path if path is None or folder is None else os.path.relpath(path, folder) for path in paths]
    return [str(row) if name is None else Path(name).as_posix() for row, name in enumerate(names)]


def load_pretrained(loader: type, path: str, **kwargs):
    try:
        return loader.from_pretrained(path, **kwargs)
    except Exception as error:  # missing, private, offline, another class: the libraries raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{path} cannot be loaded: {reason}") from error


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # The slowest process may be hours behind at the end.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])

    # 1. Images and models
    data, rows, class_names = load_images(args, accelerator)
    every_name, every_label = image_names(data, args.train_data_dir), data["label"][:]
    names, labels = [every_name[row] for row in rows], [every_label[row] for row in rows]
    vae = load_pretrained(
        *(AutoModel, args.vae_name_or_path),
        **{"subfolder": args.vae_subfolder, "cache_dir": args.cache_dir, "torch_dtype": torch.float32},
    )
    vae.requires_grad_(False).eval().to(accelerator.device)
    factor = vae_spatial_factor(vae)
    encoder, features, multiple = None, None, factor
    if args.repa_encoder is not None:
        encoder = load_pretrained(REPAEncoder, args.repa_encoder, cache_dir=args.cache_dir).to(accelerator.device)
        multiple *= args.patch_size
        grid = [args.resolution // multiple] * 2
        features = {"encoder_class": type(encoder.model).__name__, "encoder_weights_sha256": weights_sha256(encoder)}
        features |= {"grid": grid, "width": encoder.width}
    if args.resolution % multiple:
        raise BadInput(f"--resolution {args.resolution} must be a multiple of {multiple}")

    # 2. The cache, new or to be gone on with; nothing was written until here
    settings = cache_settings(
        *(vae, args.resolution, names, labels, class_names),
        **{"flips": args.flips, "dtype": args.dtype, "shard_size": args.shard_size, "features": features},
    )
    vae_config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    origin = {"vae_name_or_path": args.vae_name_or_path, "vae_subfolder": args.vae_subfolder}
    origin |= {"vae_config_sha256": json_sha256(vae_config), "repa_encoder": args.repa_encoder}
    origin |= {"versions": {module.__name__: module.__version__ for module in (diffusers, torch)}}
    try:
        writer = LatentCacheWriter(args.output_dir, settings, origin)
    except ValueError as error:
        raise BadInput(str(error)) from error
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
            raise OwnBadInput(str(error)) from error
    progress.close()

    # 4. The manifest
    found.update(gather_object(written))
    if accelerator.is_main_process:
        writer.finish(list(found.values()))
        print(f"{args.output_dir} holds the latents of {len(rows)} images in {len(found)} shards.")
    drain_process_group()
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OwnBadInput):
            print(f"cache_latents.py: error: {error}", file=sys.stderr)
        sys.exit(2)
