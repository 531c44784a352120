"""What a run leaves in its folder beside its checkpoints: configuration, environment, lock and the pipeline."""

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from ..cli import BadInput, CommandError, first_line
from ..files import remove, weights_sha256, write_json
from ..hub.push import find_stage_grid
from ..pipeline_dod import DoDPipeline
from ..repository import write_blocks
from .build import Subject


CONFIG_NAME = "training_config.json"
PACKAGES = "diffusers-dod torch diffusers transformers accelerate datasets peft safetensors numpy".split()


def lock_folder(output_dir: str | Path) -> FileLock:
    """Takes a run's folder for this process until it ends, however it ends.

    Raises:
        BadInput: if another process holds it.
    """
    lock = FileLock(Path(output_dir, ".lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise BadInput(f"another run trains in {output_dir}: wait for it, or choose another --output_dir") from error
    return lock


def run_config(args: argparse.Namespace, subject: Subject, accelerator: Accelerator) -> dict[str, Any]:
    """All that a run depends on, as JSON; a checkpoint of other settings is not resumed."""
    config = {
        **vars(args),
        "num_images": subject.data.size,
        "images_sha256": subject.data.sha256,
        "id2label": subject.pipeline.config.id2label,
    }
    config["images_per_step"] = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    # A stream's order and shards of weights belong to their number of processes.
    config["stream"] = [accelerator.num_processes, args.train_batch_size] if args.streaming else None
    for name, part in subject.pipeline.components.items():
        if isinstance(part, torch.nn.Module):  # the other weights are in the checkpoints
            config[f"frozen_{name}_sha256"] = weights_sha256(part, frozen_only=name in subject.models)
    is_sharded = accelerator.distributed_type in ("FSDP", "DEEPSPEED")
    config["sharding"] = accelerator.distributed_type if is_sharded else None
    for name, model in subject.models.items():
        values = {key: value for key, value in model.config.items() if not key.startswith("_")}
        config[f"{name.removeprefix('latent_')}_config"] = values
    return json.loads(json.dumps(config))


def describe_environment() -> dict[str, Any]:
    """Versions and, where the package is in a git checkout, its commit and whether files differ from it."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return {"versions": versions, "git": None}
    return {"versions": versions, "git": {"commit": commit.stdout.strip(), "changed": changes.stdout.splitlines()}}


def begin_run(output_dir: str, config: dict[str, Any]) -> None:
    """Writes what is known at the start."""
    write_json(Path(output_dir, CONFIG_NAME), config)
    write_json(Path(output_dir, "environment.json"), describe_environment())


def finished_steps(output_dir: str) -> int | None:
    """The step whose pipeline the folder holds, if its run has come to an end."""
    path = Path(output_dir, CONFIG_NAME)
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("step")
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{path} is damaged ({first_line(error)}): delete it, and the run resumes") from error


class PipelineNotWritten(CommandError):
    """The training is done, but its pipeline is not in its place."""

    met_by_all = False


def save_result(pipeline: DoDPipeline, output_dir: str, config: dict[str, Any]) -> None:
    """Puts the pipeline into the run's folder part by part, and last the note that it is that of the last step.

    Raises:
        PipelineNotWritten: for instance to a full disk.
    """
    try:
        _place_pipeline(pipeline, output_dir, config)
    except (OSError, SafetensorError) as error:
        raise PipelineNotWritten(
            f"the pipeline could not be written to {output_dir} ({first_line(error)}); its last checkpoint is whole: make room "
            "and repeat the command"
        ) from error


def _place_pipeline(pipeline: DoDPipeline, output_dir: str, config: dict[str, Any]) -> None:
    unfinished = Path(output_dir, "tmp-pipeline")
    remove(unfinished)
    pipeline.save_pretrained(unfinished)
    write_blocks(unfinished, place=output_dir)
    for part in sorted(unfinished.iterdir(), key=lambda path: path.name == DoDPipeline.config_name):
        place = Path(output_dir, part.name)
        if place.is_dir():
            remove(place)
        part.replace(place)
    unfinished.rmdir()
    write_json(Path(output_dir, CONFIG_NAME), {**config, "step": config["max_train_steps"]})


def describe_result(output_dir: str) -> str:
    """What the user can do with a finished run, in three lines."""
    return (
        f"Saved to {output_dir}.\n"
        f'Load it with DoDPipeline.from_pretrained("{output_dir}").\n'
        f"See it with `diffusers-dod viz --model {output_dir} --output_dir pictures`."
    )


def save_for_push(pipeline: DoDPipeline, config: dict[str, Any], output_dir: str, folder: str) -> None:
    """A pipeline of an unfinished run in a folder of its own, with what its card reports."""
    for name in (
        "transformer",
        "latent_embedder",
        "code_transformer",
    ):  # copies; the autoencoder is the training's own
        model = getattr(pipeline, name)
        if model is not None:
            model.to("cpu")
    pipeline.save_pretrained(folder)
    write_json(Path(folder, CONFIG_NAME), config)
    grid = find_stage_grid(Path(output_dir))
    if grid is not None:
        shutil.copy(grid, Path(folder, "stages.png"))
