"""Distances and scores between two sets of features; every function takes tensors and knows nothing of images.

Fréchet distance: Heusel et al. 2017 (arXiv 1706.08500). Precision and recall: Kynkäänniemi et al. 2019 (arXiv
1904.06991), as in ADM's evaluator with k = 3. Density and coverage: Naeem et al. 2020 (arXiv 2002.09797), k = 5. Kernel
distance and Inception Score are torchmetrics', an extra that training does without.
"""

from typing import NamedTuple

import torch


class FeatureStatistics(NamedTuple):
    """Mean `(channels,)` and covariance `(channels, channels)` of a set of features, in float64."""

    mean: torch.Tensor
    covariance: torch.Tensor


def check_features(*features: torch.Tensor) -> None:
    """Refuses features that are missing, not finite, or from different networks."""
    widths = {values.shape[1:] for values in features}
    if len(widths) > 1 or any(values.ndim != 2 for values in features):
        raise ValueError(
            f"The features are {' and '.join(str(tuple(each.shape)) for each in features)}: one network's?"
        )
    for values in features:
        if not len(values):
            raise ValueError("There are no samples: evaluate at least 2.")
        if not torch.isfinite(values).all():
            raise ValueError("The features hold NaN or infinite values: look at the images and the extractor.")


def feature_statistics(features: torch.Tensor) -> FeatureStatistics:
    """Statistics of `(samples, channels)`, the covariance with `samples - 1` in the denominator, as ADM's.

    Raises:
        ValueError: for fewer than two samples.
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} sample has no covariance: evaluate at least 2.")
    check_features(features)
    features = features.double()
    return FeatureStatistics(features.mean(dim=0), torch.cov(features.T).reshape(features.shape[1], -1))


def _symmetric_sqrt(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """Squared Fréchet distance of two Gaussians: `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))`.

    The trace of the root is computed from the symmetric `C1^(1/2) C2 C1^(1/2)`, which has the same eigenvalues and is
    stable with fewer samples than channels. Few samples still bias the distance upwards: compare equal numbers.
    """
    root = _symmetric_sqrt(one.covariance)
    eigenvalues = torch.linalg.eigvalsh(root @ other.covariance @ root)
    cross = eigenvalues.clamp(min=0).sqrt().sum()
    difference = (one.mean - other.mean).square().sum()
    distance = difference + one.covariance.trace() + other.covariance.trace() - 2 * cross
    # Rounding makes the distance of a set to itself slightly negative.
    return max(0.0, float(distance))


class _Given(torch.nn.Module):
    """torchmetrics extracts features itself; these are at hand already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def kernel_distance(
    samples: torch.Tensor, reference: torch.Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018, arXiv 1801.01401): unbiased squared MMD with the cubic kernel, mean and std of subsets.

    Args:
        samples (`torch.Tensor`): features, `(samples, channels)`.
        reference (`torch.Tensor`): features, `(samples, channels)`.
        subsets (`int`): number of subsets.
        subset_size (`int`): samples per subset; a smaller set is taken whole.
        seed (`int`): of the subsets.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    check_features(samples, reference)
    size = min(subset_size, len(samples), len(reference))
    if size < 2:
        raise ValueError(f"Subsets of {size} have no kernel distance: evaluate at least 2 samples.")
    metric = KernelInceptionDistance(feature=_Given(samples.shape[1]), subsets=subsets, subset_size=size)
    metric.update(reference.double(), real=True)
    metric.update(samples.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)


def inception_score(logits: torch.Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Inception Score (Salimans et al. 2016, arXiv 1606.03498) of class logits `(samples, classes)`: mean and std of splits."""
    from torchmetrics.image.inception import InceptionScore

    check_features(logits)
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} samples cannot be split into {splits} parts: evaluate more.")
    metric = InceptionScore(feature=_Given(logits.shape[1]), splits=splits)
    metric.update(logits.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)


def _radii(features: torch.Tensor, k: int, chunk: int) -> torch.Tensor:
    """Distance of every sample to its k-th nearest other one."""
    if len(features) <= k:
        raise ValueError(f"{len(features)} samples have no {k} neighbours each: evaluate at least {k + 1}.")
    # The nearest of all is the sample itself.
    rows = [torch.cdist(part, features).kthvalue(k + 1, dim=1).values for part in features.split(chunk)]
    return torch.cat(rows)


def _is_covered(points: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor, chunk: int) -> torch.Tensor:
    """Whether each point lies in the ball of any centre."""
    return torch.cat([(torch.cdist(part, centres) <= radii).any(dim=1) for part in points.split(chunk)])


def precision_recall(
    samples: torch.Tensor, reference: torch.Tensor, k: int = 3, chunk: int = 2000
) -> tuple[float, float]:
    """Share of the samples within the reference's manifold, and of the reference within the samples'.

    A manifold is the union of balls around its points that reach to the k-th nearest neighbour.

    Args:
        samples (`torch.Tensor`): features, `(samples, channels)`.
        reference (`torch.Tensor`): features, `(samples, channels)`.
        k (`int`): neighbours.
        chunk (`int`): rows of the distance matrix that are in memory at a time.
    """
    check_features(samples, reference)
    samples, reference = samples.float(), reference.float()
    precision = _is_covered(samples, reference, _radii(reference, k, chunk), chunk)
    recall = _is_covered(reference, samples, _radii(samples, k, chunk), chunk)
    return float(precision.float().mean()), float(recall.float().mean())


def density_coverage(
    samples: torch.Tensor, reference: torch.Tensor, k: int = 5, chunk: int = 2000
) -> tuple[float, float]:
    """Density and coverage of samples with respect to a reference.

    A ball around each reference feature reaches to its k-th nearest neighbour. Density is the mean number of balls that a
    sample lies in, divided by k; it can exceed 1. Coverage is the share of balls that contain a sample.

    The arguments are those of [`precision_recall`], but `k` defaults to 5.
    """
    check_features(samples, reference)
    samples, reference = samples.float(), reference.float()
    radii = _radii(reference, k, chunk)
    inside = torch.zeros((), dtype=torch.long, device=reference.device)
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for part in samples.split(chunk):
        hits = torch.cdist(part, reference) <= radii
        inside += hits.sum()
        covered |= hits.any(dim=0)
    return int(inside) / (k * len(samples)), float(covered.float().mean())
