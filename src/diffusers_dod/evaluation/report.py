"""From two sets of images to a table of metrics."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn as nn

from .images import ImageSet
from .metrics import (
    density_coverage,
    feature_statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from .names import INCEPTION_NAMES, METRICS, PLAIN_NAMES


class Batched(Protocol):
    """What [`ImageSet`] and samples in memory share."""

    def batches(self, batch_size: int, num_workers: int) -> Iterator[torch.Tensor]: ...


@torch.no_grad()
def extract_features(
    images: Batched, extractor: nn.Module, batch_size: int = 64, num_workers: int = 0, progress: Callable = iter
) -> dict[str, torch.Tensor]:
    """Features of all images, on the CPU, by the names of the extractor's outputs.

    Args:
        images ([`ImageSet`]): what to read, or anything with its `batches`.
        extractor (`nn.Module`): see `extractors.py`; it runs on the device that its parameters are on.
        batch_size (`int`): images per batch.
        num_workers (`int`): processes that read images.
        progress (`Callable`): wraps the batches, such as `tqdm`.
    """
    extractor.eval()
    device = next(iter(extractor.parameters()), torch.empty(0)).device
    parts: dict[str, list[torch.Tensor]] = {}
    for batch in progress(images.batches(batch_size, num_workers)):
        for name, values in extractor(batch.to(device)).items():
            parts.setdefault(name, []).append(values.float().cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def evaluate(
    samples: dict[str, torch.Tensor],
    reference: ImageSet,
    reference_features: dict[str, torch.Tensor],
    label: str,
    metrics: tuple[str, ...] = METRICS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The metrics that the features at hand allow.

    A Fréchet distance uses the statistics that came with the reference where there are any, for those are of the whole
    training set; they are only meaningful for the network that they were made with.

    Args:
        samples (`dict`): features of the samples, of [`extract_features`].
        reference ([`ImageSet`]): for its statistics.
        reference_features (`dict`): features of the reference's images, empty if it holds none.
        label (`str`): the extractor's; the metrics' usual names are kept for the Inception network.
        metrics (`tuple` of `str`): which to compute, of `METRICS`.
        seed (`int`): of the subsets and splits.

    Returns:
        `list` of `dict`: `metric`, `name` and `value` of each.

    Raises:
        ValueError: for an unknown metric, or statistics of another network.
    """
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no metric; choose from {', '.join(METRICS)}.")
    is_inception = label.startswith("inception")
    names = INCEPTION_NAMES if is_inception else {key: f"{name} ({label})" for key, name in PLAIN_NAMES.items()}
    suffix = "" if is_inception else f" ({label})"
    results: list[dict[str, Any]] = []

    def report(metric: str, name: str, value: float) -> None:
        results.append({"metric": metric, "name": name, "value": value})

    for metric, kind in (("fd", "features"), ("sfd", "spatial")):
        has_reference = kind in reference.statistics or kind in reference_features
        if metric in metrics and kind in samples and has_reference:
            statistics = reference.statistics.get(kind) or feature_statistics(reference_features[kind])
            if len(statistics.mean) != samples[kind].shape[1]:
                raise ValueError(
                    f"The reference's statistics have {len(statistics.mean)} channels but the extractor has "
                    f"{samples[kind].shape[1]}: they were made with another network."
                )
            report(metric, names[metric], frechet_distance(feature_statistics(samples[kind]), statistics))
    if "is" in metrics and "logits" in samples:
        mean, std = inception_score(samples["logits"], seed=seed)
        report("is", names["is"], mean)
        report("is_std", f"{names['is']}, std of splits", std)
    if reference_features:
        features, others = samples["features"], reference_features["features"]
        if "kid" in metrics:
            mean, std = kernel_distance(features, others, seed=seed)
            report("kid", names["kid"], mean)
            report("kid_std", f"{names['kid']}, std of subsets", std)
        if "precision_recall" in metrics:
            precision, recall = precision_recall(features, others)
            report("precision", f"precision{suffix}", precision)
            report("recall", f"recall{suffix}", recall)
        if "density_coverage" in metrics:
            density, coverage = density_coverage(features, others)
            report("density", f"density{suffix}", density)
            report("coverage", f"coverage{suffix}", coverage)
    return results
