"""A model of the codes: encoding a data set to codes, building the model, and measuring whether it copies.

Data flows as: images or cached latents -> latents -> the pipeline's embedder -> codes, normalised per channel -> the
training loop, for which codes are latents.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..cli import BadInput
from ..data.batches import TrainingData, load_data, make_collate, to_latents
from ..files import write_json
from ..latent_embedder_dod import DoDLatentEmbedder
from ..pipeline_dod import DoDPipeline
from ..presets import PRESETS, nearest_preset
from ..randomness import row_generators, step_generator
from ..transformer_dod import DoDTransformer2DModel
from .build import Subject, build_model, check_latents, load_component, make_scheduler
from .options import resolve_objective


logger = get_logger(__name__, log_level="INFO")
# One token of the whole grid learns far faster where a grid is this small.
WHOLE_GRID = 4
COPYING = 0.9


class EncodedCodes(Dataset):
    """Codes in memory, in the form of [`CachedLatents`]: a row has `mean` `(flips, channels, rows, columns)`, `label`, `id`."""

    def __init__(self, codes: torch.Tensor, labels: torch.Tensor):
        self.codes, self.labels = codes, labels

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"mean": self.codes[index], "label": self.labels[index], "id": torch.tensor(index)}


@torch.no_grad()
def encode_data(
    args: argparse.Namespace, data: TrainingData, pipeline: DoDPipeline, accelerator: Accelerator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of all images, `(images, flips, tokens, bottleneck_dim)`, and labels; the processes share the work."""
    rows = range(accelerator.process_index, len(data.rows), accelerator.num_processes)
    vae = None if data.are_latents else pipeline.vae
    channels = pipeline.transformer.config.in_channels if vae is None else 3
    loader = DataLoader(
        torch.utils.data.Subset(data.rows, rows),
        batch_size=args.encoding_batch_size,
        num_workers=args.dataloader_num_workers,
        collate_fn=make_collate(args, data, channels),
    )
    device = accelerator.device
    for model in (vae, pipeline.latent_embedder):
        if model is not None:
            model.requires_grad_(False).eval().to(device)
    codes, labels, seen = [], [], 0
    for batch in tqdm(loader, desc="Encoding", unit="batch", disable=not accelerator.is_local_main_process):
        batch = {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}
        count = len(batch["label"])
        generators = row_generators(args.seed, 0, rows[seen : seen + count], device)
        flips = []
        for mirrored in (False, True) if args.random_flip else (False,):
            where = torch.full((count,), mirrored, device=device)
            flips.append(pipeline.latent_embedder.encode(to_latents(batch, vae, where, generators)))
        codes.append(torch.stack(flips, dim=1).float().cpu())
        labels.append(batch["label"].cpu())
        seen += count
    # Back into the order of the images: process p has rows p, p + n, p + 2n, ...
    parts = gather_object([(accelerator.process_index, torch.cat(codes), torch.cat(labels))])
    all_codes = torch.empty(len(data.rows), *parts[0][1].shape[1:])
    all_labels = torch.empty(len(data.rows), dtype=torch.long)
    for process, part_codes, part_labels in parts:
        all_codes[process :: accelerator.num_processes] = part_codes
        all_labels[process :: accelerator.num_processes] = part_labels
    return all_codes, all_labels


def set_statistics(embedder: DoDLatentEmbedder, codes: torch.Tensor) -> None:
    """Writes mean and standard deviation of each channel of `codes`, `(..., bottleneck_dim)`, into the embedder's config."""
    values = codes.flatten(0, -2).double()
    mean, std = values.mean(dim=0), values.std(dim=0)
    if not torch.isfinite(std).all() or (std < 1e-8).any():
        raise BadInput("the embedder's codes do not vary: train the pipeline first, then its code model")
    embedder.register_to_config(codes_mean=[float(x) for x in mean], codes_std=[float(x) for x in std])


