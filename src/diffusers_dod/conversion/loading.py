"""Reads folders that diffusers saved, and refuses what this package cannot hold."""

import json
from pathlib import Path

import torch

from ..cli import BadInput
from ..tensor_files import load_tensors


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
