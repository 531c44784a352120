"""Metrics against closed forms, hand-made sets, plain sums and torchmetrics."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from diffusers_dod.evaluation import (
    FeatureStatistics,
    density_coverage,
    feature_statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def normal(samples, channels, seed, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=torch.Generator().manual_seed(99)) / channels**0.5
    return shift + scale * torch.randn(samples, channels, generator=generator) @ mixing


def test_frechet_distance_of_gaussians_in_closed_form():
    """For covariances with common eigenvectors the distance is a sum over channels."""
    basis = torch.linalg.qr(normal(6, 6, seed=1).double()).Q
    one, other = torch.linspace(0.1, 2, 6).double(), torch.linspace(3, 0.5, 6).double()
    mean = torch.arange(6).double() / 3
    first = FeatureStatistics(torch.zeros(6).double(), basis @ torch.diag(one) @ basis.T)
    second = FeatureStatistics(mean, basis @ torch.diag(other) @ basis.T)
    expected = mean.square().sum() + (one.sqrt() - other.sqrt()).square().sum()
    assert frechet_distance(first, second) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute():
    first, second = (feature_statistics(normal(400, 5, seed)) for seed in (1, 2))
    second = second._replace(covariance=second.covariance + torch.ones(5, 5))
    # The root of the product itself, which is not symmetric.
    values, vectors = np.linalg.eig((first.covariance @ second.covariance).numpy())
    root = (vectors * np.sqrt(values)) @ np.linalg.inv(vectors)
    expected = (first.mean - second.mean).square().sum() + first.covariance.trace() + second.covariance.trace()
    expected = float(expected) - 2 * np.trace(root).real
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("samples", [500, 20], ids=["many", "fewer than channels"])
def test_frechet_distance_agrees_with_torchmetrics(samples):
    one, other = normal(samples, 32, seed=1), normal(samples, 32, seed=2, scale=1.5, shift=0.3)

    class Given(torch.nn.Module):
        num_features = 32

        def forward(self, features):
            return features

    metric = FrechetInceptionDistance(feature=Given())
    metric.update(one.double(), real=True)
    metric.update(other.double(), real=False)
    expected = float(metric.compute())
    assert frechet_distance(feature_statistics(one), feature_statistics(other)) == pytest.approx(expected, rel=1e-3)


def test_statistics_are_numpys():
    features = normal(50, 4, seed=3)
    statistics = feature_statistics(features)
    assert np.allclose(statistics.mean, features.double().numpy().mean(0))
    assert np.allclose(statistics.covariance, np.cov(features.double().numpy(), rowvar=False))
    assert feature_statistics(features[:, :1]).covariance.shape == (1, 1)
    with pytest.raises(ValueError, match="1 sample has no covariance"):
        feature_statistics(features[:1])


def test_a_set_against_itself():
    features = normal(300, 16, seed=4)
    statistics = feature_statistics(features)
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-8)
    assert precision_recall(features, features) == (1.0, 1.0)
    assert density_coverage(features, features)[1] == 1.0


def test_precision_and_recall_of_points_on_a_line():
    """With one neighbour: balls of radius 1 around 0, 1, 2 and of radius 8 around 10; the samples' are 0.5 and 98 wide."""
    reference = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    samples = torch.tensor([[0.5], [1.0], [99.0]])
    precision, recall = precision_recall(samples, reference, k=1)
    assert precision == pytest.approx(2 / 3)  # 0.5 and 1
    assert recall == pytest.approx(4 / 4)  # the ball around 99 reaches to 1, and 0 lies within 0.5 of 0.5
    samples = torch.tensor([[0.5], [1.0], [1.5]])
    assert precision_recall(samples, reference, k=1) == (1.0, 3 / 4)


def test_density_and_coverage_of_points_on_a_line():
    """With one neighbour: balls of radius 1 around 0, 1, 2 and of radius 8 around 10."""
    reference = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    samples = torch.tensor([[0.5], [-0.5]])
    # 0.5 lies in the balls of 0 and 1, -0.5 in that of 0.
    assert density_coverage(samples, reference, k=1) == (3 / 2, 2 / 4)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_chunks_change_nothing(chunk):
    samples, reference = normal(60, 8, seed=5), normal(80, 8, seed=6, shift=0.2)
    assert precision_recall(samples, reference, chunk=chunk) == precision_recall(samples, reference)
    assert density_coverage(samples, reference, chunk=chunk) == density_coverage(samples, reference)


def test_too_few_for_their_neighbours():
    with pytest.raises(ValueError, match="evaluate at least 4"):
        precision_recall(normal(3, 4, seed=1), normal(30, 4, seed=2))


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("metric", [precision_recall, density_coverage, kernel_distance])
def test_too_few_are_refused_and_have_no_figure(metric, count):
    few, many = normal(count, 4, seed=1), normal(30, 4, seed=2)
    for pair in ((few, many), (many, few))[metric is density_coverage and count == 1 :]:  # which counts single samples
        with pytest.raises(ValueError, match="evaluate at least"):
            metric(*pair)


@pytest.mark.parametrize("metric", [precision_recall, density_coverage, kernel_distance])
def test_features_of_two_networks_are_refused(metric):
    with pytest.raises(ValueError, match="one network's"):
        metric(normal(30, 4, seed=1), normal(30, 5, seed=2))


def test_kernel_distance_is_the_unbiased_mmd():
    """Taken whole, it is the sum over pairs of the cubic kernel."""
    samples, reference = normal(20, 4, seed=7), normal(20, 4, seed=8, shift=0.5)

    def kernel(x, y):
        return (x.double() @ y.double().T / 4 + 1) ** 3

    same = sum((kernel(x, x).sum() - kernel(x, x).trace()) / (20 * 19) for x in (samples, reference))
    expected = same - 2 * kernel(samples, reference).mean()
    mean, std = kernel_distance(samples, reference, subsets=3, subset_size=20)
    assert mean == pytest.approx(float(expected), rel=1e-6) and std == pytest.approx(0, abs=1e-9)


def test_kernel_distance_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    one = kernel_distance(normal(50, 4, seed=1), normal(50, 4, seed=2), subsets=5, subset_size=10, seed=1)
    assert one == kernel_distance(normal(50, 4, seed=1), normal(50, 4, seed=2), subsets=5, subset_size=10, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_inception_score_of_known_predictions():
    assert inception_score(torch.zeros(100, 10), splits=1)[0] == pytest.approx(1)
    sure = 100 * torch.eye(10).repeat(20, 1)
    assert inception_score(sure, splits=1)[0] == pytest.approx(10)
    two = 100 * torch.eye(10)[[0, 1]].repeat(20, 1)
    assert inception_score(two, splits=1)[0] == pytest.approx(math.exp(math.log(2)))
