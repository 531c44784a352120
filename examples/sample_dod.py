"""Draws many images with a DoD pipeline, as evaluations need them, on any number of processes.

    accelerate launch examples/sample_dod.py --model outputs/mine --num_images 50000 --output_dir samples --npz

Every image follows from the seed and its own number, so neither the batch size nor the number of processes matters, and a
run that was interrupted goes on by the same command: an image that lies there is not drawn again. `output_dir` receives
`stage-2/000000.png` and so on (`--stages all` keeps every stage), `sampling.json` with the settings, and with `--npz`
one `stage-2.npz` a stage as ADM's evaluator reads it: `arr_0` of (samples, height, width, channels) in uint8, `arr_1` the
classes.
"""

import argparse
import json
import os
import sys
import zipfile
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

import diffusers_dod
from diffusers_dod import DoDPipeline
from diffusers_dod.process_group import drain_process_group
from diffusers_dod.randomness import row_generators


SETTINGS_NAME = "sampling.json"
# What may differ between two runs that fill one folder.
FREE_KEYS = ("output_dir", "num_images", "batch_size", "npz", "compile")


def per_stage(kind: type):
    """A list option: one value for all stages, or one each."""
    return {"type": kind, "nargs": "+"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, help="folder or repository of the Hub")
    add("--revision")
    add("--num_images", type=int, default=50000)
    add("--output_dir", required=True)
    add("--classes", choices=("balanced", "random"), default="balanced", help="equally many of each, or at random")
    add("--batch_size", type=int, default=64, help="images of a process at a time")
    add("--num_stages", type=int, default=2)
    add("--stages", default="last", help="which to keep: last, all, or numbers such as 1,2")
    add("--num_inference_steps", default=[30], **per_stage(int))
    add("--guidance_scale", default=[1.0], **per_stage(float))
    add("--prior_guidance_scale", **per_stage(float))
    add("--guidance_interval", type=float, nargs=2, default=[0.0, 1.0], help="part of the steps that is guided")
    add("--seed", type=int, default=0)
    add("--torch_dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    add("--compile", action="store_true", help="compile the blocks of the transformer")
    add("--npz", action="store_true", help="write ADM's .npz at the end")
    args = parser.parse_args(argv)
    for name in ("num_images", "batch_size", "num_stages"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for name in ("num_inference_steps", "guidance_scale", "prior_guidance_scale"):
        values = getattr(args, name)
        if values is not None and len(values) not in (1, args.num_stages):
            parser.error(f"--{name} takes one value, or one for each of the {args.num_stages} stages")
    try:
        args.stages = {"last": [args.num_stages], "all": list(range(1, args.num_stages + 1))}.get(
            args.stages
        ) or sorted({int(stage) for stage in args.stages.split(",")})
    except ValueError:
        parser.error(f"--stages {args.stages} is neither last, all nor numbers")
    if not all(1 <= stage <= args.num_stages for stage in args.stages):
        parser.error(f"--stages must be from 1 to {args.num_stages}")
    return args


def class_of(index: int, num_classes: int, args: argparse.Namespace) -> int | None:
    """The class of an image by its number; `None` for an unconditional model."""
    if num_classes == 0:
        return None
    if args.classes == "balanced":
        return index % num_classes
    return int(np.random.default_rng([args.seed, index]).integers(num_classes))


def image_path(args: argparse.Namespace, stage: int, index: int) -> Path:
    return Path(args.output_dir, f"stage-{stage}", f"{index:06d}.png")


def save_image(image: PIL.Image.Image, path: Path) -> None:
    """Under another name first, which is no picture's: an image that lies there is taken for whole."""
    unfinished = path.with_name(f"tmp-{os.getpid()}-{path.name}.part")
    image.save(unfinished, format="PNG")
    unfinished.replace(path)


def write_npz(path: Path, images: list[Path], classes: list[int]) -> None:
    """Streams the images into an `.npz`, so that 50,000 of them need no memory."""
    shape = (len(images), *np.asarray(PIL.Image.open(images[0]).convert("RGB")).shape)
    unfinished = path.with_name(f"tmp-{path.name}")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for image in tqdm(images, desc=path.name):
                file.write(np.asarray(PIL.Image.open(image).convert("RGB")).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, np.array(classes))
    unfinished.replace(path)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    state = Accelerator()  # not PartialState, which ignores accelerate's choice of the CPU

    # 1. The settings, which must be those of the images that lie there already
    settings = {key: value for key, value in vars(args).items() if key not in FREE_KEYS}
    versions = {
        "diffusers-dod": diffusers_dod.__version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
    }
    file = Path(args.output_dir, SETTINGS_NAME)
    if file.is_file():
        known = json.loads(file.read_text())
        differing = [key for key in settings if known.get(key) != settings[key]]
        if differing:
            print(
                f"{args.output_dir} holds images of another {differing[0]} ({known.get(differing[0])}): choose another "
                "--output_dir or the same settings",
                file=sys.stderr,
            )
            return 2
    state.wait_for_everyone()
    if state.is_main_process:
        for stage in args.stages:
            folder = Path(args.output_dir, f"stage-{stage}")
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("tmp-*.part"):  # of a run that was killed
                leftover.unlink()
        file.write_text(json.dumps({**settings, "versions": versions}, indent=2))
    state.wait_for_everyone()

    # 2. The pipeline
    pipe = DoDPipeline.from_pretrained(
        args.model, revision=args.revision, torch_dtype=getattr(torch, args.torch_dtype)
    ).to(state.device)
    pipe.set_progress_bar_config(disable=True)
    if args.compile:
        pipe.transformer.compile_repeated_blocks()
    num_classes = pipe.transformer.config.num_classes

    def for_stages(values):
        return values[0] if values is None or len(values) == 1 else values

    # 3. This process's images that are not there yet
    missing = [
        index
        for index in range(state.process_index, args.num_images, state.num_processes)
        if not all(image_path(args, stage, index).is_file() for stage in args.stages)
    ]
    progress = tqdm(total=len(missing), unit="image", disable=not state.is_local_main_process)
    for start in range(0, len(missing), args.batch_size):
        indices = missing[start : start + args.batch_size]
        stages = pipe(
            [class_of(index, num_classes, args) for index in indices],
            num_stages=args.num_stages,
            num_inference_steps=for_stages(args.num_inference_steps),
            guidance_scale=for_stages(args.guidance_scale),
            prior_guidance_scale=args.prior_guidance_scale and for_stages(args.prior_guidance_scale),
            guidance_interval=tuple(args.guidance_interval),
            generator=row_generators(args.seed, 0, indices),
            return_stages=True,
        ).stages
        for stage in args.stages:
            for index, image in zip(indices, stages[stage - 1]):
                save_image(image, image_path(args, stage, index))
        progress.update(len(indices))
    progress.close()
    state.wait_for_everyone()

    # 4. For ADM's evaluator
    if args.npz and state.is_main_process:
        classes = [class_of(index, num_classes, args) or 0 for index in range(args.num_images)]
        for stage in args.stages:
            paths = [image_path(args, stage, index) for index in range(args.num_images)]
            write_npz(Path(args.output_dir, f"stage-{stage}.npz"), paths, classes)
    drain_process_group()
    state.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
