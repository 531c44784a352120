"""Evaluation as papers report it: Fréchet distances, Inception Score, kernel distance, precision, recall and coverage.

Data flows as: images -> `ImageSet` -> `extract_features` -> `evaluate` -> a list of results for a JSON and the model card.
"""

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
from .report import METRICS, evaluate, extract_features


__all__ = [
    "METRICS",
    "FeatureStatistics",
    "ImageSet",
    "InceptionExtractor",
    "TransformersExtractor",
    "density_coverage",
    "evaluate",
    "extract_features",
    "feature_statistics",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]
