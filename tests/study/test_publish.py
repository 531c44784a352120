"""`study/publish.py`: what it measures, and what it writes of a model's training."""

import re
import statistics

import data_sets
import pytest
import torch
from helpers import tiny_coded_pipeline, tiny_embedder, tiny_transformer
from models import sample_labels
from publish import SEEDS, describe_training, draw, measure, memory, normalized_codes, share_without_copying
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
    share, _ = share_without_copying(labels, data.groups, data)
    assert share == pytest.approx((2 * shares[0] + shares[1]) / 3)


def test_the_error_of_the_excess_is_that_of_another_choice_of_groups(data):
    generator = torch.Generator().manual_seed(0)
    groups, labels = torch.arange(2000) ** 2 // 40000, torch.arange(2000) % 2  # of 200 to 5 images
    nearest = groups[torch.randperm(2000, generator=generator)[:300]] // 2
    excesses, errors = [], []
    for _ in range(2000):
        trained = torch.rand(100, generator=generator) < 0.8
        seen = trained[groups]
        parts = {"labels": labels[seen], "groups": groups[seen]}
        parts |= {"held_out_labels": labels[~seen], "held_out_groups": groups[~seen]}
        share, error = share_without_copying(labels, nearest, data._replace(class_names=["a", "b"], **parts))
        excesses.append(float(trained[nearest].float().mean()) - share)
        errors.append(error)
    assert statistics.mean(excesses) == pytest.approx(0, abs=0.01)
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(excesses), rel=0.05)


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
    assert results["fd"]["seeds"] != results["fd, code_guidance_scale=3"]["seeds"]
    labels = sample_labels(data, 20)
    for scale, suffix in ((None, ""), (3.0, ", code_guidance_scale=3")):
        images, codes = draw(pipe, labels, SEEDS[0], scale)
        copied = memory(images * 2 - 1, data.images, data.held_out_images, data)
        assert results[f"nearest_image{suffix}"]["seeds"][0] == pytest.approx(copied.distance / 28, abs=1e-3)
        assert results[f"training_image{suffix}"]["seeds"][0] == pytest.approx(
            float(copied.is_training.float().mean())
        )
        known, unknown = (normalized_codes(pipe, part) for part in (data.images, data.held_out_images))
        copied = memory(pipe.latent_embedder.normalize_codes(codes, 28, 28), known, unknown, data)
        assert results[f"nearest_code{suffix}"]["seeds"][0] == pytest.approx(copied.distance, abs=1e-3)
        assert results[f"training_code{suffix}"]["seeds"][0] == pytest.approx(float(copied.is_training.float().mean()))
    assert re.search(r"without copying: 0\.8\d\d ± 0\.[01]\d\d\)", results["training_image"]["name"])


def test_a_training_is_described_by_its_recipes():
    training = describe_training("digits", "mnist", "checkpoint-1000/transformer")
    assert training["weaker model for autoguidance"] == "checkpoint-1000/transformer"
    assert training["transformer and embedder: recipe"] == "digits.yaml"
    assert training["transformer and embedder: lr_warmup_steps"] == "300"
    assert training["code model: code_guidance_scale"] == "2.0"
    assert "continued training of the transformer: max_train_steps" in training
    assert not any(key.endswith("checkpointing_steps") for key in training)
