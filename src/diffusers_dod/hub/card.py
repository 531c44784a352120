"""The model card of a DoD repository, from what the model's folder holds; a figure that is not there is not claimed."""

import inspect
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from diffusers.utils.constants import CONFIG_NAME
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from ..cli import first_line
from ..latent_embedder_dod import DoDLatentEmbedder
from ..repository import INDEX_NAME
from ..transformer_dod import DoDTransformer2DModel
from .text import escape_markdown, has_local_path, without_local_paths


TEMPLATE = Path(__file__).with_name("model_card.md")
LORA_NAME = "pytorch_lora_weights.safetensors"
EVALUATION_NAME = "evaluation.json"
TRAINING_NAME = "training_config.json"
# The nearest of the Hub's tasks; it has none for class-conditional images.
TASK = "unconditional-image-generation"
TAGS = ["diffusers", "diffusers-dod", "diffusion-on-diffusion", "class-conditional"]
# Of the training's configuration, what does not describe the model or names the user's own folders.
NAME_KEYS = re.compile(r".*(name|encoder|extractor|reference)")
PRIVATE_KEYS = re.compile(r"push_to_hub|hub_.*|report_to|resume_from_checkpoint|recipe|frozen_.*|.*_(dir|path|config)")


def read_json(file: Path) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: in one line, if it cannot be read, is not JSON, or holds text that is not Unicode.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be written again
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read as JSON ({first_line(error)})") from error
    return value


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file, an empty one without the file.

    Raises:
        ValueError: as [`read_json`], or if it is no object.
    """
    value = read_json(file) if file.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _count_parameters(folder: Path) -> int:
    count = 0
    for file in folder.glob("*.safetensors"):
        if file.name.count(".") == 1:  # not a variant
            with safe_open(file, framework="pt") as weights:
                count += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())
    return count


def training_table(config: dict[str, Any]) -> dict[str, Any]:
    """The hyper-parameters among a run's configuration, without folders of the machine that it ran on."""
    return {
        key: value
        for key, value in without_local_paths(config).items()
        if isinstance(value, (int, float, str, list))
        and value != ""
        and not PRIVATE_KEYS.fullmatch(key)
        and not (NAME_KEYS.fullmatch(key) and os.path.exists(str(value)))  # a model or a data set beside the run
    }


def training_dataset(config: dict[str, Any]) -> str | None:
    """The Hub dataset that a run's configuration names, if it is one and not a local folder."""
    name = config.get("dataset_name")
    if not isinstance(name, str) or not name or has_local_path(name) or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except ValueError:
        return None
    return name


def read_evaluation(folder: Path) -> dict[str, Any]:
    """What `evaluation.json` in a folder holds, without local paths; empty without the file.

    Returns:
        `dict`: `reference` (what the samples were compared with), `results` (a list with `metric`, `value` and
        optionally `name` and `stage`), and the settings that all of them share.

    Raises:
        ValueError: in one line, for anything else.
    """
    evaluation = read_object(folder / EVALUATION_NAME)
    if not evaluation:
        return {}
    reference, results = evaluation.get("reference"), evaluation.get("results")
    if not isinstance(reference, str) or not reference.strip():
        raise ValueError("`reference` must name what the samples were compared with")
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise ValueError("`results` must be a list of objects with `metric` and `value`")
    for number, result in enumerate(results):
        for key, kinds in (("metric", str), ("value", (int, float)), ("name", (str, type(None)))):
            if not isinstance(result.get(key), kinds) or isinstance(result.get(key), bool) or result.get(key) == "":
                raise ValueError(f"`results[{number}]` has no valid `{key}` ({str(result.get(key))[:40]!r})")
    public = [without_local_paths(result) for result in results if not has_local_path(result["metric"])]
    return {"reference": "local data", **without_local_paths(evaluation), "results": public}


def evaluation_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    """The `model-index` entries of what [`read_evaluation`] returns."""
    settings = {key: value for key, value in evaluation.items() if key not in ("results", "reference")}
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=evaluation["reference"],
            dataset_name=evaluation["reference"],
            metric_type=result["metric"],
            metric_name=result.get("name") or result["metric"],
            metric_value=result["value"],
            metric_args={**settings, **{key: result[key] for key in result if key not in ("metric", "value", "name")}},
        )
        for result in evaluation.get("results", [])
    ]


