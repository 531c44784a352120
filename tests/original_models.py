"""The originals that `diffusers_dod.conversion` converts: the parity data of `conversion/checkpoints`, and diffusers' DiT itself."""

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
    source = {"repa": "sit"}.get(name, name.split("_")[0])
    return Original(weights, tensors, source, {"num_attention_heads": heads, "in_channels": latents.shape[1]})


def relative_error(output, expected):
    """The largest of the rows' errors, each over the row's own norm."""
    return ((output - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()


def diffusers_dit(num_classes=10, **overrides):
    """A `DiTTransformer2DModel` with random weights; its blocks share the embeddings, as in every published one."""
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "sample_size": 8}
    model = DiTTransformer2DModel(**config | {"num_embeds_ada_norm": num_classes} | overrides)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            std = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    first, *others = model.transformer_blocks
    for block in others:
        block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model.eval()
