"""Layers that the DoD transformer and the DoD latent embedder share.

The backbone's details follow FiTv2 (Wang et al. 2024, arXiv 2410.13925, github.com/whlzy/FiT): 2D rotary positions,
LayerNorm on queries and keys, SwiGLU and adaLN-zero with a shared and a low-rank part. The choices of DiT (Peebles & Xie
2022, arXiv 2212.09748), SiT (Ma et al. 2024, arXiv 2401.08740), LightningDiT (Yao et al. 2025, arXiv 2501.01423) and JiT (Li
& He 2025, arXiv 2511.13720) are there too, for models that start from their weights.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import (
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
    get_1d_sincos_pos_embed_from_grid,
)


NORM_EPS = 1e-6


def patchify(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cuts latents into non-overlapping patches, one row per patch.

    Args:
        latents (`torch.Tensor`): shape `(batch, channels, height, width)`.
        patch_size (`int`): side of a patch.

    Returns:
        `torch.Tensor`: shape `(batch, height/patch * width/patch, channels * patch**2)`, patches in row-major order and
        channels slowest within a patch (the layout of a convolution's weight).

    Raises:
        ValueError: if `patch_size` does not divide the height or the width.
    """
    batch, channels, height, width = latents.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"Latents of {height}x{width} cannot be cut into patches of {patch_size}: choose a height and a width that "
            f"are multiples of {patch_size}."
        )
    latents = latents.reshape(batch, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return latents.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: torch.Tensor, height: int, width: int, patch_size: int) -> torch.Tensor:
    """The inverse of [`patchify`].

    Args:
        tokens (`torch.Tensor`): shape `(batch, height/patch * width/patch, channels * patch**2)`.
        height (`int`): height of the latents to return.
        width (`int`): width of the latents to return.
        patch_size (`int`): side of a patch.

    Returns:
        `torch.Tensor`: shape `(batch, channels, height, width)`.
    """
    rows, columns = height // patch_size, width // patch_size
    tokens = tokens.reshape(tokens.shape[0], rows, columns, -1, patch_size, patch_size)
    return tokens.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, height, width)


