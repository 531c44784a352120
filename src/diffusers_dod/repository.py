"""What a saved DoD pipeline holds, in a folder or in a repository of the Hub, and how it is read back.

    model_index.json                        the components' classes
    pipeline.py                             the pipeline's own code, for those who have diffusers only
    transformer/, latent_embedder/          config.json, safetensors, diffusers_dod.py
    code_transformer/, weak_transformer/    the same, where there are such models
    scheduler/, code_scheduler/, vae/,      classes of diffusers, as in its other pipelines
    guider/
    block.py, modular_config.json           blocks of Modular Diffusers, with all code that they need
    modular_model_index.json                their components

`DiffusionPipeline` and `ModularPipeline` run the code that is carried, with `trust_remote_code=True` only. `DoDPipeline`
never does: it takes the models' classes from beside itself, whatever module the index names. The models' code is named as the
package because `AutoModel` looks for the module of that name: the package, where it is imported, or the file.
"""

import ast
import importlib.util
import inspect
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import safe_open

from .compatibility import DTYPE_ARGUMENT


INDEX_NAME = "model_index.json"
MODEL_CLASSES = ("DoDTransformer2DModel", "DoDLatentEmbedder")
# Where both are in the package, and beside a repository's own `pipeline.py`
MODELS_NAME, CARRIED_NAME = "models_dod", "diffusers_dod"
# Of the blocks: their file in this package and in a repository, their module's name wherever it was loaded from, and
# diffusers' names of what describes them.
BLOCKS_SOURCE, BLOCK_NAME, BLOCK_MODULE = "modular_dod.py", "block.py", "diffusers_dod_block"
BLOCK_CONFIG_NAME, MODULAR_INDEX_NAME = "modular_config.json", "modular_model_index.json"


def standalone_source(file: Path, inlined: set[str] | None = None) -> str:
    """The text of a module with the modules that it imports from its own package in the place of the imports.

    diffusers downloads one file of code for each component, so a carried file cannot import its neighbours.
    """
    inlined = set() if inlined is None else inlined
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    texts = []
    # In their order: a module stands where it is first needed.
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module is not None:
            is_new = node.module not in inlined
            inlined.add(node.module)
            texts.append((node, standalone_source(file.with_name(f"{node.module}.py"), inlined) if is_new else ""))
    for node, text in reversed(texts):
        lines[node.lineno - 1 : node.end_lineno] = [text]
    return "".join(lines)


def carried_code(index: dict[str, Any], pipeline_file: str | None = None) -> dict[str, str]:
    """The code that a repository carries, by its path there.

    Args:
        index (`dict`): what its `model_index.json` holds.
        pipeline_file (`str`, *optional*): the pipeline's module, this package's by default; the models' is its neighbour.
    """
    file = Path(pipeline_file or Path(__file__).with_name("pipeline_dod.py"))
    carried = file.with_name(f"{CARRIED_NAME}.py")
    models = standalone_source(carried if carried.exists() else file.with_name(f"{MODELS_NAME}.py"))
    folders = [name for name, entry in index.items() if isinstance(entry, list) and entry[1] in MODEL_CLASSES]
    return {"pipeline.py": standalone_source(file), **{f"{name}/{CARRIED_NAME}.py": models for name in folders}}


def carried_blocks(
    index: dict[str, Any], source: str | None, revision: str | None = None, pipeline_file: str | None = None
) -> dict[str, str]:
    """The blocks that a repository carries and what describes them, by its path there.

    Args:
        index, source, revision: as for [`modular_files`].
        pipeline_file (`str`, *optional*): as for [`carried_code`]; a repository's own pipeline has no blocks beside it.
    """
    blocks = Path(pipeline_file or __file__).with_name(BLOCKS_SOURCE)
    if not blocks.is_file():
        return {}
    files = {name: json_text(value) for name, value in modular_files(index, source, revision).items()}
    return {BLOCK_NAME: standalone_source(blocks), **files}


def modular_files(index: dict[str, Any], source: str | None, revision: str | None = None) -> dict[str, dict[str, Any]]:
    """What diffusers must know of the blocks, by the name of its file.

    Args:
        index (`dict`): what `model_index.json` holds.
        source (`str`, *optional*): folder or repository from which the components are loaded.
        revision (`str`, *optional*): its branch.
    """
    modular_index = {
        "_class_name": "ModularPipeline",
        "_blocks_class_name": "DoDStages",
        "_diffusers_version": diffusers.__version__,
        "id2label": index.get("id2label"),
        "code_guidance_scale": index.get("code_guidance_scale", 1.0),
    }
    for component, entry in index.items():
        if isinstance(entry, list) and not component.startswith("_") and entry[0] is not None:
            where = {"pretrained_model_name_or_path": source, "subfolder": component, "revision": revision}
            hint = modular_class(*entry)
            modular_index[component] = [*hint, {**where, "variant": None, "type_hint": hint}]
    config = {
        "_class_name": "DoDStages",
        "_diffusers_version": diffusers.__version__,
        "auto_map": {"ModularPipelineBlocks": "block.DoDStages"},
    }
    return {BLOCK_CONFIG_NAME: config, MODULAR_INDEX_NAME: modular_index}


