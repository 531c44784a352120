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

from .arguments import check_list, check_numbers, check_sizes, check_switches
from .layers import DoDRotaryEmbedding, DoDViTBlock, initialize_linear_xavier, patchify


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
