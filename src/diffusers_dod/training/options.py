"""The options of `diffusers-dod train`: from the command line, over those of a recipe, a YAML file of the same names."""

import argparse
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cli import BadInput, Parser, json_object, number
from ..presets import PRESETS


# What a resumed run may change.
FREE_KEYS = frozenset(
    "recipe output_dir resume_from_checkpoint max_train_steps checkpointing_steps checkpoints_total_limit "
    "keep_checkpoint_at validation_steps report_to cache_dir dataloader_num_workers on_broken_image compile gradient_checkpointing evaluation_samples "
    "evaluation_reference evaluation_extractor push_to_hub hub_model_id hub_license hub_private_repo hub_push_checkpoints "
    "peak_tflops max_skipped_steps train_batch_size gradient_accumulation_steps num_processes".split()
)
# Entries of --transformer_config that give the size of the models
SIZE_ENTRIES = frozenset({"num_layers", "num_attention_heads", "attention_head_dim"})
# Those of diffusers.optimization that need no further arguments.
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


class Merge(argparse.Action):
    """Lays an object over the one given before, so that a flag changes single entries of a recipe."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **values})


# What `--train` can name
TRAINED_PARTS = [["all"], ["transformer"], ["embedder"], ["lora"], ["embedder", "lora"]]


def trained_parts(text: str) -> list[str]:
    parts = sorted(set(text.split(",")))
    if parts not in TRAINED_PARTS:
        choices = ", ".join(",".join(parts) for parts in TRAINED_PARTS)
        raise argparse.ArgumentTypeError(f"{text!r} is none of {choices}")
    return parts


# Steps and images per step of a run that names neither these nor the size of its models, which `choosing.py` then chooses
STEPS, BATCH_SIZE = 4000, 64

SWITCH = argparse.BooleanOptionalAction
FRACTION, POSITIVE, INTEGER = number(float, 0, 1), number(int, 1), number(int, 0)
REAL, SIGNED = number(float, 0), number(float, float("-inf"))


def add_data_options(parser: Parser, images: bool = True) -> None:
    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="folder with one subfolder per class, or one that `datasets.save_to_disk` wrote")
    add("--dataset_name", help="Hub dataset; its `train` split is used")
    add("--dataset_config_name", help="configuration of that dataset")
    add("--latents_dir", help="cached latents of `diffusers-dod cache`, in place of images")
    add("--image_column", default="image", help="column of the images")
    add("--label_column", default="label", help="column of the classes")
    add("--num_classes", type=INTEGER, help="number of classes; default: the data's; 0: unconditional")
    add("--sampling", choices=("plain", "balanced"), default="plain", help="balanced draws classes equally often")
    add("--cache_dir", help="folder for downloads and prepared data; default: the caches of `datasets` and the Hub")
    resolution = "side in pixels, after ADM's centre crop; default: the model's"
    if images:
        resolution += " or the cached latents', else 256; near the images', at most 256, if the size is chosen"
    add("--resolution", type=POSITIVE, help=resolution)
    add("--random_flip", action=SWITCH, default=False, help="mirror images at random")
    add("--on_broken_image", choices=("skip", "stop"), default="stop", help="what to do with unreadable images")
    add("--dataloader_num_workers", type=INTEGER, default=0, help="processes that read images")
    if images:
        add(
            "--streaming",
            action=SWITCH,
            default=False,
            help="read during training instead of preparing everything first",
        )
        add("--shuffle_buffer_size", type=POSITIVE, default=1000, help="images that a stream shuffles at a time")


def add_time_options(add: Callable[..., Any], condition: str = "") -> None:
    add(
        "--timestep_density",
        choices=("logit_normal", "uniform", "mode"),
        help=f"distribution of sigma{condition}; default: logit_normal",
    )
    mean = "mean for logit_normal, above 0 is noisier; default: 0, or 0.4 where `train` chooses x_prediction"
    add("--logit_mean", type=SIGNED, help=mean)
    add("--logit_std", type=REAL, help="standard deviation for logit_normal; default: 1")
    add("--mode_scale", type=SIGNED, help="scale for mode; default: 1.29")
    add(
        "--weighting",
        choices=("none", "cosmap", "sigma_sqrt"),
        help=f"weight of the loss by sigma{condition}; default: none",
    )


def add_optimisation_options(parser: Parser, images: bool = True) -> None:
    add = parser.add_argument_group("optimisation").add_argument
    unnamed = "if the model's size is chosen automatically"
    help_of = dict.fromkeys(("steps", "batch", "rate"), "")
    if images:  # settled by `settle_pace`
        help_of = {
            "steps": f"; default: {STEPS} {unnamed}",
            "batch": f"; default: 16, or {BATCH_SIZE} {unnamed}",
            "rate": f"; default: 1e-4, or chosen {unnamed}",
        }
    steps = "optimisation steps of the whole run" + help_of["steps"]
    add("--max_train_steps", type=POSITIVE, required=not images, help=steps)
    batch = "images per process and accumulation step" + help_of["batch"]
    add("--train_batch_size", type=POSITIVE, help=batch)
    add("--gradient_accumulation_steps", type=POSITIVE, default=1, help="batches per process and optimisation step")
    optimizers = "adamw_8bit needs bitsandbytes"
    add("--optimizer", choices=("adamw", "adamw_fused", "adamw_8bit"), default="adamw", help=optimizers)
    add("--learning_rate", type=REAL, help="peak learning rate" + help_of["rate"])
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="learning-rate schedule")
    warmup = "linear warm-up steps of the learning rate; no effect with `constant`: use `constant_with_warmup`"
    add("--lr_warmup_steps", type=INTEGER, default=0, help=warmup)
    add("--adam_beta1", type=FRACTION, default=0.9, help="decay of the gradients' mean")
    add("--adam_beta2", type=FRACTION, default=0.999, help="decay of the squared gradients' mean")
    add("--adam_weight_decay", type=REAL, default=0.0, help="decoupled weight decay")
    add("--adam_epsilon", type=REAL, default=1e-8, help="added to Adam's denominator")
    add("--max_grad_norm", type=REAL, default=1.0, help="gradient clipping norm; 0 disables clipping")
    add("--spike_factor", type=REAL, help="skip updates whose gradient norm is above this multiple of its mean")
    add(
        "--max_skipped_steps",
        type=INTEGER,
        default=20,
        help="consecutive skipped updates (NaN, infinity, spikes) allowed",
    )
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: that of `accelerate launch`, else no")
    add("--ema", action=SWITCH, default=True, help="average the weights; the averages are the result")
    add(
        "--ema_decay",
        type=FRACTION,
        nargs="+",
        default=[0.9999],
        help="decays of the averages; the first is the result",
    )
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of everything random")


def add_output_options(parser: Parser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, help="folder of the run")
    add("--checkpointing_steps", type=POSITIVE, default=500, help="steps between checkpoints")
    add("--checkpoints_total_limit", type=POSITIVE, help="checkpoints to keep; default: all")
    add(
        "--keep_checkpoint_at",
        type=POSITIVE,
        nargs="+",
        default=[],
        metavar="STEP",
        help="also write checkpoints at these steps and never remove them, as weaker models for autoguidance",
    )
    add(
        "--resume_from_checkpoint",
        default="auto",
        help="checkpoint folder, or auto: the newest in --output_dir, if any",
    )
    add("--validation_steps", type=INTEGER, default=1000, help="steps between sample grids; 0: none")
    add(
        "--evaluation_samples",
        type=INTEGER,
        default=0,
        help="samples per stage for metrics, every --validation_steps; inception needs at least 10; 0: none",
    )
    add("--evaluation_reference", help="reference for these metrics: image folder, ADM .npz or dataset")
    add("--evaluation_extractor", default="inception", help="inception, or a transformers vision model")
    trackers = ("tensorboard", "wandb", "none")
    add("--report_to", choices=trackers, help="tracker of the logs; default: tensorboard where it is installed")
    add("--push_to_hub", action=SWITCH, default=False, help="push the result with a card; a failed push is a warning")
    add("--hub_model_id", help="repository; default: the name of --output_dir")
    add("--hub_license", help="licence of the model for its card, such as apache-2.0")
    add("--hub_private_repo", action=SWITCH, default=None, help="make a new repository private")
    add(
        "--hub_push_checkpoints",
        action=SWITCH,
        default=False,
        help="push at every checkpoint, while training continues",
    )
    add(
        "--peak_tflops",
        type=number(float, 1e-3),
        help="peak TFLOP/s of one device, for the MFU; default: by the GPU's name",
    )


def build_parser(description: str = "") -> Parser:
    parser = Parser(prog="diffusers-dod train", description=description)
    parser.add_argument("--recipe", help="YAML file of these options, under the same names; flags override it")
    add_data_options(parser)
    add = parser.add_argument_group("model").add_argument
    preset = "size of both models, see diffusers_dod.presets; default: chosen from the images and device, or XL if "
    preset += "--transformer_config has layers or heads"
    add("--preset", choices=list(PRESETS), help=preset)
    transformer = "constructor arguments, JSON or a JSON file; missing entries as in --preset or as chosen"
    add("--transformer_config", type=json_object, action=Merge, help=transformer)
    add("--embedder_config", type=json_object, action=Merge, help="the same for the latent embedder")
    add("--pretrained_model_name_or_path", help="a saved DoD pipeline to start from")
    add(
        "--train",
        type=trained_parts,
        help="all (default), transformer, embedder, lora or embedder,lora: the rest is frozen",
    )
    add(
        "--lora_rank",
        type=POSITIVE,
        help="rank of a LoRA on the transformer; implies --train embedder,lora unless --train is given",
    )
    add("--vae_name_or_path", help="diffusers autoencoder; default: that of --latents_dir, else none (pixel space)")
    add("--vae_subfolder", help="subfolder of the autoencoder")
    add("--gradient_checkpointing", action=SWITCH, default=False, help="less memory, more time")
    add("--compile", action=SWITCH, default=False, help="compile the blocks of both models")
    add = parser.add_argument_group("objective").add_argument
    add("--prediction_type", choices=("flow", "epsilon", "v_prediction"), help="default: the saved model's, or flow")
    add("--prior_drop", type=FRACTION, default=0.5, help="share of rows without a prior, which train stage 1")
    add("--class_drop", type=FRACTION, default=0.1, help="share of rows without a class")
    add_time_options(add, ", flow only")
    add("--embedder_noise", type=REAL, default=0.0, help="standard deviation of noise on what the embedder reads")
    add(
        "--bottleneck_noise",
        type=REAL,
        help="standard deviation of noise on the codes, relative to their size, or its maximum where the embedder reads "
        "the level; default: 0, or 1 where it reads it",
    )
    repa = "transformers vision model for representation alignment (REPA), or `cached` for features beside the latents"
    add("--repa_encoder", help=repa)
    add("--repa_weight", type=REAL, default=0.5, help="weight of the alignment loss")
    add("--repa_layer", type=POSITIVE, default=8, help="the transformer's block that is aligned, from 1")
    add_optimisation_options(parser)
    add_output_options(parser)
    return parser


def recipe_arguments(path: str, parser: Parser) -> list[str]:
    """A recipe as the flags that it stands for, so that both are checked alike."""
    import yaml

    from .recipes import load_recipe

    try:
        recipe = load_recipe(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise BadInput(f"--recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(recipe or {}, dict):
        raise BadInput(f"--recipe {path} must hold options, one `name: value` per line")
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "recipe")}
    flags: list[str] = []
    for name, value in (recipe or {}).items():
        if name not in known:
            raise BadInput(f"--recipe {path} has {name!r}, which is no option of this command")
        if value is None:
            continue  # as if it were not there
        is_switch = isinstance(known[name], argparse.BooleanOptionalAction)
        if isinstance(value, bool) != is_switch:
            takes = "true or false" if is_switch else "no true or false"
            raise BadInput(f"--recipe {path} has {name!r}: {value}, but it takes {takes}")
        if is_switch:
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def parse_args(argv: list[str], description: str | None = None) -> argparse.Namespace:
    args = parse_with_recipe(build_parser(description or ""), argv)
    check_options(args)
    settle_pace(args)
    return args


def names_no_size(args: argparse.Namespace) -> bool:
    """Whether the size of the models is left to `choosing.py`."""
    is_new = args.preset is None and args.pretrained_model_name_or_path is None
    return is_new and not SIZE_ENTRIES & set(args.transformer_config or {})


def settle_pace(args: argparse.Namespace) -> None:
    """Fills in steps, batch and learning rate; the last is left to `choosing.py` where the size is."""
    if not names_no_size(args):
        if args.max_train_steps is None:
            raise BadInput("give --max_train_steps, since the size of the models is given")
        args.train_batch_size = args.train_batch_size or 16
        args.learning_rate = 1e-4 if args.learning_rate is None else args.learning_rate
    args.max_train_steps = args.max_train_steps or STEPS
    args.train_batch_size = args.train_batch_size or BATCH_SIZE


def parse_with_recipe(parser: Parser, argv: list[str]) -> argparse.Namespace:
    finder = Parser(add_help=False)
    finder.add_argument("--recipe")
    recipe = finder.parse_known_args(argv)[0].recipe
    return parser.parse_args([*(recipe_arguments(recipe, parser) if recipe else []), *argv])


def check_options(args: argparse.Namespace) -> None:
    """Refuses options that contradict each other, or need a package that is missing; fills in `--train`."""
    if sum(getattr(args, name) is not None for name in ("train_data_dir", "dataset_name", "latents_dir")) != 1:
        raise BadInput("give one of --train_data_dir, --dataset_name and --latents_dir")
    for name in ("train_data_dir", "latents_dir"):
        if getattr(args, name) is not None:
            setattr(args, name, os.path.abspath(getattr(args, name)))
    if args.latents_dir is not None and args.streaming:
        raise BadInput("--latents_dir is not for --streaming: cached latents are read during training anyway")
    if args.repa_encoder is not None and (args.repa_encoder == "cached") != (args.latents_dir is not None):
        raise BadInput(
            "with --latents_dir, pass `--repa_encoder cached` (the features that `diffusers-dod cache --repa_encoder` "
            "stored); with images, pass the name of a vision model"
        )
    if (args.evaluation_samples > 0) != (args.evaluation_reference is not None):
        raise BadInput("--evaluation_samples and --evaluation_reference need each other")
    if args.push_to_hub and args.hub_license is None:
        raise BadInput("--push_to_hub needs --hub_license, such as apache-2.0, for the model card")
    if args.hub_push_checkpoints and not args.push_to_hub:
        raise BadInput("--hub_push_checkpoints means nothing without --push_to_hub")
    for name in ("preset", "transformer_config", "embedder_config", "vae_name_or_path"):
        if args.pretrained_model_name_or_path is not None and getattr(args, name) is not None:
            raise BadInput(f"--{name} and --pretrained_model_name_or_path exclude each other: the saved one is used")
    if args.streaming and args.sampling == "balanced":
        raise BadInput("--sampling balanced needs to know all images, so not --streaming")
    if args.sampling == "balanced" and args.num_classes == 0:
        raise BadInput("--sampling balanced draws classes equally often, but --num_classes is 0")
    if args.train is None:
        args.train = ["all"] if args.lora_rank is None else ["embedder", "lora"]
    if ("lora" in args.train) != (args.lora_rank is not None):
        raise BadInput(f"--train {','.join(args.train)} and --lora_rank {args.lora_rank} do not fit: LoRA needs both")
    if args.train != ["all"] and args.pretrained_model_name_or_path is None:
        raise BadInput(f"--train {','.join(args.train)} needs a trained model: --pretrained_model_name_or_path")
    if args.report_to is None:
        args.report_to = "none" if importlib.util.find_spec("tensorboard") is None else "tensorboard"
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise BadInput(f"{args.report_to} is not installed: `pip install {args.report_to}`, or pass --report_to none")
    if args.evaluation_samples and importlib.util.find_spec("torchmetrics") is None:
        raise BadInput("--evaluation_samples needs torchmetrics: `pip install torchmetrics`")
    if args.optimizer == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput("--optimizer adamw_8bit needs bitsandbytes: `pip install bitsandbytes`, or take adamw_fused")


def resolve_objective(args: argparse.Namespace) -> None:
    """Fills in the defaults of the flow options; refuses one that would change nothing."""
    flow = args.prediction_type == "flow"
    density = (args.timestep_density or "logit_normal") if flow else None
    for name, applies, default in (
        ("timestep_density", flow, "logit_normal"),
        ("weighting", flow, "none"),
        ("logit_mean", density == "logit_normal", 0.0),
        ("logit_std", density == "logit_normal", 1.0),
        ("mode_scale", density == "mode", 1.29),
    ):
        if getattr(args, name) is None:
            setattr(args, name, default if applies else None)
        elif not applies:
            setting = f"--timestep_density {density}" if flow else f"--prediction_type {args.prediction_type}"
            raise BadInput(f"--{name} means nothing with {setting}: leave it out")