def modular_class(library: str, name: str) -> list[str]:
    """How `modular_model_index.json` names a class: ours by the blocks' module, which is loaded by then."""
    return [BLOCK_MODULE if name in MODEL_CLASSES else library, name]


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_code(folder: str | os.PathLike, pipeline_file: str | None = None) -> None:
    """Writes the code of a saved pipeline into its folder, and its name into the index.

    Args:
        folder (`str` or `os.PathLike`): what `save_pretrained` wrote.
        pipeline_file (`str`, *optional*): as for [`carried_code`].
    """
    index_file = Path(folder, INDEX_NAME)
    index = index_with_code(json.loads(index_file.read_text(encoding="utf-8")))
    for path, text in carried_code(index, pipeline_file).items():
        Path(folder, path).write_text(text, encoding="utf-8")
    index_file.write_text(json_text(index), encoding="utf-8")


def write_blocks(
    folder: str | os.PathLike, place: str | os.PathLike | None = None, pipeline_file: str | None = None
) -> None:
    """Writes the blocks of a saved pipeline, which name the folder that they lie in, into it.

    Args:
        folder (`str` or `os.PathLike`): what `save_pretrained` wrote.
        place (`str` or `os.PathLike`, *optional*): where the folder is moved to next.
        pipeline_file (`str`, *optional*): as for [`carried_code`].
    """
    index = json.loads(Path(folder, INDEX_NAME).read_text(encoding="utf-8"))
    for path, text in carried_blocks(index, str(place or folder), pipeline_file=pipeline_file).items():
        Path(folder, path).write_text(text, encoding="utf-8")


def index_with_code(index: dict[str, Any]) -> dict[str, Any]:
    """The index of a folder that carries its code, in the form that diffusers' `trust_remote_code` reads."""
    names = {
        component: [CARRIED_NAME, entry[1]]
        for component, entry in index.items()
        if isinstance(entry, list) and entry[1] in MODEL_CLASSES
    }
    return {**index, **names, "_class_name": ["pipeline", "DoDPipeline"]}


def models_module(package: str) -> ModuleType:
    """The module with both models beside the pipeline's, in this package or in the copy of a repository's code."""
    carried = f"{package}.{CARRIED_NAME}"
    return importlib.import_module(carried if importlib.util.find_spec(carried) else f"{package}.{MODELS_NAME}")


def resolve_index(index: dict[str, Any], pipeline_classes: list[str], package: str, source: str) -> dict[str, Any]:
    """The index with our classes taken from `package`, whatever code the repository carries.

    Args:
        index (`dict`): what `model_index.json` holds.
        pipeline_classes (`list` of `str`): names of the pipeline's class and its bases.
        package (`str`): package of the pipeline's module.
        source (`str`): folder or repository, for messages.

    Raises:
        ValueError: if it is another pipeline's, or a component's class comes from a module that is not loaded yet.
    """
    class_name = index.get("_class_name")
    class_name = class_name[-1] if isinstance(class_name, list) else class_name
    if class_name not in pipeline_classes:
        raise ValueError(
            f"{source} holds a {class_name}, not a DoDPipeline. If you trust the code in it, load it with "
            "`DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`."
        )
    resolved = {**index, "_class_name": class_name}
    resolved.pop("auto_map", None)
    for component, entry in index.items():
        if not isinstance(entry, list) or component.startswith("_") or entry[0] is None:
            continue
        library, component_class = entry
        if component_class in MODEL_CLASSES:
            # diffusers wants it imported
            resolved[component] = [models_module(package).__name__, component_class]
        elif library not in ("diffusers", "transformers") and library not in sys.modules:
            # Importing a module because a repository names it would run it.
            raise ValueError(
                f"{source} takes its `{component}` from the module {library!r}, which is not diffusers'. None of its code "
                f"was run. If it is yours, import {library} first; if it is code in the repository and you trust it, "
                "load with `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`."
            )
    return resolved


