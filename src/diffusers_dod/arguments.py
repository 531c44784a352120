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


def check_sizes(least: int = 1, **sizes: Any) -> None:
    """Integers of at least `least`, for constructors; a pair of them is a size too."""
    for name, value in sizes.items():
        values = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value,)
        if not all(is_count(each, least) for each in values):
            raise ValueError(f"`{name}` is {value!r}; it must be an integer of at least {least}.")


def check_numbers(above: float | None = None, **numbers: Any) -> None:
    """Finite numbers, above a bound if there is one, for constructors."""
    for name, value in numbers.items():
        if not is_finite(value) or (above is not None and value <= above):
            bound = "" if above is None else f" above {above:g}"
            raise ValueError(f"`{name}` is {value!r}; it must be a finite number{bound}.")


def check_size(height: Any, width: Any, multiple: int) -> None:
    """The size of an image that a VAE and patches must divide."""
    if not is_count(height) or not is_count(width) or height % multiple or width % multiple:
        raise ValueError(f"A {height}x{width} image does not fit: height and width must be multiples of {multiple}.")


def check_generator(generator: Any, batch_size: int) -> None:
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(each, torch.Generator) for each in generators):
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
    if not value.is_floating_point() or value.is_meta:
        raise ValueError(f"`{name}` is {value.dtype} on {value.device}; it must hold floating-point numbers.")
    if not torch.isfinite(value).all():
        raise ValueError(f"`{name}` holds NaN or infinite values.")


def check_sample(sample: torch.Tensor, scheduler: Any) -> None:
    """A result is looked at: NaN would become a black picture without a word."""
    if not torch.isfinite(sample).all():
        raise ValueError(
            f"The sample holds NaN or infinite values: {type(scheduler).__name__} diverged. Lower `guidance_scale`, take more "
            "steps, leave out `use_karras_sigmas`, or use another scheduler; in float16, try bfloat16."
        )
