"""Public DiT-family checkpoints to the DoD backbone: stage 1 of the converted model is the checkpoint.

The layouts are those of the models' own repositories: SiT (Ma et al. 2024, arXiv 2401.08740, github.com/willisma/SiT),
REPA's SiT (Yu et al. 2024, arXiv 2410.06940, github.com/sihyun-yu/REPA), DiT (Peebles & Xie 2022, arXiv 2212.09748,
github.com/facebookresearch/DiT), FiTv2 (Wang et al. 2024, arXiv 2410.13925, github.com/whlzy/FiT), and diffusers'
`DiTTransformer2DModel`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..arguments import check_choice, check_count
from ..layers import sincos_embedding_2d
from ..transformer_dod import DoDTransformer2DModel
from .sources import SOURCES
from .tensors import CheckpointTensors, find_state_dict


# SiT and FiTv2 count time from noise (0) to data (1) and predict `data - noise`, diffusers' flow models the mirror image.
MIRRORED_TIME = {"timestep_offset": 1.0, "timestep_scale": -0.001}
# Width to heads, on which DiT, SiT, REPA and FiTv2 agree
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 2304: 24}
DIT_SWITCHES = {"pos_embed_type": "sincos", "qk_norm": None}


class ConvertedBackbone(NamedTuple):
    """
    Args:
        transformer ([`DoDTransformer2DModel`]): the model, in float32 and eval mode.
        notes (`list` of `str`): what was found in the checkpoint and does not show in the model's config.
    """

    transformer: DoDTransformer2DModel
    notes: list[str]


def _join_decoder_blocks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """REPA's first checkpoints count the blocks after the projector anew, as `decoder_blocks`."""
    decoder = "decoder_blocks."
    if not any(name.startswith(decoder) for name in tensors):
        return tensors
    encoder_depth = CheckpointTensors(tensors).count_blocks("blocks")
    joined = {}
    for name, tensor in tensors.items():
        if name.startswith(decoder):
            index, rest = name.removeprefix(decoder).split(".", 1)
            name = f"blocks.{encoder_depth + int(index)}.{rest}"
        joined[name] = tensor
    return joined


