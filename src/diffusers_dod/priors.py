"""What a call may put in the place of stage 1: a picture of the user's own, or codes."""

from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.utils.torch_utils import randn_tensor

from .arguments import check_choice, check_count, check_numbers, check_shares, check_tensor
from .autoencoding import encode_images
from .compatibility import check_code_grid, check_scheduler
from .pictures import prepare_picture


# Noise on the codes where the embedder reads its level, measured in docs/evidence.md
DEFAULT_CODE_NOISE_LEVEL = 0.3

PriorImage = PIL.Image.Image | np.ndarray | torch.Tensor | list[PIL.Image.Image] | list[np.ndarray]


def prepare_pictures(image: Any) -> list[PIL.Image.Image]:
    """A user's PIL picture, or a list of them, upright, opaque and of 8 bits per channel.

    Raises:
        ValueError: for a picture that is too large, too narrow, damaged or of another mode.
    """
    try:
        return [prepare_picture(picture) for picture in (image if isinstance(image, list) else [image])]
    except (ValueError, OSError, SyntaxError) as error:  # the last two from a file that is decoded only now
        raise ValueError(f"`image` cannot be used: {error}.") from error


def check_image(image: Any, is_gray: bool) -> None:
    """Refuses what is neither pictures nor floating-point arrays or tensors, one or a list of one kind and shape.

    Args:
        image: what a user passed.
        is_gray (`bool`): whether the model's pictures are, so that an array needs no channels.
    """
    items = image if isinstance(image, list) else [image]
    if not items:
        raise ValueError("`image` is an empty list: pass at least one picture.")
    kind = next((kind for kind in (PIL.Image.Image, np.ndarray, torch.Tensor) if isinstance(items[0], kind)), None)
    if kind is None or not all(isinstance(item, kind) for item in items):
        raise ValueError(
            "`image` is in incorrect format: pass a PIL picture, an array or a tensor, or a list of one kind."
        )
    for item in [] if kind is PIL.Image.Image else items:
        dims = (2, 3, 4) if is_gray else (3, 4)
        if item.ndim not in dims or 0 in item.shape or item.shape != items[0].shape:
            raise ValueError(
                f"`image` holds a shape of {tuple(item.shape)}: pass pictures, or arrays of pictures, of one size."
            )
        if kind is np.ndarray:
            is_real = item.dtype.kind == "f"
        else:
            is_real = item.is_floating_point() and item.layout == torch.strided and not item.is_meta
        if not is_real:
            raise ValueError(f"`image` holds {item.dtype}: pass real numbers in [0, 1], divide an 8-bit image by 255.")


