"""Patch features of a vision model, which representation alignment (REPA) draws hidden states to."""

import inspect
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel


def _input_side(image: int, tokens: int, patch: int) -> int:
    """Pixels that the encoder sees along one side.

    The most that the image has and whose patches fall on the transformer's tokens, one or several per token: 256 pixels
    and 16 tokens make 224 for patches of 14, as in the paper. A grid finer than the encoder's own takes all it has.
    """
    aligned = image // (tokens * patch) * (tokens * patch)
    return aligned or max(image // patch, 1) * patch


class REPAEncoder(nn.Module):
    """A frozen vision transformer of transformers as the source of features: DINOv2, DINOv3, ViT, CLIP, SigLIP, ...

    Args:
        model (`PreTrainedModel`): a vision model of square patches, or one with such a `vision_model`.
        image_mean (`list` of `float`): mean by which images in [0, 1] are normalized.
        image_std (`list` of `float`): standard deviation, likewise.

    Raises:
        ValueError: if the model has no patches of one size.
    """

    def __init__(self, model: PreTrainedModel, image_mean: list[float], image_std: list[float]):
        super().__init__()
        model = getattr(model, "vision_model", model)
        patch_size = getattr(model.config, "patch_size", None)
        if not isinstance(patch_size, int):
            raise ValueError(f"{type(model).__name__} is no vision transformer of square patches, REPA needs one.")
        self.patch_size, self.width = patch_size, int(model.config.hidden_size)
        self.model = model.float().requires_grad_(False).eval()
        interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        # The others, such as DINOv2, fit their positions to any size unasked.
        self._options = {"interpolate_pos_encoding": True} if interpolates else {}
        self.mean: torch.Tensor
        self.std: torch.Tensor
        for name, values in (("mean", image_mean), ("std", image_std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1))

    @classmethod
    def from_pretrained(cls, name_or_path: str, **kwargs: Any) -> "REPAEncoder":
        """Loads model and image normalization.

        Args:
            name_or_path (`str`): a folder or repository of transformers with an image processor.
            kwargs: passed on to `AutoModel.from_pretrained` and `AutoImageProcessor.from_pretrained`.
        """
        processor = AutoImageProcessor.from_pretrained(name_or_path, **kwargs)
        return cls(AutoModel.from_pretrained(name_or_path, **kwargs), processor.image_mean, processor.image_std)

    def train(self, mode: bool = True) -> "REPAEncoder":
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The last hidden states of the patches, without class and register tokens.

        Args:
            images (`torch.Tensor`): `(batch, 3 or 1, height, width)` in [-1, 1].
            grid (pair of `int`): rows and columns of the transformer's tokens.

        Returns:
            `torch.Tensor`: `(batch, rows * columns, width)`.

        Raises:
            ValueError: if the model does not give one token per patch.
        """
        sides = [_input_side(side, tokens, self.patch_size) for side, tokens in zip(images.shape[-2:], grid)]
        images = (images.float() / 2 + 0.5).expand(-1, 3, -1, -1)
        if sides != list(images.shape[-2:]):
            images = F.interpolate(images, sides, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        tokens = self.model(pixel_values=(images - self.mean) / self.std, **self._options).last_hidden_state
        rows, columns = (side // self.patch_size for side in sides)
        # In front of the patches stand the class token and the registers of those models that have them.
        if tokens.ndim != 3 or tokens.shape[1] < rows * columns:
            raise ValueError(
                f"{type(self.model).__name__} returns {tuple(tokens.shape)} for {rows}x{columns} patches, REPA needs a "
                "vision transformer that keeps its patches."
            )
        features = tokens[:, -rows * columns :]
        if (rows, columns) != tuple(grid):
            features = features.transpose(1, 2).unflatten(2, (rows, columns))
            features = F.interpolate(features, grid, mode="bilinear", antialias=True, align_corners=False)
            features = features.flatten(2).transpose(1, 2)
        return features
