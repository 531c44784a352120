"""Trains Diffusion on Diffusion (arXiv 2410.08531) on labelled images, from scratch or from a saved pipeline.

Images come from a folder with one subfolder a class, a folder of `datasets.save_to_disk` or a dataset of the Hub.
Without a VAE the model works on pixels:

    accelerate launch examples/train_dod.py --train_data_dir digits --output_dir dod-digits --resolution 28 \
        --transformer_config '{"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 32}' \
        --embedder_config '{"num_encoder_layers": 2, "num_decoder_layers": 2, "num_attention_heads": 4}' \
        --train_batch_size 64 --max_train_steps 5000

On the latents of a VAE, with the paper's model (DoD-XL/2) and batch on 8 GPUs:

    accelerate launch --num_processes 8 examples/train_dod.py --train_data_dir imagenet/train --resolution 256 \
        --vae_name_or_path stabilityai/sd-vae-ft-ema --random_flip --train_batch_size 32 --max_train_steps 1000000 \
        --mixed_precision bf16 --dataloader_num_workers 8 --output_dir dod-xl

`output_dir` then loads with `DoDPipeline.from_pretrained`. On the way it receives `checkpoint-N` folders (go on from
one with `--resume_from_checkpoint latest`), sample grids in `samples/` (rows are stages, columns classes), the logs and
`training_config.json`. Every random number of a step follows from the seed, the step and the process, so a resumed run
takes the steps that an unbroken one would have taken.
"""

import argparse
import inspect
import json
import os
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, skip_first_batches
from accelerate.logging import get_logger
from accelerate.tracking import is_tensorboard_available, is_wandb_available
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from diffusers import AutoModel, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from diffusers.utils import make_image_grid
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm

from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel
from diffusers_dod.autoencoding import encode_images, vae_latent_channels, vae_spatial_factor
from diffusers_dod.checkpoints import CONFIG_NAME, find_checkpoint, register_model_hooks, save_checkpoint
from diffusers_dod.image_data import collate_images, inspect_images, load_labelled_images
from diffusers_dod.training import count_prior_rows, ddpm_example, dod_loss, drop_labels, flow_example


logger = get_logger(__name__, log_level="INFO")
# What a resumed run may do otherwise than the run before it.
FREE_KEYS = "output_dir resume_from_checkpoint max_train_steps checkpointing_steps checkpoints_total_limit"
FREE_KEYS += (
    " validation_steps report_to cache_dir dataloader_num_workers on_broken_image compile gradient_checkpointing"
)


