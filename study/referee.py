"""What the study measures with: the features of a classifier, and principal components, which know nothing of classes."""

import examples_path  # noqa: F401
import torch
from classifier import Classifier, fit
from data_sets import DataSet

from diffusers_dod.evaluation import density_coverage, feature_statistics, frechet_distance, precision_recall


class Referee:
    """Compares generated images with the real training images.

    Args:
        data (`DataSet`): the classifier learns from its images; `accuracy` is on the held-out ones.
        steps (`int`): of 64 images, in which the classifier learns.
    """

    def __init__(self, data: DataSet, steps: int = 1500):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.classifier = self.build_classifier(data)
            batches = (torch.randint(len(data.images), (64,)) for _ in range(steps))
            learning_rates = (1e-3 * (1 - step / steps) for step in range(steps))
            fit(self.classifier, data.images, data.labels, batches, learning_rates)
            self.mean = data.images.flatten(1).mean(dim=0)
            _, _, self.components = torch.pca_lowrank(data.images.flatten(1), q=64, niter=4)
        self.remember(data)

    @staticmethod
    def build_classifier(data: DataSet) -> Classifier:
        return Classifier(*data.images.shape[1:3], num_classes=len(data.class_names), dropout=0.3)

    def remember(self, data: DataSet) -> None:
        self.real = self.features(data.images)
        self.real_components = self.principal_components(data.images)
        self.accuracy = self.classifier.accuracy(self.features(data.held_out_images), data.held_out_labels)

    def state(self) -> dict[str, torch.Tensor]:
        return {**self.classifier.state_dict(), "mean": self.mean, "components": self.components}

    @classmethod
    def load(cls, state: dict[str, torch.Tensor], data: DataSet) -> "Referee":
        """A referee of `state()`, for the same data, on its device."""
        referee = cls.__new__(cls)
        state = {name: tensor.to(data.images.device) for name, tensor in state.items()}
        referee.mean, referee.components = state.pop("mean"), state.pop("components")
        referee.classifier = cls.build_classifier(data).to(data.images.device).eval()
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
        """All figures of one set of images.

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
            "accuracy": self.classifier.accuracy(features, labels),
            "precision": precision,
            "recall": recall,
            "density": density,
            "coverage": coverage,
        }
