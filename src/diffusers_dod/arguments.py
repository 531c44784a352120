"""The arguments of calls and constructors: each checked once, with the cure in the message."""

import math
from numbers import Integral
from typing import Any

import numpy as np
import torch


# Of counts and sizes: far above what fits a machine, and small enough that memory ends before a library's integers do.
LARGEST = 2**24


def shown(value: Any) -> str:
    """A value as a message shows it: one line of at most 80 characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is an integer from `least` to `LARGEST`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= LARGEST


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number."""
    if isinstance(value, (int, np.integer)):
        return not isinstance(value, bool) and abs(int(value)) < 2**63  # torch's largest
    return isinstance(value, (float, np.floating)) and math.isfinite(value)


def per_stage(value: Any, num_stages: int) -> list:
    """One entry per stage, of a list of them or of one value for all."""
    return value if isinstance(value, list) else [value] * num_stages


def check_count(name: str, value: Any, least: int = 1) -> None:
    if not is_count(value, least):
        raise ValueError(f"`{name}` is {shown(value)}; it must be an integer from {least} to {LARGEST}.")


def check_per_stage(num_stages: int, **values: Any) -> None:
    """Lists have one entry per stage."""
    for name, value in values.items():
        if isinstance(value, list) and len(value) != num_stages:
            raise ValueError(
                f"`{name}` has {len(value)} entries for {num_stages} stages: pass one entry per stage, or one value."
            )


def check_steps(num_inference_steps: Any, num_stages: int) -> None:
    for steps in per_stage(num_inference_steps, num_stages):
        check_count("num_inference_steps", steps)


def check_scales(name: str, value: Any, num_stages: int, or_none: bool = False) -> None:
    """Finite numbers; with `or_none` also `None`."""
    for scale in per_stage(value, num_stages):
        if not is_finite(scale) and not (or_none and scale is None):
            raise ValueError(f"`{name}` is {shown(scale)}; every stage needs a finite number.")


def check_intervals(guidance_interval: Any, num_stages: int) -> None:
    for interval in per_stage(guidance_interval, num_stages):
        is_pair = isinstance(interval, (tuple, list)) and len(interval) == 2 and all(map(is_finite, interval))
        if not is_pair or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` is {shown(interval)}; pass a tuple (start, stop) with 0 <= start <= stop <= 1, or a "
                "list of them, one per stage."
            )


def check_choice(name: str, value: Any, choices: tuple) -> None:
    # By type first: an array compares with each of its elements.
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise ValueError(f"`{name}` is {shown(value)}; use {' or '.join(map(repr, choices))}.")


def check_switches(**switches: Any) -> None:
    for name, value in switches.items():
        if not isinstance(value, (int, np.bool_)):
            raise ValueError(f"`{name}` is {shown(value)}; it must be True or False.")


def check_sizes(least: int = 1, pair: tuple[str, ...] = ("sample_size",), **sizes: Any) -> None:
    """Integers of at least `least`, for constructors; those named in `pair` may also be a height and a width."""
    for name, value in sizes.items():
        is_pair = name in pair and isinstance(value, (tuple, list)) and len(value) == 2
        if not all(is_count(each, least) for each in (value if is_pair else (value,))):
            raise ValueError(f"`{name}` is {shown(value)}; it must be an integer from {least} to {LARGEST}.")


def check_numbers(above: float | None = None, **numbers: Any) -> None:
    """Finite numbers, above a bound if there is one, for constructors."""
    for name, value in numbers.items():
        if not is_finite(value) or (above is not None and value <= above):
            bound = "" if above is None else f" above {above:g}"
            raise ValueError(f"`{name}` is {shown(value)}; it must be a finite number{bound}.")


def check_list(name: str, values: Any, length: int, above: float = -math.inf) -> None:
    """So many finite numbers, above a bound if there is one."""
    is_list = isinstance(values, (list, tuple)) and len(values) == length
    if not is_list or not all(is_finite(value) and value > above for value in values):
        bound = "" if above == -math.inf else f" above {above:g}"
        raise ValueError(f"`{name}` is {shown(values)}; it must be a list of {length} finite numbers{bound}.")


def check_shares(**shares: Any) -> None:
    """Numbers from 0 to 1."""
    for name, value in shares.items():
        if not is_finite(value) or not 0 <= value <= 1:
            raise ValueError(f"`{name}` is {shown(value)}; it must be a number from 0 to 1.")


def check_instance(name: str, value: Any, *classes: type) -> None:
    if not isinstance(value, classes):
        wanted = " or ".join(each.__name__ for each in classes)
        raise TypeError(f"`{name}` is {shown(value)}; it must be a {wanted}.")


def check_size(height: Any, width: Any, multiple: int) -> None:
    """The size of an image that a VAE and patches must divide."""
    if not is_count(height) or not is_count(width) or height % multiple or width % multiple:
        raise ValueError(
            f"A {shown(height)}x{shown(width)} image does not fit: height and width must be multiples of {multiple}."
        )


def check_generator(generator: Any, batch_size: int) -> None:
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(each, torch.Generator) for each in generators):
        raise ValueError("`generator` must be a torch.Generator or a list of them, such as torch.manual_seed(0).")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"{len(generator)} generators for {batch_size} images: `generator` takes one, or one for each of the images."
        )


def check_callback(callback: Any, tensor_inputs: Any, known: list[str]) -> None:
    """`callback_on_step_end` and the names of what it is passed."""
    if callback is not None and not callable(callback):
        raise ValueError(f"`callback_on_step_end` is {shown(callback)}; it must be a function or None.")
    names = tensor_inputs if isinstance(tensor_inputs, (list, tuple)) else [tensor_inputs]
    if unknown := [name for name in names if not isinstance(name, str) or name not in known]:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` has {shown(unknown)}; pass a list of names from {known}."
        )


