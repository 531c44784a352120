"""Diffusion on Diffusion (Yue et al. 2024, arXiv 2410.08531) for Hugging Face diffusers."""

from typing import TYPE_CHECKING

from ._lazy import lazy_names


if TYPE_CHECKING:
    from .latent_embedder_dod import DoDLatentEmbedder, DoDLatentEmbedderOutput
    from .modular_dod import DoDStages
    from .pipeline_dod import DoDPipeline, DoDPipelineOutput
    from .transformer_dod import DoDTransformer2DModel, DoDTransformer2DModelOutput

__version__ = "0.1.0"

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "latent_embedder_dod": ["DoDLatentEmbedder", "DoDLatentEmbedderOutput"],
        "modular_dod": ["DoDStages"],
        "pipeline_dod": ["DoDPipeline", "DoDPipelineOutput"],
        "transformer_dod": ["DoDTransformer2DModel", "DoDTransformer2DModelOutput"],
    },
)