class PriorInputsMixin:
    """Pictures and codes of the user's own, in the form that the first stage with a prior needs."""

    vae: Any
    transformer: Any
    latent_embedder: Any
    code_transformer: Any
    code_scheduler: Any
    image_processor: Any
    spatial_factor: int

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        channels = self.transformer.config.in_channels
        return channels, height // self.spatial_factor, width // self.spatial_factor

    def choose_prior_source(self, prior_source: str | None, codes: Any, image: Any) -> str:
        """Where the first prior comes from: `"codes"` or `"stage"`, which stands for a user's picture as well.

        Raises:
            ValueError: if the arguments contradict each other, or codes need a code model that is not there.
        """
        check_choice("prior_source", prior_source, ("codes", "stage", None))
        if image is not None and (codes is not None or prior_source == "codes"):
            raise ValueError("`image` and codes are both in the place of stage 1: pass one of them.")
        if codes is not None and prior_source == "stage":
            raise ValueError("`codes` are given but `prior_source` is 'stage': leave one of them out.")
        if image is not None:
            return "stage"
        if prior_source == "codes" and codes is None and self.code_transformer is None:
            raise ValueError(
                "`prior_source` is 'codes' but this pipeline has no code model: train one with `diffusers-dod "
                "train-codes`, pass `codes`, or use 'stage'."
            )
        has_codes = codes is not None or self.code_transformer is not None
        return prior_source or ("codes" if has_codes else "stage")

    def prepare_image_latents(
        self,
        image: PriorImage,
        batch_size: int,
        num_images_per_prompt: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> torch.Tensor:
        """Latents of a user's own picture, which stand for the sample of stage 1.

        Args:
            image: one picture for all samples, one for each label or one for each sample: PIL, array or tensor in
                [0, 1], or latents. A tensor of exactly the latents' shape is taken as latents; without a VAE, where
                pictures have that shape too, one with negative values is.
            batch_size (`int`): samples.
            num_images_per_prompt (`int`): samples per label.
            height (`int`):
                of the samples; PIL pictures are cropped to their size, turned as their EXIF orientation says and laid on
                white where they are transparent.
            width (`int`): of the samples.

        Raises:
            ValueError: for a picture that is not in [0, 1], not finite, or does not fit the model or the batch; for a PIL
                picture of more than 8 bits per channel, 50 megapixels, or sides of 50 to 1.
        """
        latent_shape = self._latent_shape(height, width)
        check_image(image, is_gray=self.image_processor.config.do_convert_grayscale)
        if torch.is_tensor(image) and (
            tuple(image.shape[-3:]) == latent_shape if self.vae is not None else bool((image < 0).any())
        ):
            image_latents = (image if image.ndim == 4 else image[None]).to(device=device, dtype=dtype)
        else:
            is_pil = isinstance(image[0] if isinstance(image, list) else image, PIL.Image.Image)
            if is_pil:
                image = prepare_pictures(image)
            pixels = self.image_processor.preprocess(image, height, width, resize_mode="crop" if is_pil else "default")
            channels = latent_shape[0] if self.vae is None else 3
            if pixels.shape[1] != channels:
                raise ValueError(
                    f"`image` has {pixels.shape[1]} channels: pass a picture of {channels}, or latents of {latent_shape}."
                )
            if pixels.abs().max() > 1.01:  # 1 and some rounding
                raise ValueError("`image` holds values outside of [0, 1]: divide an 8-bit image by 255.")
            image_latents = encode_images(self.vae, pixels.to(device=device, dtype=dtype)).to(dtype)
        if not torch.isfinite(image_latents).all():
            raise ValueError("`image` holds NaN or infinite values, or the VAE made them of it.")

        num_labels = batch_size // num_images_per_prompt
        if image_latents.shape[0] == 1:
            image_latents = image_latents.expand(batch_size, -1, -1, -1)
        elif image_latents.shape[0] == num_labels:
            image_latents = image_latents.repeat_interleave(num_images_per_prompt, dim=0)
        if tuple(image_latents.shape) != (batch_size, *latent_shape):
            raise ValueError(
                f"`image` gives latents of {tuple(image_latents.shape)}; for these arguments they must be "
                f"{(batch_size, *latent_shape)}, with one picture or one for each label."
            )
        return image_latents

    def check_output_type(self, output_type: str) -> None:
        """Refuses what is no form of output, and pictures where the samples are latents."""
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        channels = self.transformer.config.in_channels
        if output_type == "pil" and self.vae is None and channels not in (1, 3):
            raise ValueError(
                f"This pipeline has no autoencoder and its samples have {channels} channels: they are latents, not pictures. "
                "Pass `output_type='latent'`, or load the pipeline with the `vae=` that the transformer was trained on."
            )

    def check_code_generation(self, height: int, width: int, num_inference_steps: int, guidance_scale: float) -> None:
        """Refuses what the code model cannot generate codes with: its scheduler, sizes and numbers."""
        check_count("code_num_inference_steps", num_inference_steps)
        check_numbers(code_guidance_scale=guidance_scale)
        scheduler, transformer = self.code_scheduler, self.code_transformer
        check_scheduler(type(scheduler), scheduler.config, transformer.config, "code_scheduler")
        grid = self.latent_embedder.code_grid(*self._latent_shape(height, width)[1:])
        check_code_grid(grid, transformer.config.patch_size, height, width)

    def check_code_noise_level(self, code_noise_level: float | None) -> None:
        """Refuses what is no level, or any level where the embedder reads none."""
        if code_noise_level is None:
            return
        check_shares(code_noise_level=code_noise_level)
        if not self.latent_embedder.config.noise_level_input:
            raise ValueError(
                "`code_noise_level` is given but this pipeline's latent embedder has no `noise_level_input`: leave it out."
            )

    def prepare_code_noise(
        self,
        code_noise_level: float | None,
        batch_size: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> dict[str, Any]:
        """Arguments of the embedder: fresh noise on the codes and its level, where it reads one."""
        config = self.latent_embedder.config
        if not config.noise_level_input:
            return {}
        rows, columns = self.latent_embedder.code_grid(*self._latent_shape(height, width)[1:])
        shape = (batch_size, rows * columns, config.bottleneck_dim)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return {
            "code_noise": noise,
            "noise_level": DEFAULT_CODE_NOISE_LEVEL if code_noise_level is None else code_noise_level,
        }

    def prepare_codes(
        self, codes: torch.Tensor, batch_size: int, height: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """A user's own codes: one set for all images, one per label or one per image."""
        grid = self.latent_embedder.code_grid(*self._latent_shape(height, width)[1:])
        shape = (batch_size, grid[0] * grid[1], self.latent_embedder.config.bottleneck_dim)
        if torch.is_tensor(codes) and codes.ndim == 3 and codes.shape[0] and batch_size % codes.shape[0] == 0:
            codes = codes.repeat_interleave(batch_size // codes.shape[0], dim=0)
        check_tensor("codes", codes, shape)
        return codes.to(device=device, dtype=dtype)
