"""Checkpoints of a training run with accelerate: whole or absent, never of another run, limited in number."""

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file

from ..cli import CommandError, first_line
from ..files import file_sha256, remove
from .averaging import WeightAverages, fill_tensors, full_tensors
from .guard import StepGuard
from .results import CONFIG_NAME


logger = get_logger(__name__, log_level="INFO")
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
AVERAGES_NAME = "averages.json"
GUARD_NAME = "guard.json"
CHECKSUMS_NAME = "checksums.json"


class CheckpointNotWritten(CommandError):
    """A checkpoint could not be written; those before it are as they were."""


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, `checkpoint-N`, in the order of their steps."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-", 1)[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _files(folder: Path) -> dict[str, Path]:
    """The files of a checkpoint but its checksums, by their names within it."""
    files = (path for path in sorted(folder.rglob("*")) if not path.is_dir() and path.name != CHECKSUMS_NAME)
    return {path.relative_to(folder).as_posix(): path for path in files}


def write_checksums(folder: Path) -> None:
    """Writes the SHA-256 sum of every file of a checkpoint."""
    sums = {name: file_sha256(path) for name, path in _files(folder).items()}
    (folder / CHECKSUMS_NAME).write_text(json.dumps(sums, indent=1))


def what_is_damaged(folder: Path) -> str | None:
    """Why a checkpoint cannot be used: a file that is missing, foreign or differs; `None` for a whole one."""
    try:
        sums, files = json.loads((folder / CHECKSUMS_NAME).read_text()), _files(folder)
        for name in sorted(sums.keys() | files.keys()):
            if name not in sums or name not in files:
                return f"{name} is {'missing' if name in sums else 'not its own'}"
            if file_sha256(files[name]) != sums[name]:
                return f"{name} differs from its checksum"
        return None if CONFIG_NAME in sums else f"{CONFIG_NAME} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{CHECKSUMS_NAME}: {first_line(error)}"


def find_checkpoint(
    resume_from: str, output_dir: str | Path, config: dict, free_keys: Collection[str]
) -> tuple[Path | None, int]:
    """The checkpoint that a run resumes from: the given one, or the last one that is whole.

    Args:
        resume_from (`str`): a checkpoint, or `"auto"` for the last of `output_dir`, if it has any.
        output_dir (`str`): folder of the run.
        config (`dict`): configuration of the run, as JSON reads it.
        free_keys (collection of `str`): entries of it that may differ from the checkpoint's.

    Returns:
        the checkpoint and its step; `(None, 0)` for a new run.

    Raises:
        ValueError: if the folder is missing, not a checkpoint, damaged, or of a run with another configuration.
    """
    existing = list_checkpoints(output_dir)
    if resume_from == "auto" and not existing:
        return None, 0
    if resume_from == "auto":
        for checkpoint in reversed(existing):
            damage = what_is_damaged(checkpoint)
            if damage is None:
                break
            logger.warning(f"{checkpoint} is damaged ({damage}) and is passed over.")
        else:
            raise ValueError(f"no checkpoint of {output_dir} is whole: delete them to start anew")
    else:
        checkpoint = Path(resume_from)
    try:
        saved = json.loads((checkpoint / CONFIG_NAME).read_text())
        step = saved.pop("step")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{checkpoint} is missing or not a checkpoint of this trainer (no {CONFIG_NAME}).") from error
    if resume_from != "auto" and (damage := what_is_damaged(checkpoint)) is not None:
        raise ValueError(f"{checkpoint} is damaged ({damage}): name an older one")
    differing = [
        f"{key} ({str(saved.get(key))[:60]} there, {str(config.get(key))[:60]} here)"
        for key in sorted(saved.keys() | config.keys())
        if saved.get(key) != config.get(key) and key not in free_keys
    ]
    if differing:
        raise ValueError(
            f"{checkpoint} was trained with another configuration: {', '.join(differing)}. Choose another folder for a "
            "new run, or the same options to resume."
        )
    if step > config["max_train_steps"]:  # else its weights would be called those of an earlier step
        raise ValueError(
            f"{checkpoint} is of a later step than --max_train_steps {config['max_train_steps']}: train longer, choose another "
            "--output_dir, or name an earlier checkpoint with --resume_from_checkpoint"
        )
    return checkpoint, step


def trained_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Those that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def register_model_hooks(
    accelerator: Accelerator, models: dict[str, ModelMixin], averages: WeightAverages | None
) -> None:
    """Has accelerate save and load the trained weights of both models, and their averages, as folders of diffusers.

    A folder is `{name}` for the weights and `{name}_ema_{decay}` for an average. Where all of a model is trained, it loads
    with `from_pretrained`; else it holds the trained weights only. FSDP and DeepSpeed write the live weights themselves, so
    only the averages are added.

    Args:
        accelerator (`Accelerator`): whose `save_state` and `load_state` these hooks join.
        models (`dict` of `str` to `ModelMixin`): folder name to model, not wrapped.
        averages ([`WeightAverages`], *optional*): of trained parameters, named `{name}.{parameter}`.
    """

    def folders(with_live: bool) -> dict[str, tuple[ModelMixin, dict[str, torch.Tensor]]]:
        contents: dict[str, tuple[ModelMixin, dict[str, torch.Tensor]]] = {}
        for name, model in models.items():
            trained = trained_parameters(model)
            if trained and with_live:
                contents[name] = (model, dict(trained))
            if averages is None:
                continue
            for decay in averages.averages:
                tensors = averages.tensors(decay)
                averaged = {key: tensors[f"{name}.{key}"] for key in trained if f"{name}.{key}" in tensors}
                if averaged:
                    contents[f"{name}_ema_{decay}"] = (model, averaged)
        return contents

    def save(_: object, weights: list, folder: str) -> None:
        with_live = len(weights) > 0
        weights.clear()  # or accelerate would write the module as well
        for name, (model, tensors) in folders(with_live).items():
            full = full_tensors(tensors)
            if accelerator.is_main_process:
                model.save_config(Path(folder, name))
                save_file(full, Path(folder, name, WEIGHTS_NAME), metadata={"format": "pt"})
        if averages is not None and accelerator.is_main_process:
            averages.save_steps(Path(folder, AVERAGES_NAME))

    def load(modules: list, folder: str) -> None:
        with_live = len(modules) > 0
        modules.clear()
        for name, (_, tensors) in folders(with_live).items():
            fill_tensors(tensors, load_file(Path(folder, name, WEIGHTS_NAME)))
        if averages is not None:
            averages.load_steps(Path(folder, AVERAGES_NAME))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _flush(folder: Path) -> None:
    """Has the disk hold the files before their folder gets its name, so that a power cut cannot leave half of them."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: str | Path,
    step: int,
    config: dict,
    guard: StepGuard,
    total_limit: int | None = None,
    process_state: dict | None = None,
    kept_steps: Collection[int] = (),
) -> None:
    """Writes `checkpoint-{step}` under another name, renames what is whole, and only then removes the oldest ones.

    Args:
        accelerator (`Accelerator`): whose state is saved; every process must call this.
        output_dir (`str`): folder of the run.
        step (`int`): optimisation steps done.
        config (`dict`): configuration of the run, which [`find_checkpoint`] compares.
        guard ([`StepGuard`]): whose counts are kept.
        total_limit (`int`, *optional*): checkpoints to keep, this one included.
        process_state (`dict`, *optional*): what this process needs beside it, for [`load_process_state`].
        kept_steps (collection of `int`): steps whose checkpoints are never removed and do not count.

    Raises:
        CheckpointNotWritten: in every process, if one of them could not write, for instance to a full disk.
    """
    unfinished, path = Path(output_dir, f"tmp-checkpoint-{step}"), Path(output_dir, f"checkpoint-{step}")
    is_main = accelerator.is_main_process

    def write() -> None:
        accelerator.save_state(str(unfinished))
        if process_state is not None:
            Path(unfinished, f"process_state_{accelerator.process_index}.json").write_text(json.dumps(process_state))
        if is_main:
            (unfinished / GUARD_NAME).write_text(json.dumps(guard.state_dict()))
            (unfinished / CONFIG_NAME).write_text(json.dumps({**config, "step": step}, indent=2))

    def flush() -> None:
        if is_main:
            write_checksums(unfinished)
            _flush(unfinished)

    if is_main:
        for leftover in Path(output_dir).glob("tmp-checkpoint-*"):
            remove(leftover)
    accelerator.wait_for_everyone()
    for work in (write, flush):
        problem = None
        try:
            work()
        except Exception as error:  # OSError, and what safetensors and torch make of it
            problem = first_line(error)
        failures = accelerator.reduce(torch.tensor([float(problem is not None)], device=accelerator.device))
        if failures.item():
            free = shutil.disk_usage(output_dir).free  # what torch says of a full disk does not name it
            accelerator.wait_for_everyone()
            if is_main:
                shutil.rmtree(unfinished, ignore_errors=True)
            last = next(reversed(list_checkpoints(output_dir)), "none")
            problem = problem or "another process could not write"
            raise CheckpointNotWritten(
                f"{path} could not be written ({problem}; {free / 1e6:.1f} MB are free); the last good one is {last}"
            )

    if is_main:
        # What goes away loses its name first, for half a folder must not look like a checkpoint.
        rubbish = []
        if path.exists():  # of a run that was resumed further back
            rubbish.append(path.rename(Path(output_dir, f"tmp-checkpoint-{step}-replaced")))
        unfinished.rename(path)
        kept = {path, *(Path(output_dir, f"checkpoint-{kept_step}") for kept_step in kept_steps)}
        older = [checkpoint for checkpoint in list_checkpoints(output_dir) if checkpoint not in kept]
        surplus = max(len(older) + (step not in kept_steps) - total_limit, 0) if total_limit else 0
        for checkpoint in older[:surplus]:
            rubbish.append(checkpoint.rename(Path(output_dir, f"tmp-{checkpoint.name}")))
        for folder in rubbish:
            remove(folder)
    accelerator.wait_for_everyone()


def load_process_state(accelerator: Accelerator, checkpoint: Path) -> dict:
    """What this process gave to [`save_checkpoint`]."""
    return json.loads((checkpoint / f"process_state_{accelerator.process_index}.json").read_text())


def load_guard(guard: StepGuard, checkpoint: Path) -> None:
    """Gives a guard the counts that [`save_checkpoint`] kept. accelerate would keep them as a pickle."""
    guard.load_state_dict(json.loads((checkpoint / GUARD_NAME).read_text()))