class BadInput(Exception):
    """Something that the user must change; printed as one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def number(kind: type, low: float, high: float = float("inf")):
    def parse(text: str):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # argparse's messages name the type
    return parse


def json_object(text: str) -> dict:
    """The JSON object in a file or in `text` itself, without the entries that diffusers adds to a saved config."""
    try:
        values = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
        return {name: value for name, value in values.items() if not name.startswith("_")}
    except (OSError, ValueError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a JSON object nor a file with one ({error})") from error


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    fraction, positive = number(float, 0, 1), number(int, 1)
    integer, real = number(int, 0), number(float, 0)

    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", help="folder with a subfolder a class, or one that `datasets.save_to_disk` wrote")
    add("--dataset_name", help="dataset of the Hub, its `train` split")
    add("--dataset_config_name")
    add("--image_column", default="image")
    add("--label_column", default="label")
    add("--cache_dir", help="where downloads and prepared data are kept")
    add("--resolution", type=positive, help="side of the square images; default: what the model is for, or 256")
    add("--center_crop", action="store_true", default=True, help="always on: ADM's centre crop")
    add("--random_flip", action="store_true", help="mirror images at random")
    add("--on_broken_image", choices=("skip", "stop"), default="stop", help="an image that cannot be read")
    add("--dataloader_num_workers", type=integer, default=0)
    add = parser.add_argument_group("model").add_argument
    add("--transformer_config", type=json_object, help="constructor arguments, JSON or a JSON file; default: XL/2")
    add("--embedder_config", type=json_object, help="the same for the latent embedder")
    add("--pretrained_model_name_or_path", help="a saved DoD pipeline to go on from")
    add("--vae_name_or_path", help="autoencoder of diffusers; none is pixel space")
    add("--vae_subfolder")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--compile", action="store_true", help="compile the blocks of both models")
    add = parser.add_argument_group("objective").add_argument
    add("--prediction_type", choices=("flow", "epsilon", "v_prediction"), help="default: the saved model's, or flow")
    add("--prior_drop", type=fraction, default=0.5, help="share of rows without a prior, which train stage 1")
    add("--class_drop", type=fraction, default=0.1, help="share of rows without a class (ours: the paper is silent)")
    add("--timestep_density", choices=("logit_normal", "uniform", "mode"), help="of sigma, flow only: logit_normal")
    add("--logit_mean", type=float, help="of logit_normal: 0; above 0 is noisier")
    add("--logit_std", type=real, help="of logit_normal: 1")
    add("--mode_scale", type=float, help="of mode: 1.29")
    add("--weighting", choices=("none", "cosmap", "sigma_sqrt"), help="of the loss by sigma, flow only: none")
    add = parser.add_argument_group("optimisation").add_argument
    add("--max_train_steps", type=positive, required=True)
    add("--train_batch_size", type=positive, default=16, help="images a process")
    add("--gradient_accumulation_steps", type=positive, default=1)
    add("--learning_rate", type=real, default=1e-4)
    add("--lr_scheduler", choices=[kind.value for kind in SchedulerType], default="constant")
    add("--lr_warmup_steps", type=integer, default=0)
    add("--adam_beta1", type=fraction, default=0.9)
    add("--adam_beta2", type=fraction, default=0.999)
    add("--adam_weight_decay", type=real, default=0.0)
    add("--adam_epsilon", type=real, default=1e-8)
    add("--max_grad_norm", type=real, default=1.0)
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: that of `accelerate config`")
    add("--use_ema", action="store_true", default=True, help="always on but for --no_ema: average the weights")
    add("--no_ema", dest="use_ema", action="store_false")
    add("--ema_decay", type=fraction, default=0.9999)
    add("--seed", type=integer, default=0)
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True)
    add("--checkpointing_steps", type=positive, default=500)
    add("--checkpoints_total_limit", type=positive, help="keep no more than these")
    add("--resume_from_checkpoint", help="a checkpoint, or `latest` (which starts anew where there is none yet)")
    add("--validation_steps", type=integer, default=1000, help="a sample grid every so many steps; 0 is never")
    add("--report_to", choices=("tensorboard", "wandb", "none"), default="tensorboard")
    args = parser.parse_args(argv)

    if (args.train_data_dir is None) == (args.dataset_name is None):
        raise BadInput("give either --train_data_dir or --dataset_name")
    if args.train_data_dir is not None:
        args.train_data_dir = os.path.abspath(args.train_data_dir)
    for name in ("transformer_config", "embedder_config", "vae_name_or_path"):
        if args.pretrained_model_name_or_path is not None and getattr(args, name) is not None:
            raise BadInput(f"--{name} and --pretrained_model_name_or_path exclude each other: the saved one is used")
    for name, available in (("tensorboard", is_tensorboard_available), ("wandb", is_wandb_available)):
        if args.report_to == name and not available():
            raise BadInput(f"{name} is not installed: `pip install {name}`, or pass --report_to none")
    return args


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


def load_images(args: argparse.Namespace, accelerator: Accelerator):
    """The readable images, the names of their classes, and whether all images are grayscale."""
    try:
        with accelerator.main_process_first():
            data, class_names = load_labelled_images(
                *(args.train_data_dir, args.dataset_name, args.dataset_config_name),
                *(args.image_column, args.label_column, args.cache_dir),
            )
    except ValueError as error:
        raise BadInput(str(error)) from error
    # Each process checks its share.
    share = data.shard(accelerator.num_processes, accelerator.process_index, contiguous=True)
    report = inspect_images(share, args.dataloader_num_workers)
    problems, is_gray = gather_object(report["problem"][:]), all(gather_object(report["is_gray"][:]))
    broken = [problem for problem in problems if problem]
    if broken and (args.on_broken_image == "stop" or len(broken) == len(problems)):
        skip = "pass --on_broken_image skip to train on the others"
        raise BadInput(f"{len(broken)} of {len(problems)} images cannot be read, the first is {broken[0]}: {skip}")
    if broken:
        data = data.select([row for row, problem in enumerate(problems) if not problem])
        logger.warning("\n  ".join([f"Skipped {len(broken)} images, {len(data)} are left:", *broken]))
    return data, class_names, is_gray


def load_component(loader: type, path: str, **kwargs):
    try:
        return loader.from_pretrained(path, torch_dtype=torch.float32, **kwargs)
    except Exception as error:  # missing, private, offline, another class: the libraries raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"{path} cannot be loaded as {loader.__name__}: {reason}") from error


def build_model(model_class: type, given: dict, derived: dict, option: str) -> torch.nn.Module:
    """A model of the user's constructor arguments and those that follow from everything else."""
    known = list(inspect.signature(model_class.__init__).parameters)[1:]
    for name, value in given.items():
        if name not in known:
            raise BadInput(f"{option} has {name!r}, which is none of {', '.join(known)}")
        if derived.get(name, value) != value:
            raise BadInput(f"{option} has {name} {value}, but data, VAE and options make it {derived[name]}")
    try:
        return model_class(**{**given, **derived})
    except (TypeError, ValueError) as error:
        raise BadInput(f"{option}: {error}") from error


