"""Options of `diffusers-dod sample` that depend on the number of stages."""

import argparse

from ..cli import BadInput


def settle_stages(args: argparse.Namespace) -> None:
    """Checks what has one value per stage, once their number is known."""
    for name in ("num_inference_steps", "guidance_scale", "prior_guidance_scale"):
        values = getattr(args, name)
        if values is not None and len(values) not in (1, args.num_stages):
            raise BadInput(f"--{name} takes one value, or one for each of the {args.num_stages} stages")
    args.stages = kept_stages(args.stages, args.num_stages)


def kept_stages(text: str, num_stages: int) -> list[int]:
    named = {"last": [num_stages], "all": list(range(1, num_stages + 1))}
    try:
        stages = named[text] if text in named else sorted({int(stage) for stage in text.split(",")})
    except ValueError as error:
        raise BadInput(f"--stages {text} is neither last, all nor numbers") from error
    if not all(1 <= stage <= num_stages for stage in stages):
        raise BadInput(f"--stages must be from 1 to {num_stages}")
    return stages
