"""The layout of DiT's own repository, which SiT, REPA, REPA-E, FiTv2, LightningDiT and JiT share but for the parts named here."""

import math
from typing import Any

import torch

from ..layers import DoDRotaryEmbedding, sincos_embedding_2d
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


State = dict[str, torch.Tensor]
Config = dict[str, Any]

# Most count time from noise (0) to data (1) and predict `data - noise`, diffusers' flow models the mirror image.
MIRRORED_TIME = {"timestep_offset": 1.0, "timestep_scale": -0.001}
# LightningDiT and what is built on its code: RMSNorm, rotary positions beside the fixed ones, SwiGLU as one `w12`
LIGHTNINGDIT_KIN = ("lightningdit", "jit")
# What only REPA's and REPA-E's models of `sit` have; theirs count time as diffusers does.
REPA_MARKS = ("projectors.", "bn.")


def join_decoder_blocks(tensors: State) -> State:
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


def _take_patch_embed(
    tensors: CheckpointTensors, source: str, width: int, in_channels: int | None
) -> tuple[State, Config]:
    embed = "x_embedder.proj"
    bias = {"patch_embed.bias": tensors.take(f"{embed}.bias", width)} if source != "jit" else {}
    if source == "fitv2":
        in_channels = 4 if in_channels is None else in_channels
        _, columns = tensors.shape(f"{embed}.weight", 2)
        patch_size = math.isqrt(columns // in_channels)
        state = {"patch_embed.weight": tensors.take(f"{embed}.weight", width, in_channels * patch_size**2)}
        return state | bias, {"patch_size": patch_size, "in_channels": in_channels}
    first = f"{embed}1" if source == "jit" else embed
    rows, found_channels, patch_size, _ = tensors.shape(f"{first}.weight", 4)
    if in_channels is not None:
        check_in_channels(found_channels, in_channels)
    config = {"patch_size": patch_size, "in_channels": found_channels}
    kernel = (found_channels, patch_size, patch_size)
    if source != "jit":
        return {"patch_embed.weight": tensors.take(f"{embed}.weight", width, *kernel).flatten(1)} | bias, config
    state = {
        "patch_embed.0.weight": tensors.take(f"{first}.weight", rows, *kernel).flatten(1),
        "patch_embed.1.weight": tensors.take(f"{embed}2.weight", width, rows, 1, 1).flatten(1),
        "patch_embed.1.bias": tensors.take(f"{embed}2.bias", width),
    }
    return state, config | {"patch_bottleneck_dim": rows}


def _take_positions(
    tensors: CheckpointTensors, width: int, head_dim: int, patch_size: int, has_rope_tables: bool
) -> Config:
    """Checks a checkpoint's fixed tables: sine-cosine, and rotary ones where it has them; they are computed here."""
    side = math.isqrt(tensors.shape("pos_embed", 3)[1])
    expected = {"pos_embed": sincos_embedding_2d(side, side, width, side, torch.device("cpu")).unsqueeze(0)}
    if has_rope_tables:
        tables = DoDRotaryEmbedding(head_dim, 10000.0)(side, side, torch.device("cpu"))
        expected |= dict(zip(("feat_rope.freqs_cos", "feat_rope.freqs_sin"), tables))
    for name, table in expected.items():
        precision = torch.finfo(tensors.left[name].dtype).eps if name in tensors.left else 0.0
        found = tensors.take(name, *table.shape)
        if not found.is_meta and (found - table).abs().max() > max(1e-4, precision):
            raise ValueError(
                f"{name} is not the fixed table of 2D positions of the published models, so it was trained or resized."
            )
    return {"base_size": side, "sample_size": side * patch_size}


def _take_attention(tensors: CheckpointTensors, block: str, target: str, width: int, head_dim: int | None) -> State:
    """Attention; `head_dim` where queries and keys have a norm with a scale."""
    state = tensors.take_linear(f"{block}.proj", width, width, f"{target}.to_out.0")
    for kind, tensor in tensors.take_linear(f"{block}.qkv", 3 * width, width, "qkv").items():
        for name, part in zip(("to_q", "to_k", "to_v"), tensor.chunk(3)):
            state[kind.replace("qkv", f"{target}.{name}")] = part.clone()
    if head_dim is not None:
        for name in ("q", "k"):
            state[f"{target}.norm_{name}.weight"] = tensors.take(f"{block}.{name}_norm.weight", head_dim)
    return state


def _read_feed_forward(tensors: CheckpointTensors, source: str) -> tuple[str, int]:
    """The form of a checkpoint's feed-forward and its hidden channels."""
    for form in ("w12",) if source in LIGHTNINGDIT_KIN else ("fc1_g",):
        if any(f".mlp.{form}." in name for name in tensors.left):
            (rows,) = tensors.shape(f"blocks.0.mlp.{form}.bias", 1)
            return form, rows if form == "fc1_g" else rows // 2
    return "fc1", tensors.shape("blocks.0.mlp.fc1.bias", 1)[0]


def _take_feed_forward(
    tensors: CheckpointTensors, block: str, target: str, width: int, form: str, hidden: int
) -> State:
    if form == "fc1":
        state = tensors.take_linear(f"{block}.fc1", hidden, width, f"{target}.net.0.proj")
        return state | tensors.take_linear(f"{block}.fc2", width, hidden, f"{target}.net.2")
    # diffusers' SwiGLU has the value's rows first, then the gate's.
    if form == "fc1_g":
        value = tensors.take_linear(f"{block}.fc1_x", hidden, width, "proj")
        gate = tensors.take_linear(f"{block}.fc1_g", hidden, width, "proj")
        last = "fc2"
    else:
        both = tensors.take_linear(f"{block}.w12", 2 * hidden, width, "proj")
        gate = {name: tensor.chunk(2)[0] for name, tensor in both.items()}
        value = {name: tensor.chunk(2)[1] for name, tensor in both.items()}
        last = "w3"
    state = tensors.take_linear(f"{block}.{last}", width, hidden, f"{target}.net.2")
    for kind in ("weight", "bias"):
        parts = [value[f"proj.{kind}"], gate[f"proj.{kind}"]]
        if not any(part.is_meta for part in parts):
            state[f"{target}.net.0.proj.{kind}"] = torch.cat(parts)
    return state


def _take_context(tensors: CheckpointTensors, width: int, num_layers: int) -> tuple[State, Config]:
    """JiT's class tokens, which come in after a third of the blocks in every published model."""
    length = tensors.shape("in_context_posemb", 3)[1]
    state = {"in_context_embed": tensors.take("in_context_posemb", 1, length, width)}
    return state, {"in_context_len": length, "in_context_start": num_layers // 3}


def _drop_repa(tensors: CheckpointTensors, in_channels: int) -> tuple[dict[str, list[float]], list[str]]:
    """Drops REPA's projectors and takes REPA-E's statistics of the latents."""
    notes = ["its time runs from data (0) to noise (1) as ours does"]
    projectors = [name for name in tensors.left if name.startswith("projectors.")]
    for name in projectors:
        del tensors.left[name]
    if projectors:
        notes.append("REPA's projectors, dropped")
    if not any(name.startswith("bn.") for name in tensors.left):
        return {}, notes
    mean, variance = (tensors.take(f"bn.running_{name}", in_channels) for name in ("mean", "var"))
    if mean.is_meta or variance.is_meta:
        return {}, notes
    notes.append("REPA-E's batch norm, made the autoencoder's statistics")
    return {"latents_mean": mean.tolist(), "latents_std": variance.sqrt().tolist()}, notes


def convert_original(
    tensors: CheckpointTensors,
    source: str,
    num_attention_heads: int | None,
    in_channels: int | None,
    noise_scale: float | None,
) -> tuple[State, Config, dict[str, list[float]], list[str]]:
    """Weights, config, statistics of the latents (REPA-E's only) and notes."""
    is_fit, is_jit, notes = source == "fitv2", source == "jit", []
    has_norms = source in LIGHTNINGDIT_KIN and any(name.endswith(".norm1.weight") for name in tensors.left)
    has_rope_tables = source == "lightningdit" and any(name.startswith("feat_rope.") for name in tensors.left)

    # 1. Sizes; biases first, because no transposed weight can hide there
    (width,) = tensors.shape("t_embedder.mlp.2.bias", 1)
    if num_attention_heads is None and has_rope_tables:
        num_attention_heads = width // tensors.shape("feat_rope.freqs_cos", 2)[1]
    has_rope = is_fit or is_jit or has_rope_tables
    heads = read_heads(width, num_attention_heads, has_rope)
    class_rows, _ = tensors.shape("y_embedder.embedding_table.weight", 2)
    (output_rows,) = tensors.shape("final_layer.linear.bias", 1)
    num_layers = tensors.count_blocks("blocks")
    form, hidden = _read_feed_forward(tensors, source)
    activation_fn = "gelu-approximate" if form == "fc1" else "swiglu"
    config: Config = {
        "num_layers": num_layers,
        **heads,
        "num_classes": class_rows - 1,
        "activation_fn": activation_fn,
        "mlp_ratio": mlp_ratio(width, hidden, activation_fn),
        "adaln_type": "full",
    }
    qk_norm_dim = None
    if not is_fit:
        config |= DIT_SWITCHES | {"pos_embed_type": "rope_sincos" if has_rope else "sincos"}
    if has_norms:
        config["norm_type"] = "rms_norm"
        if any(".attn.q_norm." in name for name in tensors.left):
            qk_norm_dim = heads["attention_head_dim"]
            config["qk_norm"] = "rms_norm"

    # 2. Embeddings
    state, found = _take_patch_embed(tensors, source, width, in_channels)
    config |= found
    patch_size, channels = config["patch_size"], config["in_channels"]
    out_channels = output_channels(output_rows, patch_size, channels)
    time = ("t_embedder.mlp.0", "t_embedder.mlp.2")
    state |= take_embeddings(tensors, time, "y_embedder.embedding_table.weight", width, class_rows)
    if not is_fit:
        config |= _take_positions(tensors, width, heads["attention_head_dim"], patch_size, has_rope_tables)
    if is_jit:
        taken, found = _take_context(tensors, width, num_layers)
        state, config = state | taken, config | found
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
        if has_norms:
            for name in ("norm1.weight", "norm2.weight"):
                state[f"{target}.{name}"] = tensors.take(f"{block}.{name}", width)
        state |= _take_attention(tensors, f"{block}.attn", f"{target}.attn", width, qk_norm_dim)
        state |= _take_feed_forward(tensors, f"{block}.mlp", f"{target}.ff", width, form, hidden)

    # 4. Output, in our order of a patch's channels and in diffusers' direction of time
    state |= tensors.take_linear("final_layer.adaLN_modulation.1", 2 * width, width, "adaln_out")
    if has_norms:
        state["norm_out.weight"] = tensors.take("final_layer.norm_final.weight", width)
    output = tensors.take_linear("final_layer.linear", output_rows, width, "proj_out")
    if not is_fit:
        output = {name: patch_rows(tensor, patch_size) for name, tensor in output.items()}
    latents_stats: dict[str, list[float]] = {}
    if source == "dit":
        config |= {"prediction_type": "epsilon", "out_channels": out_channels}
        if out_channels != channels:
            notes.append("learned sigma, kept: schedulers without a learned variance ignore it")
        return state | output, config, latents_stats, notes
    config["prediction_type"] = "flow"
    if source == "sit" and any(name.startswith(REPA_MARKS) for name in tensors.left):
        config["timestep_scale"] = 0.001
        latents_stats, notes = _drop_repa(tensors, channels)
    else:
        config |= MIRRORED_TIME
    if is_jit:
        # As its repository's commands have it: 1 at 256 pixels, 2 at 512
        noise_scale = max(1.0, config["sample_size"] / 256) if noise_scale is None else noise_scale
        config |= {"x_prediction": True, "noise_scale": noise_scale}
    elif "timestep_offset" in config:
        output = {name: -tensor for name, tensor in output.items()}
    if out_channels != channels:
        if is_fit:
            raise ValueError(
                "the checkpoint has a learned sigma, so it is FiT's first version: only FiTv2 is a flow model."
            )
        output = {name: tensor[: channels * patch_size**2].clone() for name, tensor in output.items()}
        notes.append("learned sigma, dropped: it is not used")
    return state | output, config, latents_stats, notes
