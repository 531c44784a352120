"""Public DiT-family checkpoints to the DoD backbone: stage 1 of the converted model is the checkpoint.

The layouts are those of the models' own repositories: SiT (Ma et al. 2024, arXiv 2401.08740, github.com/willisma/SiT),
REPA's SiT (Yu et al. 2024, arXiv 2410.06940, github.com/sihyun-yu/REPA), REPA-E's (Leng et al. 2025, arXiv 2504.10483,
github.com/End2End-Diffusion/REPA-E), DiT (Peebles & Xie 2022, arXiv 2212.09748, github.com/facebookresearch/DiT), FiTv2 (Wang
et al. 2024, arXiv 2410.13925, github.com/whlzy/FiT), LightningDiT (Yao et al. 2025, arXiv 2501.01423,
github.com/hustvl/LightningDiT), JiT (Li & He 2025, arXiv 2511.13720, github.com/LTH14/JiT), and diffusers'
`DiTTransformer2DModel`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..arguments import check_choice, check_count, check_numbers
from ..transformer_dod import DoDTransformer2DModel
from .diffusers_layout import convert_diffusers_dit
from .original_layout import convert_original, join_decoder_blocks
from .sources import SOURCES
from .tensors import CheckpointTensors, find_state_dict


# A tensor of the original layout and one of diffusers', by which a prefix of all names is found
ANCHORS = ("t_embedder.mlp.2.bias", "proj_out_2.bias")


class ConvertedBackbone(NamedTuple):
    """
    Args:
        transformer ([`DoDTransformer2DModel`]): the model, in float32 and eval mode.
        notes (`list` of `str`): what was found in the checkpoint and does not show in the model's config.
        latents_stats (`dict` of `str` to `list`):
            `latents_mean` and `latents_std` of the autoencoder, by which REPA-E normalises its latents; else empty.
    """

    transformer: DoDTransformer2DModel
    notes: list[str]
    latents_stats: dict[str, list[float]]


def convert_checkpoint(
    state_dict: Mapping[str, Any],
    source: str,
    *,
    num_attention_heads: int | None = None,
    sample_size: int | None = None,
    in_channels: int | None = None,
    noise_scale: float | None = None,
) -> ConvertedBackbone:
    """[`convert_backbone`] that also returns notes on the checkpoint and the statistics of its latents.

    The arguments are those of [`convert_backbone`], but `num_attention_heads` is by default read from rotary tables in the
    checkpoint, or else that of the published model of the same width.
    """
    check_choice("source", source, SOURCES)
    sizes = {"num_attention_heads": num_attention_heads, "sample_size": sample_size, "in_channels": in_channels}
    for name, value in sizes.items():
        if value is not None:
            check_count(name, value)
    if noise_scale is not None:
        check_numbers(0, noise_scale=noise_scale)
        if source != "jit":
            raise ValueError(f"`noise_scale` is JiT's: {source} has noise of standard deviation 1.")
    tensors, path = find_state_dict(state_dict, ANCHORS)
    notes = [] if path is None else [f"nested under {path!r}"]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} - {"float32"})
    if dtypes:
        notes.append(f"{' and '.join(dtypes)} weights, made float32")

    taken = CheckpointTensors(join_decoder_blocks(tensors) if source == "sit" else tensors)
    latents_stats: dict[str, list[float]] = {}
    if source == "dit" and any(name.startswith("transformer_blocks.") for name in tensors):
        state, config, found = convert_diffusers_dit(taken, num_attention_heads, in_channels)
        config["base_size"] = (32 if sample_size is None else sample_size) // config["patch_size"]
    else:
        state, config, latents_stats, found = convert_original(
            taken, source, num_attention_heads, in_channels, noise_scale
        )
    width = config["num_attention_heads"] * config["attention_head_dim"]
    taken.check(f"{source} of width {width} with {config['num_layers']} blocks")

    if sample_size is not None:
        config["sample_size"] = sample_size
    # Without memory, because every weight is about to be replaced
    with torch.device("meta"):
        model = DoDTransformer2DModel(**config)
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)
    return ConvertedBackbone(model.eval(), notes + found, latents_stats)


def convert_backbone(
    state_dict: Mapping[str, Any],
    source: str,
    *,
    num_attention_heads: int,
    sample_size: int | None = None,
    in_channels: int | None = None,
    noise_scale: float | None = None,
) -> DoDTransformer2DModel:
    r"""A DoD backbone that computes in stage 1 what the checkpoint's own model does.

    Width, depth, patch size, channels, classes, feed-forward, norms, modulation, learned sigma and the position table's grid
    are inferred from the tensors. What no tensor determines is taken to be as in the published models: a linear path and velocity
    prediction for SiT, REPA, FiTv2 and LightningDiT, a null class in the last row of the class table, parameter-free
    LayerNorm on queries and keys and plain rotary positions for FiTv2, class tokens from a third of the blocks on for JiT.

    Args:
        state_dict (`dict` of `str` to `torch.Tensor`):
            The original names to the weights, or a training checkpoint that [`find_state_dict`] opens. Left as it is.
        source (`str`):
            `"sit"`: SiT, or REPA's or REPA-E's SiT, which is recognised by its projectors or its batch norm (without them it is
            taken for SiT, whose time runs the other way). The converted model predicts `noise - data` and takes timesteps
            of 1000 times the noise level; a learned sigma is dropped.
            `"dit"`: the original DiT, also in diffusers' layout (`DiTTransformer2DModel`), which predicts noise at timesteps
            0 to 999; a learned sigma is kept as the output's second half.
            `"fitv2"`: FiTv2, as for SiT. `"lightningdit"`: LightningDiT, as for SiT.
            `"jit"`: JiT in pixel space, whose network's output is the clean image (`x_prediction`).
        num_attention_heads (`int`): Attention heads, which no tensor determines.
        sample_size (`int`, *optional*):
            Height and width of the latents to generate by default: by default those of the position table, and 32 for
            `"fitv2"` and diffusers' layout, which have none. For diffusers' layout it must be the size in the model's config,
            which its positions are interpolated to; other sources may generate another size.
        in_channels (`int`, *optional*):
            Channels of the latents, which are refused if they are not the checkpoint's; 4 by default for `"fitv2"`, where no
            tensor determines them.
        noise_scale (`float`, *optional*):
            Standard deviation of JiT's noise, refused for other sources; by default 1 up to 256 pixels and size / 256
            above.

    Returns:
        [`DoDTransformer2DModel`]: in float32, on the CPU, in eval mode.

    Raises:
        ValueError: with the list, if a tensor is missing, left over, of the wrong shape or not finite; if the heads do not
            fit the width; if diffusers' copies of the embeddings differ from block to block.
    """
    converted = convert_checkpoint(
        state_dict,
        source,
        num_attention_heads=num_attention_heads,
        sample_size=sample_size,
        in_channels=in_channels,
        noise_scale=noise_scale,
    )
    return converted.transformer
