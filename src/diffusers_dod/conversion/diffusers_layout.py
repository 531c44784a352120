"""The layout of diffusers' `DiTTransformer2DModel`, whose weights are those of the original DiT.

The class computes a little differently from the model that was trained: the timestep's frequencies fall to 1/10000 over 127
instead of 128 channels, and the epsilon of the feed-forward's norm is 1e-5 instead of 1e-6. The converted model is as trained.
"""

from typing import Any

import torch

from .shapes import (
    DIT_SWITCHES,
    check_in_channels,
    mlp_ratio,
    output_channels,
    patch_rows,
    read_heads,
    take_embeddings,
)
from .tensors import CheckpointTensors


def convert_diffusers_dit(
    tensors: CheckpointTensors, num_attention_heads: int | None, in_channels: int | None
) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """diffusers' `DiTTransformer2DModel`, where every block holds a copy of the timestep and class embedding."""
    # 1. Sizes
    embedding = "transformer_blocks.{}.norm1.emb."
    time = tuple(f"{embedding}timestep_embedder.linear_{i}" for i in (1, 2))
    classes = f"{embedding}class_embedder.embedding_table.weight"
    (width,) = tensors.shape(f"{time[1].format(0)}.bias", 1)
    heads = read_heads(width, num_attention_heads, has_rope=False)
    class_rows, _ = tensors.shape(classes.format(0), 2)
    (output_rows,) = tensors.shape("proj_out_2.bias", 1)
    _, found_channels, patch_size, _ = tensors.shape("pos_embed.proj.weight", 4)
    if in_channels is not None:
        check_in_channels(found_channels, in_channels)
    in_channels = found_channels
    (hidden,) = tensors.shape("transformer_blocks.0.ff.net.0.proj.bias", 1)
    num_layers = tensors.count_blocks("transformer_blocks")
    config = {
        **DIT_SWITCHES,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "out_channels": output_channels(output_rows, patch_size, in_channels),
        "num_layers": num_layers,
        **heads,
        "num_classes": class_rows - 1,
        "activation_fn": "gelu-approximate",
        "mlp_ratio": mlp_ratio(width, hidden, "gelu-approximate"),
        "adaln_type": "full",
        "prediction_type": "epsilon",
    }

    # 2. Blocks and embeddings
    state: dict[str, torch.Tensor] = {}
    differing: list[str] = []
    for i in range(num_layers):
        block = f"transformer_blocks.{i}"
        names = (time[0].format(i), time[1].format(i))
        embeddings = take_embeddings(tensors, names, classes.format(i), width, class_rows)
        for name, tensor in embeddings.items():
            known = state.setdefault(name, tensor)
            if not known.is_meta and not tensor.is_meta and not torch.equal(known, tensor):
                differing.append(f"{name} of block {i}")
        state |= tensors.take_linear(f"{block}.norm1.linear", 6 * width, width, f"{block}.adaln")
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            state |= tensors.take_linear(f"{block}.attn1.{name}", width, width, f"{block}.attn.{name}")
        state |= tensors.take_linear(f"{block}.ff.net.0.proj", hidden, width, f"{block}.ff.net.0.proj")
        state |= tensors.take_linear(f"{block}.ff.net.2", width, hidden, f"{block}.ff.net.2")
    if differing:
        raise ValueError(
            f"the blocks' timestep and class embeddings differ ({', '.join(differing[:10])}), but DoD has one for all."
        )

    # 3. Input and output
    patch_shape = (in_channels, patch_size, patch_size)
    state["patch_embed.weight"] = tensors.take("pos_embed.proj.weight", width, *patch_shape).flatten(1)
    state["patch_embed.bias"] = tensors.take("pos_embed.proj.bias", width)
    state |= tensors.take_linear("proj_out_1", 2 * width, width, "adaln_out")
    output = tensors.take_linear("proj_out_2", output_rows, width, "proj_out")
    state |= {name: patch_rows(tensor, patch_size) for name, tensor in output.items()}
    notes = []
    if config["out_channels"] != in_channels:
        notes.append("learned sigma, kept: schedulers without a learned variance ignore it")
    return state, config, notes
