"""Draws many images with a DoD pipeline, for evaluation, on any number of processes.

    diffusers-dod sample --model outputs/mine --num_images 50000 --output_dir samples --npz
    accelerate launch --num_processes 8 -m diffusers_dod sample --model outputs/mine --output_dir samples --npz

Every image follows from the seed and its own number, so neither the batch size nor the number of processes matters. To
resume an interrupted run, repeat the same command: finished images are not drawn again. `output_dir` receives
`stage-2/000000.png` and so on (`stage-1/` from codes; `--stages all` keeps every stage), `sampling.json` with the
settings, and with `--npz` one `.npz` per kept stage in ADM's format, such as `stage-2.npz`: `arr_0` of (samples,
height, width, channels) in uint8, `arr_1` the classes.
"""

import argparse
import sys

from ..cli import Parser, number, run
from .stages import settle_stages


def build_parser() -> Parser:
    parser = Parser(prog="diffusers-dod sample", description=__doc__)
    positive, real = number(int, 1), number(float, float("-inf"))
    add = parser.add_argument
    add("--model", required=True, help="folder or Hub repository")
    add("--revision", help="branch, tag or commit of the repository")
    add("--num_images", type=positive, default=50000, help="images to draw")
    add("--output_dir", required=True, help="folder of the images")
    add(
        "--classes",
        choices=("balanced", "random"),
        default="balanced",
        help="balanced: equally many of each class; random: drawn at random",
    )
    add("--batch_size", type=positive, default=64, help="images per process at a time")
    add("--num_stages", type=number(int, 1, 1000), help="stages to run; default: 2, or 1 from codes")
    source = "where the first prior comes from; default: codes where there is a code model"
    add("--prior_source", choices=("codes", "stage"), help=source)
    add("--stages", default="last", help="stages to keep: last, all, or numbers such as 1,2")
    add("--num_inference_steps", type=positive, nargs="+", default=[30], help="one value, or one per stage")
    scale = "one value, or one per stage; refused with a guider, which has its own; default: 1, no guidance"
    add("--guidance_scale", type=real, nargs="+", help=scale)
    add(
        "--prior_guidance_scale",
        type=real,
        nargs="+",
        help="separate scale for the prior, one or one per stage; default: none",
    )
    add("--code_num_inference_steps", type=positive, default=30, help="steps of the code model")
    add(
        "--code_guidance_scale",
        type=real,
        default=1.0,
        help="class guidance of the code model; the default saved in the pipeline is not used",
    )
    noise = "noise on the codes, 0 to 1 times their RMS; only for embedders with `noise_level_input`; default: 0.3"
    add("--code_noise_level", type=number(float, 0, 1), help=noise)
    interval = "guided part of the steps, from noise (0) to sample (1); refused with a guider; default: 0 1"
    add("--guidance_interval", type=number(float, 0, 1), nargs=2, help=interval)
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the noise and of random classes")
    add(
        "--dtype",
        "--torch_dtype",
        choices=("float32", "float16", "bfloat16"),
        default="float32",
        help="type of the weights",
    )
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="compile the transformer's blocks")
    add("--npz", action=argparse.BooleanOptionalAction, default=False, help="write ADM's .npz at the end")
    return parser


def parse_args(argv: list[str]) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    if args.num_stages is not None:
        settle_stages(args)
    return args


def draw(argv: list[str]) -> None:
    args = parse_args(argv)
    from .sampling import sample

    sample(args)


def main(argv: list[str] | None = None) -> int:
    return run(draw, "diffusers-dod sample", argv)


if __name__ == "__main__":
    sys.exit(main())