def changed_tensors(changed: Any, **tensors: torch.Tensor | None) -> list[Any]:
    """The tensors after a callback returned what it changed: a dict of some of them, each of the shape that it had."""
    if not isinstance(changed, dict):
        raise TypeError(
            f"`callback_on_step_end` returned {shown(changed)}; it must return a dict, {{}} where it changes nothing."
        )
    for name, before in tensors.items():
        after = changed.get(name, before)
        if after is not before and (before is None or not torch.is_tensor(after) or after.shape != before.shape):
            wanted = None if before is None else tuple(before.shape)
            raise ValueError(f"`callback_on_step_end` returned other `{name}` than a tensor of {wanted}.")
    return [changed.get(name, before) for name, before in tensors.items()]


def check_tensor(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """A finite tensor of a shape."""
    if not torch.is_tensor(value) or tuple(value.shape) != shape:
        given = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
        raise ValueError(f"`{name}` is {given}; for these arguments it must be a tensor of {shape}.")
    if not value.is_floating_point() or value.is_meta or value.layout != torch.strided:
        raise ValueError(f"`{name}` is {value.dtype} on {value.device}; it must hold floating-point numbers.")
    if not torch.isfinite(value).all():
        raise ValueError(f"`{name}` holds NaN or infinite values.")


def check_rows(shape: tuple[int | None, ...], integers: bool = False, **tensors: Any) -> None:
    """Tensors of a shape, in which `None` is any size, by type alone: a GPU would have to wait for a look at the values."""
    for name, value in tensors.items():
        fits = torch.is_tensor(value) and len(value.shape) == len(shape)
        if not fits or any(size not in (None, given) for size, given in zip(shape, value.shape)):
            given = tuple(value.shape) if torch.is_tensor(value) else shown(value)
            wanted = f"({', '.join('any' if size is None else str(size) for size in shape)}{',' * (len(shape) == 1)})"
            raise ValueError(f"`{name}` is {given}; it must be a tensor of {wanted}.")
        is_integer = not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
        if is_integer != integers or value.is_complex() or value.dtype == torch.bool or value.layout != torch.strided:
            kind = "integers" if integers else "floating-point numbers"
            raise ValueError(f"`{name}` holds {value.dtype}; it must hold {kind}.")


def check_sample(sample: torch.Tensor, scheduler: Any) -> None:
    """A result is looked at: NaN would become a black picture without a word."""
    if not torch.isfinite(sample).all():
        raise ValueError(
            f"The sample holds NaN or infinite values: {type(scheduler).__name__} diverged. Lower `guidance_scale`, take more "
            "steps, leave out `use_karras_sigmas`, or use another scheduler; in float16, try bfloat16."
        )
