"""Reads checkpoints and diffusers' folders without running code that they hold."""

import argparse
import json
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..cli import BadInput, first_line


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def load_tensors(path: Path) -> dict:
    """Reads a checkpoint without ever running code that it holds.

    Args:
        path (`Path`): `.safetensors`, or a file of `torch.save` (`.pt`, `.pth`, `.bin`, `.ckpt`).

    Raises:
        BadInput: if it cannot be read, or only by running its code.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise BadInput(f"{path} is a git-lfs pointer, not the file itself: fetch that with `git lfs pull`.")
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
    """Refuses a `DiTTransformer2DModel` that differs from the published ones in what no tensor determines."""
    published = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_eps": 1e-5}
    differing = [
        f"{key} is {config[key]}, not {value}" for key, value in published.items() if config.get(key, value) != value
    ]
    if differing:
        raise BadInput(f"the model's config.json differs from DiT's: {', '.join(differing)}.")