def default_code_config(pipeline: DoDPipeline, preset: str | None) -> dict[str, Any]:
    """Size and patch of a code model for a pipeline."""
    width = pipeline.transformer.inner_dim
    config = dict(PRESETS[preset or nearest_preset(width)].code_transformer)
    size, patch = pipeline.transformer.config.sample_size, pipeline.latent_embedder.config.patch_size
    rows, columns = (size // patch,) * 2 if isinstance(size, int) else (size[0] // patch, size[1] // patch)
    config["sample_size"] = rows if rows == columns else (rows, columns)
    is_small = rows == columns <= WHOLE_GRID
    config["patch_size"] = rows if is_small else 2 if rows % 2 == columns % 2 == 0 else 1
    return config


class CodeTraining:
    """A training of a code model, and what it is compared with at the end."""

    kept: torch.Tensor
    held_out: torch.Tensor
    held_out_labels: torch.Tensor

    def build(self, args: argparse.Namespace, accelerator: Accelerator) -> Subject:
        """A new code model on the codes of the data, for the training loop."""
        pipeline: DoDPipeline = load_component(DoDPipeline, args.pipeline, cache_dir=args.cache_dir)
        size = pipeline.transformer.config.sample_size
        if not isinstance(size, int):
            raise BadInput(f"the model is for latents of {size}, but images are square here")
        own_resolution = size * pipeline.spatial_factor
        if args.resolution not in (None, own_resolution):
            raise BadInput(f"--resolution {args.resolution}: the model's codes are of images of {own_resolution}")
        args.resolution = own_resolution
        resolve_objective(args)
        data = load_data(args, accelerator)
        if args.latents_dir is not None:
            check_latents(data, pipeline.vae, args.latents_dir, args.pipeline)
        num_classes = pipeline.transformer.config.num_classes
        if data.num_classes > num_classes or (data.num_classes == 0 and num_classes > 0):
            raise BadInput(
                f"the model has {num_classes} classes, but the data or --num_classes has {data.num_classes}"
            )

        # 1. Codes, some of them held out
        codes, labels = encode_data(args, data, pipeline, accelerator)
        order = torch.randperm(len(codes), generator=step_generator(args.seed, 0))
        num_held_out = int(args.held_out * len(codes))
        held_out, kept = order.split([num_held_out, len(codes) - num_held_out])
        if not len(kept):
            raise BadInput(f"--held_out {args.held_out} leaves none of {len(codes)} images to train on")
        embedder = pipeline.latent_embedder.to("cpu")
        set_statistics(embedder, codes[kept])
        normalized = embedder.normalize_codes(codes.flatten(0, 1), size, size).unflatten(0, codes.shape[:2])
        self.kept, self.held_out, self.held_out_labels = normalized[kept], normalized[held_out], labels[held_out]

        # 2. The model
        torch.manual_seed(args.seed)
        codes_grid = embedder.code_grid(size, size)
        own = {"in_channels": embedder.config.bottleneck_dim, "num_classes": num_classes, "prediction_type": "flow"}
        config = {**default_code_config(pipeline, args.code_preset), **(args.code_config or {})}
        model: DoDTransformer2DModel = build_model(DoDTransformer2DModel, config, own, "--code_config")
        if any(side % model.config.patch_size for side in codes_grid):
            raise BadInput(
                f"--code_config: a patch of {model.config.patch_size} does not divide the {codes_grid} codes"
            )
        # With FiTv2's 0.02, made for a million steps, a few thousand do not learn the classes.
        torch.nn.init.normal_(model.class_embed.weight, std=1.0)
        whole = DoDPipeline.from_pipe(
            pipeline,
            code_transformer=model,
            code_scheduler=make_scheduler("flow"),
            code_guidance_scale=args.code_guidance_scale,
        )
        rows = EncodedCodes(self.kept, labels[kept])
        return Subject(
            whole,
            "code_transformer",
            TrainingData(rows, num_classes, None, False, len(rows), are_latents=True, sha256=data.sha256),
        )

    @torch.no_grad()
    def report(self, args: argparse.Namespace) -> None:
        """Prints, and writes to `codes.json`, how far generated and held-out codes lie from the training codes."""
        count = min(1000, len(self.held_out))
        if count == 0:
            print("No codes were held out (--held_out), so nobody knows whether the model copies.")
            return
        pipeline = DoDPipeline.from_pretrained(args.output_dir)
        pipeline.set_progress_bar_config(disable=True)
        size = pipeline.transformer.config.sample_size * pipeline.spatial_factor
        labels = self.held_out_labels[:count]
        generators = row_generators(args.seed, 1, range(count))
        generated = pipeline.generate_codes(labels, size, size, generator=generators)
        latent_size = pipeline.transformer.config.sample_size
        generated = pipeline.latent_embedder.normalize_codes(generated, latent_size, latent_size)
        training = self.kept.flatten(0, 1)
        distances = {
            "generated": float(nearest(generated, training)[0].median()),
            "held_out": float(nearest(self.held_out[:count, 0], training)[0].median()),
        }
        copies = distances["generated"] < COPYING * distances["held_out"]
        write_json(Path(args.output_dir, "codes.json"), {**distances, "count": count, "copies": copies})
        print(
            f"Nearest training code, median of {count}, in standard deviations: generated {distances['generated']:.3g}, "
            f"held out {distances['held_out']:.3g}."
        )
        if copies:
            logger.warning(
                "Generated codes lie nearer to training codes than held-out ones do: the code model copies. Train it for "
                "fewer steps, or make it smaller."
            )


def nearest(codes: torch.Tensor, others: torch.Tensor, chunk: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance of each of `codes` to the nearest of `others`, both `(number, ...)`, and which that is; each `(number,)`."""
    found = [torch.cdist(part, others.flatten(1)).min(dim=1) for part in codes.flatten(1).split(chunk)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])
