"""Tiny models with weights that act: the parts that start at zero are randomised too."""

import torch

from diffusers_dod import DoDLatentEmbedder, DoDTransformer2DModel


def _randomize(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def tiny_transformer(**overrides) -> DoDTransformer2DModel:
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_classes": 3,
    }
    return _randomize(DoDTransformer2DModel(**{**config, **overrides}))


def tiny_embedder(**overrides) -> DoDLatentEmbedder:
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "bottleneck_dim": 2,
        "output_dim": 16,
    }
    return _randomize(DoDLatentEmbedder(**{**config, **overrides}))
