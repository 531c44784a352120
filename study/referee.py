"""What the study measures with: the features of a classifier, and principal components, which know nothing of classes."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from data_sets import DataSet

from diffusers_dod.evaluation import density_coverage, feature_statistics, frechet_distance, precision_recall


class Classifier(nn.Module):
    """A small CNN. Its 64 penultimate activations are the feature space of the Fréchet distance."""

    def __init__(self, channels: int, size: int, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(32 * (size // 4) ** 2, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


class Referee:
    """Compares generated images with the real training images.

    Args:
        data (`DataSet`): the classifier learns from its images; `accuracy` is on the held-out ones.
        steps (`int`): of 64 images, in which the classifier learns.
    """

    def __init__(self, data: DataSet, steps: int = 1500):
        channels, size = data.images.shape[1:3]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.classifier = Classifier(channels, size, len(data.class_names))
            optimizer = torch.optim.AdamW(self.classifier.parameters(), lr=1e-3, weight_decay=1e-2)
            for step in range(steps):
                optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
                rows = torch.randint(len(data.images), (64,))
                shift = torch.randint(-2, 3, (2,)).tolist()
                images = data.images[rows].roll(shift, dims=(2, 3))
                F.cross_entropy(self.classifier(images), data.labels[rows]).backward()
                optimizer.step()
                optimizer.zero_grad()
            self.classifier.eval()
            self.mean = data.images.flatten(1).mean(dim=0)
            _, _, self.components = torch.pca_lowrank(data.images.flatten(1), q=64, niter=4)
        self.remember(data)

    def remember(self, data: DataSet) -> None:
        self.real = self.features(data.images)
        self.real_components = self.principal_components(data.images)
        held_out = self.classifier.head(self.features(data.held_out_images))
        self.accuracy = (held_out.argmax(dim=1) == data.held_out_labels).float().mean().item()

    def state(self) -> dict[str, torch.Tensor]:
        return {**self.classifier.state_dict(), "mean": self.mean, "components": self.components}

    @classmethod
    def load(cls, state: dict[str, torch.Tensor], data: DataSet) -> "Referee":
        """A referee of `state()`, for the same data, on its device."""
        referee = cls.__new__(cls)
        state = {name: tensor.to(data.images.device) for name, tensor in state.items()}
        referee.mean, referee.components = state.pop("mean"), state.pop("components")
        channels, size = data.images.shape[1:3]
        referee.classifier = Classifier(channels, size, len(data.class_names)).to(data.images.device).eval()
        referee.classifier.load_state_dict(state)
        referee.remember(data)
        return referee

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Of images `(number, channels, size, size)`: `(number, 64)`."""
        return torch.cat([self.classifier.features(batch) for batch in images.split(500)])

    def principal_components(self, images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1) - self.mean) @ self.components

    @torch.no_grad()
    def measure(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Everything that one set of images is measured by.

        Args:
            images (`torch.Tensor`): `(number, channels, size, size)` in [-1, 1].
            labels (`torch.Tensor`): `(number,)`, what they should show.
        """
        features = self.features(images)
        # As many real images as generated ones, since both manifolds' radii depend on their number.
        rows = torch.randperm(len(self.real), generator=torch.Generator().manual_seed(0))[: len(images)]
        precision, recall = precision_recall(features, self.real[rows])
        density, coverage = density_coverage(features, self.real[rows])
        components = feature_statistics(self.principal_components(images))
        return {
            "fd": frechet_distance(feature_statistics(features), feature_statistics(self.real)),
            "fd_pca": frechet_distance(components, feature_statistics(self.real_components)),
            "accuracy": (self.classifier.head(features).argmax(dim=1) == labels).float().mean().item(),
            "precision": precision,
            "recall": recall,
            "density": density,
            "coverage": coverage,
        }
