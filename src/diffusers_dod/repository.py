"""What a saved DoD pipeline holds, in a folder or in a repository of the Hub, and how it is read back.

    model_index.json                        the components' classes
    pipeline.py                             the pipeline's own code, for those who have diffusers only
    transformer/                            config.json, safetensors, transformer_dod.py
    latent_embedder/                        config.json, safetensors, latent_embedder_dod.py
    scheduler/, vae/                        classes of diffusers, as in its other pipelines

`DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` runs the code that is carried. `DoDPipeline` never does:
it takes the two models' classes from beside itself, whatever module the index names.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download


INDEX_NAME = "model_index.json"
MODEL_FILES = {"DoDTransformer2DModel": "transformer_dod", "DoDLatentEmbedder": "latent_embedder_dod"}


def standalone_source(file: Path, inlined: set[str] | None = None) -> str:
    """The text of a module with the modules that it imports from its own package in the place of the imports.

    diffusers downloads one file of code for each component, so a carried file cannot import its neighbours.
    """
    inlined = set() if inlined is None else inlined
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module is not None:
            is_new = node.module not in inlined
            inlined.add(node.module)
            text = standalone_source(file.with_name(f"{node.module}.py"), inlined) if is_new else ""
            lines[node.lineno - 1 : node.end_lineno] = [text]
    return "".join(lines)


def carried_code(pipeline_file: str) -> dict[str, str]:
    """The code that a repository carries, by its path there.

    Args:
        pipeline_file (`str`): the pipeline's module; the models' modules are its neighbours.
    """
    file = Path(pipeline_file)
    return {
        "pipeline.py": standalone_source(file),
        "transformer/transformer_dod.py": standalone_source(file.with_name("transformer_dod.py")),
        "latent_embedder/latent_embedder_dod.py": standalone_source(file.with_name("latent_embedder_dod.py")),
    }


def index_with_code(index: dict[str, Any]) -> dict[str, Any]:
    """The index of a folder that carries its code, in the form that diffusers' `trust_remote_code` reads."""
    names = {
        component: [MODEL_FILES[entry[1]], entry[1]]
        for component, entry in index.items()
        if isinstance(entry, list) and entry[1] in MODEL_FILES
    }
    return {**index, **names, "_class_name": ["pipeline", "DoDPipeline"]}


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
    for component, entry in index.items():
        if not isinstance(entry, list) or component.startswith("_") or entry[0] is None:
            continue
        library, component_class = entry
        if component_class in MODEL_FILES:
            resolved[component] = [f"{package}.{MODEL_FILES[component_class]}", component_class]
        elif library not in ("diffusers", "transformers") and library not in sys.modules:
            # Importing a module because a repository names it would run it.
            raise ValueError(
                f"{source} takes its `{component}` from the module {library!r}, which is not diffusers'. Nothing of it "
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


def check_weights(folder: str, passed_components: set[str], source: str) -> None:
    """Refuses models whose weights are not safetensors.

    Raises:
        ValueError: naming the component.
    """
    for config in sorted(Path(folder).glob("*/config.json")):
        component = config.parent
        if component.name not in passed_components and not any(component.glob("*.safetensors")):
            raise ValueError(
                f"{source} has no safetensors weights for `{component.name}`. Pickled ones (.bin, .pt, .ckpt) can run "
                "code when they are read, so they are not loaded: ask the author for safetensors, or, if you trust the "
                "files, download them, load the folder with `use_safetensors=False` and save it again."
            )