def download_snapshot(
    repo_id: str, passed_components: set[str], variant: str | None = None, revision: str | None = None, **options: Any
) -> str:
    """Downloads the configs and the safetensors that a pipeline needs, and no code.

    Args:
        repo_id (`str`): repository of the Hub.
        passed_components (`set` of `str`): components that are at hand and need no download.
        variant (`str`, *optional*): variant of the weights; a component without it comes in its default one.
        revision (`str`, *optional*): branch, tag or commit.
        options: `cache_dir`, `token`, `force_download` and `local_files_only` of `huggingface_hub`.

    Returns:
        `str`: the snapshot's folder.
    """
    index_file = hf_hub_download(repo_id, INDEX_NAME, revision=revision, **options)
    # All that follows is of the same commit, also if somebody pushes in between.
    commit = Path(index_file).parent.name
    components = [
        component
        for component, entry in json.loads(Path(index_file).read_text(encoding="utf-8")).items()
        if isinstance(entry, list)
        and not component.startswith("_")
        and entry[0]
        and component not in passed_components
    ]

    def fetch(names: list[str], weights: list[str], ignored: list[str]) -> Path:
        allowed = [f"{name}/{pattern}" for name in names for pattern in ("*.json", *weights)]
        return Path(
            snapshot_download(repo_id, revision=commit, allow_patterns=allowed, ignore_patterns=ignored, **options)
        )

    folder, remaining = Path(index_file).parent, components
    if variant is not None:
        folder = fetch(components, [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"], [])
        remaining = [name for name in components if not any((folder / name).glob(f"*.{variant}[.-]*"))]
    if remaining:
        folder = fetch(remaining, ["*.safetensors"], ["*.*.safetensors"])
    return str(folder)


def check_weights(folder: str, passed_components: set[str], source: str, variant: str | None = None) -> None:
    """Refuses models whose weights are not safetensors, and our own models whose weights lack a tensor.

    diffusers would fill a missing tensor at random, with a line in the log.

    Raises:
        ValueError: naming the component.
    """
    for config in sorted(Path(folder).glob("*/config.json")):
        component = config.parent
        if component.name in passed_components:
            continue
        if not any(component.glob("*.safetensors")):
            raise ValueError(
                f"{source} has no safetensors weights for `{component.name}`. Pickled ones (.bin, .pt, .ckpt) can run "
                "code when they are read, so they are not loaded: ask the author for safetensors, or, if you trust the "
                "files, download them, load the folder with `use_safetensors=False` and save it again."
            )
        values = json.loads(config.read_text(encoding="utf-8"))
        name = values.get("_class_name")
        if name not in MODEL_CLASSES or "quantization_config" in values:
            continue
        model_class = getattr(models_module(__name__.rpartition(".")[0]), name)
        with torch.device("meta"):
            expected = set(model_class.from_config(values).state_dict())
        missing = sorted(expected - _tensor_names(component, variant))
        if missing:
            raise ValueError(
                f"{source}: the weights of `{component.name}` lack {missing[0]} ({len(missing)} of {len(expected)} tensors "
                "are missing): the folder is incomplete or not of this model."
            )


def check_not_a_checkpoint(folder: str) -> None:
    """Refuses a trainer's `checkpoint-N`, which has the models that are trained and their state.

    Raises:
        ValueError: with where the run's pipeline is.
    """
    has_index = Path(folder, INDEX_NAME).exists()
    if not has_index and Path(folder, "training_config.json").exists() and Path(folder, "checksums.json").exists():
        run = Path(folder).resolve().parent
        config = json.loads(Path(folder, "training_config.json").read_text(encoding="utf-8"))
        cure = "load that. The checkpoint has only the weights that are trained, to resume from."
        if config.get("train") == ["all"] and config.get("transformer_config"):
            cure = (
                f"load that, with this step's models: `DoDPipeline.from_pretrained({str(run)!r}, transformer="
                f"DoDTransformer2DModel.from_pretrained({folder!r}, subfolder='transformer'))`, and the `latent_embedder` "
                "likewise. Averaged weights are in subfolders such as 'transformer_ema_0.9999'."
            )
        raise ValueError(
            f"{folder} is a checkpoint of a training run. When the run has ended, its pipeline is in {run}: {cure}"
        )


def _tensor_names(component: Path, variant: str | None) -> set[str]:
    """Names of the tensors in the files of a variant, or of the default one where it is not there."""
    of_variant = list(component.glob(f"*.{variant}[.-]*")) if variant is not None else []
    names: set[str] = set()
    for file in of_variant or [file for file in component.glob("*.safetensors") if file.name.count(".") == 1]:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                names |= set(weights.keys())
    return names


class DoDRepositoryMixin:
    """How [`DoDPipeline`] is loaded and saved: from a folder or the Hub without running code, to a folder with its code."""

    @classmethod
    def _pipeline_class(cls) -> type:
        """The class that this mixin was made for, of which `cls` may be a subclass."""
        return next(base for base in cls.__mro__ if DoDRepositoryMixin in base.__bases__)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Loads a pipeline from a folder or from the Hub; code that it carries is neither needed nor run.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder, or a repository of the Hub.
            kwargs:
                as in [`DiffusionPipeline.from_pretrained`]: `dtype`, `variant`, `revision`, `token`, ...
                `trust_remote_code` is ignored.

        Raises:
            ValueError: if the folder holds another pipeline or a training checkpoint, if a component's class is of a
                module that is neither diffusers, transformers, this package nor imported before, or if weights are
                pickled or lack tensors.
        """
        source = str(pretrained_model_name_or_path)
        kwargs.pop("trust_remote_code", None)
        if "dtype" in kwargs:
            kwargs[DTYPE_ARGUMENT] = kwargs.pop("dtype")
        folder = source if os.path.isdir(source) else cls.download(source, **kwargs)
        check_not_a_checkpoint(folder)
        if kwargs.setdefault("use_safetensors", True):
            check_weights(folder, set(kwargs), source, kwargs.get("variant"))
        pipeline = super().from_pretrained(folder, **kwargs)  # type: ignore[misc]
        pipeline.register_to_config(_name_or_path=source)
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, dtype: Any = None, torch_dtype: Any = None, **components: Any) -> Any:
        """A pipeline with the components, labels and code guidance of another, as diffusers' own pipelines have it.

        Args:
            pipeline: any pipeline with a DoD pipeline's components.
            dtype (`torch.dtype`, *optional*): to which the shared models are brought.
            torch_dtype (`torch.dtype`, *optional*): its older name.
            components: those that take the place of the other pipeline's.

        Raises:
            ValueError: for a component that a DoD pipeline does not have.
        """
        expected = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
        if unknown := sorted(set(components) - expected):
            raise ValueError(f"{cls.__name__} has no component {unknown[0]!r}; it has {', '.join(sorted(expected))}.")
        shared = {name: part for name, part in pipeline.components.items() if name in expected}
        own = {name: pipeline.config[name] for name in ("id2label", "code_guidance_scale") if name in pipeline.config}
        new = cls(**{**own, **shared, **components})
        dtype = torch_dtype if dtype is None else dtype
        return new if dtype is None else new.to(dtype=dtype)  # type: ignore[attr-defined]

    # diffusers' own `download` refuses a repository that carries code, and fails on a component of a third-party
    # package that does not; overriding it and `load_config` changes nothing outside this class.
    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Downloads what `from_pretrained` reads of a repository, without its code; returns the folder."""
        options = {
            name: kwargs[name]
            for name in ("variant", "revision", "cache_dir", "token", "force_download", "local_files_only")
            if kwargs.get(name) is not None
        }
        return download_snapshot(pretrained_model_name, passed_components=set(kwargs), **options)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> dict[str, Any] | tuple:
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        config, *rest = loaded if isinstance(loaded, tuple) else (loaded,)
        classes = [base.__name__ for base in cls.__mro__]
        package = cls._pipeline_class().__module__.rpartition(".")[0]
        config = resolve_index(config, classes, package, str(pretrained_model_name_or_path))
        return (config, *rest) if rest else config

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the pipeline and its code, so that it also loads with diffusers alone and `trust_remote_code=True`.

        Args:
            save_directory (`str` or `os.PathLike`): a folder, made if need be.
            push_to_hub (`bool`, defaults to `False`): whether to also push with [`~DoDPipeline.push_to_hub`].
            kwargs:
                of [`DiffusionPipeline.save_pretrained`], such as `variant` and `max_shard_size`. With
                `push_to_hub=True`, all but `safe_serialization` and `max_shard_size` go to the push, which needs
                `license`; `repo_id` is by default the folder's name.

        Raises:
            ValueError: if a LoRA is loaded, which the saved weights would hold in peft's layout.
        """
        if getattr(self.transformer, "peft_config", None):  # type: ignore[attr-defined]
            raise ValueError(
                "The transformer has a LoRA beside its weights: save it with `save_lora_weights`, and call "
                "`unload_lora_weights()`, after `fuse_lora()` to keep what it does, before the pipeline is saved."
            )
        weights = kwargs
        if push_to_hub:
            weights = {name: kwargs.pop(name) for name in ("safe_serialization", "max_shard_size") if name in kwargs}
        # diffusers leaves out what was None at first and was set later, such as a guider.
        self.register_modules(**{name: getattr(self, name) for name in self._optional_components})  # type: ignore[attr-defined]
        super().save_pretrained(save_directory, **weights)  # type: ignore[misc]
        if type(self) is self._pipeline_class():  # the code of a subclass may be anything, such as a user's script
            pipeline_file = str(sys.modules[type(self).__module__].__file__)
            write_code(save_directory, pipeline_file)
            write_blocks(save_directory, pipeline_file=pipeline_file)
        if push_to_hub:
            self.push_to_hub(  # type: ignore[attr-defined]
                kwargs.pop("repo_id", Path(save_directory).name), **kwargs
            )
