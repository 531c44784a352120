"""Representation alignment (REPA, Yu et al. 2024, arXiv 2410.06940): a loss that draws hidden states to a vision model.

    encoder = REPAEncoder.from_pretrained("facebook/dinov2-base")
    projector = REPAProjector(transformer.inner_dim, encoder.width)
    features = encoder(images, grid=(16, 16))              # or those that were cached beside the latents
    loss = dod_loss(transformer, latent_embedder, latents, labels, example, prior_rows, hidden_states_layer=8)
    total = loss.total + 0.5 * repa_loss(projector(loss.hidden_states), features)

The projector is trained along and is not needed afterwards.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from ..arguments import check_rows, check_sizes
from ..data.features import REPAEncoder


__all__ = ["REPAEncoder", "REPAProjector", "repa_loss"]


class REPAProjector(ModelMixin, ConfigMixin):
    """The paper's three-layer MLP from hidden states to features.

    Parameters:
        in_dim (`int`): The transformer's width.
        out_dim (`int`): The features' width.
        hidden_dim (`int`, defaults to 2048): Width of the layers between.
    """

    @register_to_config
    def __init__(self, in_dim: int, out_dim: int, hidden_dim: int = 2048):
        super().__init__()
        check_sizes(in_dim=in_dim, out_dim=out_dim, hidden_dim=hidden_dim)
        self.layers = nn.Sequential(
            *(nn.Linear(in_dim, hidden_dim), nn.SiLU()),
            *(nn.Linear(hidden_dim, hidden_dim), nn.SiLU()),
            nn.Linear(hidden_dim, out_dim),
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): `(batch, tokens, in_dim)`.

        Returns:
            `torch.Tensor`: `(batch, tokens, out_dim)`.
        """
        return self.layers(hidden_states)


def repa_loss(projected: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Negative cosine similarity of the tokens, from -1 (aligned) to 1, averaged over tokens and batch in float32.

    Args:
        projected (`torch.Tensor`): `(batch, tokens, width)`.
        features (`torch.Tensor`): `(batch, tokens, width)`.

    Raises:
        ValueError: if their shapes differ.
    """
    check_rows((None,) * 3, projected=projected, features=features)
    if projected.shape != features.shape:
        raise ValueError(
            f"`projected` is {tuple(projected.shape)} but the features are {tuple(features.shape)}: encode "
            "them for the transformer's token grid, and give the projector their width."
        )
    return -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean()
