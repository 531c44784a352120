"""Checkpoints of a training run with accelerate: whole or absent, never of another run, limited in number."""

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from accelerate import Accelerator
from diffusers.models.modeling_utils import ModelMixin
from diffusers.training_utils import EMAModel


CONFIG_NAME = "training_config.json"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, `checkpoint-N`, in the order of their steps."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-", 1)[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find_checkpoint(
    resume_from: str | None, output_dir: str | Path, config: dict, free_keys: Collection[str]
) -> tuple[Path | None, int]:
    """What a run goes on from.

    Args:
        resume_from (`str`, *optional*): a checkpoint, or `"latest"` for the last of `output_dir`.
        output_dir (`str`): folder of the run; a new run may not have checkpoints there.
        config (`dict`): configuration of the run, as JSON reads it.
        free_keys (collection of `str`): entries of it that may differ from the checkpoint's.

    Returns:
        the checkpoint and its step; `(None, 0)` for a new run, which `"latest"` is where there is no checkpoint yet.

    Raises:
        ValueError: if the folder is missing, not a checkpoint, or of a run with another configuration.
    """
    existing = list_checkpoints(output_dir)
    if resume_from is None and existing:
        raise ValueError(
            f"{output_dir} already holds {existing[-1].name}: resume from `latest` to go on, or choose another folder."
        )
    if resume_from is None or (resume_from == "latest" and not existing):
        return None, 0
    checkpoint = existing[-1] if resume_from == "latest" else Path(resume_from)
    try:
        saved = json.loads((checkpoint / CONFIG_NAME).read_text())
        step = saved.pop("step")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{checkpoint} is missing or not a checkpoint of this trainer (no {CONFIG_NAME}).") from error
    differing = [
        f"{key} ({str(saved.get(key))[:60]} there, {str(config.get(key))[:60]} here)"
        for key in sorted(saved.keys() | config.keys())
        if saved.get(key) != config.get(key) and key not in free_keys
    ]
    if differing:
        raise ValueError(f"{checkpoint} was trained with another configuration: {', '.join(differing)}.")
    return checkpoint, step


def register_model_hooks(accelerator: Accelerator, models: dict[str, ModelMixin], emas: dict[str, EMAModel]) -> None:
    """Has accelerate save and load the models of the one module it prepared as folders of diffusers.

    Args:
        accelerator (`Accelerator`): whose `save_state` and `load_state` these hooks join.
        models (`dict` of `str` to `ModelMixin`): folder name to model, not wrapped.
        emas (`dict` of `str` to `EMAModel`): their averages, by the same names, saved in `{name}_ema`.
    """

    def save(_, weights: list, folder: str) -> None:
        weights.clear()  # or accelerate would write the module as well
        if accelerator.is_main_process:
            for name, model in models.items():
                model.save_pretrained(Path(folder, name))
            for name, ema in emas.items():
                ema.save_pretrained(Path(folder, f"{name}_ema"))

    def load(modules: list, folder: str) -> None:
        modules.clear()
        for name, model in models.items():
            model.load_state_dict(type(model).from_pretrained(folder, subfolder=name).state_dict())
        for name, ema in emas.items():
            ema.load_state_dict(
                EMAModel.from_pretrained(str(Path(folder, f"{name}_ema")), type(models[name])).state_dict()
            )
            ema.to(accelerator.device)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, step: int, config: dict, total_limit: int | None = None
) -> None:
    """Writes `checkpoint-{step}` under another name, renames what is whole, and only then removes the oldest ones.

    Args:
        accelerator (`Accelerator`): whose state is saved; every process must call this.
        output_dir (`str`): folder of the run.
        step (`int`): optimisation steps done.
        config (`dict`): configuration of the run, which [`find_checkpoint`] compares.
        total_limit (`int`, *optional*): checkpoints to keep, this one included.
    """
    unfinished, path = Path(output_dir, f"tmp-checkpoint-{step}"), Path(output_dir, f"checkpoint-{step}")
    if accelerator.is_main_process:
        for leftover in Path(output_dir).glob("tmp-checkpoint-*"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / CONFIG_NAME).write_text(json.dumps({**config, "step": step}, indent=2))
        if path.exists():  # of a run that was resumed further back
            shutil.rmtree(path)
        unfinished.rename(path)
        older = [checkpoint for checkpoint in list_checkpoints(output_dir) if checkpoint != path]
        while total_limit and len(older) >= total_limit:
            shutil.rmtree(older.pop(0))
