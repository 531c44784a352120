"""Floating-point operations of the models, for throughput and utilisation (MFU)."""

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


def _token_grid(size: int | tuple[int, int], patch_size: int) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    return (height // patch_size) * (width // patch_size)


def _block_flops(tokens: int, dim: int, mlp_ratio: float) -> int:
    hidden = int(dim * mlp_ratio) * 2 // 3
    projections = 4 * dim * dim
    feed_forward = dim * 2 * hidden + hidden * dim  # SwiGLU's input has a gate
    attention = 2 * tokens * dim  # scores and their sum over values, for each query
    return 2 * tokens * (projections + feed_forward + attention)


def transformer_flops(model: DoDTransformer2DModel, size: int | tuple[int, int] | None = None) -> int:
    """Of one sample's forward pass: matrix multiplications, two operations a multiply-accumulate.

    Args:
        model ([`DoDTransformer2DModel`]): the model.
        size (`int` or pair of `int`, *optional*): of the latents, the model's `sample_size` by default.
    """
    config, dim = model.config, model.inner_dim
    tokens = _token_grid(config.sample_size if size is None else size, config.patch_size)
    rank = dim // 4 if config.adaln_rank is None else config.adaln_rank
    patch = config.patch_size**2
    embedding = 2 * (256 * dim + dim * dim + 6 * dim * dim + 2 * dim * dim)  # time, shared and last modulation
    ends = 2 * tokens * dim * patch * (config.in_channels + model.out_channels)
    modulation = 2 * (dim * rank + rank * 6 * dim)
    return embedding + ends + config.num_layers * (modulation + _block_flops(tokens, dim, config.mlp_ratio))


def embedder_flops(model: DoDLatentEmbedder, size: int | tuple[int, int] | None = None) -> int:
    """Of one sample's forward pass, as [`transformer_flops`]."""
    config = model.config
    size = config.sample_size if size is None else size
    dim = config.num_attention_heads * config.attention_head_dim
    tokens, output_tokens = _token_grid(size, config.patch_size), _token_grid(size, model.output_patch_size)
    encoder = tokens * dim * (config.in_channels * config.patch_size**2 + config.bottleneck_dim)
    decoder = output_tokens * dim * (config.bottleneck_dim + config.output_dim)
    blocks = config.num_encoder_layers * _block_flops(tokens, dim, config.mlp_ratio)
    blocks += config.num_decoder_layers * _block_flops(output_tokens, dim, config.mlp_ratio)
    return 2 * (encoder + decoder) + blocks


def training_flops(transformer: DoDTransformer2DModel, embedder: DoDLatentEmbedder, prior_share: float) -> float:
    """Of one sample in training, forward and backward: three forward passes, the usual count for MFU.

    What gradient checkpointing computes again is not useful work and is left out, and so is the autoencoder.

    Args:
        transformer ([`DoDTransformer2DModel`]), embedder ([`DoDLatentEmbedder`]): the models.
        prior_share (`float`): share of rows on which the embedder runs.
    """
    return 3 * (transformer_flops(transformer) + prior_share * embedder_flops(embedder))
