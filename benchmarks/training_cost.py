"""What it costs to train from published weights: the figures at the head of three of `examples/recipes/`.

    python benchmarks/training_cost.py

Estimated, not measured: floating-point operations of the models at their published sizes, over what an H100 did in the training
of DoD-XL/2 (`results-h100.json`). Where the transformer is frozen but for a LoRA, its own weights' gradients are left out.
Without the autoencoder, whose latents are cached, and without sample grids.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch

from diffusers_dod import DoDLatentEmbedder, DoDTransformer2DModel
from diffusers_dod.conversion.converting import make_embedder, nearest_preset
from diffusers_dod.training.codes import default_code_config
from diffusers_dod.training.flops import PEAK_TFLOPS, embedder_flops, training_flops, transformer_flops


BATCH, PRIOR_SHARE = 256, 0.5
STEPS = {"embedder and LoRA": 20_000, "code model": 50_000, "everything": 100_000}
XL = {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "adaln_type": "full", "qk_norm": None}
XL |= {"patch_size": 1, "in_channels": 32, "sample_size": 16, "prediction_type": "flow"}
PUBLISHED = {
    "lightningdit": XL | {"pos_embed_type": "rope_sincos", "norm_type": "rms_norm"},
    "repae": XL | {"pos_embed_type": "sincos", "activation_fn": "gelu-approximate"},
    "jit": {
        "num_layers": 32,
        "num_attention_heads": 16,
        "attention_head_dim": 80,
        "adaln_type": "full",
        "qk_norm": "rms_norm",
        "norm_type": "rms_norm",
        "pos_embed_type": "rope_sincos",
        "patch_size": 16,
        "patch_bottleneck_dim": 256,
        "in_channels": 3,
        "sample_size": 256,
        "in_context_len": 32,
        "in_context_start": 10,
        "prediction_type": "flow",
        "x_prediction": True,
    },
}


def useful_flops() -> float:
    """Of an H100 in a second, in the training of DoD-XL/2."""
    rows = json.loads((Path(__file__).parent / "results-h100.json").read_text())["mfu"]["rows"]
    return PEAK_TFLOPS["H100"] * 1e12 * rows["training, MFU, DoD-XL/2, batch 256 in parts of 128"]


def build(name: str) -> tuple[DoDTransformer2DModel, DoDLatentEmbedder, DoDTransformer2DModel]:
    """Transformer, embedder and code model of a recipe, without memory."""
    with torch.device("meta"):
        transformer = DoDTransformer2DModel(**PUBLISHED[name])
        embedder = make_embedder(transformer, nearest_preset(transformer.inner_dim))
        config = default_code_config(SimpleNamespace(transformer=transformer, latent_embedder=embedder), None)
        codes = DoDTransformer2DModel(in_channels=embedder.config.bottleneck_dim, prediction_type="flow", **config)
    return transformer, embedder, codes


def lines(name: str) -> list[str]:
    """What the head of a recipe says."""
    transformer, embedder, codes = build(name)
    forward, embedding = transformer_flops(transformer), 3 * PRIOR_SHARE * embedder_flops(embedder)
    row = {
        "embedder and LoRA": 2 * forward + embedding,
        "code model": training_flops(codes, None, 0.0),
        "everything": 3 * forward + embedding,
    }
    hours = {what: row[what] * BATCH * steps / useful_flops() / 3600 for what, steps in STEPS.items()}
    return [
        f"Parameters with 1000 classes: transformer {transformer.num_parameters():,}, embedder {embedder.num_parameters():,}",
        f"H100 hours, estimated from FLOPs: embedder and LoRA {hours['embedder and LoRA']:.1f}, code model "
        f"{hours['code model']:.1f}, everything {hours['everything']:.0f}",
    ]


if __name__ == "__main__":
    for name in PUBLISHED:
        print(f"{name}.yaml", *lines(name), sep="\n  ")
