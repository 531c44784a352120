"""The files of a saved model that a push sends, and what is wrong with them."""

import os
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from diffusers import guiders
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import SafetensorError, safe_open

from ..arguments import check_numbers
from ..autoencoding import vae_spatial_factor
from ..cli import first_line
from ..compatibility import check_code_grid, check_code_model, check_components, check_scheduler, check_weak_model
from ..guidance import check_guider
from ..latent_embedder_dod import DoDLatentEmbedder
from ..repository import INDEX_NAME, resolve_index
from ..transformer_dod import DoDTransformer2DModel
from .card import EVALUATION_NAME, LORA_NAME, TRAINING_NAME, read_evaluation, read_json, read_object


PACKAGE = __name__.partition(".")[0]
CARD_NAME = "README.md"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PARTS = "transformer latent_embedder scheduler vae code_transformer code_scheduler guider weak_transformer".split()
# Beside the components' folders, these are read; all but the training's configuration also go up.
ROOT_FILES = (CARD_NAME, INDEX_NAME, "LICENSE", "LICENSE.txt", "LICENSE.md", EVALUATION_NAME, TRAINING_NAME, LORA_NAME)


def component_names(index: dict[str, Any]) -> list[str]:
    """The components that an index names and that have a folder.

    Raises:
        ValueError: for a name or an entry that is none of diffusers'.
    """
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_")}
    for name, entry in entries.items():
        is_entry = len(entry) == 2 and all(part is None or isinstance(part, str) for part in entry)
        if not name.isidentifier() or not is_entry or (entry[0] is None) != (entry[1] is None):
            raise ValueError(f"{name!r} is not a component of the form [library, class]")
    return [name for name, (library, _) in entries.items() if library is not None]


def component_classes(folder: Path) -> dict[str, Any]:
    """The classes of a folder's components, none of them loaded by the folder's own word.

    Raises:
        ValueError: naming what is wrong with the index.
    """
    if not (folder / INDEX_NAME).is_file():
        raise ValueError("No such file")
    index = read_object(folder / INDEX_NAME)
    names = component_names(index)
    if not isinstance(index.get("_class_name"), str) and not index.get("_class_name"):
        raise ValueError("no `_class_name`")
    index = resolve_index(index, ["DoDPipeline"], PACKAGE, str(folder))
    own = {cls.__name__: cls for cls in (DoDTransformer2DModel, DoDLatentEmbedder)}
    classes = {}
    for name in names:
        cls = own.get(index[name][1]) or getattr(diffusers, index[name][1], getattr(guiders, index[name][1], None))
        if not isinstance(cls, type) or not hasattr(cls, "config_name"):
            raise ValueError(f"{name}: {index[name][1]} is no model, no scheduler and no guider of diffusers")
        classes[name] = cls
    return classes


def is_model(cls: type) -> bool:
    return issubclass(cls, torch.nn.Module)


