"""Our models with random weights where they would start at zero, for tests that compare outputs of fresh models."""

from functools import wraps

import torch

from diffusers_dod import DoDLatentEmbedder, DoDTransformer2DModel


def _add_noise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


class RandomStartTransformer(DoDTransformer2DModel):
    @wraps(DoDTransformer2DModel.__init__)  # diffusers reads a class's config from this signature
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _add_noise(self)


class RandomStartEmbedder(DoDLatentEmbedder):
    @wraps(DoDLatentEmbedder.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _add_noise(self)
