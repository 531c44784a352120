"""What a DiT's size follows from, and the parts that every layout has."""

import math

import torch

from .tensors import CheckpointTensors


# Width to heads, on which DiT, SiT, REPA, FiTv2, LightningDiT and JiT agree
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1536: 24, 1792: 28, 2304: 24}
DIT_SWITCHES = {"pos_embed_type": "sincos", "qk_norm": None}


def mlp_ratio(width: int, hidden: int, activation_fn: str) -> float:
    """The ratio that makes a feed-forward of `hidden` channels (of which SwiGLU's constructor cuts a third)."""
    if activation_fn == "swiglu" and int(width * 4.0) * 2 // 3 == hidden:
        return 4.0
    uncut = hidden if activation_fn != "swiglu" else math.ceil(hidden * 3 / 2)
    # The half keeps the constructor's rounding down from losing one.
    return uncut / width if uncut % width == 0 else (uncut + 0.5) / width


def output_channels(rows: int, patch_size: int, in_channels: int) -> int:
    for channels in (in_channels, 2 * in_channels):
        if rows == channels * patch_size**2:
            return channels
    raise ValueError(
        f"the output layer has {rows} rows, which is neither {in_channels} channels nor twice as many (learned sigma) "
        f"in patches of {patch_size}: check `in_channels`."
    )


def check_in_channels(found: int, in_channels: int) -> None:
    if found != in_channels:
        raise ValueError(f"the checkpoint takes {found} channels, not {in_channels}: check `in_channels`.")


def read_heads(width: int, num_attention_heads: int | None, has_rope: bool) -> dict[str, int]:
    if num_attention_heads is None:
        if width not in PUBLISHED_HEADS:
            raise ValueError(f"no published model has a width of {width}, so give its `num_attention_heads`.")
        num_attention_heads = PUBLISHED_HEADS[width]
    if num_attention_heads < 1 or width % num_attention_heads:
        raise ValueError(f"a width of {width} cannot be cut into {num_attention_heads} heads.")
    if has_rope and width // num_attention_heads % 4:
        raise ValueError(
            f"{num_attention_heads} heads of a width of {width} have {width // num_attention_heads} channels, which is "
            "no multiple of 4 as 2D rotary positions need: check `num_attention_heads`."
        )
    return {"num_attention_heads": num_attention_heads, "attention_head_dim": width // num_attention_heads}


def patch_rows(tensor: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Output rows from DiT's order, channels fastest within a patch, to ours, channels slowest."""
    rows = tensor.unflatten(0, (patch_size, patch_size, -1))
    return rows.movedim(2, 0).flatten(0, 2)


def take_embeddings(tensors: CheckpointTensors, time: tuple[str, str], classes: str, width: int, rows: int) -> dict:
    return {
        **tensors.take_linear(time[0], width, 256, "time_embed.linear_1"),
        **tensors.take_linear(time[1], width, width, "time_embed.linear_2"),
        "class_embed.weight": tensors.take(classes, rows, width),
    }
