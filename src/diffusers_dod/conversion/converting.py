"""From a public checkpoint's file to the folder of a DoD pipeline."""

import argparse
import os
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel, DDIMScheduler, FlowMatchEulerDiscreteScheduler, ModelMixin

from ..autoencoding import vae_latent_channels
from ..cli import BadInput, bad_input
from ..latent_embedder_dod import DoDLatentEmbedder
from ..pipeline_dod import DoDPipeline
from ..presets import PRESETS, nearest_preset
from ..repository import write_blocks
from ..tensor_files import load_tensors
from ..transformer_dod import DoDTransformer2DModel
from .autoencoders import check_latents_stats, convert_autoencoder, read_latents_stats
from .backbones import convert_checkpoint
from .loading import check_dit_config, load_folder


# What not every source's tensors determine, and a diffusers folder's config holds
SIZE_OPTIONS = ("num_attention_heads", "sample_size", "in_channels")
# LightningDiT's commands sample at times t = 0.3 s / (1 - 0.7 s) for even steps s from noise (0) to data (1).
LIGHTNINGDIT_SHIFT = 1 / 0.3


def imagenet_labels() -> dict[int, str]:
    """ImageNet's class ids and names; the file names its source."""
    lines = files(__package__).joinpath("imagenet_labels.txt").read_text().splitlines()
    return dict(enumerate(line for line in lines if not line.startswith("#")))


def make_embedder(transformer: DoDTransformer2DModel, preset: str) -> DoDLatentEmbedder:
    """A fresh embedder of the preset's size that fits the transformer; its output is zero."""
    config = transformer.config
    return DoDLatentEmbedder(
        **PRESETS[preset].latent_embedder
        | {
            "sample_size": config.sample_size,
            "patch_size": config.patch_size,
            "in_channels": config.in_channels,
            "output_dim": transformer.inner_dim,
        }
    )


def make_scheduler(transformer: DoDTransformer2DModel, source: str) -> FlowMatchEulerDiscreteScheduler | DDIMScheduler:
    """The scheduler that reads the transformer's prediction, with even steps in the source's own time where it has one;
    DDIM with the noise that DiT was trained with."""
    if transformer.config.prediction_type != "flow":
        return DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    shift = LIGHTNINGDIT_SHIFT if source == "lightningdit" else transformer.config.noise_scale
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def make_vae(
    args: argparse.Namespace, checkpoint: Mapping[str, Any], latents_stats: dict[str, list[float]], latent_size: int
) -> ModelMixin | None:
    """The autoencoder of `--vae`, else that within REPA-E's checkpoint, with the statistics that the model takes."""
    if args.latents_stats is not None:
        with bad_input(ValueError, what=str(args.latents_stats)):
            latents_stats = read_latents_stats(load_tensors(args.latents_stats))
    if args.vae is None and "vae" not in checkpoint:
        if args.latents_stats is not None:
            raise BadInput("--latents_stats are an autoencoder's: give --vae.")
        return None
    if args.vae is not None and not Path(args.vae).is_file():
        # Missing, private, offline, another class: the libraries raise many kinds.
        with bad_input(Exception, what=f"{args.vae} cannot be loaded as an autoencoder"):
            vae = AutoModel.from_pretrained(args.vae, subfolder=args.vae_subfolder)
        if args.latents_stats is not None or (latents_stats and vae.config.get("latents_mean") is None):
            with bad_input(ValueError, what=args.vae):
                check_latents_stats(latents_stats, vae_latent_channels(vae))
            vae.register_to_config(**latents_stats, scaling_factor=1.0)
        return vae
    if not latents_stats:
        raise BadInput(f"{args.vae} has no statistics of its latents: give the file of them as --latents_stats.")
    tensors = checkpoint["vae"] if args.vae is None else load_tensors(Path(args.vae))
    with bad_input(ValueError, what=str(args.checkpoint if args.vae is None else args.vae)):
        return convert_autoencoder(tensors, latents_stats, latent_size)


def save_pipeline(pipeline: DoDPipeline, output: Path) -> None:
    """Saves under another name first, so that `output` is whole or absent."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_name(f".{output.name}-{os.getpid()}")
        partial.mkdir()  # with the rights that the user's umask gives, unlike a folder of tempfile
    except OSError as error:
        raise BadInput(f"{output} cannot be written: {error}.") from error
    try:
        pipeline.save_pretrained(partial)
        write_blocks(partial, place=output)
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial)
        raise


def describe(transformer: DoDTransformer2DModel, source: str, notes: list[str]) -> list[str]:
    """What was recognised, as lines to print."""
    config = transformer.config
    sincos = f"sine-cosine positions of a {config.base_size}x{config.base_size} grid"
    positions = {"rope": "2D rotary positions", "sincos": sincos, "rope_sincos": f"2D rotary and {sincos}"}
    modulation = "full modulation" if config.adaln_type == "full" else f"modulation of rank {config.adaln_rank}"
    millions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e6
    return [
        f"{source}: {millions:.1f} M parameters, patch {config.patch_size}, width {transformer.inner_dim}, "
        f"{config.num_layers} blocks, {config.num_attention_heads} heads, {config.num_classes} classes",
        f"{config.activation_fn} feed-forward, {positions[config.pos_embed_type]}, {modulation}, predicts {config.prediction_type}",
        *notes,
    ]


def convert(args: argparse.Namespace) -> None:
    """What `diffusers-dod convert` does; `args` are its options."""
    output = args.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise BadInput(f"{output} exists already: choose another folder.")
    options = {name: getattr(args, name) for name in SIZE_OPTIONS if getattr(args, name) is not None}

    # 1. The checkpoint
    if not args.checkpoint.is_dir():
        checkpoint = load_tensors(args.checkpoint)
    elif args.source != "dit":
        raise BadInput(f"{args.checkpoint} is a folder: only dit reads diffusers folders, give the checkpoint's file.")
    else:
        checkpoint, config = load_folder(args.checkpoint)
        check_dit_config(config)
        if options:
            raise BadInput(f"--{' and --'.join(options)} cannot be given: a diffusers folder's config.json holds it.")
        options = {name: config[name] for name in SIZE_OPTIONS if name in config}

    # 2. The transformer
    with bad_input(ValueError, what=str(args.checkpoint)):
        transformer, notes, latents_stats = convert_checkpoint(
            checkpoint, args.source, noise_scale=args.noise_scale, **options
        )
    for line in describe(transformer, args.source, notes):
        print(line)

    # 3. What a pipeline has besides
    preset = args.embedder_preset or nearest_preset(transformer.inner_dim)
    torch.manual_seed(0)  # the same folder every time
    embedder, scheduler = make_embedder(transformer, preset), make_scheduler(transformer, args.source)
    vae = make_vae(args, checkpoint, latents_stats, transformer.config.sample_size)
    labels = imagenet_labels()
    id2label = labels if transformer.config.num_classes == len(labels) else None
    with bad_input(ValueError):
        pipeline = DoDPipeline(transformer, embedder, scheduler, vae, id2label)

    # 4. The folder
    save_pipeline(pipeline, output)
    print(
        f"{output}: with {type(scheduler).__name__}, the {preset} embedder, "
        f"{'no autoencoder' if vae is None else type(vae).__name__} and "
        f"{'no label names' if id2label is None else 'the label names of ImageNet'}"
    )
