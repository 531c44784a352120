"""How a model in training looks: a grid of samples, and metrics of a few samples of every stage against a reference."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..cli import BadData, first_line
from ..evaluation import ImageSet, InceptionExtractor, TransformersExtractor, evaluate, extract_features
from ..pipeline_dod import DoDPipeline
from ..randomness import row_generators
from ..viz import stage_grid
from .tracking import log_image, log_values


logger = get_logger(__name__)
MAX_CLASSES, SAMPLES_PER_CLASS = 8, 3


def draw_grid(pipeline: DoDPipeline, accelerator: Accelerator, args: argparse.Namespace, step: int) -> None:
    """Writes a titled grid of some samples of the first classes, stage by stage, always from the same noise."""
    known: list[int | None] = [*range(min(pipeline.transformer.config.num_classes, MAX_CLASSES))]
    columns = known or [None] * MAX_CLASSES
    names = pipeline.config.id2label or {}
    titles = ["" if i is None else names.get(str(i), f"class {i}") for i in columns]
    class_ids = columns * (SAMPLES_PER_CLASS if known else 1)
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(len(class_ids))]
    with accelerator.autocast():
        stages = pipeline.to(accelerator.device)(class_ids, generator=generators, return_stages=True).stages
    grid = stage_grid(stages, titles)
    path = Path(args.output_dir, "samples", f"step_{step}.png")
    try:
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
    except OSError as error:
        logger.warning(f"{path} could not be written: {first_line(error)}. Training continues.")
    log_image(accelerator, "samples", grid, step)


class _Drawn:
    """Samples in memory, read as [`ImageSet`] is."""

    def __init__(self, images: np.ndarray):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)

    def batches(self, batch_size: int, num_workers: int) -> Iterator[torch.Tensor]:
        for batch in self.images.split(batch_size):
            yield batch.expand(-1, 3, -1, -1)


class TrainingEvaluation:
    """Draws always the same noise for the same balanced classes, so that a curve shows the model alone.

    Args:
        args: the options `evaluation_samples`, `evaluation_reference`, `evaluation_extractor`, `train_batch_size`,
            `resolution` and `seed`.
        device (`torch.device`): where the extractor runs.

    Raises:
        ValueError, OSError, ImportError: if the reference or the extractor cannot be had.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args = args
        if args.evaluation_extractor == "inception":
            self.extractor: torch.nn.Module = InceptionExtractor()
        else:
            self.extractor = TransformersExtractor(args.evaluation_extractor)
        self.extractor.to(device)
        self.reference = ImageSet(args.evaluation_reference, args.resolution)
        self.reference_features = extract_features(self.reference, self.extractor, args.train_batch_size)

    def __call__(self, pipeline: DoDPipeline) -> dict[str, float]:
        """The metrics by name and stage, such as `evaluation/fd_stage_2`."""
        count, num_classes = self.args.evaluation_samples, pipeline.transformer.config.num_classes
        drawn: dict[int, list[np.ndarray]] = {}
        for start in range(0, count, self.args.train_batch_size):
            indices = range(start, min(start + self.args.train_batch_size, count))
            labels = [index % num_classes if num_classes else None for index in indices]
            generators = row_generators(self.args.seed, 0, indices)
            _, stages = pipeline(labels, generator=generators, output_type="np", return_stages=True, return_dict=False)
            for number, images in enumerate(stages, start=1):
                drawn.setdefault(number, []).append((images * 255).round().astype(np.uint8))
        metrics = {}
        for number, images in drawn.items():
            features = extract_features(_Drawn(np.concatenate(images)), self.extractor, self.args.train_batch_size)
            for result in evaluate(features, self.reference, self.reference_features, str(self.extractor.label)):
                metrics[f"evaluation/{result['metric']}_stage_{number}"] = result["value"]
        return metrics


def validate(
    pipeline: DoDPipeline,
    evaluation: TrainingEvaluation | None,
    accelerator: Accelerator,
    args: argparse.Namespace,
    step: int,
) -> None:
    """Draws the grid, and measures where asked for; of a model that diverged there is a warning."""
    try:
        draw_grid(pipeline, accelerator, args, step)
        if evaluation is not None:
            log_values(accelerator, evaluation(pipeline), step)
    except ValueError as error:  # results that are not finite
        logger.warning(f"Samples or metrics of step {step} are missing: {first_line(error)} Training continues.")


def build_evaluation(args: argparse.Namespace, accelerator: Accelerator) -> TrainingEvaluation | None:
    """What `--evaluation_samples` asks for, in the main process."""
    if not args.evaluation_samples or not accelerator.is_main_process:
        return None
    try:
        return TrainingEvaluation(args, accelerator.device)
    except (ValueError, OSError, ImportError) as error:
        raise BadData(f"--evaluation_reference, --evaluation_extractor: {first_line(error)}") from error