def _is_shown(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


def find_stage_grid(folder: Path) -> Path | None:
    """The picture of all stages for the card: `stages.png`, or the last one that the training drew."""
    if (folder / "stages.png").is_file():
        return folder / "stages.png"
    drawn = [path for path in (folder / "samples").glob("[!.]*.png") if path.is_file()]
    return max(drawn, key=lambda path: path.stat().st_mtime, default=None)


def list_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """The files that a push reads, and sends but for `training_config.json`, which the card is written from.

    Hidden files and folders are left out. Links are followed within the folder only.

    Returns:
        `dict` of `str` to `Path`: path in the repository to the file.
        `list` of `str`: what is in the way, such as links out of the folder.
    """
    try:
        names = component_names(read_object(folder / INDEX_NAME))
    except ValueError:  # `component_classes` says what
        names = []
    found = {name: folder / name for name in ROOT_FILES}
    for name in names:
        parts = (path for path in sorted((folder / name).glob("[!.]*")) if path.suffix in (".json", ".safetensors"))
        found |= {f"{name}/{path.name}": path for path in parts}
    if (grid := find_stage_grid(folder)) is not None:
        found["stages.png"] = grid

    files, problems, home = {}, [], folder.resolve()
    for name, path in found.items():
        if not os.path.lexists(path):
            continue
        where = path.relative_to(folder)
        if not path.name.isprintable():
            problems.append(f"{str(where)!r}: a name that the Hub does not take")
        elif not path.is_file():
            problems.append(f"{where}: not a file")
        elif not path.resolve().is_relative_to(home) or not _is_shown(path.resolve(), home):
            problems.append(f"{where}: a link out of the folder or to a hidden file; put the file itself there")
        else:
            files[name] = path
    return files, problems


def _check_tensors(file: Path, where: str) -> tuple[dict[str, torch.Size], list[str], bool]:
    """The shapes in a file of weights, what is wrong with its values, and whether it could be read."""
    found, problems = {}, []
    try:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():
                tensor = weights.get_tensor(key)
                found[key] = tensor.shape
                if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                    problems.append(f"{where}: {key} holds NaN or infinite values")
    except (SafetensorError, OSError) as error:
        return found, [*problems, f"{where}: cannot be read ({first_line(error)})"], False
    return found, problems, True


def _check_model_weights(name: str, files: list[Path], expected: dict[str, torch.Size]) -> list[str]:
    """What is wrong with the weights of one model, each of its variants by itself."""
    problems = []
    by_variant: dict[str, list[Path]] = {}
    for file in files:
        variant = file.name.removesuffix(".safetensors").partition(".")[2].partition("-")[0]
        by_variant.setdefault(variant, []).append(file)
    if "" not in by_variant:
        problems.append(f"{name}: no safetensors weights (its default variant)")
    for variant_files in by_variant.values():
        found: dict[str, torch.Size] = {}
        readable = True
        for file in variant_files:
            shapes, wrong_values, was_read = _check_tensors(file, f"{name}/{file.name}")
            found, problems, readable = found | shapes, problems + wrong_values, readable and was_read
        if readable and found != expected:
            wrong = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
            problems.append(
                f"{name}/{variant_files[0].name}: the weights are not those of its config.json, for instance {wrong[0]} "
                f"({len(wrong)} of {len(expected)} differ)"
            )
    return problems


def _check_lora(file: Path) -> list[str]:
    shapes, problems, readable = _check_tensors(file, file.name)
    foreign = [key for key in shapes if not key.startswith("transformer.") or "lora" not in key]
    if readable and (foreign or not shapes):
        problems.append(f"{file.name}: not a LoRA of the transformer as `save_lora_weights` writes it ({foreign[:1]})")
    return problems


def _check_card(file: Path | None, license: str | None) -> list[str]:
    problems, card_license = [], None
    try:
        if file is not None:
            card_license = ModelCard(file.read_text(encoding="utf-8")).data.get("license")
    except (yaml.YAMLError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        problems.append(f"{CARD_NAME}: its head is not valid YAML ({error})")
    if not card_license and (file is not None or not license):
        cure = "pass `--license`" if file is None else f"write `license:` into the metadata at the top of {CARD_NAME}"
        problems.append(f"no licence: {cure}")
    return problems


def _check_contents(folder: Path, files: dict[str, Path]) -> list[str]:
    """What is wrong with the JSON files and the picture, each by itself."""
    problems = []
    for name, file in files.items():
        try:
            if name == EVALUATION_NAME:
                read_evaluation(folder)
            elif name == TRAINING_NAME:
                read_object(file)
            elif file.suffix == ".json" and name != INDEX_NAME:
                read_json(file)
            elif name == "stages.png":
                with Image.open(file) as picture:
                    picture.verify()
            elif name.startswith("LICENSE"):
                file.read_bytes()
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            problems.append(f"{file.relative_to(folder)}: {first_line(error)}")
    return problems


def _check_labels(labels: Any, num_classes: int) -> list[str]:
    if labels is None:
        return []
    if not isinstance(labels, dict):
        return [f"{INDEX_NAME}: `id2label` is not an object of class ids and names"]
    wrong = [
        f"{key!r}: {name!r}"
        for key, name in labels.items()
        if not (key.isdecimal() and int(key) < num_classes and isinstance(name, str))
    ]
    return [f"{INDEX_NAME}: `id2label` is not of ids below {num_classes} and names: {wrong[0]}"] if wrong else []


def _check_pipeline(folder: Path, files: dict[str, Path]) -> list[str]:
    """What is wrong with the models and the scheduler, each by itself and beside each other."""
    try:
        classes = component_classes(folder)
    except ValueError as error:
        return [f"{INDEX_NAME}: {error}"]
    problems = []
    for path in sorted(path for part in (folder, *(folder / name for name in classes)) for path in part.glob("[!.]*")):
        if path.suffix in PICKLED:
            problems.append(f"{path.relative_to(folder)}: a pickled file can run code; save safetensors and delete it")

    loaded: dict[str, Any] = {}
    for name, cls in classes.items():
        where = f"{name}/{cls.config_name}"
        if where not in files:
            if not os.path.lexists(folder / where):  # otherwise `list_files` says what is wrong with it
                problems.append(f"{where}: no such file")
            continue
        try:
            config = read_object(files[where])
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        try:
            # Not accelerate's `init_empty_weights`, which would reach the models that other threads build. Schedulers move
            # their tensors to the CPU, which those of no content cannot do.
            with torch.device("meta" if is_model(cls) else "cpu"):
                loaded[name] = cls.from_config(config)
        except Exception as error:  # a class raises anything for a config that is not its own
            problems.append(f"{where}: {type(error).__name__}: {first_line(error)}")
            continue
        if is_model(cls):
            expected = {key: tensor.shape for key, tensor in loaded[name].state_dict().items()}
            weights = [path for path in files.values() if path.parent.name == name and path.suffix == ".safetensors"]
            problems += _check_model_weights(name, weights, expected)
    missing = {"transformer", "latent_embedder", "scheduler"} - set(classes)
    problems += [f"{INDEX_NAME}: no {name}" for name in sorted(missing)]
    if set(loaded) == set(classes) and not missing:
        try:
            check_components(loaded["transformer"].config, loaded["latent_embedder"].config, loaded.get("vae"))
            scheduler = loaded["scheduler"]
            check_scheduler(type(scheduler), scheduler.config, loaded["transformer"].config)
            if "weak_transformer" in loaded:
                check_weak_model(loaded["weak_transformer"].config, loaded["transformer"].config)
            if "guider" in loaded:
                check_guider(loaded["guider"], loaded["transformer"])
            if ("code_transformer" in loaded) != ("code_scheduler" in loaded):
                raise ValueError("a code model needs both `code_transformer` and `code_scheduler`")
            if "code_transformer" in loaded:
                configs = (loaded[name].config for name in ("code_transformer", "transformer", "latent_embedder"))
                check_code_model(*configs)
                size = loaded["transformer"].config.sample_size
                height, width = (size, size) if isinstance(size, int) else size
                grid = loaded["latent_embedder"].code_grid(height, width)
                factor = vae_spatial_factor(loaded.get("vae"))
                patch_size = loaded["code_transformer"].config.patch_size
                check_code_grid(grid, patch_size, height * factor, width * factor)
                scheduler = loaded["code_scheduler"]
                check_scheduler(type(scheduler), scheduler.config, loaded["code_transformer"].config)
        except (ValueError, AttributeError) as error:
            problems.append(f"configs: {error}")
    index = read_object(folder / INDEX_NAME)
    try:
        check_numbers(code_guidance_scale=index.get("code_guidance_scale", 1.0))
    except ValueError as error:
        problems.append(f"{INDEX_NAME}: {error}")
    if isinstance(loaded.get("transformer"), DoDTransformer2DModel):
        labels = index.get("id2label")
        problems += _check_labels(labels, loaded["transformer"].config.num_classes)
    return problems


def check_folder(folder: str | Path, license: str | None = None) -> list[str]:
    """What must be put right before a saved pipeline, or a folder with a LoRA, is pushed; empty if all is well.

    Reads exactly the files that a push reads. Looks for: unreadable or missing parts, weights that do not load or hold
    NaN, configs that contradict each other, components of foreign modules, pickled files, links out of the folder, a
    missing licence.

    Args:
        folder (`str` or `Path`): the pipeline's folder.
        license (`str`, *optional*): Hub licence identifier (`"apache-2.0"`), where the folder's card names none.

    Returns:
        `list` of `str`: one line for each problem.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder}: no such folder"]
    files, problems = list_files(folder)
    problems = _check_card(files.get(CARD_NAME), license) + problems + _check_contents(folder, files)
    if LORA_NAME in files:
        problems += _check_lora(files[LORA_NAME])
    if LORA_NAME not in files or INDEX_NAME in files:
        problems += _check_pipeline(folder, files)
    # One line each, that any terminal prints
    lines = (" ".join(problem.split()) for problem in problems)
    return list(dict.fromkeys(line.encode("utf-8", "backslashreplace").decode() for line in lines))
