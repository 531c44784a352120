"""The arguments of a pipeline's call: each checked once, with the cure in the message."""

import math
from numbers import Integral, Real
from typing import Any

import torch


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer of at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def per_stage(value: Any, num_stages: int) -> list:
    """One entry per stage, of a list of them or of one value for all."""
    return value if isinstance(value, list) else [value] * num_stages


def check_count(name: str, value: Any) -> None:
    if not is_count(value):
        raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least 1.")


def check_per_stage(num_stages: int, **values: Any) -> None:
    """Lists have one entry per stage."""
    for name, value in values.items():
        if isinstance(value, list) and len(value) != num_stages:
            raise ValueError(
                f"`{name}` has {len(value)} entries for {num_stages} stages: pass one entry per stage, or one value."
            )


def check_steps(num_inference_steps: Any, num_stages: int) -> None:
    for steps in per_stage(num_inference_steps, num_stages):
        if not is_count(steps):
            raise ValueError(f"`num_inference_steps` is {steps!r}; every stage needs an integer of at least 1.")


def check_scales(name: str, value: Any, num_stages: int, or_none: bool = False) -> None:
    """Finite numbers; with `or_none` also `None`."""
    for scale in per_stage(value, num_stages):
        if not is_finite(scale) and not (or_none and scale is None):
            raise ValueError(f"`{name}` is {scale!r}; every stage needs a finite number.")


def check_intervals(guidance_interval: Any, num_stages: int) -> None:
    for interval in per_stage(guidance_interval, num_stages):
        is_pair = isinstance(interval, (tuple, list)) and len(interval) == 2 and all(map(is_finite, interval))
        if not is_pair or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` is {interval!r}; pass a tuple (start, stop) with 0 <= start <= stop <= 1, or a "
                "list of them, one per stage."
            )


def check_choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}; use {' or '.join(map(repr, choices))}.")


def check_generator(generator: Any, batch_size: int) -> None:
    generators = generator if isinstance(generator, list) else [generator]
    if not all(each is None or isinstance(each, torch.Generator) for each in generators):
        raise ValueError("`generator` must be a torch.Generator or a list of them, such as torch.manual_seed(0).")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"{len(generator)} generators for {batch_size} images: pass one, or one for each of the images."
        )


def check_tensor(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """A finite tensor of a shape."""
    if not torch.is_tensor(value) or tuple(value.shape) != shape:
        given = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
        raise ValueError(f"`{name}` is {given}; for these arguments it must be a tensor of {shape}.")
    if not torch.isfinite(value).all():
        raise ValueError(f"`{name}` holds NaN or infinite values.")
