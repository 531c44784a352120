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

from .arguments import check_choice, check_numbers, check_sizes, check_switches
from .layers import (
    DoDRotaryEmbedding,
    DoDTransformerBlock,
    initialize_linear_xavier,
    make_norm,
    patchify,
    prepend_unturned,
    sincos_embedding_2d,
    unpatchify,
)


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
