"""What train_dod.py trains on and what it trains: data, models and optimizer from the options."""

import argparse
import inspect
import os
import signal
import warnings
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import datasets
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets.distributed import split_dataset_by_node
from diffusers import AutoModel, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig, get_peft_model_state_dict
from torch.utils.data import DataLoader, default_collate
from train_arguments import BadData, BadInput, resolve_objective

from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel

from ..autoencoding import encode_images, vae_latent_channels, vae_spatial_factor
from ..data.cache import CachedLatents, sample_posterior, select_flip
from ..data.cache_writing import vae_settings
from ..data.images import collate_images, inspect_images, load_labelled_images, read_image
from ..data.order import BatchSampler, EpochOrder
from ..data.streaming import ShuffledStream, StreamedRows
from ..presets import PRESETS
from .repa import REPAEncoder, REPAProjector


logger = get_logger(__name__, log_level="INFO")
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class TrainingData(NamedTuple):
    """`rows` are undecoded images or latents, with labels; `size` is their number, unknown for a stream."""

    rows: datasets.Dataset | datasets.IterableDataset | CachedLatents
    num_classes: int
    id2label: dict[int, str] | None
    is_gray: bool
    size: int | None


def load_data(args: argparse.Namespace, accelerator: Accelerator) -> TrainingData:
    """The images to train on, of which broken ones were left out or refused unless they are streamed; or latents."""
    if args.latents_dir is not None:
        return load_latents(args)
    try:
        with accelerator.main_process_first():
            data, class_names = load_labelled_images(
                *(args.train_data_dir, args.dataset_name, args.dataset_config_name, args.image_column),
                *(None if args.num_classes == 0 else args.label_column, args.cache_dir, args.streaming),
            )
    except ValueError as error:
        raise BadInput(str(error)) from error
    id2label = dict(enumerate(class_names)) if class_names else None

    if args.streaming:
        if args.num_classes is None and class_names is None:
            raise BadInput("a stream does not tell how many classes there are: give --num_classes")
        first = next(iter(data), None)
        if first is None:
            raise BadInput("the stream holds no images")
        is_gray = read_image(first["image"]).mode in ("1", "L", "LA")
        num_classes, size = len(class_names or ()), None
    else:
        data, is_gray = check_images(args, data, accelerator)
        labels = data.unique("label") if "label" in data.column_names else [-1]
        num_classes, size = len(class_names) if class_names else max(labels) + 1, len(data)
    if args.num_classes is not None:
        if args.num_classes < num_classes:
            raise BadInput(f"the data has {num_classes} classes, so --num_classes cannot be {args.num_classes}")
        num_classes = args.num_classes
    return TrainingData(data, num_classes, id2label, is_gray, size)


def load_latents(args: argparse.Namespace) -> TrainingData:
    """Cached latents, whose resolution becomes `args.resolution`."""
    try:
        cache = CachedLatents(args.latents_dir)
    except ValueError as error:
        raise BadInput(str(error)) from error
    if args.random_flip and not cache.flips:
        raise BadInput(
            f"{args.latents_dir} holds no mirrored images: cache it with --flips, or leave out --random_flip"
        )
    if args.repa_encoder is not None and not cache.settings["features"]:
        raise BadInput(f"{args.latents_dir} holds no features: cache it with --repa_encoder")
    resolution = cache.settings["resolution"]
    if args.resolution not in (None, resolution):
        raise BadInput(
            f"{args.latents_dir} is of resolution {resolution}, so --resolution cannot be {args.resolution}"
        )
    args.resolution = resolution
    num_classes = cache.num_classes if args.num_classes is None else args.num_classes
    if 0 < num_classes < cache.num_classes:
        raise BadInput(f"the data has {cache.num_classes} classes, so --num_classes cannot be {num_classes}")
    id2label = dict(enumerate(cache.class_names)) if cache.class_names and num_classes else None
    return TrainingData(cache, num_classes, id2label, False, len(cache))


def check_images(args: argparse.Namespace, data: datasets.Dataset, accelerator: Accelerator):
    """The readable images, and whether all of them are grayscale."""
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
    return data, is_gray


