"""The probe of the embedder's codes: known answers of the classifier, and the command on real digits."""

import json

import pytest
import torch
from helpers import tiny_embedder, tiny_pipeline, tiny_transformer
from training_runs import write_digits

from diffusers_dod import DoDLatentEmbedder
from diffusers_dod.evaluation.probe import main
from diffusers_dod.evaluation.probing import fit, probe_accuracy


def test_probe_of_features_that_tell_all_something_and_nothing():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (3000,), generator=generator)
    noise = torch.randn(3000, 4, generator=generator)
    everything = torch.cat([torch.nn.functional.one_hot(labels, 3) * 100.0, noise], dim=1)
    # One class of three can be told from the two others: those are guessed.
    something = torch.cat([(labels == 0).float().unsqueeze(1), noise], dim=1)
    scores = [
        probe_accuracy(values[:2000], labels[:2000], values[2000:], labels[2000:])
        for values in (everything, something, noise)
    ]
    assert scores[0] == 1.0
    assert scores[1] == pytest.approx(2 / 3, abs=0.05)
    assert scores[2] == pytest.approx(1 / 3, abs=0.05)


def test_optimum_is_that_of_the_regularised_loss():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(50, 3, generator=generator), torch.randint(2, (50,), generator=generator)
    probe = fit(features, labels, 2, weight_decay=0.1)
    loss = torch.nn.functional.cross_entropy(probe(features), labels) + 0.1 * probe.weight.square().sum()
    gradients = torch.autograd.grad(loss, list(probe.parameters()))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-4


def test_command_reports_codes_latents_and_an_untrained_embedder(tmp_path, capsys):
    digits = write_digits(tmp_path / "digits", counts=(40, 40, 40))
    shape = {"sample_size": 28, "in_channels": 1, "patch_size": 7}
    embedder = tiny_embedder(**shape, output_patch_size=7)
    pipe = tiny_pipeline(transformer=tiny_transformer(**shape), latent_embedder=embedder)
    pipe.save_pretrained(tmp_path / "model")
    arguments = ["--model", tmp_path / "model", "--train_data_dir", digits, "--output", tmp_path / "probe.json"]
    assert main([*map(str, arguments)]) == 0
    report = json.loads((tmp_path / "probe.json").read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert (report["train_images"], report["test_images"]) == (96, 24)
    scores = report["top_1_accuracy"]
    assert {name: score["channels"] for name, score in scores.items()} == {
        "codes": 32,
        "raw latents": 784,
        "codes, untrained": 32,
    }
    assert scores["raw latents"]["value"] > 0.8  # 0, 1 and 4 in pixels
    assert scores["codes"] != scores["codes, untrained"]
    # A set of its own for the test, here the same one: nothing is kept back, and what was learned is known.
    assert main([*map(str, [*arguments, "--test_data_dir", digits])]) == 0
    report = json.loads((tmp_path / "probe.json").read_text())
    assert (report["train_images"], report["test_images"]) == (120, 120)
    assert report["top_1_accuracy"]["raw latents"]["value"] == 1.0


def test_a_model_of_oblong_images_is_refused(tmp_path, capsys):
    shape = {"sample_size": (8, 16)}
    pipe = tiny_pipeline(transformer=tiny_transformer(**shape), latent_embedder=tiny_embedder(**shape))
    pipe.save_pretrained(tmp_path / "model")
    assert main(["--model", str(tmp_path / "model"), "--train_data_dir", str(tmp_path)]) == 2
    assert "but images are square here" in capsys.readouterr().err


def test_untrained_embedder_has_the_trained_ones_shape():
    embedder = tiny_embedder()
    fresh = DoDLatentEmbedder.from_config(embedder.config)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {
        k: v.shape for k, v in embedder.state_dict().items()
    }
