"""The model sizes that papers compare, as constructor arguments.

B, XL and 3B are FiTv2's backbones (Wang et al. 2024, arXiv 2410.13925); XL is that of DoD-XL. S and L are ours: DiT's
widths (Peebles & Xie 2022, arXiv 2212.09748) with FiTv2's ratio of depths. The embedders are ours too.
"""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """Constructor arguments of one model size, without those that depend on the data, such as `sample_size`.

    Args:
        transformer (`dict`): for [`DoDTransformer2DModel`].
        latent_embedder (`dict`): for the [`DoDLatentEmbedder`] that fits this transformer.
        code_transformer (`dict`):
            for the code model, a [`DoDTransformer2DModel`] with 2 to 4 % of the transformer's parameters.
    """

    transformer: dict[str, Any]
    latent_embedder: dict[str, Any]
    code_transformer: dict[str, Any]


def _preset(
    layers: int,
    heads: int,
    head_dim: int,
    embedder_layers: int,
    embedder_heads: int,
    embedder_head_dim: int,
    code_layers: int,
    code_heads: int,
) -> Preset:
    return Preset(
        transformer={"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim},
        latent_embedder={
            "num_encoder_layers": embedder_layers,
            "num_decoder_layers": embedder_layers,
            "num_attention_heads": embedder_heads,
            "attention_head_dim": embedder_head_dim,
            "output_dim": heads * head_dim,
        },
        code_transformer={"num_layers": code_layers, "num_attention_heads": code_heads, "attention_head_dim": 64},
    )


PRESETS = {
    "S": _preset(15, 6, 64, 2, 6, 32, 4, 2),
    "B": _preset(15, 12, 64, 4, 8, 32, 6, 3),
    "L": _preset(30, 16, 64, 4, 16, 24, 8, 5),
    "XL": _preset(36, 16, 72, 4, 16, 24, 8, 6),
    "3B": _preset(40, 24, 96, 4, 24, 32, 12, 10),
}
"""A [`Preset`] by name, from `"S"` to `"3B"`; used as in `DoDTransformer2DModel(**PRESETS["B"].transformer)`."""


def nearest_preset(width: int) -> str:
    """The preset whose transformer's width is nearest."""
    return min(PRESETS, key=lambda name: abs(PRESETS[name].latent_embedder["output_dim"] - width))
