"""The models in the repository: they load in every way, draw what is asked for, and nothing is missing for a push."""

import json
import re

import nbformat
import numpy as np
import pytest
import torch
from classifier import measure, train_classifier
from diffusers import DiffusionPipeline
from digits import load_digits
from helpers import EXAMPLES
from nbclient import NotebookClient

from diffusers_dod import DoDPipeline
from diffusers_dod.hub import check_folder
from diffusers_dod.hub.card import build_card
from diffusers_dod.repository import carried_code


MODELS = {"digits": (28, "L"), "letters": (64, "RGB"), "emoji": (32, "RGB")}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_draws_alike_with_and_without_the_package(name):
    folder, (size, mode) = EXAMPLES / "pretrained" / name, MODELS[name]
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(folder)
    images = []
    for pipeline_class, options in ((DoDPipeline, {}), (DiffusionPipeline, {"trust_remote_code": True})):
        pipe = pipeline_class.from_pretrained(folder, **options)
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe([0, 1], num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images)
    for one, other in zip(*images):
        assert one.size == (size, size) and one.mode == mode
        assert np.array_equal(np.asarray(one), np.asarray(other)) and np.asarray(one).std() > 10


@pytest.mark.parametrize("name", MODELS)
def test_the_code_and_the_card_of_a_model_are_the_packages(name):
    folder = EXAMPLES / "pretrained" / name
    card = build_card(folder, f"examples/pretrained/{name}", "apache-2.0", has_picture=True)
    assert (folder / "README.md").read_text() == card, "run `python examples/pretrained/write_code.py`"
    code = carried_code(json.loads((folder / "model_index.json").read_text()))
    assert len(code) == 1 + len([*folder.glob("*transformer"), *folder.glob("latent_embedder")])
    for path, text in code.items():
        assert (folder / path).read_text() == text, "run `python examples/pretrained/write_code.py`"


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_missing_for_a_push(name):
    folder = EXAMPLES / "pretrained" / name
    assert check_folder(folder, license="apache-2.0") == []
    card = (folder / "README.md").read_text()
    assert "nearest training image" in card and "stages.png" in card and "| data |" in card
    results = {
        result["metric"]: result["value"] for result in json.loads((folder / "evaluation.json").read_text())["results"]
    }
    assert results["accuracy"] > 0.5 and results["nearest_image"] > 0


def test_digits_are_read_as_what_they_should_be():
    pipe = DoDPipeline.from_pretrained(EXAMPLES / "pretrained" / "digits")
    pipe.set_progress_bar_config(disable=True)
    images, labels = load_digits()
    classifier, _ = train_classifier(images, labels, epochs=6)
    wanted = torch.arange(200) % 10
    with torch.no_grad():
        reference = classifier.features(images)
    figures = []
    for options in ({"code_guidance_scale": 1.0}, {"prior_source": "stage", "num_stages": 1}):
        generator = torch.Generator().manual_seed(0)
        drawn = pipe(wanted, num_inference_steps=12, generator=generator, output_type="latent", **options).images
        figures.append(measure(classifier, drawn.clamp(-1, 1), wanted, reference))
    (from_codes, accuracy), (from_class, _) = figures
    assert accuracy > 0.95 and from_codes < 0.9 * from_class


def test_the_readme_quotes_the_models_figures():
    """As the limits there do: in the order digits, letters and emoji, with the figures of real images."""
    readme = " ".join((EXAMPLES.parent / "README.md").read_text(encoding="utf-8").split())
    evaluations = [json.loads((EXAMPLES / f"pretrained/{name}/evaluation.json").read_text()) for name in MODELS]
    results = [{result["metric"]: result for result in evaluation["results"]} for evaluation in evaluations]

    def values(metric, digits, factor=100.0):
        return [f"{factor * result[metric]['value']:.{digits}f}" for result in results]

    def references(metric, digits):
        found = [re.search(r": ([\d.]+)(?: ± ([\d.]+))?\)$", result[metric]["name"]).groups() for result in results]
        return [" ± ".join(f"{100 * float(figure):.{digits}f}" for figure in pair if figure) for pair in found]

    configs = [json.loads((EXAMPLES / f"pretrained/{name}/model_index.json").read_text()) for name in MODELS]
    scales = [f"{config['code_guidance_scale']:g}" for config in configs]
    assert (
        f"{scales[0]} (digits) or {scales[1]} (letters, emoji), makes clear samples" in readme
        and scales[1] == scales[2]
    )
    read, real = values("accuracy", 1), references("accuracy", 1)
    assert f"{read[0]} % of their digits, {read[1]} % of their letters and {read[2]} % of their emoji" in readme
    assert f"held-out real images: {real[0]}, {real[1]} and {real[2]} %" in readme
    unguided = values("accuracy, code_guidance_scale=1", 1)
    assert f"the accuracies are {unguided[0]}, {unguided[1]} and {unguided[2]} %" in readme
    distances = [values("fd", 0, 1), values("fd, code_guidance_scale=1", 0, 1)]
    assert f"instead of {', '.join(distances[0][:2])} and {distances[0][2]}" in readme
    assert f"the Fréchet distances {', '.join(distances[1][:2])} and {distances[1][2]}" in readme
    known, without = values("training_image", 0), references("training_image", 0)
    assert (
        f"is a training image for {known[0]} % of the digits, {known[1]} % of the letters and {known[2]} % of the emoji"
        in readme
    )
    assert f"the shares would be {without[0]}, {without[1]} and {without[2]} %" in readme
    known, without = values("training_code", 0), references("training_code", 0)
    assert f"By nearest codes, the shares are {known[0]}, {known[1]} and {known[2]} %" in readme
    assert f"without copying, {without[0]}, {without[1]} and {without[2]} %" in readme


def test_the_notebook_runs():
    notebook = nbformat.read(EXAMPLES / "notebooks" / "codes.ipynb", as_version=4)
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(EXAMPLES / "notebooks")}}).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 6
