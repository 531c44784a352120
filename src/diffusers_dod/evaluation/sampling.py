"""Many images of a pipeline, on any number of processes, each following from the seed and its own number."""

import argparse
import json
import os
import zipfile
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from .. import __version__
from ..cli import BadInput, bad_input
from ..files import json_sha256, weights_sha256, whole_file, write_json
from ..guidance import check_guidance
from ..pipeline_dod import DoDPipeline
from ..processes import end_together
from ..randomness import row_generators
from .stages import settle_stages


SETTINGS_NAME = "sampling.json"
# What may differ between two runs that fill one folder.
FREE_KEYS = ("output_dir", "num_images", "batch_size", "npz", "compile", "model", "revision")


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
    """Written to a temporary name first, so that every finished file name is a complete image."""
    unfinished = path.with_name(f"tmp-{os.getpid()}-{path.name}.part")
    image.save(unfinished, format="PNG")
    unfinished.replace(path)


def _size(path: Path) -> tuple[int, int]:
    with bad_input(OSError, what=str(path)), PIL.Image.open(path) as image:
        return image.size


def write_npz(path: Path, images: list[Path], classes: list[int]) -> None:
    """Streams the images into an `.npz`, so that 50,000 of them need no memory.

    Raises:
        BadInput: naming a picture of another size, of which the file's header could not tell.
    """
    sizes = {image: _size(image) for image in images}
    width, height = sizes[images[0]]
    for image, size in sizes.items():
        if size != (width, height):
            raise BadInput(
                f"{image} is {size[0]}x{size[1]} and {images[0].name} is {width}x{height}: delete what is wrong"
            )
    shape = (len(images), height, width, 3)
    with whole_file(path) as file_name, zipfile.ZipFile(file_name, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for image in tqdm(images, desc=path.name):
                with bad_input(OSError, what=str(image)):
                    pixels = np.asarray(PIL.Image.open(image).convert("RGB"))
                file.write(pixels.tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, np.array(classes))


def check_settings(args: argparse.Namespace, settings: dict) -> None:
    """Refuses a folder that holds images of other settings."""
    file = Path(args.output_dir, SETTINGS_NAME)
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else settings
    differing = [key for key in settings if known.get(key) != settings[key]]
    if differing:
        raise BadInput(
            f"{args.output_dir} holds images of another {differing[0]} ({known.get(differing[0])}): choose another "
            "--output_dir or the same settings"
        )


def sample(args: argparse.Namespace) -> None:
    """What `diffusers-dod sample` does; `args` are its options."""
    state = Accelerator()  # not PartialState, which ignores accelerate's choice of the CPU

    # 1. The pipeline, and the settings, which must be those of the images that lie there already
    with bad_input():
        pipe = DoDPipeline.from_pretrained(args.model, revision=args.revision, dtype=getattr(torch, args.dtype)).to(
            state.device
        )
        check_guidance(
            *(pipe.guider, pipe.transformer, pipe.weak_transformer, args.guidance_scale, args.prior_guidance_scale),
            guidance_drop=None,
            guidance_interval=args.guidance_interval,
        )
    if pipe.guider is None:
        args.guidance_scale = args.guidance_scale or [1.0]
        args.guidance_interval = args.guidance_interval or [0.0, 1.0]
    if args.num_stages is None:
        args.prior_source = args.prior_source or ("stage" if pipe.code_transformer is None else "codes")
        args.num_stages = 2 if args.prior_source == "stage" else 1
        settle_stages(args)
    settings = {key: value for key, value in vars(args).items() if key not in FREE_KEYS}
    # A model is known by its weights, wherever it lies.
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    settings["weights_sha256"] = json_sha256({name: weights_sha256(model) for name, model in models.items()})
    versions = {"diffusers-dod": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__}
    with bad_input():
        check_settings(args, settings)
    pipe.set_progress_bar_config(disable=True)
    if args.compile:
        pipe.transformer.compile_repeated_blocks()
    num_classes = pipe.transformer.config.num_classes
    state.wait_for_everyone()
    if state.is_main_process:
        for stage in args.stages:
            folder = Path(args.output_dir, f"stage-{stage}")
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("tmp-*.part"):  # of a run that was killed
                leftover.unlink()
        write_json(Path(args.output_dir, SETTINGS_NAME), {"model": args.model, **settings, "versions": versions})
    state.wait_for_everyone()

    def for_stages(values: list | None) -> object:
        return values[0] if values is not None and len(values) == 1 else values

    guidance = {
        "guidance_scale": for_stages(args.guidance_scale),
        "prior_guidance_scale": for_stages(args.prior_guidance_scale),
        "guidance_interval": args.guidance_interval and tuple(args.guidance_interval),
    }

    # 2. This process's images that are not there yet
    missing = [
        index
        for index in range(state.process_index, args.num_images, state.num_processes)
        if not all(image_path(args, stage, index).is_file() for stage in args.stages)
    ]
    progress = tqdm(total=len(missing), unit="image", disable=not state.is_local_main_process)
    for start in range(0, len(missing), args.batch_size):
        indices = missing[start : start + args.batch_size]
        with bad_input(ValueError):
            stages = pipe(
                [class_of(index, num_classes, args) for index in indices],
                num_stages=args.num_stages,
                prior_source=args.prior_source,
                code_num_inference_steps=args.code_num_inference_steps,
                code_guidance_scale=args.code_guidance_scale,
                code_noise_level=args.code_noise_level,
                num_inference_steps=for_stages(args.num_inference_steps),
                **guidance,
                generator=row_generators(args.seed, 0, indices),
                return_stages=True,
            ).stages
        for stage in args.stages:
            for index, image in zip(indices, stages[stage - 1]):
                save_image(image, image_path(args, stage, index))
        progress.update(len(indices))
    progress.close()
    state.wait_for_everyone()

    # 3. For ADM's evaluator
    if args.npz and state.is_main_process:
        classes = [class_of(index, num_classes, args) or 0 for index in range(args.num_images)]
        for stage in args.stages:
            paths = [image_path(args, stage, index) for index in range(args.num_images)]
            write_npz(Path(args.output_dir, f"stage-{stage}.npz"), paths, classes)
    end_together(state)