def _model_config(folder: Path, cls: type) -> dict[str, Any]:
    """A model's config with the defaults of the entries that it leaves out."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    return {**defaults, **read_object(folder / CONFIG_NAME)}


def _cells(values: dict[str, Any]) -> dict[str, str]:
    """Names and values as Markdown; an object is shown as `diffusers-dod 0.1.0, torch 2.13.0`."""
    return {
        escape_markdown(key): escape_markdown(
            ", ".join(f"{name} {entry}" for name, entry in value.items()) if isinstance(value, dict) else value
        )
        for key, value in values.items()
        if value not in (None, {})
    }


def _example_label(num_classes: int, labels: dict[str, str]) -> str:
    """What the card's snippets draw: the name of class 0 where it needs no care in code and in Markdown."""
    if num_classes == 0:
        return "None"
    name = (labels.get("0") or "").split(",")[0].strip()
    return repr(name) if re.fullmatch(r"[\w '().+-]+", name) else "0"


def build_card(
    folder: str | Path,
    repo_id: str,
    license: str | None,
    datasets: list[str] | None = None,
    base_model: str | None = None,
    has_picture: bool = False,
    has_code: bool = True,
) -> str:
    """The card of a saved pipeline.

    Its training's `training_config.json` and an `evaluation.json` in the folder are reported where there are any.

    Args:
        folder (`str` or `Path`): the pipeline's folder.
        repo_id (`str`): the repository that the snippets load.
        license (`str`): Hub licence identifier.
        datasets (`list` of `str`, *optional*): Hub datasets.
        base_model (`str`, *optional*): repository that the model was made from.
        has_picture (`bool`): whether the repository holds `stages.png`.
        has_code (`bool`): whether it carries the code that diffusers alone needs.

    Raises:
        ValueError: for a JSON file that [`check_folder`] would name.
    """
    folder = Path(folder)
    index = read_object(folder / INDEX_NAME)
    transformer = _model_config(folder / "transformer", DoDTransformer2DModel)
    embedder = _model_config(folder / "latent_embedder", DoDLatentEmbedder)
    training, evaluation = read_object(folder / TRAINING_NAME), read_evaluation(folder)
    if datasets is None and (dataset := training_dataset(training)):
        datasets = [dataset]
    results = evaluation_results(evaluation)
    labels = index.get("id2label") or {}
    card_data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=TAGS,
        datasets=datasets,
        base_model=base_model,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    sample_size = transformer["sample_size"]
    sides = [sample_size] * 2 if isinstance(sample_size, int) else sample_size
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        model_name=repo_id.rpartition("/")[2],
        example_label=_example_label(transformer["num_classes"], labels),
        has_picture=has_picture,
        has_code=has_code,
        base_model=base_model,
        num_classes=transformer["num_classes"],
        labels=[escape_markdown(labels[key]) for key in sorted(labels, key=int)][:20],
        more_labels=max(0, len(labels) - 20),
        latent_shape=[transformer["in_channels"], *sides],
        autoencoder=(index.get("vae") or [None, None])[1],
        scheduler=index["scheduler"][1],
        prediction_type=transformer["prediction_type"],
        transformer_millions=f"{_count_parameters(folder / 'transformer') / 1e6:.2f}",
        embedder_millions=f"{_count_parameters(folder / 'latent_embedder') / 1e6:.2f}",
        code_grid="x".join(str(side // embedder["patch_size"]) for side in sides),
        bottleneck_dim=embedder["bottleneck_dim"],
        code_millions=f"{codes / 1e6:.2f}" if (codes := _count_parameters(folder / "code_transformer")) else None,
        code_guidance_scale=index.get("code_guidance_scale", 1.0),
        weak_millions=f"{weak / 1e6:.2f}" if (weak := _count_parameters(folder / "weak_transformer")) else None,
        training=_cells(training_table(training)),
        evaluation=_cells({key: value for key, value in evaluation.items() if key != "results"}),
        results=[_cells(result) for result in evaluation.get("results", [])],
    )
    return card.content


def build_lora_card(repo_id: str, license: str | None, base_model: str, datasets: list[str] | None = None) -> str:
    """The card of a repository that holds a LoRA of a DoD transformer; the arguments are [`build_card`]'s."""
    card_data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=[*TAGS, "lora"],
        datasets=datasets,
        base_model=base_model,
    )
    return f"""---
{card_data.to_yaml()}
---

# {repo_id.rpartition("/")[2]}

A LoRA for the DoD model [{base_model}](https://huggingface.co/{base_model}), made with diffusers-dod.

```python
from diffusers_dod import DoDPipeline

pipe = DoDPipeline.from_pretrained("{base_model}")
pipe.load_lora_weights("{repo_id}")
```

Its limits are those of the base model.
"""
