"""The model card of a DoD repository, from what the model's folder holds; a figure that is not there is not claimed."""

import json
import math
import re
from pathlib import Path
from typing import Any

from diffusers.utils.constants import CONFIG_NAME
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open


TEMPLATE = Path(__file__).with_name("model_card.md")
LORA_NAME = "pytorch_lora_weights.safetensors"
# The nearest of the Hub's tasks; it has none for class-conditional images.
TASK = "unconditional-image-generation"
TAGS = ["diffusers", "diffusers-dod", "diffusion-on-diffusion", "class-conditional"]
# Of the training's configuration, what says nothing about the model or names the user's own folders.
PRIVATE_KEYS = re.compile(r"push_to_hub|hub_.*|report_to|resume_from_checkpoint|recipe|.*_(dir|path|config)")


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


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
        for key, value in config.items()
        if isinstance(value, (int, float, str, list)) and value != "" and not PRIVATE_KEYS.fullmatch(key)
    }


def evaluation_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    """The `model-index` entries of an evaluation.

    Args:
        evaluation (`dict`):
            `reference` (what the samples were compared with), `results` (a list with `metric`, `value` and optionally
            `name` and `stage`), and the settings that all of them share.
    """
    settings = {key: value for key, value in evaluation.items() if key not in ("results", "reference")}
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=evaluation["reference"],
            dataset_name=evaluation["reference"],
            metric_type=result["metric"],
            metric_name=result.get("name", result["metric"]),
            metric_value=result["value"],
            metric_args={**settings, **{key: result[key] for key in result if key not in ("metric", "value", "name")}},
        )
        for result in evaluation.get("results", [])
    ]


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
        license (`str`): identifier of the Hub.
        datasets (`list` of `str`, *optional*): datasets of the Hub.
        base_model (`str`, *optional*): repository that the model was made from.
        has_picture (`bool`): whether the repository holds `stages.png`.
        has_code (`bool`): whether it carries the code that diffusers alone needs.
    """
    folder = Path(folder)
    index = _read_json(folder / "model_index.json")
    transformer, embedder = (_read_json(folder / name / CONFIG_NAME) for name in ("transformer", "latent_embedder"))
    training, evaluation = _read_json(folder / "training_config.json"), _read_json(folder / "evaluation.json")
    if datasets is None and training.get("dataset_name"):
        datasets = [training["dataset_name"]]
    results = evaluation_results(evaluation)
    labels = index.get("id2label") or {}
    if transformer["num_classes"] == 0:
        example_label = "None"
    else:
        example_label = repr(labels["0"].split(",")[0].strip()) if labels.get("0") else "0"
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
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        model_name=repo_id.rpartition("/")[2],
        example_label=example_label,
        has_picture=has_picture,
        has_code=has_code,
        base_model=base_model,
        num_classes=transformer["num_classes"],
        labels=[labels[key] for key in sorted(labels, key=int)][:20],
        more_labels=max(0, len(labels) - 20),
        latent_shape=[
            transformer["in_channels"],
            *([sample_size] * 2 if isinstance(sample_size, int) else sample_size),
        ],
        autoencoder=(index.get("vae") or [None, None])[1],
        scheduler=index["scheduler"][1],
        prediction_type=transformer.get("prediction_type"),
        transformer_millions=f"{_count_parameters(folder / 'transformer') / 1e6:.1f}",
        embedder_millions=f"{_count_parameters(folder / 'latent_embedder') / 1e6:.1f}",
        bottleneck_dim=embedder["bottleneck_dim"],
        training=training_table(training),
        evaluation={key: value for key, value in evaluation.items() if key != "results"},
        results=evaluation.get("results", []),
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
