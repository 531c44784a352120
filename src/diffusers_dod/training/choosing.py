"""What a run trains where the user names no size: resolution, patch, width, depth, bottleneck and the pace of learning.

The first row of `SIZES` is what the study measured on images of 28 and 32 pixels (`study/experiments.py`), patches of 7 and 8
with the network's output as the clean image (JiT, arXiv 2511.13720); the others are ours and not measured.
"""

import argparse
import io
import statistics
from typing import Any, NamedTuple

import PIL.Image

from ..cli import BadInput
from ..data.batches import TrainingData
from ..presets import PRESETS


class Size(NamedTuple):
    """Layers, heads and channels of a head of the transformer, and a learning rate for it."""

    layers: int
    heads: int
    head_dim: int
    learning_rate: float


# By tokens along a side, for up to `FEW_IMAGES` images
SIZES = {4: Size(4, 4, 32, 3e-3), 8: Size(6, 6, 32, 2e-3), 16: Size(8, 8, 32, 1e-3)}
FEW_IMAGES = 20_000
# Presets for more
PRESETS_BY_IMAGES = {"S": 200_000, "B": 1_000_000}
LARGEST_SIDE = 256  # of pixels without an autoencoder; larger images are scaled down
NUM_LOOKED_AT = 100


def tokens_per_side(size: int) -> int:
    """Tokens along a side of latents, or images in pixel space, of `size`: few, for small ones are learnt in minutes."""
    return 4 if size <= 32 else 8 if size <= 64 else 16


def choose_resolution(data: TrainingData, factor: int) -> int:
    """A side of the training images that a patch divides: near the median of the images' shorter sides, 256 at most."""
    if data.size is None:  # a stream is not read in advance
        return LARGEST_SIDE
    sides = [_short_side(data.rows[row]["image"]) for row in range(0, data.size, max(1, data.size // NUM_LOOKED_AT))]
    side = min(LARGEST_SIDE, int(statistics.median(sides)))
    return fitting_side(side, factor)


def fitting_side(side: int, factor: int = 1) -> int:
    """The side at or below `side` that makes the wanted number of tokens, for an autoencoder of that factor."""
    multiple = tokens_per_side(side // factor) * factor
    return max(multiple, side // multiple * multiple)


def _short_side(image: dict) -> int:
    source = image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
    with PIL.Image.open(source) as picture:
        return min(picture.size)


def choose_patch(size: int, is_pixels: bool) -> int:
    """The patch whose tokens are nearest to [`tokens_per_side`]; latents of an autoencoder have patches of 2 at most."""
    if not is_pixels:
        return 2 if size % 2 == 0 and size > 16 else 1
    wanted = tokens_per_side(size)
    patch = min((patch for patch in range(1, size + 1) if size % patch == 0), key=lambda p: abs(size / p - wanted))
    if 2 * (size // patch) < wanted:
        raise BadInput(
            f"a patch that divides {size} leaves {size // patch}x{size // patch} tokens: give a --resolution of "
            f"{fitting_side(size)}, or the patch as --transformer_config"
        )
    return patch


def choose_size(num_images: int | None, tokens: int, device_type: str) -> tuple[str | None, Size]:
    """A preset's name, if it is one, and a size, from the number of images and the device."""
    if device_type != "cpu" and (num_images is None or num_images > FEW_IMAGES):
        name = next((name for name, most in PRESETS_BY_IMAGES.items() if (num_images or FEW_IMAGES) <= most), "XL")
        shape = PRESETS[name].transformer
        return name, Size(shape["num_layers"], shape["num_attention_heads"], shape["attention_head_dim"], 1e-4)
    return None, SIZES[min(SIZES, key=lambda side: abs(side - tokens))]


def choose_models(
    args: argparse.Namespace, size: int, is_pixels: bool, num_images: int | None, device_type: str
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Constructor arguments of transformer and embedder for latents of `size`, and a line for each choice.

    Entries of `args.transformer_config` and `args.embedder_config` replace the chosen ones. Fills in `args.learning_rate`,
    and `args.logit_mean` for patches of many numbers, where they are not given.
    """
    given, given_embedder = args.transformer_config or {}, args.embedder_config or {}
    patch = given.get("patch_size") or choose_patch(size, is_pixels)
    tokens = size // patch
    preset, shape = choose_size(num_images, tokens, device_type)
    # The codes' grid has half of the tokens' sides where that is a whole number, but 4x4 for a code model (docs/evidence.md).
    is_for_codes = args.prior_drop < 0.5
    code_patch = 2 * patch if tokens % 2 == 0 and not (is_for_codes and tokens <= 4) else patch
    is_wide = is_pixels and patch >= 4 and args.prediction_type in (None, "flow")
    transformer = {
        "patch_size": patch,
        "num_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "attention_head_dim": shape.head_dim,
        "x_prediction": is_wide,
        **given,
    }
    if preset is None:
        embedder: dict[str, Any] = {"num_encoder_layers": 2, "num_decoder_layers": 1, "num_attention_heads": 2}
        embedder |= {"attention_head_dim": 32, "bottleneck_dim": 4}
    else:
        embedder = {key: value for key, value in PRESETS[preset].latent_embedder.items() if key != "output_dim"}
    embedder["patch_size"] = code_patch
    if is_for_codes:
        embedder["noise_level_input"] = True
    embedder |= given_embedder

    images = "a stream" if num_images is None else f"{num_images:,} images"
    name = "" if preset is None else f"preset {preset}, "
    grid = size // embedder["patch_size"]
    noise = ", with noise whose level is an input" if embedder.get("noise_level_input") else ""
    unit = "pixels" if is_pixels else "latents"
    lines = [
        f"Patch: {patch}x{patch} {unit}, {tokens}x{tokens} tokens, for {size}x{size} {unit} (--transformer_config).",
        f"Size: {name}{shape.layers} layers of width {shape.heads * shape.head_dim}, for "
        f"{images if preset else f'{tokens}x{tokens} tokens'} (--preset).",
        f"Codes: {grid}x{grid} of {embedder.get('bottleneck_dim', 4)} numbers, for "
        f"{'a code model' if is_for_codes else 'two stages'}{noise} (--prior_drop, --embedder_config).",
    ]
    if args.learning_rate is None:
        args.learning_rate = shape.learning_rate
        lines.append(f"Learning rate: {shape.learning_rate:g} (--learning_rate).")
    if is_wide:
        if args.logit_mean is None and args.timestep_density in (None, "logit_normal"):
            args.logit_mean = 0.4
            lines.append("Noise: more than by default, with a mean of 0.4 (--logit_mean).")
        if "x_prediction" not in given:
            lines.append(
                "Output: the clean image, because a patch holds many numbers (x_prediction); the loss is the same."
            )
    return transformer, embedder, lines