def build_pipeline(args: argparse.Namespace, num_classes: int, id2label: dict | None, is_gray: bool) -> DoDPipeline:
    """The pipeline to train, new or loaded, in float32; settles `args.resolution` and the objective."""
    saved, vae = None, None
    config, embedder_config = dict(args.transformer_config or {}), dict(args.embedder_config or {})
    if args.pretrained_model_name_or_path is not None:
        saved = load_component(DoDPipeline, args.pretrained_model_name_or_path, cache_dir=args.cache_dir)
        vae, config, embedder_config = saved.vae, saved.transformer.config, saved.latent_embedder.config
        saved_type = config["prediction_type"] or saved.scheduler.config.get("prediction_type", "flow")
        args.prediction_type = args.prediction_type or saved_type
        if args.prediction_type != saved_type:
            raise BadInput(
                f"the saved model predicts {saved_type}, so --prediction_type cannot be {args.prediction_type}"
            )
    elif args.vae_name_or_path is not None:
        vae = load_component(AutoModel, args.vae_name_or_path, subfolder=args.vae_subfolder, cache_dir=args.cache_dir)
    args.prediction_type = args.prediction_type or "flow"
    resolve_objective(args)

    # What follows from data, VAE and transformer
    factor, patch_size = vae_spatial_factor(vae), config.get("patch_size", 2)
    if args.resolution is None:
        sample_size = config.get("sample_size", 256 // factor)
        if not isinstance(sample_size, int):
            raise BadInput(
                f"the model is for latents of {sample_size}, but images are square here: give a --resolution"
            )
        args.resolution = sample_size * factor
    for patch in (patch_size, embedder_config.get("patch_size", patch_size)):
        if args.resolution % (factor * patch):
            multiple = f"{factor * patch} (VAE {factor} x patch {patch})" if vae is not None else f"the patch, {patch}"
            raise BadInput(f"--resolution {args.resolution} must be a multiple of {multiple}")
    if config.get("num_classes", num_classes) < num_classes:
        raise BadInput(f"the data has {num_classes} classes but the model only {config['num_classes']}")
    channels = config.get("in_channels", 1 if is_gray else 3) if vae is None else vae_latent_channels(vae)
    if vae is None and channels not in (1, 3):
        raise BadInput(f"pixels have 1 or 3 channels but the model takes {channels}: give its --vae_name_or_path")
    derived = {"sample_size": args.resolution // factor, "in_channels": channels}

    if saved is not None:
        saved.transformer.register_to_config(sample_size=derived["sample_size"], prediction_type=args.prediction_type)
        saved.latent_embedder.register_to_config(sample_size=derived["sample_size"])
        return DoDPipeline(saved.transformer, saved.latent_embedder, saved.scheduler, vae, id2label)
    config.setdefault("num_classes", num_classes)
    own = {**derived, "prediction_type": args.prediction_type}
    transformer = build_model(DoDTransformer2DModel, config, own, "--transformer_config")
    embedder_config.setdefault("patch_size", patch_size)
    own = {**derived, "output_dim": transformer.inner_dim, "output_patch_size": patch_size}
    embedder = build_model(DoDLatentEmbedder, embedder_config, own, "--embedder_config")
    if args.prediction_type == "flow":
        return DoDPipeline(transformer, embedder, FlowMatchEulerDiscreteScheduler(), vae, id2label)
    # Only pixels have a range to clip to.
    scheduler = DDIMScheduler(prediction_type=args.prediction_type, clip_sample=vae is None)
    return DoDPipeline(transformer, embedder, scheduler, vae, id2label)


class TrainingModule(torch.nn.Module):
    """Both models and their loss as one module: one forward for DDP to synchronise and for autocast to cover."""

    def __init__(self, transformer: DoDTransformer2DModel, latent_embedder: DoDLatentEmbedder):
        super().__init__()
        self.transformer, self.latent_embedder = transformer, latent_embedder

    def forward(self, *inputs):
        return dod_loss(self.transformer, self.latent_embedder, *inputs)


@contextmanager
def averaged_weights(models: list[torch.nn.Module], emas: list[EMAModel]):
    """Lets the models hold their EMA weights for a while; without EMA, their own."""
    for model, ema in zip(models, emas):
        ema.store(model.parameters())
        ema.copy_to(model.parameters())
    yield
    for model, ema in zip(models, emas):
        ema.restore(model.parameters())


def endless_batches(dataloader: DataLoader, first: int):
    """Batches by their number in the training, from `first` on; every epoch has an order of its own."""
    while True:
        epoch, done = divmod(first, len(dataloader))
        dataloader.set_epoch(epoch)
        for batch in skip_first_batches(dataloader, done):
            yield first, batch
            first += 1


def make_example(latents: torch.Tensor, args: argparse.Namespace, noise_scheduler: DDPMScheduler | None):
    """What to denoise, and the weight of each row's error."""
    noise = torch.randn_like(latents)
    batch_size, device = len(latents), latents.device
    if noise_scheduler is not None:
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (batch_size,), device=device)
        return ddpm_example(latents, noise, timesteps, noise_scheduler), None
    shape = (args.logit_mean, args.logit_std, args.mode_scale)
    sigmas = compute_density_for_timestep_sampling(args.timestep_density, batch_size, *shape, device=device)
    # The least noise of diffusers' schedulers, for sigma_sqrt is infinite without any.
    weighting = compute_loss_weighting_for_sd3(args.weighting, sigmas.clamp(min=1e-3))
    return flow_example(latents, noise, sigmas), weighting


def validate(pipeline: DoDPipeline, accelerator: Accelerator, args: argparse.Namespace, step: int) -> None:
    """Writes a grid of samples of the first classes, stage by stage, always from the same noise."""
    class_ids = list(range(min(pipeline.transformer.config.num_classes, 8)))
    generators = [torch.Generator().manual_seed(args.seed + class_id) for class_id in class_ids]
    with accelerator.autocast():
        stages = pipeline(class_ids, generator=generators, return_stages=True).stages
    grid = make_image_grid([image for stage in stages for image in stage], rows=len(stages), cols=len(class_ids))
    path = Path(args.output_dir, "samples", f"step_{step}.png")
    path.parent.mkdir(exist_ok=True)
    grid.save(path)
    for tracker in accelerator.trackers:
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": np.array(grid)[None]}, step=step, **options)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # 1. Accelerator. An embedder that sees no row of a batch gets no gradient, of which DDP must be told; looking for
    # that costs time, so only where `count_prior_rows` can be 0.
    may_lack_prior = int(args.train_batch_size * (1 - args.prior_drop)) == 0
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")),
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=may_lack_prior)],
        )
    except ValueError as error:  # a precision that the machine lacks
        raise BadInput(str(error)) from error
    args.mixed_precision = accelerator.mixed_precision
    set_seed(args.seed)

    # 2. Data and models. An epoch is a whole number of steps: other images are left over each time, too few repeat.
    data, class_names, is_gray = load_images(args, accelerator)
    num_classes = len(class_names) if class_names else max(data.unique("label")) + 1
    pipeline = build_pipeline(args, num_classes, dict(enumerate(class_names)) if class_names else None, is_gray)
    pipeline.set_progress_bar_config(disable=True)
    models, vae = [pipeline.transformer, pipeline.latent_embedder], pipeline.vae
    images_a_step = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    steps_an_epoch = max(len(data) // images_a_step, 1)
    channels = pipeline.transformer.config.in_channels if vae is None else 3
    dataloader = DataLoader(
        data,
        batch_size=args.train_batch_size,
        sampler=RandomSampler(data, num_samples=steps_an_epoch * images_a_step),
        collate_fn=partial(collate_images, size=args.resolution, channels=channels),
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )

    # 3. What to go on from; nothing was written until here
    config = {**vars(args), "num_processes": accelerator.num_processes, "num_images": len(data)}
    for name, model in zip(("transformer_config", "embedder_config"), models):
        config[name] = {key: value for key, value in model.config.items() if not key.startswith("_")}
    config = json.loads(json.dumps({**config, "id2label": pipeline.config.id2label}))
    try:
        checkpoint, step = find_checkpoint(args.resume_from_checkpoint, args.output_dir, config, FREE_KEYS.split())
    except ValueError as error:
        raise BadInput(str(error)) from error
    if accelerator.is_main_process:
        os.makedirs(args.output_dir, exist_ok=True)
        Path(args.output_dir, CONFIG_NAME).write_text(json.dumps(config, indent=2))

    # 4. Preparation
    for model in models:
        model.requires_grad_(True).train()
        if args.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if args.compile:
            model.compile_repeated_blocks()
    if vae is not None:
        vae.requires_grad_(False).eval().to(accelerator.device)
    module = TrainingModule(*models)
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    adam["weight_decay"] = args.adam_weight_decay
    optimizer = torch.optim.AdamW(module.parameters(), lr=args.learning_rate, **adam)
    # accelerate steps the schedule once for each process.
    schedule_steps = [steps * accelerator.num_processes for steps in (args.lr_warmup_steps, args.max_train_steps)]
    lr_scheduler = get_scheduler(args.lr_scheduler, optimizer, None, *schedule_steps)
    module, optimizer, lr_scheduler, dataloader = accelerator.prepare(module, optimizer, lr_scheduler, dataloader)
    noise_scheduler, emas = None, []
    if args.prediction_type != "flow":
        noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    if args.use_ema:
        options = {"decay": args.ema_decay, "foreach": True}
        emas = [EMAModel(m.parameters(), model_cls=type(m), model_config=m.config, **options) for m in models]
    names = ("transformer", "latent_embedder")
    register_model_hooks(accelerator, dict(zip(names, models)), dict(zip(names, emas)))
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        logger.info(f"Going on from {checkpoint}.")
    if args.report_to != "none":
        plain = {k: v if isinstance(v, (bool, int, float, str)) else json.dumps(v) for k, v in config.items()}
        accelerator.init_trackers("train_dod", plain)
    progress = tqdm(total=args.max_train_steps, initial=step, disable=not accelerator.is_local_main_process)

    # 5. Training
    totals = torch.zeros(2, 2, device=accelerator.device)  # with a prior and without: the sum of losses, the rows
    batches = endless_batches(dataloader, step * args.gradient_accumulation_steps)
    while step < args.max_train_steps:
        batch, (pixels, labels) = next(batches)
        # All that is random in a batch follows from this, so a resumed run needs no memory of the one before.
        entropy = np.random.SeedSequence([args.seed, batch, accelerator.process_index])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))

        with accelerator.accumulate(module):
            # Images to latents
            images = pixels.float() / 127.5 - 1
            if args.random_flip:
                mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
                images = torch.where(mirrored, images.flip(-1), images)
            with torch.no_grad():
                latents = encode_images(vae, images, sample_posterior=True).float()

            # Noise, class drop and prior drop
            example, weighting = make_example(latents, args, noise_scheduler)
            labels = drop_labels(labels, pipeline.transformer.config.num_classes, args.class_drop)
            prior_rows = count_prior_rows(len(latents), args.prior_drop)

            # Loss and step
            loss = module(latents, labels, example, prior_rows, weighting)
            accelerator.backward(loss.total)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            for total, part in zip(totals, (loss.per_sample[:prior_rows], loss.per_sample[prior_rows:])):
                total += torch.stack([part.sum(), part.new_tensor(len(part))])
        if not accelerator.sync_gradients:
            continue

        # Averaged weights and logs
        step += 1
        for model, ema in zip(models, emas):
            ema.step(model.parameters())
        (with_prior, with_rows), (without_prior, without_rows) = accelerator.reduce(totals).tolist()
        totals.zero_()
        logs = {"loss": (with_prior + without_prior) / (with_rows + without_rows)}
        if with_rows:
            logs["loss_with_prior"] = with_prior / with_rows
        if without_rows:
            logs["loss_without_prior"] = without_prior / without_rows
        logs.update(lr=lr_scheduler.get_last_lr()[0], grad_norm=float(grad_norm))
        progress.update()
        progress.set_postfix(logs, refresh=False)
        accelerator.log(logs, step=step)

        # Checkpoint and samples
        if step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, args.output_dir, step, config, args.checkpoints_total_limit)
        if args.validation_steps and step % args.validation_steps == 0 and accelerator.is_main_process:
            with averaged_weights(models, emas):
                validate(pipeline, accelerator, args, step)

    # 6. The pipeline, in the folder itself
    accelerator.wait_for_everyone()
    progress.close()
    if accelerator.is_main_process:
        with averaged_weights(models, emas):
            pipeline.save_pretrained(args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train_dod.py: error: {error}", file=sys.stderr)
        sys.exit(2)
