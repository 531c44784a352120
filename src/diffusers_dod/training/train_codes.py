"""Trains a code model, which replaces a pipeline's stage 1: minutes on a CPU for small data.

    diffusers-dod train-codes outputs/mine --train_data_dir images --max_train_steps 4000 \\
        --output_dir outputs/mine-codes

The data are encoded to codes once, by the pipeline's own latent embedder, and kept in memory. `output_dir` receives the
whole pipeline with the code model; `DoDPipeline` then draws from codes by default. With cached latents
(`--latents_dir`), no images are encoded. Some images are held out: at the end the command prints the distances of
generated and of held-out codes to the nearest training code, and warns if the model copies.

Resuming, averages, logs, sample grids, signals and exit statuses are those of `diffusers-dod train`.
"""

import argparse
import os
import sys

from ..cli import Parser, json_object, number, run
from ..presets import PRESETS
from .options import (
    FRACTION,
    POSITIVE,
    SWITCH,
    Merge,
    add_data_options,
    add_optimisation_options,
    add_output_options,
    add_time_options,
    check_options,
    parse_with_recipe,
)
from .stopping import note_launcher


# What a training of a whole pipeline can also vary
UNUSED = {
    "streaming": False,
    "pretrained_model_name_or_path": None,
    "train": ["all"],
    "lora_rank": None,
    "preset": None,
    "transformer_config": None,
    "embedder_config": None,
    "vae_name_or_path": None,
    "prediction_type": "flow",
    "prior_drop": 1.0,
    "embedder_noise": 0.0,
    "bottleneck_noise": 0.0,
    "repa_encoder": None,
    "repa_layer": 1,
    "repa_weight": 0.0,
    "gradient_checkpointing": False,
}


def build_parser() -> Parser:
    parser = Parser(prog="diffusers-dod train-codes", description=__doc__)
    parser.add_argument("pipeline", help="the DoD pipeline: a folder or Hub repository")
    parser.add_argument("--recipe", help="YAML file of these options, under the same names; flags override it")
    add_data_options(parser, images=False)
    add = parser.add_argument_group("model").add_argument
    add("--code_preset", choices=list(PRESETS), help="size; default: the preset with the nearest transformer")
    add("--code_config", type=json_object, action=Merge, help="constructor arguments, JSON or a JSON file")
    guidance = "class guidance that calls of the pipeline apply by default; saved in its config"
    add("--code_guidance_scale", type=number(float, float("-inf")), default=1.0, help=guidance)
    add("--compile", action=SWITCH, default=False, help="compile the blocks")
    add = parser.add_argument_group("objective").add_argument
    add("--class_drop", type=FRACTION, default=0.1, help="share of rows without a class, for guidance")
    add_time_options(add)
    held_out = "share of images held out to test whether the model copies"
    add("--held_out", type=FRACTION, default=0.05, help=held_out)
    add("--encoding_batch_size", type=POSITIVE, default=256, help="images per forward of the embedder")
    add_optimisation_options(parser, images=False)
    add_output_options(parser)
    parser.set_defaults(
        **UNUSED,
        train_batch_size=256,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=100,
        ema_decay=[0.999],
    )
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    args = parse_with_recipe(build_parser(), argv)
    check_options(args)
    return args


def train_codes(argv: list[str]) -> int:
    note_launcher()
    args = parse_args(argv)
    from .codes import CodeTraining
    from .loop import train

    training = CodeTraining()
    status = train(args, training.build)
    if status == 0 and os.environ.get("RANK", "0") == "0":
        training.report(args)
    return status


def main(argv: list[str] | None = None) -> int:
    return run(train_codes, "diffusers-dod train-codes", argv)


if __name__ == "__main__":
    sys.exit(main())
