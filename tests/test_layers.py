"""The pieces both models are made of: patches, rotary positions, attention, feed-forward."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from diffusers_dod.layers import (
    DoDAttention,
    DoDRotaryEmbedding,
    DoDTransformerBlock,
    make_norm,
    patchify,
    swiglu_feed_forward,
    unpatchify,
)


CPU = torch.device("cpu")


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_patchify_has_the_layout_of_a_convolution(patch_size):
    latents = torch.randn(2, 3, 6, 12)
    weight = torch.randn(5, 3, patch_size, patch_size)
    tokens = patchify(latents, patch_size) @ weight.flatten(1).T
    expected = F.conv2d(latents, weight, stride=patch_size).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected)


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_unpatchify_has_the_layout_of_a_transposed_convolution(patch_size):
    rows, columns = 6 // patch_size, 12 // patch_size
    hidden_states = torch.randn(2, rows * columns, 5)
    weight = torch.randn(5, 3, patch_size, patch_size)
    latents = unpatchify(hidden_states @ weight.flatten(1), 6, 12, patch_size)
    grid = hidden_states.transpose(1, 2).unflatten(2, (rows, columns))
    torch.testing.assert_close(latents, F.conv_transpose2d(grid, weight, stride=patch_size))


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (12, 4)])
def test_unpatchify_inverts_patchify(size):
    latents = torch.randn(2, 3, *size)
    assert torch.equal(unpatchify(patchify(latents, 4), *size, 4), latents)


@pytest.mark.parametrize("size", [(8, 9), (9, 8)])
def test_patchify_refuses_a_size_the_patch_does_not_divide(size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}.*multiples of 2"):
        patchify(torch.zeros(1, 3, *size), 2)


@pytest.mark.parametrize(("head_dim", "theta"), [(4, 10000.0), (16, 10000.0), (12, 100.0)])
def test_rotary_table(head_dim, theta):
    rows, columns, half = 3, 5, head_dim // 2
    cos, sin = DoDRotaryEmbedding(head_dim, theta)(rows, columns, CPU)
    assert cos.dtype == sin.dtype == torch.float32
    for row in range(rows):
        for column in range(columns):
            for channel in range(head_dim):
                position = row if channel < half else column
                pair = (channel % half) // 2
                angle = position * theta ** (-2 * pair / half)
                assert cos[row * columns + column, channel].item() == pytest.approx(math.cos(angle), abs=1e-6)
                assert sin[row * columns + column, channel].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_rotary_positions_need_heads_of_a_multiple_of_4():
    with pytest.raises(ValueError, match="`attention_head_dim` is 6; 2D rotary positions need a multiple of 4"):
        DoDRotaryEmbedding(6, 10000.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_attention_turns_queries_and_keys_alone(dtype, fused):
    """As complex numbers, also where queries and keys are slices of a fused projection."""
    torch.manual_seed(0)
    attention, hidden_states = DoDAttention(heads=2, dim_head=8).to(dtype), torch.randn(2, 12, 16).to(dtype)
    row, column = torch.arange(3).repeat_interleave(4), torch.arange(4).repeat(3)
    angles = torch.stack([row, row / 100, column, column / 100], dim=-1)  # 10000 to the power of -1/2 is 1/100

    def turned(norm, projection):
        pairs = norm(projection(hidden_states).unflatten(-1, (2, 8))).float().unflatten(-1, (4, 2))
        rotations = torch.polar(torch.ones(12, 4), angles).unsqueeze(1)
        return torch.view_as_real(torch.view_as_complex(pairs) * rotations).flatten(-2).to(dtype)

    query, key = turned(attention.norm_q, attention.to_q), turned(attention.norm_k, attention.to_k)
    value = attention.to_v(hidden_states).unflatten(-1, (2, 8))
    mixed = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    expected = attention.to_out[0](mixed.transpose(1, 2).flatten(2))
    if fused:
        attention.fuse_projections()
        assert attention.fused_projections
    output = attention(hidden_states, DoDRotaryEmbedding(8, 10000.0)(3, 4, CPU))
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps)


def _window(tables, grid_columns, top, left, rows=3, columns=4):
    """The tables of a rows x columns window of a larger grid."""
    return tuple(
        table.unflatten(0, (-1, grid_columns))[top : top + rows, left : left + columns].flatten(0, 1)
        for table in tables
    )


def test_attention_depends_on_relative_position_only():
    torch.manual_seed(0)
    attention = DoDAttention(heads=2, dim_head=8)
    hidden_states = torch.randn(2, 12, 16)
    tables = DoDRotaryEmbedding(8, 10000.0)(9, 11, CPU)
    at_origin = attention(hidden_states, _window(tables, 11, 0, 0))
    moved = attention(hidden_states, _window(tables, 11, 5, 6))
    torch.testing.assert_close(moved, at_origin, atol=1e-5, rtol=1e-5)


def test_attention_sees_rows_and_columns():
    torch.manual_seed(0)
    attention = DoDAttention(heads=2, dim_head=8)
    hidden_states = torch.randn(1, 12, 16)
    outputs = [
        attention(hidden_states, DoDRotaryEmbedding(8, 10000.0)(*grid, CPU))
        for grid in [(3, 4), (4, 3), (1, 12), (12, 1)]
    ]
    for i, output in enumerate(outputs):
        for other in outputs[:i]:
            assert (output - other).abs().max() > 1e-3


def test_queries_and_keys_are_normalized_without_parameters():
    torch.manual_seed(0)
    attention = DoDAttention(heads=2, dim_head=8)
    assert not list(attention.norm_q.parameters()) and not list(attention.norm_k.parameters())
    assert attention.norm_q.eps == attention.norm_k.eps == 1e-6
    hidden_states = torch.randn(1, 12, 16)
    tables = DoDRotaryEmbedding(8, 10000.0)(3, 4, CPU)
    expected = attention(hidden_states, tables)
    with torch.no_grad():
        for linear in (attention.to_q, attention.to_k):
            linear.weight.mul_(3)
            linear.bias.mul_(3).add_(0.5)
    torch.testing.assert_close(attention(hidden_states, tables), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rms_norm_under_autocast_is_that_of_float32():
    """As autocast has LayerNorm, and without PyTorch's warning that it has no kernel for mixed types."""
    norm, tokens = make_norm("rms_norm", 16), torch.randn(2, 5, 16).to(torch.bfloat16)
    norm.weight.uniform_(0.5, 2)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")
        normalized = norm(tokens)
    expected = tokens.float() / (tokens.float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(normalized, expected)


@pytest.mark.parametrize(("dim", "width"), [(768, 2048), (1152, 3072), (2304, 6144), (20, 53)])
def test_swiglu_width(dim, width):
    with torch.device("meta"):
        feed_forward = swiglu_feed_forward(dim, 4.0)
    assert feed_forward.net[0].proj.weight.shape == (2 * width, dim)
    assert feed_forward.net[2].weight.shape == (dim, width)


def test_block_modulation_is_shared_plus_low_rank():
    torch.manual_seed(0)
    block = DoDTransformerBlock(num_attention_heads=2, attention_head_dim=8, mlp_ratio=4.0, adaln_rank=4)
    torch.nn.init.normal_(block.adaln_up.weight)
    hidden_states, conditioning, modulation = torch.randn(2, 12, 16), torch.randn(2, 16), torch.randn(2, 96)
    tables = DoDRotaryEmbedding(8, 10000.0)(3, 4, CPU)
    expected = block(hidden_states, conditioning, modulation, tables)
    # The block's own part, moved into the shared one
    own = block.adaln_up(block.adaln_down(conditioning))
    torch.nn.init.zeros_(block.adaln_up.weight)
    torch.nn.init.zeros_(block.adaln_up.bias)
    torch.testing.assert_close(block(hidden_states, conditioning, modulation + own, tables), expected)
    # adaLN-zero: without modulation the block is the identity
    assert torch.equal(block(hidden_states, conditioning, torch.zeros_like(modulation), tables), hidden_states)
