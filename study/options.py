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


class NoisyCodesLinear(nn.Linear):
    """A linear layer that also reads the noise level of its input, a number or one per row, `(batch,)`."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.level_embed = nn.Sequential(
            nn.Linear(1, out_features), nn.SiLU(), nn.Linear(out_features, out_features, bias=False)
        )
        self.level: torch.Tensor | float = 0.0

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        level = torch.as_tensor(self.level, device=codes.device, dtype=codes.dtype).expand(len(codes))
        return super().forward(codes) + self.level_embed(level[:, None, None])


class NoiseLevelEmbedder(DoDLatentEmbedder):
    """Its decoder knows how noisy the codes are (conditioning augmentation, Ho et al. 2021, arXiv 2106.15282)."""

    def __init__(self, **config: Any):
        super().__init__(**config)
        self.from_codes = NoisyCodesLinear(self.from_codes.in_features, self.from_codes.out_features)


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
