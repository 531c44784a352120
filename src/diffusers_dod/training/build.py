"""What is trained: accelerator, models and optimizer from the options, and a plain copy of the models to sample with."""

import argparse
import dataclasses
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, ProjectConfiguration
from diffusers import AutoModel, DDIMScheduler, SchedulerMixin, UniPCMultistepScheduler
from peft import LoraConfig, get_peft_model_state_dict

from ..arguments import is_count
from ..autoencoding import vae_latent_channels, vae_spatial_factor
from ..cli import BadInput, bad_input
from ..compatibility import DTYPE_ARGUMENT, check_code_grid
from ..data.batches import TrainingData, load_data
from ..data.cache_writing import vae_settings
from ..data.features import REPAEncoder
from ..latent_embedder_dod import DoDLatentEmbedder
from ..pipeline_dod import DoDPipeline
from ..presets import PRESETS
from ..transformer_dod import DoDTransformer2DModel
from .averaging import WeightAverages, full_tensors
from .choosing import choose_models, choose_resolution
from .flops import PEAK_TFLOPS
from .options import names_no_size, resolve_objective
from .repa import REPAProjector


LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class Subject(NamedTuple):
    """What a run trains: some components of a pipeline, on rows of data.

    Args:
        pipeline ([`DoDPipeline`]): the whole pipeline.
        denoiser (`str`): the component that denoises, `"transformer"` or `"code_transformer"`.
        data ([`TrainingData`]): images or latents; codes where the code model is trained.
    """

    pipeline: DoDPipeline
    denoiser: str
    data: TrainingData

    @property
    def models(self) -> dict[str, Any]:
        """The trained components by name: a denoiser, and for the pipeline's own its latent embedder."""
        names = ("transformer", "latent_embedder") if self.denoiser == "transformer" else (self.denoiser,)
        return {name: getattr(self.pipeline, name) for name in names}


def build_subject(args: argparse.Namespace, accelerator: Accelerator) -> Subject:
    """What `diffusers-dod train` trains."""
    data = load_data(args, accelerator)
    return Subject(build_pipeline(args, data, accelerator.device, accelerator.print), "transformer", data)


def build_accelerator(args: argparse.Namespace) -> Accelerator:
    """The accelerator of the options, whose precision becomes `args.mixed_precision`."""
    with bad_input(ValueError):  # a precision that the machine lacks
        accelerator = Accelerator(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(args.output_dir, logging_dir=os.path.join(args.output_dir, "logs")),
            step_scheduler_with_optimizer=False,
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise BadInput("FSDP means FSDP2 here: set fsdp_version to 2 in accelerate's configuration")
    keep_precision_in_fsdp(accelerator)
    if accelerator.scaler is not None and args.spike_factor is not None:
        raise BadInput("--spike_factor works without fp16's gradient scaler only: take bf16")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # which would look for it in a prepared dataloader
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
    args.mixed_precision = accelerator.mixed_precision
    check_prior_rows(args, accelerator)
    return accelerator


def keep_precision_in_fsdp(accelerator: Accelerator) -> None:
    """Has FSDP2 in mixed precision compute what DDP does: autocast alone decides what is computed in low precision.

    accelerate's policy also casts whatever enters or leaves a sharded module, timesteps, targets, rotary tables and losses
    among them, and adds up the gradients of the processes in low precision. To be called before `prepare`.
    """
    if accelerator.distributed_type != DistributedType.FSDP or accelerator.mixed_precision == "no":
        return
    plugin = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = dataclasses.replace(
        plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
    )


def check_prior_rows(args: argparse.Namespace, accelerator: Accelerator) -> None:
    """An embedder that sees no row of a batch gets no gradient: DDP needs a setting for that, FSDP2 cannot do it."""
    if int(args.train_batch_size * (1 - args.prior_drop)) > 0:
        return
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP and args.prior_drop < 1
    if is_fsdp or args.train == ["embedder"]:
        raise BadInput(
            f"a --train_batch_size of {args.train_batch_size} with a --prior_drop of {args.prior_drop} leaves processes "
            f"without a prior, which {'FSDP' if is_fsdp else '--train embedder'} cannot do: raise the first or lower the second"
        )
    accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)


