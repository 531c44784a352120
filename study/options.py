"""What the study tries in the models beside what the package has."""

from typing import Any

import torch
import torch.nn as nn

from diffusers_dod import DoDLatentEmbedder, DoDTransformer2DModel


class QuantisedEmbedder(DoDLatentEmbedder):
    """Codes of finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505), `levels` per channel in [-1, 1]."""

    levels = 8

    def encode(self, latents: torch.Tensor) -> torch.Tensor:
        codes, half = torch.tanh(super().encode(latents)), (self.levels - 1) / 2
        return codes + ((codes * half).round() / half - codes).detach()


class PresenceEmbedding(nn.Embedding):
    """Class embeddings, to which rows with a prior add a learned vector; `present` is `(batch, 1)`."""

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__(num_embeddings, embedding_dim)
        self.presence = nn.Parameter(torch.zeros(embedding_dim))
        self.present: torch.Tensor | float = 0.0

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        return super().forward(labels) + self.present * self.presence


class PresenceTransformer(DoDTransformer2DModel):
    """Its conditioning says whether a prior is present."""

    def __init__(self, **config: Any):
        super().__init__(**config)
        self.class_embed = PresenceEmbedding(self.class_embed.num_embeddings, self.class_embed.embedding_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        prior = encoder_hidden_states
        self.class_embed.present = 0.0 if prior is None else prior.ne(0).any(dim=(1, 2)).to(prior.dtype)[:, None]
        return super().forward(hidden_states, timestep, class_labels, prior, **options)
