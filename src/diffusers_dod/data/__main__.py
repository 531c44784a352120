"""Caches the latents of labelled images, so that training needs neither the images nor the VAE's encoder.

    diffusers-dod cache --train_data_dir imagenet/train --resolution 256 --flips \\
        --vae_name_or_path stabilityai/sd-vae-ft-ema --batch_size 64 --dataloader_num_workers 8 --output_dir latents

Images come from a folder with one subfolder per class, a folder of `datasets.save_to_disk` or a Hub dataset. The cache
holds the VAE posterior's mean and standard deviation, normalized as the diffusion model sees them; training draws a
fresh sample each time (`diffusers_dod.data.CachedLatents`). `--repa_encoder` adds the features of a vision model.

With several GPUs, `accelerate launch -m diffusers_dod cache ...` shares the shards among the processes. To resume an
interrupted run, repeat the same command; it checks finished shards by their checksums.
"""

import argparse
import os
import sys

from ..cli import BadInput, Parser, number, run


def build_parser() -> Parser:
    parser = Parser(prog="diffusers-dod cache", description=__doc__)
    positive, switch = number(int, 1), argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="folder with one subfolder per class, or one that `datasets.save_to_disk` wrote")
    add("--dataset_name", help="Hub dataset; its `train` split is used")
    add("--dataset_config_name", help="configuration of that dataset")
    add("--image_column", default="image", help="column of the images")
    add("--label_column", default="label", help="column of the classes")
    add("--cache_dir", help="where downloads and prepared data are kept; default: the `datasets` cache")
    add("--resolution", type=positive, default=256, help="side in pixels, after ADM's centre crop")
    add("--flips", action=switch, default=False, help="cache the mirror images too: twice the size")
    add("--on_broken_image", choices=("skip", "stop"), default="stop", help="what to do with unreadable images")
    add("--dataloader_num_workers", type=number(int, 0), default=0, help="processes that read images")
    add = parser.add_argument_group("encoding").add_argument
    add("--vae_name_or_path", required=True, help="diffusers autoencoder")
    add("--vae_subfolder", help="subfolder of the autoencoder")
    add("--batch_size", type=positive, default=16, help="images per process")
    add("--repa_encoder", help="transformers vision model whose patch features are cached too; default: none")
    add("--patch_size", type=positive, default=2, help="transformer's patch size, for --repa_encoder's features")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, help="folder of the cache")
    add("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="type of the stored numbers")
    add("--shard_size", type=positive, default=2048, help="images per shard, the most that an interruption loses")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise BadInput("give either --train_data_dir or --dataset_name")
    if args.train_data_dir is not None:
        args.train_data_dir = os.path.abspath(args.train_data_dir)
    return args


def cache_latents(argv: list[str]) -> None:
    args = parse_args(argv)
    from .caching import cache

    cache(args)


def main(argv: list[str] | None = None) -> int:
    return run(cache_latents, "diffusers-dod cache", argv)


if __name__ == "__main__":
    sys.exit(main())
