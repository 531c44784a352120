"""Tiny models for the tests, with random weights so that the parts which start at zero act too."""

import torch

from diffusers_dod import DoDLatentEmbedder, DoDTransformer2DModel


def randomize_weights(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Adds seeded noise to every parameter, in place, and puts the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_transformer(**overrides) -> DoDTransformer2DModel:
    config = {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_classes": 10,
    }
    torch.manual_seed(0)
    return randomize_weights(DoDTransformer2DModel(**{**config, **overrides}))


def tiny_embedder(**overrides) -> DoDLatentEmbedder:
    config = {
        "sample_size": 8,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "bottleneck_dim": 2,
        "output_dim": 16,
    }
    torch.manual_seed(0)
    return randomize_weights(DoDLatentEmbedder(**{**config, **overrides}))