def peak_flops(args: argparse.Namespace, accelerator: Accelerator) -> float | None:
    """Of one device, in FLOP/s; `None` where neither the options nor the table have it."""
    if args.peak_tflops is not None:
        return args.peak_tflops * 1e12
    if accelerator.device.type != "cuda" or accelerator.mixed_precision == "no":
        return None
    name = torch.cuda.get_device_name(accelerator.device)
    return next((1e12 * peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


class REPAParts(NamedTuple):
    """REPA's encoder (none for cached features), its projector, and the grid of the transformer's tokens."""

    encoder: REPAEncoder | None
    projector: REPAProjector
    grid: tuple[int, int]


def build_repa(args: argparse.Namespace, data: TrainingData, transformer: DoDTransformer2DModel) -> REPAParts | None:
    """What `--repa_encoder` asks for, if it does."""
    if args.repa_encoder is None:
        return None
    if args.repa_layer > transformer.config.num_layers:
        raise BadInput(
            f"--repa_layer {args.repa_layer} is beyond the transformer's {transformer.config.num_layers} blocks"
        )

    def new_projector(width: int) -> REPAProjector:
        torch.manual_seed(args.seed)  # loading an encoder may have drawn random numbers
        return REPAProjector(transformer.inner_dim, width)

    grid = (transformer.config.sample_size // transformer.config.patch_size,) * 2
    if args.repa_encoder == "cached":
        features = data.rows.settings["features"]
        if tuple(features["grid"]) != grid:
            raise BadInput(
                f"the cached features are of {features['grid']} tokens but the transformer has {list(grid)}: cache them "
                f"with --patch_size {transformer.config.patch_size}"
            )
        return REPAParts(None, new_projector(features["width"]), grid)
    # Missing, private, offline, no vision model: transformers raises many kinds.
    with bad_input(Exception, what=f"--repa_encoder {args.repa_encoder}"):
        encoder = REPAEncoder.from_pretrained(args.repa_encoder, cache_dir=args.cache_dir)
    return REPAParts(encoder, new_projector(encoder.width), grid)


def load_component(loader: Any, path: str, **kwargs: Any) -> Any:
    # Missing, private, offline, another class: the libraries raise many kinds. The CPU, whatever the default device.
    with bad_input(Exception, what=f"{path} cannot be loaded as {loader.__name__}"), torch.device("cpu"):
        return loader.from_pretrained(path, **{DTYPE_ARGUMENT: torch.float32}, **kwargs)


def build_model(model_class: Any, given: dict, derived: dict, option: str) -> Any:
    """A model of the user's constructor arguments and those that follow from everything else."""
    known = list(inspect.signature(model_class).parameters)
    for name, value in given.items():
        if name not in known:
            raise BadInput(f"{option} has {name!r}, which is none of {', '.join(known)}")
        if derived.get(name, value) != value:
            raise BadInput(f"{option} has {name} {value}, but data, VAE and options make it {derived[name]}")
    with bad_input(TypeError, ValueError, what=option):
        return model_class(**{**given, **derived})


def build_pipeline(
    args: argparse.Namespace,
    data: TrainingData,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
    say: Callable[[str], None] = print,
) -> DoDPipeline:
    """The pipeline to train, new or loaded, in float32; settles `args.resolution` and the objective.

    What is chosen for the user, for data of that size and the `device`, is passed to `say`.
    """
    saved, vae, num_classes, id2label = None, None, data.num_classes, data.id2label
    config, embedder_config = dict(args.transformer_config or {}), dict(args.embedder_config or {})
    if args.preset is not None:
        config = {**PRESETS[args.preset].transformer, **config}
        # Its `output_dim` follows from the transformer, whose width the options may have changed.
        preset = {key: value for key, value in PRESETS[args.preset].latent_embedder.items() if key != "output_dim"}
        embedder_config = {**preset, **embedder_config}
    for given in (config, embedder_config):
        if not is_count(given.get("patch_size", 1), 1):
            raise BadInput(f"patch_size is {given['patch_size']!r}; it must be an integer of at least 1")
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
    elif args.latents_dir is not None:
        origin = {"path": data.rows.manifest["vae_name_or_path"], "subfolder": data.rows.manifest["vae_subfolder"]}
        vae = load_component(AutoModel, **origin, cache_dir=args.cache_dir)
    if args.latents_dir is not None:
        source = args.pretrained_model_name_or_path or args.vae_name_or_path or origin["path"]
        check_latents(data, vae, args.latents_dir, source)
    factor = vae_spatial_factor(vae)
    if names_no_size(args):
        args.resolution = args.resolution or choose_resolution(data, factor)
        size = args.resolution // factor
        config, embedder_config, choices = choose_models(args, size, vae is None, data.size, device.type)
        say("\n".join(choices))
    args.prediction_type = args.prediction_type or "flow"
    resolve_objective(args)
    if args.bottleneck_noise is None:
        args.bottleneck_noise = 1.0 if embedder_config.get("noise_level_input") else 0.0

    # What follows from data, VAE and transformer
    patch_size = config.get("patch_size", 2)
    if args.resolution is None:
        sample_size = config.get("sample_size", 256 // factor)
        if not isinstance(sample_size, int):
            raise BadInput(
                f"the model is for latents of {sample_size}, but images are square here: give a --resolution"
            )
        args.resolution = sample_size * factor
    for patch in (patch_size, embedder_config.get("patch_size") or patch_size):
        if args.resolution % (factor * patch):
            multiple = f"{factor * patch} (VAE {factor} x patch {patch})" if vae is not None else f"the patch, {patch}"
            raise BadInput(f"--resolution {args.resolution} must be a multiple of {multiple}")
    model_classes = config.get("num_classes", num_classes)
    if model_classes < num_classes or (args.num_classes is not None and model_classes != num_classes):
        raise BadInput(f"the model has {model_classes} classes, but the data or --num_classes has {num_classes}")
    channels = config.get("in_channels", 1 if data.is_gray else 3) if vae is None else vae_latent_channels(vae)
    if vae is None and channels not in (1, 3):
        cure = "pass --vae_name_or_path" if saved is None else "save the pipeline with its autoencoder"
        raise BadInput(f"pixels have 1 or 3 channels, but the model takes {channels}: {cure}")
    derived = {"sample_size": args.resolution // factor, "in_channels": channels}

    if saved is not None:
        saved.transformer.register_to_config(sample_size=derived["sample_size"], prediction_type=args.prediction_type)
        saved.latent_embedder.register_to_config(sample_size=derived["sample_size"])
        # A code model and a weaker model are those of one embedder: they stay if the embedder does.
        kept = {"guider": saved.guider}
        others = {"code model": saved.code_transformer, "weaker model": saved.weak_transformer}
        if args.train == ["all"] or "embedder" in args.train:
            dropped = [name for name, model in others.items() if model is not None]
            if dropped:
                say(f"The {' and the '.join(dropped)} are left out: they belong to the embedder as it was.")
            saved.latent_embedder.register_to_config(codes_mean=None, codes_std=None)
        else:
            if saved.code_transformer is not None:
                grid = saved.latent_embedder.code_grid(derived["sample_size"], derived["sample_size"])
                with bad_input(ValueError, what="--resolution"):
                    check_code_grid(grid, saved.code_transformer.config.patch_size, args.resolution, args.resolution)
            kept |= {"code_transformer": saved.code_transformer, "code_scheduler": saved.code_scheduler}
            kept |= {"code_guidance_scale": saved.config.code_guidance_scale}
            kept |= {"weak_transformer": saved.weak_transformer}
        return DoDPipeline(saved.transformer, saved.latent_embedder, saved.scheduler, vae, id2label, **kept)
    config.setdefault("num_classes", num_classes)
    own = {**derived, "prediction_type": args.prediction_type}
    transformer = build_model(DoDTransformer2DModel, config, own, "--transformer_config")
    embedder_config.setdefault("patch_size", patch_size)
    own = {**derived, "output_dim": transformer.inner_dim, "output_patch_size": patch_size}
    embedder = build_model(DoDLatentEmbedder, embedder_config, own, "--embedder_config")
    # Only pixels have a range to clip to.
    scheduler = make_scheduler(args.prediction_type, clip_sample=vae is None)
    return DoDPipeline(transformer, embedder, scheduler, vae, id2label)


def check_latents(data: TrainingData, vae: Any, latents_dir: str, source: str) -> None:
    """Refuses cached latents of another autoencoder than that of `source`."""
    if vae is None or not vae_settings(vae).items() <= data.rows.settings.items():
        raise BadInput(f"{latents_dir} was not made with the VAE of {source}: cache the latents with it")


def make_scheduler(prediction_type: str, clip_sample: bool = False) -> SchedulerMixin:
    """What a new model is sampled with: for flow the second-order UniPC, whose samples are better than Euler's."""
    if prediction_type == "flow":
        with torch.device("cpu"):  # it copies its tables, which the meta device cannot
            return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return DDIMScheduler(prediction_type=prediction_type, clip_sample=clip_sample)


def freeze(args: argparse.Namespace, subject: Subject) -> None:
    """Lets gradients reach what `--train` names, and adds the LoRA."""
    for name, model in subject.models.items():
        model.requires_grad_(args.train == ["all"] or name.removeprefix("latent_") in args.train).train()
    if "lora" in args.train:
        # peft's default starts as the identity: B is zero.
        lora = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=LORA_TARGETS)
        subject.pipeline.transformer.add_adapter(lora)


def build_optimizer(args: argparse.Namespace, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    adam = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    adam["weight_decay"] = args.adam_weight_decay
    with bad_input(ValueError, what="optimizer"):  # a decay of 1
        if args.optimizer == "adamw_8bit":
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit(parameters, **adam)
        return torch.optim.AdamW(parameters, fused=args.optimizer == "adamw_fused" or None, **adam)


def export_pipeline(
    pipeline: DoDPipeline,
    weights: dict[str, dict[str, torch.Tensor]],
    lora_dir: str | os.PathLike | None = None,
) -> DoDPipeline:
    """A plain copy of a pipeline in training, for sampling and saving.

    Args:
        pipeline ([`DoDPipeline`]): whose models may be sharded, compiled or hold a LoRA.
        weights (`dict`): full state dicts of its models, by component.
        lora_dir (`str`, *optional*): where the LoRA is saved by itself; in the copy it is fused into the weights.
    """
    copies = {}
    for name, state_dict in weights.items():
        model = getattr(pipeline, name)
        copy = type(model).from_config(model.config)
        if getattr(model, "peft_config", None):
            copy.add_adapter(model.peft_config["default"])
        copy.load_state_dict(state_dict)
        if getattr(model, "peft_config", None):
            if lora_dir is not None:
                DoDPipeline.save_lora_weights(lora_dir, transformer_lora_layers=get_peft_model_state_dict(copy))
            copy.fuse_lora()
            copy.unload_lora()
        copies[name] = copy.eval()
    plain = DoDPipeline.from_pipe(pipeline, **copies)
    plain.set_progress_bar_config(disable=True)
    return plain


def averaged_pipeline(
    accelerator: Accelerator, subject: Subject, averages: WeightAverages | None, lora_dir: Path | None = None
) -> DoDPipeline | None:
    """A plain copy with the averaged weights, or the live ones, in the main process; every process must call this."""
    weights = {name: full_tensors(model.state_dict()) for name, model in subject.models.items()}
    if averages is not None:
        averaged = full_tensors(averages.tensors(next(iter(averages.averages))))
        for name, value in averaged.items():
            model, key = name.split(".", 1)
            weights[model][key] = value
    return export_pipeline(subject.pipeline, weights, lora_dir) if accelerator.is_main_process else None