class DoDRotaryEmbedding(nn.Module):
    """2D rotary positions: the first half of a head's channels turns with the row, the second with the column.

    Args:
        attention_head_dim (`int`): channels of a head, a multiple of 4.
        theta (`float`): base of the frequencies.

    Raises:
        ValueError: if the channels cannot be halved twice.
    """

    def __init__(self, attention_head_dim: int, theta: float):
        super().__init__()
        if attention_head_dim % 4:
            raise ValueError(
                f"`attention_head_dim` is {attention_head_dim}; 2D rotary positions need a multiple of 4."
            )
        self.attention_head_dim, self.theta = attention_head_dim, theta

    def forward(self, rows: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of a grid of tokens.

        Returns:
            cosine and sine, each `(rows * columns, attention_head_dim)` in float32, channels in interleaved pairs as
            `diffusers.models.embeddings.apply_rotary_emb` takes them.
        """
        row = torch.arange(rows, device=device).repeat_interleave(columns)
        column = torch.arange(columns, device=device).repeat(rows)
        tables = [
            get_1d_rotary_pos_embed(self.attention_head_dim // 2, positions, self.theta, use_real=True)
            for positions in (row, column)
        ]
        cos, sin = (torch.cat(halves, dim=-1) for halves in zip(*tables))
        return cos, sin


def prepend_unturned(
    rotary_emb: tuple[torch.Tensor, torch.Tensor], num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables of [`DoDRotaryEmbedding`] with rows for tokens without a position before those of the grid."""
    cos, sin = rotary_emb
    return F.pad(cos, (0, 0, num_tokens, 0), value=1.0), F.pad(sin, (0, 0, num_tokens, 0))


def sincos_embedding_2d(rows: int, columns: int, dim: int, base_size: int, device: torch.device) -> torch.Tensor:
    """Fixed sine-cosine positions of a grid: the first half of the channels encodes the column, the second the row.

    Args:
        rows (`int`): rows of the grid of tokens.
        columns (`int`): its columns.
        dim (`int`): width of a token, a multiple of 4.
        base_size (`int`): tokens along a side that positions are counted in; any other grid is interpolated onto it.
        device (`torch.device`): where the table is made.

    Returns:
        `torch.Tensor`: `(rows * columns, dim)` in float32.
    """
    row = torch.arange(rows, device=device, dtype=torch.float32) * (base_size / rows)
    column = torch.arange(columns, device=device, dtype=torch.float32) * (base_size / columns)
    # Not every device has diffusers' default, float64.
    options = {"output_type": "pt", "dtype": torch.float32}
    row_embedding = get_1d_sincos_pos_embed_from_grid(dim // 2, row, **options).repeat_interleave(columns, dim=0)
    column_embedding = get_1d_sincos_pos_embed_from_grid(dim // 2, column, **options).repeat(rows, 1)
    return torch.cat([column_embedding, row_embedding], dim=-1)


def initialize_linear_xavier(module: nn.Module) -> None:
    """Gives a linear layer Xavier-uniform weights and a zero bias; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class DoDRMSNorm(nn.RMSNorm):
    """RMSNorm in the precision of its scale, as autocast has LayerNorm; of mixed ones PyTorch has no fused kernel."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states.to(self.weight.dtype))


def make_norm(norm_type: str, dim: int) -> nn.Module:
    """A norm over channels: `"layer_norm"`, without parameters, or `"rms_norm"`, with a learned scale."""
    if norm_type == "rms_norm":
        return DoDRMSNorm(dim, eps=NORM_EPS)
    return nn.LayerNorm(dim, eps=NORM_EPS, elementwise_affine=False)


def swiglu_feed_forward(dim: int, mlp_ratio: float) -> FeedForward:
    """diffusers' SwiGLU feed-forward, its width cut to 2/3 so that it has the parameters of a plain one."""
    return FeedForward(dim, inner_dim=int(dim * mlp_ratio) * 2 // 3, activation_fn="swiglu")


class DoDAttnProcessor:
    """Self-attention through diffusers' attention dispatcher, with 2D rotary positions where it is given them."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "DoDAttention", hidden_states: torch.Tensor, rotary_emb: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)

        # By a head's width, because under tensor parallelism a process has some of the heads only.
        query = query.unflatten(-1, (-1, attn.dim_head))
        key = key.unflatten(-1, (-1, attn.dim_head))
        value = value.unflatten(-1, (-1, attn.dim_head))

        query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary_emb is not None:
            query = apply_rotary_emb(query, rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, rotary_emb, sequence_dim=1)
        query, key = query.to(value.dtype), key.to(value.dtype)

        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](hidden_states))


class DoDAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention over `(batch, tokens, heads * dim_head)`.

    Args:
        heads (`int`): attention heads.
        dim_head (`int`): channels per head.
        qk_norm (`str`, *optional*, defaults to `"layer_norm"`):
            Norm of queries and keys over a head's channels, as for [`make_norm`], or `None`.
    """

    _default_processor_cls = DoDAttnProcessor
    _available_processors = [DoDAttnProcessor]
    is_cross_attention = False
    use_bias = True

    def __init__(self, heads: int, dim_head: int, qk_norm: str | None = "layer_norm"):
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        dim = heads * dim_head
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        if qk_norm is None:
            self.norm_q, self.norm_k = nn.Identity(), nn.Identity()
        else:
            self.norm_q, self.norm_k = make_norm(qk_norm, dim_head), make_norm(qk_norm, dim_head)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.set_processor(DoDAttnProcessor())

    def forward(
        self, hidden_states: torch.Tensor, rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        return self.processor(self, hidden_states, rotary_emb)


class DoDTransformerBlock(nn.Module):
    """A block of the backbone, modulated by adaLN-zero (Peebles & Xie 2022, arXiv 2212.09748).

    The six modulation vectors are FiTv2's sum of a projection that all blocks share (`modulation`) and this block's own
    low-rank one, which starts at zero; or, as in DiT, a full projection of this block's own.

    Args:
        num_attention_heads (`int`): attention heads.
        attention_head_dim (`int`): channels per head.
        mlp_ratio (`float`): feed-forward width over the block's, before SwiGLU's factor of 2/3.
        adaln_rank (`int`, *optional*): rank of the block's own projection; `None` is a full one and nothing shared.
        qk_norm (`str`, *optional*, defaults to `"layer_norm"`): as for [`DoDAttention`].
        activation_fn (`str`, defaults to `"swiglu"`): diffusers' name of the feed-forward's activation.
        norm_type (`str`, defaults to `"layer_norm"`): as for [`make_norm`].
    """

    def __init__(
        self,
        num_attention_heads: int,
        attention_head_dim: int,
        mlp_ratio: float,
        adaln_rank: int | None,
        qk_norm: str | None = "layer_norm",
        activation_fn: str = "swiglu",
        norm_type: str = "layer_norm",
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        if adaln_rank is None:
            self.adaln = nn.Linear(dim, 6 * dim)
        else:
            self.adaln_down = nn.Linear(dim, adaln_rank)
            self.adaln_up = nn.Linear(adaln_rank, 6 * dim)
        self.norm1 = make_norm(norm_type, dim)
        self.attn = DoDAttention(num_attention_heads, attention_head_dim, qk_norm)
        self.norm2 = make_norm(norm_type, dim)
        if activation_fn == "swiglu":
            self.ff = swiglu_feed_forward(dim, mlp_ratio)
        else:
            self.ff = FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn=activation_fn)
        # Tensor parallelism must cut the two halves of SwiGLU's projection each by itself.
        self.ff.net[0].proj._tp_packed_col_blocks = [1, 1] if activation_fn == "swiglu" else [1]

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        modulation: torch.Tensor | None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): tokens, `(batch, tokens, width)`.
            conditioning (`torch.Tensor`): SiLU of timestep plus class embedding, `(batch, width)`.
            modulation (`torch.Tensor`, *optional*):
                the shared modulation, `(batch, 6 * width)`; `None` for a block with a full projection of its own.
            rotary_emb (`tuple` of `torch.Tensor`, *optional*):
                tables of [`DoDRotaryEmbedding`]; `None` where the tokens carry their positions.
        """
        if modulation is None:
            modulation = self.adaln(conditioning)
        else:
            modulation = modulation + self.adaln_up(self.adaln_down(conditioning))
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = modulation.unsqueeze(1).chunk(6, dim=-1)

        attention_output = self.attn(self.norm1(hidden_states) * (1 + scale_attn) + shift_attn, rotary_emb)
        hidden_states = hidden_states + gate_attn * attention_output
        feed_forward_output = self.ff(self.norm2(hidden_states) * (1 + scale_ff) + shift_ff)
        return hidden_states + gate_ff * feed_forward_output


# First-block and magnitude caching and the guiders that skip layers look both up in registries, which diffusers fills with
# its own models only and does not export.
try:
    from diffusers.hooks._helpers import (
        AttentionProcessorMetadata,
        AttentionProcessorRegistry,
        TransformerBlockMetadata,
        TransformerBlockRegistry,
    )
except ImportError:
    pass  # they say which class is missing
else:
    TransformerBlockRegistry.register(DoDTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
    AttentionProcessorRegistry.register(
        DoDAttnProcessor, AttentionProcessorMetadata(lambda attn, hidden_states, *args, **kwargs: hidden_states)
    )


class DoDViTBlock(nn.Module):
    """A pre-norm ViT block of the latent embedder: the backbone's attention and feed-forward, without modulation."""

    def __init__(self, num_attention_heads: int, attention_head_dim: int, mlp_ratio: float):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = DoDAttention(num_attention_heads, attention_head_dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.ff = swiglu_feed_forward(dim, mlp_ratio)

    def forward(self, hidden_states: torch.Tensor, rotary_emb: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), rotary_emb)
        return hidden_states + self.ff(self.norm2(hidden_states))
