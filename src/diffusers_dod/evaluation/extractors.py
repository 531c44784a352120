"""Networks that turn images into features; any `nn.Module` of this interface can take their place.

An extractor maps uint8 images `(batch, 3, height, width)` to a dictionary of `features` `(batch, channels)`, and, where it
has them, `spatial` `(batch, channels)` for sFID and `logits` `(batch, classes)` for the Inception Score. Its `label` says in
every report what the figures were made with.
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModel

from ..tensor_files import load_tensors


# Channels of the spatial features of sFID (Nash et al. 2021, arXiv 2103.03841), as in ADM's evaluator.
SPATIAL_CHANNELS = 7


class InceptionExtractor(nn.Module):
    """The Inception network of FID, by torch-fidelity's port of the original TensorFlow graph.

    Args:
        weights (`str`, *optional*): file of torch-fidelity's weights; downloaded by it where none is given.
    """

    label = "inception-v3-compat (torch-fidelity)"

    def __init__(self, weights: str | None = None):
        super().__init__()
        try:
            from torch_fidelity import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError(
                "The Inception network needs torch-fidelity: `pip install torch-fidelity torchvision`."
            ) from error
        if weights is not None:
            load_tensors(Path(weights))  # torch-fidelity would run code in it
        names = ["2048", "logits_unbiased"]
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", names, feature_extractor_weights_path=weights
        )
        # ADM reads `mixed_6/conv:0`, the 1x1 branch of the third 17x17 block.
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features, logits = self.network(images)
        return {"features": features, "spatial": self.spatial, "logits": logits}


class TransformersExtractor(nn.Module):
    """A transformers vision model: FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675) with `facebook/dinov2-large`.

    Features are the pooled output, which for DINOv2 is the normalised class token. Images are resized bicubically to the
    square crop size of the model's image processor, whatever their aspect ratio, and normalised with its mean and
    standard deviation.

    Args:
        name_or_path (`str`): Hub model or folder of a model with a `pooler_output`, or with such a `vision_model`.
    """

    def __init__(self, name_or_path: str):
        super().__init__()
        self.label = Path(name_or_path).name if Path(name_or_path).is_dir() else name_or_path
        model = AutoModel.from_pretrained(name_or_path)
        self.network = getattr(model, "vision_model", model).eval()
        processor = AutoImageProcessor.from_pretrained(name_or_path)
        size = getattr(processor, "crop_size", None) or processor.size
        self.side = size.get("height") or size["shortest_edge"]
        self.image_mean: torch.Tensor
        self.image_std: torch.Tensor
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(getattr(processor, name)).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        pixels = F.interpolate(images.float() / 255, size=(self.side, self.side), mode="bicubic", antialias=True)
        pixels = (pixels.clamp(0, 1) - self.image_mean) / self.image_std
        pooled = getattr(self.network(pixel_values=pixels), "pooler_output", None)
        if pooled is None:
            raise ValueError(f"{self.label} has no pooled output, which the features are: take another model.")
        return {"features": pooled}
