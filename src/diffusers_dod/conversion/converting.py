"""From a public checkpoint's file to the folder of a DoD pipeline."""

import argparse
import json
import os
import pickle
import shutil
import warnings
import zipfile
from importlib.resources import files
from pathlib import Path

import torch
from diffusers import AutoModel, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..cli import BadInput, bad_input, first_line
from ..latent_embedder_dod import DoDLatentEmbedder
from ..pipeline_dod import DoDPipeline
from ..presets import PRESETS
from ..transformer_dod import DoDTransformer2DModel
from .backbones import convert_checkpoint


# What no tensor of every source tells
SIZE_OPTIONS = ("num_attention_heads", "sample_size", "in_channels")


def imagenet_labels() -> dict[int, str]:
    """ImageNet's class ids and names; the file names its source."""
    lines = files(__package__).joinpath("imagenet_labels.txt").read_text().splitlines()
    return dict(enumerate(line for line in lines if not line.startswith("#")))


def load_tensors(path: Path) -> dict:
    """Reads a checkpoint without ever running code that it holds.

    Args:
        path (`Path`): `.safetensors`, or a file of `torch.save` (`.pt`, `.pth`, `.bin`, `.ckpt`).

    Raises:
        BadInput: if it cannot be read, or only by running its code.
    """
    try:
        # FiT's own loader says that some files called .safetensors were written by torch.save.
        if path.suffix == ".safetensors" and not zipfile.is_zipfile(path):
            return load_file(path)
        # The training scripts of DiT, SiT and REPA save their command line along; a Namespace runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle that torch did not write, which fails below or loads whole
            with path.open("rb") as file:  # of a path torch would believe the suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadInput(
            f"{path} is broken or holds other objects than tensors, which are not loaded because that can run code: "
            "save its state dict alone, best as .safetensors."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, SafetensorError) as error:
        raise BadInput(f"{path} cannot be read: {first_line(error)}") from error


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is missing or no JSON, so this is no model that diffusers saved.") from error


def load_folder(folder: Path) -> tuple[dict, dict]:
    """Weights and config of a `DiTTransformer2DModel` that diffusers saved, alone or in a pipeline's folder."""
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    config = read_json(folder / "config.json")
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            tensors: dict[str, torch.Tensor] = {}
            for shard in sorted(set(read_json(index)["weight_map"].values())):
                tensors |= load_tensors(folder / shard)
            return tensors, config
        if (folder / name).is_file():
            return load_tensors(folder / name), config
    raise BadInput(f"{folder} has no diffusion_pytorch_model.safetensors or .bin.")


def check_dit_config(config: dict) -> None:
    """Refuses a `DiTTransformer2DModel` that differs from the published ones in what no tensor tells."""
    published = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_eps": 1e-5}
    differing = [
        f"{key} is {config[key]}, not {value}" for key, value in published.items() if config.get(key, value) != value
    ]
    if differing:
        raise BadInput(f"the model's config.json differs from DiT's: {', '.join(differing)}.")


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


def make_scheduler(transformer: DoDTransformer2DModel) -> FlowMatchEulerDiscreteScheduler | DDIMScheduler:
    """The scheduler that reads the transformer's prediction; DDIM with the noise that DiT was trained with."""
    if transformer.config.prediction_type == "flow":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)


def nearest_preset(width: int) -> str:
    """The preset whose transformer's width is nearest."""
    return min(PRESETS, key=lambda name: abs(PRESETS[name].latent_embedder["output_dim"] - width))


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
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial)
        raise


def describe(transformer: DoDTransformer2DModel, source: str, notes: list[str]) -> list[str]:
    """What was recognised, as lines to print."""
    config = transformer.config
    positions = "2D rotary positions"
    if config.pos_embed_type == "sincos":
        positions = f"sine-cosine positions of a {config.base_size}x{config.base_size} grid"
    modulation = "full modulation" if config.adaln_type == "full" else f"modulation of rank {config.adaln_rank}"
    millions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e6
    return [
        f"{source}: {millions:.1f} M parameters, patch {config.patch_size}, width {transformer.inner_dim}, "
        f"{config.num_layers} blocks, {config.num_attention_heads} heads, {config.num_classes} classes",
        f"{config.activation_fn} feed-forward, {positions}, {modulation}, predicts {config.prediction_type}",
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
        tensors = load_tensors(args.checkpoint)
    elif args.source != "diffusers-dit":
        raise BadInput(f"{args.checkpoint} is a folder: only diffusers-dit reads folders, give the checkpoint's file.")
    else:
        tensors, config = load_folder(args.checkpoint)
        check_dit_config(config)
        if options:
            raise BadInput(f"--{' and --'.join(options)} cannot be given: a diffusers folder's config.json says it.")
        options = {name: config[name] for name in SIZE_OPTIONS if name in config}

    # 2. The transformer
    with bad_input(ValueError, what=str(args.checkpoint)):
        transformer, notes = convert_checkpoint(tensors, args.source, **options)
    for line in describe(transformer, args.source, notes):
        print(line)

    # 3. What a pipeline has besides
    preset = args.embedder_preset or nearest_preset(transformer.inner_dim)
    torch.manual_seed(0)  # the same folder every time
    embedder, scheduler, vae = make_embedder(transformer, preset), make_scheduler(transformer), None
    if args.vae is not None:
        # Missing, private, offline, another class: the libraries raise many kinds.
        with bad_input(Exception, what=f"{args.vae} cannot be loaded as an autoencoder"):
            vae = AutoModel.from_pretrained(args.vae, subfolder=args.vae_subfolder)
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