def _patch_rows(tensor: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Output rows from DiT's order, channels fastest within a patch, to ours, channels slowest."""
    rows = tensor.unflatten(0, (patch_size, patch_size, -1))
    return rows.movedim(2, 0).flatten(0, 2)


def _mlp_ratio(width: int, hidden: int, activation_fn: str) -> float:
    """The ratio that makes a feed-forward of `hidden` channels (of which SwiGLU's constructor cuts a third)."""
    if activation_fn == "swiglu" and int(width * 4.0) * 2 // 3 == hidden:
        return 4.0
    uncut = hidden if activation_fn != "swiglu" else math.ceil(hidden * 3 / 2)
    # The half keeps the constructor's rounding down from losing one.
    return uncut / width if uncut % width == 0 else (uncut + 0.5) / width


def _output_channels(rows: int, patch_size: int, in_channels: int) -> int:
    for channels in (in_channels, 2 * in_channels):
        if rows == channels * patch_size**2:
            return channels
    raise ValueError(
        f"the output layer has {rows} rows, which is neither {in_channels} channels nor twice as many (learned sigma) "
        f"in patches of {patch_size}: check `in_channels`."
    )


def _check_in_channels(found: int, in_channels: int) -> None:
    if found != in_channels:
        raise ValueError(f"the checkpoint takes {found} channels, not {in_channels}: check `in_channels`.")


def _heads(width: int, num_attention_heads: int | None, has_rope: bool) -> dict[str, int]:
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


def _take_embeddings(tensors: CheckpointTensors, time: tuple[str, str], classes: str, width: int, rows: int) -> dict:
    return {
        **tensors.take_linear(time[0], width, 256, "time_embed.linear_1"),
        **tensors.take_linear(time[1], width, width, "time_embed.linear_2"),
        "class_embed.weight": tensors.take(classes, rows, width),
    }


def _read_position_table(tensors: CheckpointTensors, width: int) -> int:
    """Side of the grid of a checkpoint's fixed sine-cosine table."""
    side = math.isqrt(tensors.shape("pos_embed", 3)[1])
    precision = torch.finfo(tensors.left["pos_embed"].dtype).eps
    positions = tensors.take("pos_embed", 1, side**2, width)
    if not positions.is_meta:
        expected = sincos_embedding_2d(side, side, width, side, torch.device("cpu"))
        tolerance = max(1e-4, precision)
        if (positions[0] - expected).abs().max() > tolerance:
            raise ValueError(
                "pos_embed is not the fixed 2D sine-cosine table of SiT and DiT, so it was trained or resized."
            )
    return side


def _convert_original(
    tensors: CheckpointTensors, source: str, num_attention_heads: int | None, in_channels: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """SiT, REPA, DiT and FiTv2, which share the names of their tensors."""
    state, notes = {}, []
    is_fit = source == "fitv2"

    # 1. Sizes; biases first, because no transposed weight can hide there
    (width,) = tensors.shape("t_embedder.mlp.2.bias", 1)
    heads = _heads(width, num_attention_heads, has_rope=is_fit)
    class_rows, _ = tensors.shape("y_embedder.embedding_table.weight", 2)
    (output_rows,) = tensors.shape("final_layer.linear.bias", 1)
    num_layers = tensors.count_blocks("blocks")
    if is_fit:
        _, patch_columns = tensors.shape("x_embedder.proj.weight", 2)
        patch_size = math.isqrt(patch_columns // in_channels)
    else:
        _, found_channels, patch_size, _ = tensors.shape("x_embedder.proj.weight", 4)
        _check_in_channels(found_channels, in_channels)
    out_channels = _output_channels(output_rows, patch_size, in_channels)
    activation_fn = "swiglu" if any(".mlp.fc1_g." in name for name in tensors.left) else "gelu-approximate"
    first_layer = "fc1_g" if activation_fn == "swiglu" else "fc1"
    (hidden,) = tensors.shape(f"blocks.0.mlp.{first_layer}.bias", 1)
    config = {
        "patch_size": patch_size,
        "num_layers": num_layers,
        **heads,
        "num_classes": class_rows - 1,
        "activation_fn": activation_fn,
        "mlp_ratio": _mlp_ratio(width, hidden, activation_fn),
        "adaln_type": "full",
    }

    # 2. Embeddings
    patch_shape = (in_channels * patch_size**2,) if is_fit else (in_channels, patch_size, patch_size)
    state["patch_embed.weight"] = tensors.take("x_embedder.proj.weight", width, *patch_shape).flatten(1)
    state["patch_embed.bias"] = tensors.take("x_embedder.proj.bias", width)
    time = ("t_embedder.mlp.0", "t_embedder.mlp.2")
    state |= _take_embeddings(tensors, time, "y_embedder.embedding_table.weight", width, class_rows)
    if not is_fit:
        config |= DIT_SWITCHES
        base_size = _read_position_table(tensors, width)
        config |= {"base_size": base_size, "sample_size": base_size * patch_size}
    if any(name.startswith("global_adaLN_modulation.") for name in tensors.left):
        (adaln_rank,) = tensors.shape("blocks.0.adaLN_modulation.1.bias", 1)
        config |= {"adaln_type": "low_rank", "adaln_rank": adaln_rank}
        state |= tensors.take_linear("global_adaLN_modulation.1", 6 * width, width, "adaln_global")

    # 3. Blocks
    for i in range(num_layers):
        block, target = f"blocks.{i}", f"transformer_blocks.{i}"
        if config["adaln_type"] == "low_rank":
            state |= tensors.take_linear(f"{block}.adaLN_modulation.1", adaln_rank, width, f"{target}.adaln_down")
            state |= tensors.take_linear(f"{block}.adaLN_modulation.2", 6 * width, adaln_rank, f"{target}.adaln_up")
        else:
            state |= tensors.take_linear(f"{block}.adaLN_modulation.1", 6 * width, width, f"{target}.adaln")
        for kind, tensor in tensors.take_linear(f"{block}.attn.qkv", 3 * width, width, "qkv").items():
            for name, part in zip(("to_q", "to_k", "to_v"), tensor.chunk(3)):
                state[kind.replace("qkv", f"{target}.attn.{name}")] = part.clone()
        state |= tensors.take_linear(f"{block}.attn.proj", width, width, f"{target}.attn.to_out.0")
        if activation_fn == "swiglu":
            value = tensors.take_linear(f"{block}.mlp.fc1_x", hidden, width, "value")
            gate = tensors.take_linear(f"{block}.mlp.fc1_g", hidden, width, "gate")
            for kind in ("weight", "bias"):
                parts = [value[f"value.{kind}"], gate[f"gate.{kind}"]]
                if not any(part.is_meta for part in parts):
                    state[f"{target}.ff.net.0.proj.{kind}"] = torch.cat(parts)
        else:
            state |= tensors.take_linear(f"{block}.mlp.fc1", hidden, width, f"{target}.ff.net.0.proj")
        state |= tensors.take_linear(f"{block}.mlp.fc2", width, hidden, f"{target}.ff.net.2")

    # 4. Output, in our order of a patch's channels and in diffusers' direction of time
    state |= tensors.take_linear("final_layer.adaLN_modulation.1", 2 * width, width, "adaln_out")
    output = tensors.take_linear("final_layer.linear", output_rows, width, "proj_out")
    if not is_fit:
        output = {name: _patch_rows(tensor, patch_size) for name, tensor in output.items()}
    projectors = [name for name in tensors.left if name.startswith("projectors.")] if source == "sit" else []
    for name in projectors:
        del tensors.left[name]
    if source == "dit":
        config |= {"prediction_type": "epsilon", "out_channels": out_channels}
        if out_channels != in_channels:
            notes.append("learned sigma, kept: schedulers without a learned variance ignore it")
    elif projectors:
        config |= {"prediction_type": "flow", "timestep_scale": 0.001}
        notes.append("REPA's projectors, dropped; its time runs from data (0) to noise (1) as ours does")
    else:
        config |= {"prediction_type": "flow", **MIRRORED_TIME}
        output = {name: -tensor for name, tensor in output.items()}
    if out_channels != in_channels and source != "dit":
        if is_fit:
            raise ValueError(
                "the checkpoint has a learned sigma, so it is FiT's first version: only FiTv2 is a flow model."
            )
        output = {name: tensor[: in_channels * patch_size**2].clone() for name, tensor in output.items()}
        notes.append("learned sigma, dropped: SiT does not use it")
    return state | output, config, notes


def _convert_diffusers_dit(
    tensors: CheckpointTensors, num_attention_heads: int | None, in_channels: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """diffusers' `DiTTransformer2DModel`, where every block holds a copy of the timestep and class embedding."""
    # 1. Sizes
    embedding = "transformer_blocks.{}.norm1.emb."
    time = tuple(f"{embedding}timestep_embedder.linear_{i}" for i in (1, 2))
    classes = f"{embedding}class_embedder.embedding_table.weight"
    (width,) = tensors.shape(f"{time[1].format(0)}.bias", 1)
    heads = _heads(width, num_attention_heads, has_rope=False)
    class_rows, _ = tensors.shape(classes.format(0), 2)
    (output_rows,) = tensors.shape("proj_out_2.bias", 1)
    _, found_channels, patch_size, _ = tensors.shape("pos_embed.proj.weight", 4)
    _check_in_channels(found_channels, in_channels)
    (hidden,) = tensors.shape("transformer_blocks.0.ff.net.0.proj.bias", 1)
    num_layers = tensors.count_blocks("transformer_blocks")
    config = {
        **DIT_SWITCHES,
        "patch_size": patch_size,
        "out_channels": _output_channels(output_rows, patch_size, in_channels),
        "num_layers": num_layers,
        **heads,
        "num_classes": class_rows - 1,
        "activation_fn": "gelu-approximate",
        "mlp_ratio": _mlp_ratio(width, hidden, "gelu-approximate"),
        "adaln_type": "full",
        "prediction_type": "epsilon",
        # Where diffusers' class departs from the original DiT
        "freq_shift": 1,
        "ff_norm_eps": 1e-5,
    }

    # 2. Blocks and embeddings
    state: dict[str, torch.Tensor] = {}
    differing: list[str] = []
    for i in range(num_layers):
        block = f"transformer_blocks.{i}"
        names = (time[0].format(i), time[1].format(i))
        embeddings = _take_embeddings(tensors, names, classes.format(i), width, class_rows)
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
    state |= {name: _patch_rows(tensor, patch_size) for name, tensor in output.items()}
    notes = []
    if config["out_channels"] != in_channels:
        notes.append("learned sigma, kept: schedulers without a learned variance ignore it")
    return state, config, notes


def convert_checkpoint(
    state_dict: Mapping[str, Any],
    source: str,
    *,
    num_attention_heads: int | None = None,
    sample_size: int | None = None,
    in_channels: int = 4,
) -> ConvertedBackbone:
    """[`convert_backbone`] with notes on what was found, and by default the published head count of the width."""
    check_choice("source", source, SOURCES)
    sizes = {"num_attention_heads": num_attention_heads, "sample_size": sample_size, "in_channels": in_channels}
    for name, value in sizes.items():
        if value is not None or name == "in_channels":
            check_count(name, value)
    tensors, path = find_state_dict(state_dict)
    notes = [] if path is None else [f"nested under {path!r}"]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} - {"float32"})
    if dtypes:
        notes.append(f"{' and '.join(dtypes)} weights, made float32")

    taken = CheckpointTensors(_join_decoder_blocks(tensors) if source == "sit" else tensors)
    if source == "diffusers-dit":
        state, config, found = _convert_diffusers_dit(taken, num_attention_heads, in_channels)
        config["base_size"] = (32 if sample_size is None else sample_size) // config["patch_size"]
    else:
        state, config, found = _convert_original(taken, source, num_attention_heads, in_channels)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    taken.check(f"{source} of width {width} with {config['num_layers']} blocks")

    if sample_size is not None:
        config["sample_size"] = sample_size
    # Without memory, because every weight is about to be replaced
    with torch.device("meta"):
        model = DoDTransformer2DModel(in_channels=in_channels, **config)
    model.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()}, assign=True)
    return ConvertedBackbone(model.eval(), notes + found)


