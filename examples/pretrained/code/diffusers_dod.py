"""Both models, as one file of a repository's code, and the one class that diffusers' `AutoModel` may take for either."""

import os
from typing import Any

from diffusers.models.modeling_utils import ModelMixin  # diffusers looks for it beside the models

"""The Latent Embedding Module of DoD: compresses a latent to a few numbers and decodes them to prior tokens."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

"""The arguments of calls and constructors: each checked once, with the cure in the message."""

import math
from numbers import Integral
from typing import Any

import numpy as np
import torch


# Of counts and sizes: far above what fits a machine, and small enough that memory ends before a library's integers do.
LARGEST = 2**24


def shown(value: Any) -> str:
    """A value as a message shows it: one line of at most 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer from `least` to `LARGEST`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= LARGEST


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    if isinstance(value, (int, np.integer)):
        return not isinstance(value, bool) and abs(int(value)) < 2**63  # torch's largest
    return isinstance(value, (float, np.floating)) and math.isfinite(value)


def per_stage(value: Any, num_stages: int) -> list:
    """One entry per stage, of a list of them or of one value for all."""
    return value if isinstance(value, list) else [value] * num_stages


def check_count(name: str, value: Any, least: int = 1) -> None:
    if not is_count(value, least):
        raise ValueError(f"`{name}` is {shown(value)}; it must be an integer from {least} to {LARGEST}.")


def check_per_stage(num_stages: int, **values: Any) -> None:
    """Lists have one entry per stage."""
    for name, value in values.items():
        if isinstance(value, list) and len(value) != num_stages:
            raise ValueError(
                f"`{name}` has {len(value)} entries for {num_stages} stages: pass one entry per stage, or one value."
            )


def check_steps(num_inference_steps: Any, num_stages: int) -> None:
    for steps in per_stage(num_inference_steps, num_stages):
        check_count("num_inference_steps", steps)


def check_scales(name: str, value: Any, num_stages: int, or_none: bool = False) -> None:
    """Finite numbers; with `or_none` also `None`."""
    for scale in per_stage(value, num_stages):
        if not is_finite(scale) and not (or_none and scale is None):
            raise ValueError(f"`{name}` is {shown(scale)}; every stage needs a finite number.")


