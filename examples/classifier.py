"""A small classifier whose features measure generated images: the quickstart's digits and the study's data sets."""

from collections.abc import Iterable
from itertools import repeat

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusers_dod.evaluation import feature_statistics, frechet_distance


class Classifier(nn.Module):
    """A small CNN. Its 64 penultimate activations are the feature space of the Fréchet distance.

    Args:
        channels (`int`): of the images, `(number, channels, size, size)`.
        size (`int`): of the images.
        num_classes (`int`): number of classes.
        dropout (`float`): probability in training, before the last hidden layer.
    """

    def __init__(self, channels: int, size: int, num_classes: int, dropout: float = 0.0):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(32 * (size // 4) ** 2, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))

    @torch.no_grad()
    def accuracy(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of images, given by their features, whose class it reads."""
        return (self.head(features).argmax(dim=1) == labels).float().mean().item()


def fit(
    classifier: Classifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    batches: Iterable[torch.Tensor],
    learning_rates: Iterable[float] = repeat(1e-3),
) -> None:
    """Trains on shifted images and leaves the classifier in eval mode.

    Args:
        images (`torch.Tensor`): all images.
        labels (`torch.Tensor`): their classes.
        batches (iterable of `torch.Tensor`): the rows of each step.
        learning_rates (iterable of `float`): the learning rate of each step.
    """
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=1e-2)
    for rows, learning_rate in zip(batches, learning_rates):
        optimizer.param_groups[0]["lr"] = learning_rate
        shift = torch.randint(-2, 3, (2,)).tolist()
        F.cross_entropy(classifier(images[rows].roll(shift, dims=(2, 3))), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    classifier.eval()


def train_classifier(images: torch.Tensor, labels: torch.Tensor, epochs: int = 12) -> tuple[Classifier, float]:
    """Trains a [`Classifier`] on nine tenths of the images, the same one every time.

    Returns:
        the classifier in eval mode and its accuracy on the held-out tenth.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = Classifier(*images.shape[1:3], num_classes=int(labels.max()) + 1)
        training, held_out = torch.randperm(len(images)).tensor_split([len(images) * 9 // 10])
        batches = (rows for _ in range(epochs) for rows in training[torch.randperm(len(training))].split(64))
        fit(classifier, images, labels, batches)
    with torch.no_grad():
        features = classifier.features(images[held_out])
    return classifier, classifier.accuracy(features, labels[held_out])


@torch.no_grad()
def measure(
    classifier: Classifier, images: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor
) -> tuple[float, float]:
    """Fréchet distance of generated images to `reference` features, and how often the classifier reads their label.

    Args:
        images (`torch.Tensor`): `(samples, channels, size, size)` in [-1, 1].
        labels (`torch.Tensor`): `(samples,)`, what they should show.
        reference (`torch.Tensor`): features of real images, `(samples, 64)`.
    """
    features = classifier.features(images)
    distance = frechet_distance(feature_statistics(features), feature_statistics(reference))
    return distance, classifier.accuracy(features, labels)
