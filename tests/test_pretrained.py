"""The model in the repository: it loads, and its second stage is better than its first."""

import pytest
import torch
from classifier import measure, train_classifier
from diffusers import DiffusionPipeline
from digits import load_digits
from helpers import EXAMPLES

from diffusers_dod import DoDPipeline
from diffusers_dod.hub import check_folder


FOLDER = EXAMPLES / "pretrained" / "digits"


@pytest.fixture(scope="module")
def pipe():
    pipe = DoDPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_second_stage_is_better_than_the_first(pipe):
    images, labels = load_digits()
    classifier, _ = train_classifier(images, labels, epochs=6)
    wanted = torch.arange(500) % 10
    generator = torch.Generator().manual_seed(0)
    stages = pipe(wanted, 2, 12, 1.0, generator=generator, output_type="latent", return_stages=True).stages
    with torch.no_grad():
        reference = classifier.features(images)
    (first, first_accuracy), (second, second_accuracy) = (
        measure(classifier, stage.clamp(-1, 1), wanted, reference) for stage in stages
    )
    assert second < 0.9 * first and second_accuracy > first_accuracy > 0.6


def test_it_loads_with_its_own_code(pipe):
    """`examples/pretrained/write_code.py` writes it; it need not be this version's."""
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(FOLDER)
    carried = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    assert type(carried).__module__.startswith("diffusers_modules")
    carried.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "output_type": "pt"}
    images = [each([3], generator=torch.Generator().manual_seed(0), **options).images for each in (pipe, carried)]
    assert torch.equal(*images)


def test_nothing_is_missing_for_a_push(pipe):
    assert check_folder(FOLDER, license="apache-2.0") == []
    card = (FOLDER / "README.md").read_text()
    assert "Fréchet distance" in card and "stages.png" in card
    assert pipe.config.id2label["7"] == "7"
