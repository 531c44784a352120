"""`study/publish.py`: what it measures, and what it writes of a model's training."""

import re

import data_sets
import pytest
import torch
from helpers import tiny_coded_pipeline, tiny_embedder, tiny_transformer
from publish import SEEDS, describe_training, expected_share, measure, memory, standard_error
from referee import Referee


@pytest.fixture(scope="module")
def data():
    whole = data_sets.digits(None)
    return whole._replace(
        images=whole.images[::13],
        labels=whole.labels[::13],
        groups=whole.groups[::13],
        held_out_images=whole.held_out_images[::16],
        held_out_labels=whole.held_out_labels[::16],
        held_out_groups=whole.held_out_groups[::16],
    )


def test_samples_that_are_training_images_are_found(data):
    known, unknown = data.images[:20], data.held_out_images[:20]
    copied = memory(known, data.images, data.held_out_images, data)
    assert copied.distance == pytest.approx(0, abs=0.1) and copied.is_training.all()
    assert copied.groups.tolist() == data.groups[:20].tolist()
    own = memory(unknown, data.images, data.held_out_images, data)
    assert own.distance > 1 and not own.is_training.any()
    assert own.groups.tolist() == data.held_out_groups[:20].tolist()


def test_the_share_without_copying_is_that_of_the_classes(data):
    labels = torch.tensor([0, 0, 1])
    shares = [
        int((data.labels == label).sum()) / int((torch.cat([data.labels, data.held_out_labels]) == label).sum())
        for label in (0, 1)
    ]
    assert expected_share(labels, data) == pytest.approx((2 * shares[0] + shares[1]) / 3)


def test_samples_near_one_group_count_as_one():
    assert standard_error(0.8, torch.arange(100)) == pytest.approx(0.04)
    assert standard_error(0.8, torch.arange(100) % 4) == pytest.approx(0.2)
    assert standard_error(0.8, torch.zeros(100)) == pytest.approx(0.4)


def test_figures_are_means_of_the_seeds(data):
    shape = {"sample_size": 28, "in_channels": 1, "patch_size": 7}
    embedder = tiny_embedder(**shape, output_patch_size=7, codes_mean=[0.0] * 2, codes_std=[1.0] * 2)
    pipe = tiny_coded_pipeline(transformer=tiny_transformer(**shape), latent_embedder=embedder)
    pipe.set_progress_bar_config(disable=True)
    results = {result["metric"]: result for result in measure(pipe, data, Referee(data, steps=20), 20, (None, 3.0))}
    kinds = ("fd", "fd_pca", "accuracy", "nearest_image", "training_image", "nearest_code", "training_code")
    assert list(results) == [f"{kind}{scale}" for scale in ("", ", code_guidance_scale=3") for kind in kinds]
    for result in results.values():
        assert len(result["seeds"]) == len(SEEDS)
        assert result["value"] == pytest.approx(sum(result["seeds"]) / len(SEEDS), abs=1e-4)
    assert re.search(r"without copying: 0\.8\d\d ± 0\.[01]\d\d\)", results["training_image"]["name"])


def test_a_training_is_described_by_its_recipes():
    training = describe_training("digits", "mnist", "checkpoint-1000/transformer")
    assert training["weaker model for autoguidance"] == "checkpoint-1000/transformer"
    assert training["transformer and embedder: recipe"] == "digits.yaml"
    assert training["transformer and embedder: lr_warmup_steps"] == "300"
    assert training["code model: code_guidance_scale"] == "2.0"
    assert "continued training of the transformer: max_train_steps" in training
    assert not any(key.endswith("checkpointing_steps") for key in training)