def collate_rows(rows: list[dict], size: int, channels: int, num_classes: int) -> dict:
    """Rows to a batch: `pixels` and `label` as [`collate_images`] makes them, and `name`, for messages."""
    rows = [{"label": 0, **row} for row in rows]
    names = [row["image"]["path"] or "an unnamed image" for row in rows]
    for name, row in zip(names, rows):
        if not 0 <= row["label"] < max(num_classes, 1):
            raise ValueError(f"{name} has class {row['label']}, but the model knows 0 to {num_classes - 1}")
    pixels, labels = collate_images(rows, size, channels)
    return {"pixels": pixels, "label": labels, "name": names}


def is_readable(row: dict, skip_broken: bool) -> bool:
    try:
        read_image(row["image"])
        return True
    except Exception as error:  # whatever a decoder raises, the picture cannot be used
        problem = f"{row['image']['path'] or 'an unnamed image'} cannot be read ({error})"
        if not skip_broken:
            raise ValueError(f"{problem}: pass --on_broken_image skip to train on the others") from error
        warnings.warn(f"Skipped: {problem}.", stacklevel=2)
        return False


def collate_streamed(item: tuple[list[dict], str], skip_broken: bool, **kwargs) -> dict:
    """The same for a stream, with its `state`. Good rows of the batch stand in for broken ones."""
    rows, state = item
    good = [row for row in rows if is_readable(row, skip_broken)]
    if not good:
        raise ValueError(f"none of {len(rows)} images in a row can be read")
    rows = [good[i % len(good)] for i in range(len(rows))]
    return {**collate_rows(rows, **kwargs), "state": state}


def collate_latents(rows: list[dict], has_classes: bool) -> dict:
    """Rows of a cache to a batch, with a `name` of each for messages."""
    batch = default_collate(rows)
    if not has_classes:
        batch["label"] = torch.zeros_like(batch["label"])
    return {**batch, "name": [f"image {number}" for number in batch["id"].tolist()]}


