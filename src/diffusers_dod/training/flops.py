"""Floating-point operations of the models, for throughput and utilisation (MFU), counted by PyTorch on the meta device."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..latent_embedder_dod import DoDLatentEmbedder
from ..transformer_dod import DoDTransformer2DModel


# Dense bfloat16 or float16 TFLOP/s of whole devices, from NVIDIA's data sheets; `torch.cuda.get_device_name` holds the key.
PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "H200": 989.4,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
}


def _latents(config: dict, size: int | tuple[int, int] | None) -> torch.Tensor:
    size = config["sample_size"] if size is None else size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.empty(1, config["in_channels"], height, width, device="meta")


@torch.no_grad()
def transformer_flops(model: DoDTransformer2DModel, size: int | tuple[int, int] | None = None) -> int:
    """Of one sample's forward pass: matrix multiplications, two operations per multiply-accumulate.

    Args:
        model ([`DoDTransformer2DModel`]): the model; only its config is read.
        size (`int` or pair of `int`, *optional*): of the latents, the model's `sample_size` by default.
    """
    with torch.device("meta"):
        copy = DoDTransformer2DModel.from_config(model.config)
        time, label = torch.empty(1), torch.empty(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        copy(_latents(model.config, size), time, label)
    return counter.get_total_flops()


@torch.no_grad()
def embedder_flops(model: DoDLatentEmbedder, size: int | tuple[int, int] | None = None) -> int:
    """Of one sample's forward pass, as [`transformer_flops`]."""
    with torch.device("meta"):
        copy = DoDLatentEmbedder.from_config(model.config)
    with FlopCounterMode(display=False) as counter:
        copy(_latents(model.config, size))
    return counter.get_total_flops()


def training_flops(
    transformer: DoDTransformer2DModel, embedder: DoDLatentEmbedder | None, prior_share: float
) -> float:
    """Of one sample in training, forward and backward: three forward passes, the usual count for MFU.

    What gradient checkpointing computes again is not useful work and is left out, and so is the autoencoder.

    Args:
        transformer ([`DoDTransformer2DModel`]): the transformer.
        embedder ([`DoDLatentEmbedder`], *optional*): the embedder.
        prior_share (`float`): share of rows on which the embedder runs.
    """
    embedding = 0.0 if embedder is None else prior_share * embedder_flops(embedder)
    return 3 * (transformer_flops(transformer) + embedding)
