"""Autoencoders in latent diffusion's layout (Rombach et al. 2022, arXiv 2112.10752) as diffusers' `AutoencoderKL`.

Those of LightningDiT (VA-VAE: Yao et al. 2025, arXiv 2501.01423) and of REPA-E (Leng et al. 2025, arXiv 2504.10483) are such.
Their latents are normalised with a mean and a deviation for each channel, which become `latents_mean` and `latents_std`.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL

from .tensors import CheckpointTensors, find_state_dict


# Of a training checkpoint, what is no part of the autoencoder: its loss, VA-VAE's foundation model and projection to it
TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.")
# From the original names to diffusers'. Its own `convert_ldm_vae_checkpoint` knows attention in the middle only, and neither names
# what it does not know nor what is missing.
RENAMES = (
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"(_blocks\.\d+)\.block\.", r"\1.resnets."),
    (r"(_blocks\.\d+)\.attn\.", r"\1.attentions."),
    (r"(_blocks\.\d+)\.(down|up)sample\.", r"\1.\2samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
)


def read_latents_stats(checkpoint: Mapping[str, Any]) -> dict[str, list[float]]:
    """`latents_mean` and `latents_std` from a file of LightningDiT (`mean`, `std`) or REPA-E (`latents_bias`, `latents_scale`).

    Raises:
        ValueError: if it has neither, or numbers that are not finite.
    """
    if isinstance(checkpoint, Mapping) and {"mean", "std"} <= checkpoint.keys():
        mean, std = checkpoint["mean"], checkpoint["std"]
    elif isinstance(checkpoint, Mapping) and {"latents_bias", "latents_scale"} <= checkpoint.keys():
        mean, std = checkpoint["latents_bias"], 1 / checkpoint["latents_scale"]
    else:
        raise ValueError("it has neither mean and std (LightningDiT) nor latents_bias and latents_scale (REPA-E).")
    if not torch.isfinite(mean).all() or not torch.isfinite(std).all() or (std <= 0).any():
        raise ValueError("it has statistics that are not finite or deviations that are not above 0.")
    return {"latents_mean": mean.flatten().tolist(), "latents_std": std.flatten().tolist()}


def check_latents_stats(latents_stats: Mapping[str, list[float]], channels: int) -> None:
    """Refuses statistics of another number of channels."""
    for name, values in latents_stats.items():
        if len(values) != channels:
            raise ValueError(f"{name} has {len(values)} numbers, but the autoencoder has {channels} channels.")


def _infer_config(tensors: CheckpointTensors) -> dict[str, Any]:
    levels = {name.split(".")[2] for name in tensors.left if name.startswith("encoder.down.")}
    channels, types = [], []
    for level in (f"encoder.down.{i}" for i in range(max(1, len(levels)))):
        channels.append(tensors.shape(f"{level}.block.0.conv1.weight", 4)[0])
        types.append("Attn" if any(name.startswith(f"{level}.attn.") for name in tensors.left) else "")
    blocks = {name.split(".")[4] for name in tensors.left if name.startswith("encoder.down.0.block.")}
    return {
        "block_out_channels": channels,
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in types],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(types)],
        "layers_per_block": len(blocks),
        "latent_channels": tensors.shape("decoder.conv_in.weight", 4)[1],
        "in_channels": tensors.shape("encoder.conv_in.weight", 4)[1],
        "out_channels": tensors.shape("decoder.conv_out.weight", 4)[0],
    }


def _rename(name: str, num_levels: int) -> str:
    """diffusers' name; it counts the decoder's levels from the lowest resolution up."""
    name = re.sub(r"^decoder\.up\.(\d+)", lambda level: f"decoder.up_blocks.{num_levels - 1 - int(level[1])}", name)
    for old, new in RENAMES:
        name = re.sub(old, new, name)
    return name


def convert_autoencoder(
    checkpoint: Mapping[str, Any], latents_stats: Mapping[str, list[float]], latent_size: int
) -> AutoencoderKL:
    """diffusers' `AutoencoderKL` with the weights of a checkpoint in latent diffusion's layout.

    Args:
        checkpoint (`dict`): the original names to the weights, or a training checkpoint that [`find_state_dict`] opens.
        latents_stats (`dict`): `latents_mean` and `latents_std`, one number per channel of the latents.
        latent_size (`int`): height and width of the latents of the images that it is for.

    Returns:
        `AutoencoderKL`: in float32, on the CPU, in eval mode.

    Raises:
        ValueError: with the list, if a tensor is missing, left over, of the wrong shape or not finite; if the statistics are
            of another number of channels.
    """
    tensors, _ = find_state_dict(checkpoint, ("decoder.conv_out.bias",), TRAINING_ONLY)
    config = _infer_config(CheckpointTensors(tensors))
    num_levels = len(config["block_out_channels"])

    renamed = {_rename(name, num_levels): tensor for name, tensor in tensors.items()}
    for name, tensor in renamed.items():
        if ".attentions." in name and tensor.shape[2:] == (1, 1):
            renamed[name] = tensor.flatten(1)  # a convolution of one pixel, a linear layer in diffusers
    with torch.device("meta"):
        sample_size = latent_size * 2 ** (num_levels - 1)
        model = AutoencoderKL(**config, **latents_stats, scaling_factor=1.0, sample_size=sample_size)
    taken = CheckpointTensors(renamed)
    state = {name: taken.take(name, *tensor.shape) for name, tensor in model.state_dict().items()}
    taken.check(
        f"an autoencoder of {num_levels} levels with {config['latent_channels']} channels, in diffusers' names"
    )
    check_latents_stats(latents_stats, config["latent_channels"])
    model.load_state_dict(state, assign=True)
    return model.eval()
