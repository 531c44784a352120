"""Training on cached latents, with REPA, and with pushes to the Hub."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import tiny_vae
from hub_server import HubServer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import (
    SCRIPT,
    arguments,
    cache_digits,
    finish,
    load_file,
    start,
    weights,
    write_digits,
)
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

from diffusers_dod import DoDPipeline
from diffusers_dod.viz import read_scalars


OPTIONS = ("--train_batch_size", 4, "--max_train_steps", 6, "--random_flip", "--checkpointing_steps", 3, "--no-ema")
PATCHES = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 1}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data"), counts=(3, 3, 3))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny DINOv2, whose 7x7 patches at 14 pixels a side belong to one token of 2 pixels each."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 14, "patch_size": 2}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(digits, tmp_path_factory):
    """Without mirrored images; beside it a VAE of the same weights and another scale."""
    folder = tmp_path_factory.mktemp("cache")
    tiny_vae("kl", scaling_factor=0.25).save_pretrained(folder / "other")
    return cache_digits(digits, folder)


def train(folder, *options, **kwargs):
    status = finish(start(arguments(folder / "run", *OPTIONS, *options, **kwargs), folder / "log"))
    assert status == 0, (folder / "log").read_text()
    return folder / "run"


@pytest.mark.parametrize("vae, tolerance", [("tiny", 1e-6), ("kl", 1e-4)])
def test_cached_latents_train_as_their_images_do(vae, tolerance, digits, tmp_path):
    """The same seed gives the same flips, posterior samples and noise. One picture at a time in the cache, four at once
    in training: sums in another order."""
    latents = cache_digits(digits, tmp_path, "--flips", "--dtype", "float32", vae=vae)
    for name in ("raw", "cached"):
        (tmp_path / name).mkdir()
    raw = train(
        tmp_path / "raw", "--train_data_dir", digits, "--resolution", 14, "--vae_name_or_path", tmp_path / "vae"
    )
    cached = train(tmp_path / "cached", "--latents_dir", latents)
    expected = weights(raw)
    for name, value in weights(cached).items():
        assert torch.allclose(value, expected[name], atol=tolerance), name
    # The folder has the cache's VAE and class names.
    pipe = DoDPipeline.from_pretrained(cached)
    assert pipe.config.id2label == {"0": "digit 0", "1": "digit 1", "2": "digit 4"}
    assert type(pipe.vae) is type(DoDPipeline.from_pretrained(raw).vae)


def test_repa_is_the_same_on_images_and_on_cached_features_and_resumes(digits, encoder, tmp_path):
    latents = cache_digits(
        digits, tmp_path, "--flips", "--dtype", "float32", "--repa_encoder", encoder, "--patch_size", 1, vae="tiny"
    )
    for name in ("raw", "cached", "plain"):
        (tmp_path / name).mkdir()
    repa = ("--repa_layer", 1, "--repa_weight", 0.5, "--learning_rate", 1e-3)
    data = ("--train_data_dir", digits, "--resolution", 14, "--vae_name_or_path", tmp_path / "vae")
    logs = ("--report_to", "tensorboard")
    raw = train(tmp_path / "raw", *data, *repa, *logs, "--repa_encoder", encoder, transformer=PATCHES)
    options = ("--latents_dir", latents, *repa, "--repa_encoder", "cached")
    # Stopped half-way, and again.
    train(tmp_path / "cached", *options, "--max_train_steps", 3, transformer=PATCHES)
    cached = train(tmp_path / "cached", *options, transformer=PATCHES)
    expected = weights(raw)
    for name, value in weights(cached).items():
        assert torch.allclose(value, expected[name], atol=1e-5), name
    projectors = [
        load_file(run / "checkpoint-6/repa_projector/diffusion_pytorch_model.safetensors") for run in (raw, cached)
    ]
    for name, value in projectors[0].items():
        assert torch.allclose(value, projectors[1][name], atol=1e-5), name
    assert not (cached / "repa_projector").exists()  # not part of the model
    losses = [value for _, value in read_scalars(raw / "logs")["loss_repa"]]
    assert losses and losses[-1] < losses[0] and losses[-1] < 0
    plain = train(tmp_path / "plain", *data, transformer=PATCHES)
    assert any(not torch.equal(value, expected[name]) for name, value in weights(plain).items())


@pytest.mark.parametrize(
    "options, message",
    [
        (("--random_flip",), "holds no mirrored images"),
        (("--resolution", 28), "is of resolution 14, so --resolution cannot be 28"),
        (("--num_classes", 2), "the data has 3 classes, so --num_classes cannot be 2"),
        (("--repa_encoder", "cached"), "holds no features"),
        (("--repa_encoder", "facebook/dinov2-base"), "with --latents_dir, pass `--repa_encoder cached`"),
        (("--streaming",), "--latents_dir is not for --streaming"),
        (("--vae_name_or_path", "{other}"), "was not made with the VAE of"),
        (("--train_data_dir", "x"), "give one of --train_data_dir, --dataset_name and --latents_dir"),
        (("--push_to_hub",), "--push_to_hub needs --hub_license"),
        (("--evaluation_samples", 8), "--evaluation_samples and --evaluation_reference need each other"),
    ],
)
def test_what_does_not_fit_the_cache_is_one_line(options, message, digits, cache, tmp_path, capsys):
    from diffusers_dod.training import __main__ as train_command

    options = [str(option).format(other=cache.parent / "other") for option in options]
    assert train_command.main(arguments(tmp_path / "run", "--latents_dir", cache, *options)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert message in errors[-1] and not (tmp_path / "run").exists()


def test_unconditional_and_balanced_training_on_latents(cache, tmp_path):
    for name in ("free", "balanced"):
        (tmp_path / name).mkdir()
    options = ("--latents_dir", cache, "--train_batch_size", 3, "--max_train_steps", 2)
    free = finish(start(arguments(tmp_path / "free/run", *options, "--num_classes", 0), tmp_path / "free/log"))
    balanced = finish(
        start(arguments(tmp_path / "balanced/run", *options, "--sampling", "balanced"), tmp_path / "balanced/log")
    )
    assert (free, balanced) == (0, 0), (tmp_path / "free/log").read_text()
    assert DoDPipeline.from_pretrained(tmp_path / "free/run").transformer.config.num_classes == 0


def test_metrics_of_every_stage_are_logged_beside_the_grid(digits, encoder, tmp_path):
    data = ("--train_data_dir", digits, "--resolution", 14, "--validation_steps", 2, "--report_to", "tensorboard")
    options = ("--evaluation_samples", 7, "--evaluation_reference", digits, "--evaluation_extractor", encoder)
    run = train(tmp_path, *data, *options, "--max_train_steps", 4)
    events = EventAccumulator(str(run / "logs" / "train_dod")).Reload()
    for metric in ("fd", "kid", "precision", "recall", "coverage"):
        for stage in (1, 2):
            points = events.Scalars(f"evaluation/{metric}_stage_{stage}")
            assert [point.step for point in points] == [2, 4] and all(np.isfinite(point.value) for point in points)
    assert events.Scalars("evaluation/fd_stage_1")[0].value > 0


def test_training_pushes_on_its_way_and_at_its_end_and_survives_a_hub_that_fails(digits, tmp_path):
    """At step 2 the commit is refused, at step 4 and at the end it is not; the last one holds the last weights."""
    data = ("--train_data_dir", digits, "--resolution", 14, "--checkpointing_steps", 2, "--max_train_steps", 4)
    options = ("--push_to_hub", "--hub_license", "mit", "--hub_private_repo", "--hub_push_checkpoints")
    with HubServer() as hub:
        hub.faults["commit"] = [500]
        command = arguments(tmp_path / "my-digits", *data, *options, "--validation_steps", 2)
        environment = hub.environment(tmp_path / "home")
        done = subprocess.run([sys.executable, SCRIPT, *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "The push to my-digits failed" in done.stderr and hub.faults["commit"] == []
        assert f"Pushed: {hub.endpoint}" in done.stdout
        repository = hub.repositories["user/my-digits"]
        assert repository.private and len(repository.commits) in (2, 3)  # empty, perhaps step 4, the end
        files = hub.files("user/my-digits")
    path = "transformer/diffusion_pytorch_model.safetensors"
    assert files[path] == (tmp_path / "my-digits" / path).read_bytes()
    card = files["README.md"].decode()
    assert "| max_train_steps | 4 |" in card and "stages.png" in files and str(tmp_path) not in card
    assert "hub_license" not in card
    assert json.loads((tmp_path / "my-digits/training_config.json").read_text())["step"] == 4
