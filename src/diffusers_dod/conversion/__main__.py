"""Writes a DoD pipeline folder from a public checkpoint.

    diffusers-dod convert sit SiT-XL-2-256x256.pt outputs/sit --vae stabilityai/sd-vae-ft-ema

Stage 1 of the pipeline is the checkpoint. The latent embedder's output starts at zero, so the later stages are the same
until it is trained.
"""

import argparse
import sys
from pathlib import Path

from ..cli import Parser, number, run
from ..presets import PRESETS
from .sources import SOURCES


def build_parser() -> Parser:
    parser = Parser(prog="diffusers-dod convert", description=__doc__)
    add, positive = parser.add_argument, number(int, 1)
    add("source", choices=SOURCES, help="the checkpoint's project; sit also covers REPA and REPA-E")
    add("checkpoint", type=Path, help=".pt, .pth, .bin, .ckpt or .safetensors; dit also takes a diffusers folder")
    add("output", type=Path, help="new or empty folder to write")
    heads = "attention heads; default: those of the folder's config, or of the published models of the same width"
    vae = (
        "autoencoder: a diffusers folder or Hub repository, or a VA-VAE or REPA-E file; default: REPA-E's own, or none"
    )
    add("--num_attention_heads", type=positive, help=heads)
    add("--sample_size", type=positive, help="height and width of the latents; default: the checkpoint's, or 32")
    add("--in_channels", type=positive, help="channels of the latents; default: the checkpoint's, or 4")
    add(
        "--noise_scale",
        type=number(float, 0),
        help="jit: standard deviation of the noise; default: 1 up to 256 pixels, 2 at 512",
    )
    add(
        "--embedder_preset",
        choices=PRESETS,
        help="size of the latent embedder; default: the preset with the nearest width",
    )
    add("--vae", help=vae)
    add("--vae_subfolder", help="subfolder of the autoencoder")
    add("--latents_stats", type=Path, help="LightningDiT or REPA-E file with the latents' mean and standard deviation")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    return build_parser().parse_args(argv)


def convert_file(argv: list[str]) -> None:
    args = parse_args(argv)
    from .converting import convert

    convert(args)


def main(argv: list[str] | None = None) -> int:
    return run(convert_file, "diffusers-dod convert", argv)


if __name__ == "__main__":
    sys.exit(main())
