"""Tiny pipelines for the demo: pixel space, one channel, a scheduler with a memory, and names."""

from diffusers import DPMSolverMultistepScheduler
from helpers import tiny_coded_pipeline, tiny_embedder, tiny_pipeline, tiny_transformer


NAMES = {0: "goose", 1: "crane", 2: "crane", 3: 'it\'s "odd" <b>&\n', 4: "n" * 200}


def digits_like(make=tiny_pipeline, **overrides):
    components = {
        "channels": 1,
        "transformer": tiny_transformer(in_channels=1),
        "latent_embedder": tiny_embedder(in_channels=1, codes_mean=[0.1, -0.2], codes_std=[0.5, 2.0]),
        "scheduler": DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        "id2label": NAMES,
    }
    return make(**components | overrides)


def coded_digits(**overrides):
    """The same with a code model."""
    return digits_like(tiny_coded_pipeline, **overrides)
