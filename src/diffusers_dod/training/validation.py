"""Metrics of a model in training: a few samples of every stage against a reference."""

import argparse
from collections.abc import Iterator

import numpy as np
import torch

from diffusers_dod import DoDPipeline

from ..evaluation import ImageSet, InceptionExtractor, TransformersExtractor, evaluate, extract_features
from ..randomness import row_generators


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
        args: the script's options `evaluation_samples`, `evaluation_reference`, `evaluation_extractor`, `train_batch_size`,
            `resolution` and `seed`.
        device (`torch.device`): where the extractor runs.

    Raises:
        ValueError, OSError, ImportError: if the reference or the extractor cannot be had.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args = args
        if args.evaluation_extractor == "inception":
            self.extractor = InceptionExtractor()
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
            stages = pipeline(labels, generator=generators, output_type="np", return_stages=True).stages
            for number, images in enumerate(stages, start=1):
                drawn.setdefault(number, []).append((images * 255).round().astype(np.uint8))
        metrics = {}
        for number, images in drawn.items():
            features = extract_features(_Drawn(np.concatenate(images)), self.extractor, self.args.train_batch_size)
            for result in evaluate(features, self.reference, self.reference_features, self.extractor.label):
                metrics[f"evaluation/{result['metric']}_stage_{number}"] = result["value"]
        return metrics
