"""The originals that `diffusers_dod.conversion` converts: the parity data of `conversion/checkpoints`, and diffusers' DiT itself."""

import json
import random
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiTTransformer2DModel
from safetensors import safe_open

from diffusers_dod.conversion import convert_backbone


CHECKPOINTS = Path(__file__).parent / "conversion" / "checkpoints"


class Original(NamedTuple):
    """A file of `conversion/checkpoints`: `weights` under the original names, the other tensors, and what `convert_backbone` takes."""

    weights: dict
    tensors: dict
    source: str
    options: dict

    def convert(self, weights=None, **options):
        return convert_backbone(self.weights if weights is None else weights, self.source, **self.options | options)


def load_original(name):
    with safe_open(CHECKPOINTS / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        heads = int(file.metadata()["num_attention_heads"])
    weights = {key.removeprefix("weights."): tensors.pop(key) for key in list(tensors) if key.startswith("weights.")}
    latents = next(tensor for key, tensor in tensors.items() if key.endswith("latents"))
    source = {"repa": "sit", "repae": "sit"}.get(name, name.split("_")[0])
    options = {"num_attention_heads": heads, "in_channels": latents.shape[1]}
    if name == "jit_noise_scale":
        options["noise_scale"] = 2.0
    return Original(weights, tensors, source, options)


def of_channels(weights, channels):
    """The first channels of a model whose patches are single latents."""
    cut = weights | {"x_embedder.proj.weight": weights["x_embedder.proj.weight"][:, :channels].clone()}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias", "bn.running_mean", "bn.running_var"):
        if name in weights:
            cut[name] = weights[name][:channels].clone()
    return cut


def _spread(name, shape):
    """The values of an autoencoder's tensor: uniform, from its name, in the order of Python's generator."""
    generator, count = random.Random(name), 1
    for size in shape:
        count *= size
    values = torch.tensor([2 * generator.random() - 1 for _ in range(count)]).reshape(shape)
    if len(shape) > 1:
        return values * (3 * shape[0] / count) ** 0.5
    return 1 + 0.3 * values if name.endswith("weight") else 0.3 * values


def load_autoencoder(name):
    """Weights under the original names and the other tensors of a file of `conversion/checkpoints`."""
    with safe_open(CHECKPOINTS / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        shapes = json.loads(file.metadata()["shapes"])
    return {key: _spread(key, shape) for key, shape in shapes.items()}, tensors


def relative_error(output, expected):
    """The largest of the rows' errors, each over the row's own norm."""
    return ((output - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()


def diffusers_dit(num_classes=10, **overrides):
    """A `DiTTransformer2DModel` with random weights; its blocks share the embeddings, as in every published one.

    It computes as the original DiT does, from which diffusers' class departs in two constants.
    """
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "sample_size": 8}
    model = DiTTransformer2DModel(**config | {"num_embeds_ada_norm": num_classes} | overrides)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    first, *others = model.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model.eval()
