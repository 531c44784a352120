"""Diffusion on Diffusion (Yue et al. 2024, arXiv 2410.08531) for Hugging Face diffusers."""

from .latent_embedder_dod import DoDLatentEmbedder, DoDLatentEmbedderOutput
from .pipeline_dod import DoDPipeline, DoDPipelineOutput
from .transformer_dod import DoDTransformer2DModel


__version__ = "0.1.0"

__all__ = [
    "DoDLatentEmbedder",
    "DoDLatentEmbedderOutput",
    "DoDPipeline",
    "DoDPipelineOutput",
    "DoDTransformer2DModel",
]
