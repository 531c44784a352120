"""Evaluation as papers report it: Fréchet distances, Inception Score, kernel distance, precision, recall and coverage.

Data flows as: images -> `ImageSet` -> `extract_features` -> `evaluate` -> a list of results for a JSON and the model card.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_names


if TYPE_CHECKING:
    from .extractors import InceptionExtractor, TransformersExtractor
    from .images import ImageSet
    from .metrics import (
        FeatureStatistics,
        density_coverage,
        feature_statistics,
        frechet_distance,
        inception_score,
        kernel_distance,
        precision_recall,
    )
    from .report import evaluate, extract_features

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "extractors": ["InceptionExtractor", "TransformersExtractor"],
        "images": ["ImageSet"],
        "metrics": [
            "FeatureStatistics",
            "density_coverage",
            "feature_statistics",
            "frechet_distance",
            "inception_score",
            "kernel_distance",
            "precision_recall",
        ],
        "report": ["evaluate", "extract_features"],
    },
)