def convert_backbone(
    state_dict: Mapping[str, Any],
    source: str,
    *,
    num_attention_heads: int,
    sample_size: int | None = None,
    in_channels: int = 4,
) -> DoDTransformer2DModel:
    r"""A DoD backbone that computes in stage 1 what the checkpoint's own model does.

    Width, depth, patch size, classes, feed-forward, modulation, learned sigma and the position table's grid are inferred from
    the tensors. What no tensor tells is taken to be as in the published models: a linear path and velocity prediction
    for SiT, REPA and FiTv2, a null class in the last row of the class table, parameter-free LayerNorm on queries and keys
    and plain rotary positions for FiTv2.

    Args:
        state_dict (`dict` of `str` to `torch.Tensor`):
            The original names to the weights, or a training checkpoint that [`find_state_dict`] opens. Left as it is.
        source (`str`):
            `"sit"`: SiT, or REPA's SiT, which is told by its projectors (without them it is taken for SiT, whose time
            runs the other way). The converted model predicts `noise - data` and takes timesteps of 1000 times the
            noise level; a learned sigma is dropped.
            `"dit"` and `"diffusers-dit"`: the original DiT and diffusers' `DiTTransformer2DModel`, which predict noise at
            timesteps 0 to 999; a learned sigma is kept as the output's second half.
            `"fitv2"`: FiTv2, as for SiT.
        num_attention_heads (`int`): Attention heads, which no tensor tells.
        sample_size (`int`, *optional*):
            Height and width of the latents to generate by default: by default those of the position table, and 32 for
            `"fitv2"` and `"diffusers-dit"`, which have none. For `"diffusers-dit"` it must be the size in the model's
            config, which its positions are interpolated to; other sources may generate another size.
        in_channels (`int`, defaults to 4): Channels of the latents.

    Returns:
        [`DoDTransformer2DModel`]: in float32, on the CPU, in eval mode.

    Raises:
        ValueError: with the list, if a tensor is missing, left over, of the wrong shape or not finite; if the heads do not
            fit the width; if diffusers' copies of the embeddings differ from block to block.
    """
    converted = convert_checkpoint(
        state_dict, source, num_attention_heads=num_attention_heads, sample_size=sample_size, in_channels=in_channels
    )
    return converted.transformer