def ignore_interrupts(_) -> None:
    """Workers leave it to the training process to end well."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def make_batches(
    args: argparse.Namespace, data: TrainingData, channels: int, accelerator: Accelerator, step: int, state: str | None
) -> Iterator[dict]:
    """This process's batches without end, from `step` on, or for a stream from `state`."""
    kwargs = {"size": args.resolution, "channels": channels, "num_classes": data.num_classes}
    options = {"num_workers": args.dataloader_num_workers, "worker_init_fn": ignore_interrupts}
    options["pin_memory"] = accelerator.device.type == "cuda"
    if args.streaming:
        part = split_dataset_by_node(data.rows, accelerator.process_index, accelerator.num_processes)
        options["sampler"] = ShuffledStream(part, args.train_batch_size, args.shuffle_buffer_size, args.seed, state)
        collate = partial(collate_streamed, skip_broken=args.on_broken_image == "skip", **kwargs)
        loader = DataLoader(StreamedRows(), batch_size=None, collate_fn=collate, **options)
    else:
        is_cached, labels = isinstance(data.rows, CachedLatents), None
        if args.sampling == "balanced":
            labels = data.rows.labels.tolist() if is_cached else data.rows["label"][:]
        order = EpochOrder(data.size, args.seed, labels)
        processes = (accelerator.num_processes, accelerator.process_index)
        options["batch_sampler"] = BatchSampler(
            order, args.train_batch_size, *processes, args.gradient_accumulation_steps, first_step=step
        )
        collate = partial(collate_rows, **kwargs)
        if is_cached:
            collate = partial(collate_latents, has_classes=data.num_classes > 0)
        loader = DataLoader(data.rows, collate_fn=collate, **options)
    try:
        yield from loader
    except ValueError as error:  # from a worker with its traceback before it
        raise BadData(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def to_latents(
    batch: dict, vae: ModelMixin | None, mirrored: torch.Tensor, generators: list[torch.Generator]
) -> torch.Tensor:
    """Clean latents of a batch in float32, the `mirrored` rows flipped, posteriors sampled by the rows' generators."""
    if "mean" in batch:
        mean, std = select_cached(batch["mean"], mirrored), batch.get("std")
        if std is None:
            return sample_posterior(mean)
        noise = randn_tensor(mean.shape, generator=generators, device=mean.device)
        return sample_posterior(mean, select_cached(std, mirrored), noise)
    with torch.no_grad():
        return encode_images(vae, to_images(batch, mirrored), generators, sample_posterior=True).float()


def to_images(batch: dict, mirrored: torch.Tensor) -> torch.Tensor:
    """A batch's images in [-1, 1], the `mirrored` rows flipped."""
    images = batch["pixels"].float() / 127.5 - 1
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def select_cached(values: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Of each row, the image or its mirror image; a cache without those has none to mirror."""
    return select_flip(values, mirrored if values.shape[1] == 2 else None)


def to_features(
    batch: dict, encoder: REPAEncoder | None, grid: tuple[int, int], mirrored: torch.Tensor
) -> torch.Tensor:
    """What REPA aligns hidden states with, `(batch, tokens, width)`: cached, or encoded from the images."""
    if encoder is None:
        return select_cached(batch["features"], mirrored).float()
    return encoder(to_images(batch, mirrored), grid)


def build_repa(
    args: argparse.Namespace, data: TrainingData, transformer: DoDTransformer2DModel
) -> tuple[REPAEncoder | None, REPAProjector, tuple[int, int]]:
    """REPA's encoder (none for cached features), its projector, and the grid of the transformer's tokens."""
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
        return None, new_projector(features["width"]), grid
    try:
        encoder = REPAEncoder.from_pretrained(args.repa_encoder, cache_dir=args.cache_dir)
    except Exception as error:  # missing, private, offline, no vision model: transformers raises many kinds
        raise BadInput(f"--repa_encoder {args.repa_encoder}: {str(error).strip().splitlines()[0]}") from error
    return encoder, new_projector(encoder.width), grid


def load_component(loader: type, path: str, **kwargs):
    try:
        with torch.device("cpu"):  # whatever the default device
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


def build_pipeline(args: argparse.Namespace, data: TrainingData) -> DoDPipeline:
    """The pipeline to train, new or loaded, in float32; settles `args.resolution` and the objective."""
    saved, vae, num_classes, id2label = None, None, data.num_classes, data.id2label
    config, embedder_config = dict(args.transformer_config or {}), dict(args.embedder_config or {})
    if args.preset is not None:
        config = {**PRESETS[args.preset].transformer, **config}
        # Its `output_dim` follows from the transformer, whose width the options may have changed.
        preset = {key: value for key, value in PRESETS[args.preset].latent_embedder.items() if key != "output_dim"}
        embedder_config = {**preset, **embedder_config}
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
    if args.latents_dir is not None and (vae is None or not vae_settings(vae).items() <= data.rows.settings.items()):
        raise BadInput(
            f"{args.latents_dir} was made with another VAE than "
            f"{args.pretrained_model_name_or_path or args.vae_name_or_path or origin['path']} is"
        )
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
    model_classes = config.get("num_classes", num_classes)
    if model_classes < num_classes or (args.num_classes is not None and model_classes != num_classes):
        raise BadInput(f"the data has {num_classes} classes but the model only {model_classes}")
    channels = config.get("in_channels", 1 if data.is_gray else 3) if vae is None else vae_latent_channels(vae)
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


def freeze(args: argparse.Namespace, pipeline: DoDPipeline) -> None:
    """Lets gradients reach what `--train` names, and adds the LoRA."""
    models = {"transformer": pipeline.transformer, "embedder": pipeline.latent_embedder}
    for name, model in models.items():
        model.requires_grad_(args.train == ["all"] or name in args.train).train()
    if "lora" in args.train:
        # peft's default starts as the identity: B is zero.
        lora = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=LORA_TARGETS)
        pipeline.transformer.add_adapter(lora)


def build_optimizer(args: argparse.Namespace, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    adam = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    adam["weight_decay"] = args.adam_weight_decay
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
    plain = DoDPipeline(**{**pipeline.components, **copies}, id2label=pipeline.config.id2label)
    plain.set_progress_bar_config(disable=True)
    return plain
