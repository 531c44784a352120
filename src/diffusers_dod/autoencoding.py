"""Images to latents and back, through any of diffusers' image autoencoders, in the scale a diffusion model works in."""

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor


def _normalizes_itself(vae: ModelMixin) -> bool:
    # AutoencoderRAE takes images in [0, 1] and applies its latent statistics and scaling within encode and decode.
    return "encoder_norm_mean" in vae.config


def vae_spatial_factor(vae: ModelMixin | None) -> int:
    """The autoencoder's downsampling factor: image height divided by latent height; 1 without an autoencoder."""
    if vae is None:
        return 1
    if _normalizes_itself(vae):
        return vae.config.patch_size
    blocks = vae.config.get("encoder_block_out_channels") or vae.config.block_out_channels
    return 2 ** (len(blocks) - 1)


def vae_latent_channels(vae: ModelMixin) -> int:
    """Channels of the autoencoder's latents."""
    return vae.config.encoder_hidden_size if _normalizes_itself(vae) else vae.config.latent_channels


def make_image_processor(vae: ModelMixin | None, transformer: Any) -> VaeImageProcessor:
    """What turns pictures into the autoencoder's input and its output into pictures, for a transformer of that config."""
    return VaeImageProcessor(
        vae_scale_factor=vae_spatial_factor(vae) * transformer.patch_size,
        vae_latent_channels=0,  # `prepare_image_latents` tells latents from pictures itself
        do_convert_rgb=vae is not None or transformer.in_channels == 3,
        do_convert_grayscale=vae is None and transformer.in_channels == 1,
    )


def _scale_shift(vae: ModelMixin, latents: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """The pair (scale, shift) of `normalized = (latents - shift) * scale`."""
    config = vae.config
    scale = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return scale / std, mean
    return scale, config.get("shift_factor") or 0.0


def encode_posterior(vae: ModelMixin | None, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encodes images to the distribution of their normalized latents.

    Args:
        vae (`ModelMixin`, *optional*):
            `AutoencoderKL`, `AutoencoderTiny`, `AutoencoderDC`, `AutoencoderRAE` or one that shares their interface;
            `None` is pixel space, where the images are the latents.
        images (`torch.Tensor`): `(batch, 3, height, width)` in [-1, 1].

    Returns:
        mean and standard deviation, each `(batch, channels, height/factor, width/factor)`; the deviation is `None` for
        an autoencoder without a posterior, whose latents are the mean.
    """
    if vae is None:
        return images, None
    images = images.to(vae.dtype)
    if _normalizes_itself(vae):
        return vae.encode(images / 2 + 0.5, return_dict=False)[0], None
    encoded = vae.encode(images, return_dict=False)[0]
    mean, std = (encoded, None) if torch.is_tensor(encoded) else (encoded.mean, encoded.std)
    scale, shift = _scale_shift(vae, mean)
    return (mean - shift) * scale, None if std is None else std * scale


def encode_images(
    vae: ModelMixin | None,
    images: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sample_posterior: bool = False,
) -> torch.Tensor:
    """Encodes images to normalized latents.

    Args:
        vae (`ModelMixin`, *optional*): as for [`encode_posterior`].
        images (`torch.Tensor`): as for [`encode_posterior`].
        generator (`torch.Generator` or a `list` of them, *optional*): for the posterior's sample.
        sample_posterior (`bool`, defaults to `False`): whether to draw from a posterior or to take its mode.

    Returns:
        `torch.Tensor`: `(batch, channels, height/factor, width/factor)`.
    """
    mean, std = encode_posterior(vae, images)
    if std is None or not sample_posterior:
        return mean
    return mean + std * randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)


def decode_latents(vae: ModelMixin | None, latents: torch.Tensor) -> torch.Tensor:
    """Decodes normalized latents, the inverse of [`encode_images`].

    Args:
        vae (`ModelMixin`, *optional*): as for [`encode_posterior`].
        latents (`torch.Tensor`): `(batch, channels, height, width)`.

    Returns:
        `torch.Tensor`: images, `(batch, 3, height*factor, width*factor)`, about [-1, 1].
    """
    if vae is None:
        return latents
    latents = latents.to(vae.dtype)
    if _normalizes_itself(vae):
        return vae.decode(latents, return_dict=False)[0] * 2 - 1
    scale, shift = _scale_shift(vae, latents)
    return vae.decode(latents / scale + shift, return_dict=False)[0]