def check_intervals(guidance_interval: Any, num_stages: int) -> None:
    for interval in per_stage(guidance_interval, num_stages):
        is_pair = isinstance(interval, (tuple, list)) and len(interval) == 2 and all(map(is_finite, interval))
        if not is_pair or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` is {shown(interval)}; pass a tuple (start, stop) with 0 <= start <= stop <= 1, or a "
                "list of them, one per stage."
            )


def check_choice(name: str, value: Any, choices: tuple) -> None:
    # By type first: an array compares with each of its elements.
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"`{name}` is {shown(value)}; use {' or '.join(map(repr, choices))}.")


def check_switches(**switches: Any) -> None:
    for name, value in switches.items():
        if not isinstance(value, (int, np.bool_)):
            raise ValueError(f"`{name}` is {shown(value)}; it must be True or False.")


def check_sizes(least: int = 1, pair: tuple[str, ...] = ("sample_size",), **sizes: Any) -> None:
    """Integers of at least `least`, for constructors; those named in `pair` may also be a height and a width."""
    for name, value in sizes.items():
        is_pair = name in pair and isinstance(value, (tuple, list)) and len(value) == 2
        if not all(is_count(each, least) for each in (value if is_pair else (value,))):
            raise ValueError(f"`{name}` is {shown(value)}; it must be an integer from {least} to {LARGEST}.")


def check_numbers(above: float | None = None, **numbers: Any) -> None:
    """Finite numbers, above a bound if there is one, for constructors."""
    for name, value in numbers.items():
        if not is_finite(value) or (above is not None and value <= above):
            bound = "" if above is None else f" above {above:g}"
            raise ValueError(f"`{name}` is {shown(value)}; it must be a finite number{bound}.")


def check_list(name: str, values: Any, length: int, above: float = -math.inf) -> None:
    """So many finite numbers, above a bound if there is one."""
    is_list = isinstance(values, (list, tuple)) and len(values) == length
    if not is_list or not all(is_finite(value) and value > above for value in values):
        bound = "" if above == -math.inf else f" above {above:g}"
        raise ValueError(f"`{name}` is {shown(values)}; it must be a list of {length} finite numbers{bound}.")


def check_shares(**shares: Any) -> None:
    """Numbers from 0 to 1."""
    for name, value in shares.items():
        if not is_finite(value) or not 0 <= value <= 1:
            raise ValueError(f"`{name}` is {shown(value)}; it must be a number from 0 to 1.")


def check_instance(name: str, value: Any, *classes: type) -> None:
    if not isinstance(value, classes):
        wanted = " or ".join(each.__name__ for each in classes)
        raise TypeError(f"`{name}` is {shown(value)}; it must be a {wanted}.")


def check_size(height: Any, width: Any, multiple: int) -> None:
    """The size of an image that a VAE and patches must divide."""
    if not is_count(height) or not is_count(width) or height % multiple or width % multiple:
        raise ValueError(
            f"A {shown(height)}x{shown(width)} image does not fit: height and width must be multiples of {multiple}."
        )


def check_generator(generator: Any, batch_size: int) -> None:
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(each, torch.Generator) for each in generators):
        raise ValueError("`generator` must be a torch.Generator or a list of them, such as torch.manual_seed(0).")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"{len(generator)} generators for {batch_size} images: `generator` takes one, or one for each of the images."
        )


def check_callback(callback: Any, tensor_inputs: Any, known: list[str]) -> None:
    """`callback_on_step_end` and the names of what it is passed."""
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end` is {shown(callback)}; it must be a function or None.")
    names = tensor_inputs if isinstance(tensor_inputs, (list, tuple)) else [tensor_inputs]
    if unknown := [name for name in names if not isinstance(name, str) or name not in known]:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` has {shown(unknown)}; pass a list of names from {known}."
        )


def changed_tensors(changed: Any, **tensors: torch.Tensor | None) -> list[Any]:
    """The tensors after a callback returned what it changed: a dict of some of them, each of the shape that it had."""
    if not isinstance(changed, dict):
        raise TypeError(
            f"`callback_on_step_end` returned {shown(changed)}; it must return a dict, {{}} where it changes nothing."
        )
    for name, before in tensors.items():
        after = changed.get(name, before)
        if after is not before and (before is None or not torch.is_tensor(after) or after.shape != before.shape):
            wanted = None if before is None else tuple(before.shape)
            raise ValueError(f"`callback_on_step_end` returned other `{name}` than a tensor of {wanted}.")
    return [changed.get(name, before) for name, before in tensors.items()]


def check_tensor(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """A finite tensor of a shape."""
    if not torch.is_tensor(value) or tuple(value.shape) != shape:
        given = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
        raise ValueError(f"`{name}` is {given}; for these arguments it must be a tensor of {shape}.")
    if not value.is_floating_point() or value.is_meta or value.layout != torch.strided:
        raise ValueError(f"`{name}` is {value.dtype} on {value.device}; it must hold floating-point numbers.")
    if not torch.isfinite(value).all():
        raise ValueError(f"`{name}` holds NaN or infinite values.")


def check_rows(shape: tuple[int | None, ...], integers: bool = False, **tensors: Any) -> None:
    """Tensors of a shape, in which `None` is any size, by type alone: a GPU would have to wait for a look at the values."""
    for name, value in tensors.items():
        fits = torch.is_tensor(value) and len(value.shape) == len(shape)
        if not fits or any(size not in (None, given) for size, given in zip(shape, value.shape)):
            given = tuple(value.shape) if torch.is_tensor(value) else shown(value)
            wanted = f"({', '.join('any' if size is None else str(size) for size in shape)}{',' * (len(shape) == 1)})"
            raise ValueError(f"`{name}` is {given}; it must be a tensor of {wanted}.")
        is_integer = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
        if is_integer != integers or value.is_complex() or value.dtype == torch.bool or value.layout != torch.strided:
            kind = "integers" if integers else "floating-point numbers"
            raise ValueError(f"`{name}` holds {value.dtype}; it must hold {kind}.")


def check_sample(sample: torch.Tensor, scheduler: Any) -> None:
    """A result is looked at: NaN would become a black picture without a word."""
    if not torch.isfinite(sample).all():
        raise ValueError(
            f"The sample holds NaN or infinite values: {type(scheduler).__name__} diverged. Lower `guidance_scale`, take more "
            "steps, leave out `use_karras_sigmas`, or use another scheduler; in float16, try bfloat16."
        )
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


@dataclass
class DoDLatentEmbedderOutput(BaseOutput):
    """
    Args:
        prior_tokens (`torch.Tensor`):
            What the transformer sees, `(batch, height/output_patch * width/output_patch, output_dim)`.
        codes (`torch.Tensor`):
            The bottleneck, all that the prior knows: `(batch, height/patch * width/patch, bottleneck_dim)`.
    """

    prior_tokens: torch.Tensor
    codes: torch.Tensor


class DoDLatentEmbedder(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin):
    r"""Latent Embedding Module (Yue et al. 2024, arXiv 2410.08531): ViT encoder, channel bottleneck, ViT decoder.

    The bottleneck discards detail and keeps semantics; without it the denoiser would learn to copy the condition. It is
    trained jointly with the transformer by the diffusion loss alone. The last projection starts at zero, so a fresh
    embedder leaves the transformer as it is.

    Parameters:
        sample_size (`int` or pair of `int`, defaults to 32):
            Size of the latents it is made for; any size that the patches divide can be passed to `forward`.
        patch_size (`int`, defaults to 2):
            Side of the embedder's own patch, and so the bottleneck's grid. One larger than `output_patch_size` makes the
            bottleneck coarser than the transformer's grid; the codes are then resized bilinearly.
        in_channels (`int`, defaults to 4): Channels of the latents.
        num_encoder_layers (`int`, defaults to 4): Blocks before the bottleneck.
        num_decoder_layers (`int`, defaults to 4): Blocks after the bottleneck.
        num_attention_heads (`int`, defaults to 16): Attention heads.
        attention_head_dim (`int`, defaults to 24): Channels per head, a multiple of 4. Heads times channels is the width.
        bottleneck_dim (`int`, defaults to 4): Channels of a code.
        output_dim (`int`, defaults to 1152): The transformer's width.
        output_patch_size (`int`, *optional*): The transformer's patch, `patch_size` by default.
        mlp_ratio (`float`, defaults to 4.0): Feed-forward width over the embedder's, before SwiGLU's factor of 2/3.
        rope_theta (`float`, defaults to 10000.0): Base of the rotary frequencies.
        codes_mean (`list` of `float`, *optional*): Mean of each channel of the training data's codes, for a code model.
        codes_std (`list` of `float`, *optional*): Standard deviation of each channel, likewise.
        noise_level_input (`bool`, defaults to `False`):
            The decoder reads how much noise is on the codes (conditioning augmentation, Ho et al. 2021, arXiv 2106.15282).

    Examples:
        ```py
        >>> import torch
        >>> from diffusers_dod import DoDLatentEmbedder

        >>> embedder = DoDLatentEmbedder(num_encoder_layers=1, num_decoder_layers=1, output_dim=32)
        >>> output = embedder(torch.randn(2, 4, 32, 32))
        >>> prior_tokens, codes = output.prior_tokens, output.codes  # (2, 256, 32) and (2, 256, 4)
        ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DoDViTBlock"]
    _repeated_blocks = ["DoDViTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm", "to_codes", "from_codes", "noise_level_embed"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        num_encoder_layers: int = 4,
        num_decoder_layers: int = 4,
        num_attention_heads: int = 16,
        attention_head_dim: int = 24,
        bottleneck_dim: int = 4,
        output_dim: int = 1152,
        output_patch_size: int | None = None,
        mlp_ratio: float = 4.0,
        rope_theta: float = 10000.0,
        codes_mean: list[float] | None = None,
        codes_std: list[float] | None = None,
        noise_level_input: bool = False,
    ):
        super().__init__()
        check_sizes(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            bottleneck_dim=bottleneck_dim,
            output_dim=output_dim,
            output_patch_size=patch_size if output_patch_size is None else output_patch_size,
        )
        check_sizes(0, num_encoder_layers=num_encoder_layers, num_decoder_layers=num_decoder_layers)
        check_numbers(0, mlp_ratio=mlp_ratio, rope_theta=rope_theta)
        check_switches(noise_level_input=noise_level_input)
        if codes_mean is not None:
            check_list("codes_mean", codes_mean, bottleneck_dim)
        if codes_std is not None:
            check_list("codes_std", codes_std, bottleneck_dim, above=0)
        dim = num_attention_heads * attention_head_dim
        self.output_patch_size = patch_size if output_patch_size is None else output_patch_size

        self.rope = DoDRotaryEmbedding(attention_head_dim, rope_theta)
        self.patch_embed = nn.Linear(in_channels * patch_size**2, dim)
        self.encoder_blocks = nn.ModuleList(
            DoDViTBlock(num_attention_heads, attention_head_dim, mlp_ratio) for _ in range(num_encoder_layers)
        )
        self.norm_codes = nn.LayerNorm(dim, eps=1e-6)
        self.to_codes = nn.Linear(dim, bottleneck_dim)

        self.from_codes = nn.Linear(bottleneck_dim, dim)
        self.decoder_blocks = nn.ModuleList(
            DoDViTBlock(num_attention_heads, attention_head_dim, mlp_ratio) for _ in range(num_decoder_layers)
        )
        self.norm_out = nn.LayerNorm(dim, eps=1e-6)
        self.proj_out = nn.Linear(dim, output_dim)

        self.gradient_checkpointing = False
        self.apply(initialize_linear_xavier)
        nn.init.zeros_(self.proj_out.weight)
        if noise_level_input:
            # With PyTorch's initialisation, which trained better here than Xavier's (docs/evidence.md).
            self.from_codes = nn.Linear(bottleneck_dim, dim)
            self.noise_level_embed = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim, bias=False))

    def _run(self, blocks: nn.ModuleList, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        rotary_emb = self.rope(*grid, hidden_states.device)
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, rotary_emb)
            else:
                hidden_states = block(hidden_states, rotary_emb)
        return hidden_states

    def code_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the codes of latents of that size."""
        return height // self.config.patch_size, width // self.config.patch_size

    @apply_forward_hook  # which lets offloading move the model here as well
    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        """Compresses latents to codes.

        Args:
            latents (`torch.Tensor`): noise-free latents, `(batch, in_channels, height, width)`.

        Returns:
            `torch.Tensor`: `(batch, height/patch * width/patch, bottleneck_dim)`, row-major.

        Raises:
            ValueError: if `patch_size` does not divide the latents.
        """
        grid = self.code_grid(*latents.shape[-2:])
        hidden_states = self.patch_embed(patchify(latents, self.config.patch_size))
        hidden_states = self._run(self.encoder_blocks, hidden_states, grid)
        return self.to_codes(self.norm_codes(hidden_states))

    @apply_forward_hook
    def decode(
        self,
        codes: torch.Tensor,
        height: int,
        width: int,
        code_noise: torch.Tensor | None = None,
        noise_level: torch.Tensor | float | None = None,
    ) -> torch.Tensor:
        """Decodes codes to prior tokens.

        Args:
            codes (`torch.Tensor`): `(batch, height/patch * width/patch, bottleneck_dim)`, as `encode` returns them.
            height (`int`): height of the latents that the tokens are for.
            width (`int`): width of these latents.
            code_noise (`torch.Tensor`, *optional*):
                Noise of the codes' shape, in multiples of the root mean square of each sample's codes, so that
                the codes cannot outgrow it.
            noise_level (`float` or `torch.Tensor` of `(batch,)`, *optional*):
                Scales the noise, and is read where the config has `noise_level_input`; 0 is clean. By default 1 with
                `code_noise` and 0 without.

        Returns:
            `torch.Tensor`: `(batch, height/output_patch * width/output_patch, output_dim)`.

        Raises:
            ValueError: if the codes or their noise are not those of latents of that size, or `output_patch_size` does not
                divide it.
        """
        grid, output_patch_size = self.code_grid(height, width), self.output_patch_size
        if height % output_patch_size or width % output_patch_size:
            raise ValueError(
                f"Latents of {height}x{width} do not fit the transformer's patch of {output_patch_size}: choose a height "
                f"and a width that are multiples of {output_patch_size}."
            )
        if codes.shape[1:] != (grid[0] * grid[1], self.config.bottleneck_dim):
            raise ValueError(
                f"Codes are {tuple(codes.shape)}, but latents of {height}x{width} have {grid[0]}x{grid[1]} codes of "
                f"{self.config.bottleneck_dim} numbers: (batch, {grid[0] * grid[1]}, {self.config.bottleneck_dim})."
            )
        if noise_level is None:
            noise_level = 0.0 if code_noise is None else 1.0
        if not torch.is_tensor(noise_level):
            noise_level = codes.new_full((len(codes),), noise_level)
        noise_level = noise_level.to(codes.dtype).view(-1, 1, 1)
        if code_noise is not None:
            if code_noise.shape != codes.shape:
                raise ValueError(f"`code_noise` is {tuple(code_noise.shape)} for codes of {tuple(codes.shape)}.")
            codes = codes + noise_level * code_noise * codes.detach().square().mean(dim=(1, 2), keepdim=True).sqrt()
        output_grid = (height // output_patch_size, width // output_patch_size)
        if output_grid != grid:
            codes = codes.transpose(1, 2).unflatten(2, grid)
            codes = F.interpolate(codes, size=output_grid, mode="bilinear", align_corners=False)
            codes = codes.flatten(2).transpose(1, 2)
        hidden_states = self.from_codes(codes)
        if self.config.noise_level_input:
            hidden_states = hidden_states + self.noise_level_embed(noise_level)
        hidden_states = self._run(self.decoder_blocks, hidden_states, output_grid)
        return self.proj_out(self.norm_out(hidden_states))

    def normalize_codes(self, codes: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Codes as a code model reads them: standardised per channel, on their grid.

        Args:
            codes (`torch.Tensor`): `(batch, rows * columns, bottleneck_dim)`.
            height (`int`): height of their latents.
            width (`int`): width of their latents.

        Returns:
            `torch.Tensor`: `(batch, bottleneck_dim, rows, columns)`.

        Raises:
            ValueError: if the config has no `codes_mean` and `codes_std`.
        """
        mean, std = self._code_statistics(codes)
        return ((codes - mean) / std).transpose(1, 2).unflatten(2, self.code_grid(height, width))

    def denormalize_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """The inverse of [`~DoDLatentEmbedder.normalize_codes`].

        Args:
            codes (`torch.Tensor`): normalised codes, `(batch, bottleneck_dim, rows, columns)`.

        Returns:
            `torch.Tensor`: `(batch, rows * columns, bottleneck_dim)`.
        """
        codes = codes.flatten(2).transpose(1, 2)
        mean, std = self._code_statistics(codes)
        return codes * std + mean

    def _code_statistics(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.codes_mean is None or self.config.codes_std is None:
            raise ValueError(
                "The latent embedder's config has no `codes_mean` and `codes_std`, which a code model needs: "
                "`diffusers-dod train-codes` measures them."
            )
        mean, std = (
            torch.tensor(values, device=codes.device, dtype=codes.dtype)
            for values in (self.config.codes_mean, self.config.codes_std)
        )
        return mean, std

    def forward(
        self,
        latents: torch.Tensor,
        return_dict: bool = True,
        code_noise: torch.Tensor | None = None,
        noise_level: torch.Tensor | float | None = None,
    ) -> DoDLatentEmbedderOutput | tuple:
        """`encode`, then `decode`.

        Args:
            latents (`torch.Tensor`): noise-free latents, `(batch, in_channels, height, width)`.
            return_dict (`bool`, defaults to `True`): whether to return a [`DoDLatentEmbedderOutput`] or a tuple.
            code_noise (`torch.Tensor`, *optional*):
                Noise on the codes, see [`~DoDLatentEmbedder.decode`]. The returned codes are without it.
            noise_level (`float` or `torch.Tensor`, *optional*): Scale of that noise.

        Returns:
            [`DoDLatentEmbedderOutput`] or `tuple`: prior tokens and codes.

        Raises:
            ValueError: if `patch_size` or `output_patch_size` does not divide the latents.
        """
        codes = self.encode(latents)
        prior_tokens = self.decode(codes, *latents.shape[-2:], code_noise, noise_level)
        if not return_dict:
            return (prior_tokens, codes)
        return DoDLatentEmbedderOutput(prior_tokens=prior_tokens, codes=codes)
"""The DoD backbone: a class-conditional diffusion transformer that may also see prior tokens."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import FasterCacheConfig
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin



# Private names of diffusers: without one its form of parallelism is off.
try:
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
except ImportError:
    ContextParallelInput = ContextParallelOutput = None
try:
    from diffusers.hooks.tensor_parallel import PackedColwiseParallel  # from 0.40
except ImportError:
    PackedColwiseParallel = None

# JiT's bound on the denominator of the velocity that a clean sample implies.
LEAST_SIGMA = 0.05


@dataclass
class DoDTransformer2DModelOutput(Transformer2DModelOutput):
    """
    Args:
        sample (`torch.Tensor`): the prediction, `(batch, out_channels, height, width)`.
        hidden_states (`torch.Tensor`, *optional*):
            Tokens within the transformer, `(batch, height/patch * width/patch, width of the model)`, where asked for.
    """

    hidden_states: torch.Tensor | None = None


class DoDTransformer2DModel(ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):
    r"""Diffusion transformer of Diffusion on Diffusion (Yue et al. 2024, arXiv 2410.08531), with FiTv2's backbone or DiT's.

    One set of weights serves every stage. Without prior tokens it is a class-conditional transformer (stage 1); with
    them, the tokens of [`DoDLatentEmbedder`] are added to the patch embedding of the noisy latents, which costs
    nothing per step. All-zero prior tokens equal no prior, so rows with and without a prior can share a batch. The output
    projection of a new model is zero.

    Parameters:
        sample_size (`int` or pair of `int`, defaults to 32):
            Height and width of the latents that a pipeline generates by default. Any size that `patch_size` divides
            can be passed to `forward`.
        patch_size (`int`, defaults to 2): Side of a patch.
        in_channels (`int`, defaults to 4): Channels of the latents.
        out_channels (`int`, *optional*):
            Channels of the output, `in_channels` by default. Twice `in_channels` is a DiT with learned variance.
        num_layers (`int`, defaults to 36): Blocks.
        num_attention_heads (`int`, defaults to 16): Attention heads.
        attention_head_dim (`int`, defaults to 72):
            Channels of a head, a multiple of 4 with rotary positions; the width is
            `num_attention_heads * attention_head_dim`.
        num_classes (`int`, defaults to 1000):
            Classes. Label `num_classes` is the null class; 0 makes an unconditional model, whose only label is 0.
        mlp_ratio (`float`, defaults to 4.0):
            Hidden width of the feed-forward relative to the model's width; with SwiGLU, 2/3 of that.
        adaln_rank (`int`, *optional*):
            Rank of each block's own modulation, by default a quarter of the width; unused if `adaln_type` is `"full"`.
        rope_theta (`float`, defaults to 10000.0): Base of the rotary frequencies.
        timestep_scale (`float`, defaults to 1.0):
            The sinusoidal embedding reads `timestep_offset + timestep_scale * timestep`. A model whose time runs from
            noise (0) to data (1), such as SiT, has offset 1 and scale -0.001.
        timestep_offset (`float`, defaults to 0.0): See `timestep_scale`.
        prediction_type (`str`, *optional*):
            What the output is: `"flow"` (`noise - sample`), `"epsilon"`, `"v_prediction"` or `"sample"`. It does not
            change the computation; [`DoDPipeline`] refuses a scheduler that reads the output as something else.
            `None` leaves it to the scheduler.
        pos_embed_type (`str`, defaults to `"rope"`):
            Positions of tokens: `"rope"` turns queries and keys (FiTv2); `"sincos"` adds a fixed table to the patch
            embedding (DiT, SiT) and needs a width that is a multiple of 4; `"rope_sincos"` does both (LightningDiT, JiT).
        base_size (`int`, defaults to 16):
            Side, in patches, of the grid that sine-cosine positions are defined on, that of the original training;
            any other grid is interpolated onto it, as diffusers' `PatchEmbed` does.
        activation_fn (`str`, defaults to `"swiglu"`):
            Activation of the feed-forward: `"swiglu"` (FiTv2, LightningDiT, JiT) or `"gelu-approximate"` (DiT, SiT).
        norm_type (`str`, defaults to `"layer_norm"`):
            Norms of the tokens: `"layer_norm"`, without parameters, or `"rms_norm"`, with a learned scale (LightningDiT,
            JiT).
        qk_norm (`str`, *optional*, defaults to `"layer_norm"`):
            Norm of queries and keys: `"layer_norm"`, without parameters (FiTv2), `"rms_norm"`, with a learned scale
            (JiT), or `None` (DiT, SiT, LightningDiT).
        adaln_type (`str`, defaults to `"low_rank"`):
            Modulation: `"low_rank"` is a projection that all blocks share plus one of rank `adaln_rank` in each
            (FiTv2); `"full"` is a full projection in each block (DiT, SiT, LightningDiT, JiT).
        x_prediction (`bool`, defaults to `False`):
            Whether the network's output is the clean sample (Li & He 2025, JiT, arXiv 2511.13720), for patches of many
            numbers in pixel space. `forward` still returns the velocity that it implies,
            `(noisy - sample) / max(sigma, 0.05)`, so schedulers and losses stay the same. For `"flow"` models only.
        patch_bottleneck_dim (`int`, *optional*):
            Makes the patch embedding two linear layers with that many channels between them (JiT).
        in_context_len (`int`, defaults to 0):
            Number of class tokens: copies of the class embedding, each plus a learned one, before the tokens of the latents
            (JiT).
        in_context_start (`int`, defaults to 0): Index, from 0, of the first block that sees the class tokens.
        noise_scale (`float`, defaults to 1.0):
            Standard deviation of the noise that the network takes (JiT has 2 at 512 pixels). `forward` still takes unit
            noise and returns its velocity, so schedulers and losses stay the same: the network sees the noisy latents
            scaled to its own noise, at the time of the same signal-to-noise ratio. For `"flow"` models only.

    Examples:
        ```py
        >>> import torch
        >>> from diffusers_dod import DoDTransformer2DModel

        >>> model = DoDTransformer2DModel(num_layers=2, num_attention_heads=2, attention_head_dim=16, num_classes=10)
        >>> noisy, timestep, labels = torch.randn(2, 4, 32, 32), torch.tensor([900.0, 100.0]), torch.tensor([3, 10])
        >>> velocity = model(noisy, timestep, labels).sample  # (2, 4, 32, 32); label 10 is the null class
        ```
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DoDTransformerBlock"]
    _repeated_blocks = ["DoDTransformerBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "time_embed", "class_embed", "norm", "adaln"]
    # Processes share the tokens between the first block and the last: the prior is in them by then.
    _cp_plan = ContextParallelInput and {
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "transformer_blocks.*": {"rotary_emb": [ContextParallelInput(split_dim=0, expected_dims=2)] * 2},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }
    # Processes share the heads and the feed-forward's width. Modulation and norms are whole in each.
    _tp_plan = PackedColwiseParallel and {
        "transformer_blocks.*.attn.to_q": "colwise",
        "transformer_blocks.*.attn.to_k": "colwise",
        "transformer_blocks.*.attn.to_v": "colwise",
        "transformer_blocks.*.attn.to_out.0": "rowwise",
        "transformer_blocks.*.ff.net.0.proj": PackedColwiseParallel(),
        "transformer_blocks.*.ff.net.2": "rowwise",
    }

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 36,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        num_classes: int = 1000,
        mlp_ratio: float = 4.0,
        adaln_rank: int | None = None,
        rope_theta: float = 10000.0,
        timestep_scale: float = 1.0,
        timestep_offset: float = 0.0,
        prediction_type: str | None = None,
        pos_embed_type: str = "rope",
        base_size: int = 16,
        activation_fn: str = "swiglu",
        qk_norm: str | None = "layer_norm",
        adaln_type: str = "low_rank",
        x_prediction: bool = False,
        norm_type: str = "layer_norm",
        patch_bottleneck_dim: int | None = None,
        in_context_len: int = 0,
        in_context_start: int = 0,
        noise_scale: float = 1.0,
    ):
        super().__init__()
        for name, value, choices in (
            ("prediction_type", prediction_type, ("flow", "epsilon", "v_prediction", "sample", None)),
            ("pos_embed_type", pos_embed_type, ("rope", "sincos", "rope_sincos")),
            ("activation_fn", activation_fn, ("swiglu", "gelu-approximate")),
            ("norm_type", norm_type, ("layer_norm", "rms_norm")),
            ("qk_norm", qk_norm, ("layer_norm", "rms_norm", None)),
            ("adaln_type", adaln_type, ("low_rank", "full")),
        ):
            check_choice(name, value, choices)
        check_sizes(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=in_channels if out_channels is None else out_channels,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            adaln_rank=1 if adaln_rank is None else adaln_rank,
            base_size=base_size,
            patch_bottleneck_dim=1 if patch_bottleneck_dim is None else patch_bottleneck_dim,
        )
        check_sizes(
            0,
            num_layers=num_layers,
            num_classes=num_classes,
            in_context_len=in_context_len,
            in_context_start=in_context_start,
        )
        check_numbers(0, mlp_ratio=mlp_ratio, rope_theta=rope_theta, noise_scale=noise_scale)
        check_numbers(timestep_scale=timestep_scale, timestep_offset=timestep_offset)
        check_switches(x_prediction=x_prediction)
        self.out_channels = in_channels if out_channels is None else out_channels
        if x_prediction and (prediction_type != "flow" or self.out_channels != in_channels):
            raise ValueError("`x_prediction` needs `prediction_type='flow'` and no `out_channels` of its own.")
        if noise_scale != 1 and prediction_type != "flow":
            raise ValueError("`noise_scale` needs `prediction_type='flow'`.")
        if in_context_len and in_context_start >= num_layers:
            raise ValueError(f"`in_context_start` is {in_context_start}, but there are {num_layers} blocks.")
        self.inner_dim = num_attention_heads * attention_head_dim
        if "sincos" in pos_embed_type and self.inner_dim % 4:
            raise ValueError(f"The width is {self.inner_dim}; sine-cosine positions need a multiple of 4.")
        if adaln_type == "full":
            adaln_rank = None
        elif adaln_rank is None:
            adaln_rank = self.inner_dim // 4

        if patch_bottleneck_dim is None:
            self.patch_embed = nn.Linear(in_channels * patch_size**2, self.inner_dim)
        else:
            self.patch_embed = nn.Sequential(
                nn.Linear(in_channels * patch_size**2, patch_bottleneck_dim, bias=False),
                nn.Linear(patch_bottleneck_dim, self.inner_dim),
            )
        self.rope = DoDRotaryEmbedding(attention_head_dim, rope_theta) if "rope" in pos_embed_type else None
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, self.inner_dim)
        self.class_embed = nn.Embedding(num_classes + 1, self.inner_dim)
        if in_context_len:
            self.in_context_embed = nn.Parameter(torch.zeros(1, in_context_len, self.inner_dim))
            # Context parallelism splits the tokens of the latents, which class tokens do not follow.
            self._cp_plan = None
        if adaln_type == "low_rank":
            self.adaln_global = nn.Linear(self.inner_dim, 6 * self.inner_dim)
        self.transformer_blocks = nn.ModuleList(
            DoDTransformerBlock(
                num_attention_heads, attention_head_dim, mlp_ratio, adaln_rank, qk_norm, activation_fn, norm_type
            )
            for _ in range(num_layers)
        )
        self.adaln_out = nn.Linear(self.inner_dim, 2 * self.inner_dim)
        self.norm_out = make_norm(norm_type, self.inner_dim)
        self.proj_out = nn.Linear(self.inner_dim, self.out_channels * patch_size**2)

        self.gradient_checkpointing = False
        self._initialize_weights()

    def _initialize_weights(self) -> None:
        # FiTv2's: Xavier for linear layers, normal for both embeddings, zero for every modulation and the output.
        self.apply(initialize_linear_xavier)
        for embedding in (self.time_embed.linear_1, self.time_embed.linear_2, self.class_embed):
            nn.init.normal_(embedding.weight, std=0.02)
        if self.config.in_context_len:
            nn.init.normal_(self.in_context_embed, std=0.02)
        modulations = [self.adaln_out]
        if self.config.adaln_type == "low_rank":
            modulations += [self.adaln_global, *(block.adaln_up for block in self.transformer_blocks)]
        else:
            modulations += [block.adaln for block in self.transformer_blocks]
        for linear in (*modulations, self.proj_out):
            nn.init.zeros_(linear.weight)

    def enable_cache(self, config: Any) -> None:
        if self.config.in_context_len and type(config).__name__ in ("FirstBlockCacheConfig", "MagCacheConfig"):
            raise ValueError(
                f"{type(config).__name__} subtracts the first block's tokens from the last one's, but a model with class "
                "tokens has more in its later blocks: use a cache of attention, such as `PyramidAttentionBroadcastConfig`."
            )
        if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled:
            raise ValueError(
                "FasterCache would drop the unguided half of a batch without its `class_labels`: pass "
                "`is_guidance_distilled=True`, which keeps the batch whole and only skips attention."
            )
        super().enable_cache(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        return_dict: bool = True,
        hidden_states_layer: int | None = None,
    ) -> DoDTransformer2DModelOutput | tuple[torch.Tensor, ...]:
        """
        Args:
            hidden_states (`torch.Tensor`): noisy latents, `(batch, in_channels, height, width)`.
            timestep (`torch.Tensor`): `(batch,)` or `()`, in [0, 1000]; 1000 * sigma for flow matching.
            class_labels (`torch.Tensor`): `(batch,)` of integers in `[0, num_classes]`, `num_classes` the null class.
            encoder_hidden_states (`torch.Tensor`, *optional*):
                Prior tokens, `(batch, height/patch * width/patch, width of the model)`. `None` is stage 1; a row of
                zeros is a sample without a prior.
            return_dict (`bool`, defaults to `True`): whether to return a [`DoDTransformer2DModelOutput`] or a tuple.
            hidden_states_layer (`int`, *optional*):
                Returns the tokens after that many blocks too, to align them with other features ([`repa_loss`]).

        Returns:
            [`DoDTransformer2DModelOutput`] or `tuple`: the prediction and, where asked for, hidden states.

        Raises:
            ValueError: if `patch_size` does not divide the latents, the prior tokens do not fit their grid, or there
                are not as many blocks as `hidden_states_layer`.
        """
        num_layers = len(self.transformer_blocks)
        if hidden_states_layer is not None and not 1 <= hidden_states_layer <= num_layers:
            raise ValueError(f"`hidden_states_layer` is {hidden_states_layer}; choose one from 1 to {num_layers}.")
        batch, _, height, width = hidden_states.shape
        patch_size, noise_scale = self.config.patch_size, self.config.noise_scale
        dtype, unit_noisy, sigma = hidden_states.dtype, hidden_states, timestep / 1000
        if noise_scale != 1:
            # (1 - sigma) * data + sigma * noise, up to a factor, as a point of data and of noise of another scale
            ratio = 1 / (sigma + noise_scale * (1 - sigma))
            sigma, timestep = ratio * sigma, ratio * timestep
            ratio = ratio.to(dtype).view(-1, 1, 1, 1)
            hidden_states = noise_scale * ratio * hidden_states
        noisy = hidden_states

        # 1. Tokens and where they stand, with the prior added
        grid, device = (height // patch_size, width // patch_size), hidden_states.device
        hidden_states = self.patch_embed(patchify(hidden_states, patch_size))
        rotary_emb = None if self.rope is None else self.rope(*grid, device)
        if "sincos" in self.config.pos_embed_type:
            positions = sincos_embedding_2d(*grid, self.inner_dim, self.config.base_size, device)
            hidden_states = hidden_states + positions.to(hidden_states.dtype)
        if encoder_hidden_states is not None:
            if encoder_hidden_states.shape != hidden_states.shape:
                raise ValueError(
                    f"Prior tokens are {tuple(encoder_hidden_states.shape)} but the noisy tokens are "
                    f"{tuple(hidden_states.shape)}: use an embedder whose `output_dim` and `output_patch_size` are the "
                    "transformer's width and patch size, on latents of the same size."
                )
            hidden_states = hidden_states + encoder_hidden_states

        # 2. Conditioning on time and class
        timestep = self.config.timestep_offset + self.config.timestep_scale * timestep
        timestep_emb = self.time_embed(self.time_proj(timestep.expand(batch)).to(dtype))
        class_emb = self.class_embed(class_labels)
        conditioning = F.silu(timestep_emb + class_emb)
        modulation = self.adaln_global(conditioning) if self.config.adaln_type == "low_rank" else None

        # 3. Blocks, the later ones with class tokens before the others
        inner_hidden_states, in_context_len = None, 0
        for layer, block in enumerate(self.transformer_blocks, start=1):
            if self.config.in_context_len and layer == self.config.in_context_start + 1:
                in_context_len = self.config.in_context_len
                class_tokens = class_emb.unsqueeze(1) + self.in_context_embed
                hidden_states = torch.cat([class_tokens, hidden_states], dim=1)
                rotary_emb = None if rotary_emb is None else prepend_unturned(rotary_emb, in_context_len)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, conditioning, modulation, rotary_emb
                )
            else:
                hidden_states = block(hidden_states, conditioning, modulation, rotary_emb)
            if layer == hidden_states_layer:
                inner_hidden_states = hidden_states[:, in_context_len:]
        hidden_states = hidden_states[:, in_context_len:]

        # 4. Output
        shift, scale = self.adaln_out(conditioning).unsqueeze(1).chunk(2, dim=-1)
        hidden_states = self.proj_out(self.norm_out(hidden_states) * (1 + scale) + shift)
        sample = unpatchify(hidden_states, height, width, patch_size)
        if self.config.x_prediction:
            sample = (noisy - sample) / sigma.to(sample.dtype).clamp(min=LEAST_SIGMA).view(-1, 1, 1, 1)
        if noise_scale != 1:
            sample = ratio * (sample - (noise_scale - 1) * unit_noisy)

        if not return_dict:
            return (sample,) if inner_hidden_states is None else (sample, inner_hidden_states)
        return DoDTransformer2DModelOutput(sample=sample, hidden_states=inner_hidden_states)


class DoDModel:
    """`from_pretrained` of either model: the index of a repository can name one class for `AutoModel`, not one for each."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> ModelMixin:
        """The model whose class the folder's `config.json` names; arguments as of [`ModelMixin.from_pretrained`]."""
        config = DoDTransformer2DModel.load_config(pretrained_model_name_or_path, **kwargs)
        is_embedder = config["_class_name"] == DoDLatentEmbedder.__name__
        model_class = DoDLatentEmbedder if is_embedder else DoDTransformer2DModel
        return model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
