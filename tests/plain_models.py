"""The two models' mathematics written out a second time, from the state dict and in other operations.

Convolutions for patches, complex numbers for rotary positions, a softmax for attention, matrices for the bilinear
resize: the tests compare these with the real models.
"""

import math

import torch
import torch.nn.functional as F


def _normalize(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def _norm(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm where the state dict has its scale, else LayerNorm without parameters."""
    if f"{name}.weight" in state:
        return x / ((x**2).mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]
    return _normalize(x)


def _linear(state: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    return torch.einsum("...i,oi->...o", x, state[f"{name}.weight"]) + state[f"{name}.bias"]


def _rotations(rows: int, columns: int, head_dim: int, theta: float) -> torch.Tensor:
    """Unit complex numbers, `(rows * columns, head_dim / 2)`: a quarter of a head's channels turns with the row."""
    pairs = head_dim // 4
    frequencies = [theta ** (-2 * pair / (head_dim // 2)) for pair in range(pairs)]
    angles = [
        [row * f for f in frequencies] + [column * f for f in frequencies]
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.polar(torch.ones(rows * columns, 2 * pairs), torch.tensor(angles))


def _rotate(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring channels of `(batch, heads, tokens, channels)`."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotations).flatten(-2)


def _positions(rows: int, columns: int, dim: int, base_size: int) -> torch.Tensor:
    """Sine-cosine positions, `(rows * columns, dim)`: sines and cosines of the column, then those of the row."""
    table = torch.zeros(rows, columns, dim)
    quarter = dim // 4
    for row in range(rows):
        for column in range(columns):
            for channel in range(dim):
                kind, index = divmod(channel, quarter)
                position = (column * base_size / columns, row * base_size / rows)[kind // 2]
                angle = position * 10000 ** (-index / quarter)
                table[row, column, channel] = math.cos(angle) if kind % 2 else math.sin(angle)
    return table.flatten(0, 1)


def _attention(
    state: dict, name: str, x: torch.Tensor, heads: int, rotations: torch.Tensor | None, qk_norm: bool = True
) -> torch.Tensor:
    query, key, value = (
        torch.stack(_linear(state, f"{name}.{part}", x).chunk(heads, dim=-1), dim=1)
        for part in ("to_q", "to_k", "to_v")
    )
    if qk_norm:
        query, key = _norm(state, f"{name}.norm_q", query), _norm(state, f"{name}.norm_k", key)
    if rotations is not None:
        query, key = _rotate(query, rotations), _rotate(key, rotations)
    scores = torch.einsum("bhqc,bhkc->bhqk", query, key) / math.sqrt(query.shape[-1])
    mixed = torch.einsum("bhqk,bhkc->bqhc", scores.softmax(-1), value).flatten(2)
    return _linear(state, f"{name}.to_out.0", mixed)


def _feed_forward(state: dict, name: str, x: torch.Tensor, activation_fn: str = "swiglu") -> torch.Tensor:
    hidden = _linear(state, f"{name}.net.0.proj", x)
    if activation_fn == "swiglu":
        value, gate = hidden.chunk(2, dim=-1)
        hidden = value * gate * torch.sigmoid(gate)
    else:  # GELU by tanh
        hidden = hidden / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return _linear(state, f"{name}.net.2", hidden)


def _patch_embed(state: dict, x: torch.Tensor, patch_size: int) -> torch.Tensor:
    if "patch_embed.0.weight" in state:
        kernel, last = state["patch_embed.0.weight"], state["patch_embed.1.weight"]
        weight, bias = last @ kernel, state["patch_embed.1.bias"]
    else:
        weight, bias = state["patch_embed.weight"], state["patch_embed.bias"]
    kernel = weight.unflatten(1, (x.shape[1], patch_size, patch_size))
    return F.conv2d(x, kernel, bias, stride=patch_size).flatten(2).transpose(1, 2)


def _resize_matrix(source: int, target: int) -> torch.Tensor:
    """Bilinear weights of one axis, `(target, source)`, with pixel centres at half-integers."""
    matrix = torch.zeros(target, source)
    for i in range(target):
        position = min(max((i + 0.5) * source / target - 0.5, 0.0), source - 1.0)
        left = min(int(position), source - 2) if source > 1 else 0
        share = position - left
        matrix[i, left] += 1 - share
        if source > 1:
            matrix[i, left + 1] += share
    return matrix


def plain_transformer(config, state: dict, latents, timestep, class_labels, prior_tokens=None) -> torch.Tensor:
    """What `DoDTransformer2DModel.forward` must return; timesteps are `(batch,)`."""
    patch_size, heads = config.patch_size, config.num_attention_heads
    rows, columns = latents.shape[2] // patch_size, latents.shape[3] // patch_size
    rotations = None
    x = _patch_embed(state, latents, patch_size)
    if config.pos_embed_type != "sincos":
        rotations = _rotations(rows, columns, config.attention_head_dim, config.rope_theta)
    if config.pos_embed_type != "rope":
        x = x + _positions(rows, columns, x.shape[-1], config.base_size)
    if prior_tokens is not None:
        x = x + prior_tokens

    time = config.timestep_offset + config.timestep_scale * timestep
    # In float32 like the model's: at timestep 1000 a frequency's last bit is 1e-4 of an angle.
    angles = time[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time_emb = _linear(state, "time_embed.linear_1", torch.cat([angles.cos(), angles.sin()], dim=-1))
    time_emb = _linear(state, "time_embed.linear_2", time_emb * torch.sigmoid(time_emb))
    conditioning = time_emb + state["class_embed.weight"][class_labels]
    conditioning = conditioning * torch.sigmoid(conditioning)

    tokens = x.shape[1]
    for i in range(config.num_layers):
        block = f"transformer_blocks.{i}"
        if config.in_context_len and i == config.in_context_start:
            class_tokens = state["class_embed.weight"][class_labels][:, None] + state["in_context_embed"]
            x = torch.cat([class_tokens, x], dim=1)
            if rotations is not None:
                rotations = torch.cat([torch.ones(config.in_context_len, rotations.shape[1]), rotations])
        if config.adaln_type == "full":
            modulation = _linear(state, f"{block}.adaln", conditioning)
        else:
            own = _linear(state, f"{block}.adaln_up", _linear(state, f"{block}.adaln_down", conditioning))
            modulation = _linear(state, "adaln_global", conditioning) + own
        modulation = modulation.unflatten(-1, (6, 1, -1))
        shift, scale, gate = modulation[:, 0], modulation[:, 1], modulation[:, 2]
        normalized = _norm(state, f"{block}.norm1", x) * (1 + scale) + shift
        x = x + gate * _attention(state, f"{block}.attn", normalized, heads, rotations, config.qk_norm is not None)
        shift, scale, gate = modulation[:, 3], modulation[:, 4], modulation[:, 5]
        normalized = _norm(state, f"{block}.norm2", x) * (1 + scale) + shift
        x = x + gate * _feed_forward(state, f"{block}.ff", normalized, config.activation_fn)

    shift, scale = _linear(state, "adaln_out", conditioning).unflatten(-1, (2, 1, -1)).unbind(1)
    x = _norm(state, "norm_out", x[:, -tokens:]) * (1 + scale) + shift
    kernel = state["proj_out.weight"].unflatten(0, (-1, patch_size, patch_size)).permute(3, 0, 1, 2)
    image = F.conv_transpose2d(x.transpose(1, 2).unflatten(2, (rows, columns)), kernel, stride=patch_size)
    bias = state["proj_out.bias"].unflatten(0, (-1, patch_size, patch_size))
    return image + bias.repeat(1, rows, columns)


def plain_embedder(config, state: dict, latents) -> tuple[torch.Tensor, torch.Tensor]:
    """What `DoDLatentEmbedder.forward` must return: prior tokens and codes."""
    heads, output_patch_size = config.num_attention_heads, config.output_patch_size or config.patch_size
    height, width = latents.shape[2:]

    def run_blocks(x, side, count, rotations):
        for i in range(count):
            block = f"{side}.{i}"
            normalized = _normalize(x) * state[f"{block}.norm1.weight"] + state[f"{block}.norm1.bias"]
            x = x + _attention(state, f"{block}.attn", normalized, heads, rotations)
            normalized = _normalize(x) * state[f"{block}.norm2.weight"] + state[f"{block}.norm2.bias"]
            x = x + _feed_forward(state, f"{block}.ff", normalized)
        return x

    def rotations_of(rows, columns):
        return _rotations(rows, columns, config.attention_head_dim, config.rope_theta)

    rows, columns = height // config.patch_size, width // config.patch_size
    x = _patch_embed(state, latents, config.patch_size)
    x = run_blocks(x, "encoder_blocks", config.num_encoder_layers, rotations_of(rows, columns))
    x = _normalize(x) * state["norm_codes.weight"] + state["norm_codes.bias"]
    codes = _linear(state, "to_codes", x)

    output_rows, output_columns = height // output_patch_size, width // output_patch_size
    resized = torch.einsum(
        "ij,kl,bjlc->bikc",
        _resize_matrix(rows, output_rows),
        _resize_matrix(columns, output_columns),
        codes.unflatten(1, (rows, columns)),
    )
    x = _linear(state, "from_codes", resized.flatten(1, 2))
    x = run_blocks(x, "decoder_blocks", config.num_decoder_layers, rotations_of(output_rows, output_columns))
    x = _normalize(x) * state["norm_out.weight"] + state["norm_out.bias"]
    return _linear(state, "proj_out", x), codes
