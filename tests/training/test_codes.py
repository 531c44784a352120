"""`diffusers-dod train-codes` on real digits: a code model that learns, resumes, and tells whether it copies."""

import json
import shutil

import pytest
import torch
from diffusers import ClassifierFreeGuidance, UniPCMultistepScheduler
from helpers import tiny_embedder, tiny_pipeline, tiny_transformer, tiny_vae
from safetensors.torch import load_file
from training_runs import assert_equal_tensors, cache_digits, start_together, write_digits

from diffusers_dod import DoDPipeline
from diffusers_dod.training.__main__ import main as train_pipeline
from diffusers_dod.training.codes import nearest
from diffusers_dod.training.train_codes import main


MODEL = '{"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}'
OPTIONS = ("--code_config", MODEL, "--report_to", "none", "--validation_steps", 0, "--train_batch_size", 16)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data"), counts=(8, 8, 8))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    models = {
        "transformer": tiny_transformer(in_channels=1, num_classes=3, prediction_type="flow", sample_size=14),
        "latent_embedder": tiny_embedder(in_channels=1, sample_size=14, patch_size=7, output_patch_size=2),
    }
    tiny_pipeline(**models, id2label={0: "zero", 1: "one", 2: "four"}).save_pretrained(folder)
    return folder


def train(pipeline, data, output_dir, *options, status=0):
    argv = [pipeline, "--train_data_dir", data, "--output_dir", output_dir, *OPTIONS, *options]
    assert main([str(argument) for argument in argv]) == status
    return output_dir


def code_weights(folder):
    return load_file(folder / "code_transformer" / "diffusion_pytorch_model.safetensors")


def test_it_learns_the_codes_and_the_folder_draws_from_them(digits, pipeline, tmp_path, capsys):
    options = ("--max_train_steps", 400, "--held_out", 0.25, "--ema_decay", 0.9, "--learning_rate", 3e-3)
    options += ("--code_guidance_scale", 1.5)
    run = train(pipeline, digits, tmp_path / "run", *options)
    pipe = DoDPipeline.from_pretrained(run)
    # Stage and embedder are the pipeline's own.
    for name in ("transformer", "latent_embedder"):
        path = f"{name}/diffusion_pytorch_model.safetensors"
        assert_equal_tensors(load_file(run / path), load_file(pipeline / path))
    blocks = json.loads((run / "modular_model_index.json").read_text())
    assert blocks["transformer"][2]["pretrained_model_name_or_path"] == str(run), "not where it was written first"
    assert pipe.config.code_guidance_scale == 1.5
    assert pipe.config.id2label["1"] == "one" and pipe.code_transformer.config.patch_size == 2
    assert isinstance(pipe.code_scheduler, UniPCMultistepScheduler) and pipe.code_scheduler.config.use_flow_sigmas
    # Standardised codes of the training images have the statistics of the config; generated ones come near.
    labels = torch.arange(300) % 3
    codes = pipe.generate_codes(labels, 14, 14, generator=torch.Generator().manual_seed(0))
    normalised = pipe.latent_embedder.normalize_codes(codes, 14, 14)
    assert normalised.mean(dim=(0, 2, 3)).abs().max() < 0.35
    assert (normalised.std(dim=(0, 2, 3)) - 1).abs().max() < 0.35
    report = json.loads((run / "codes.json").read_text())
    assert report["count"] == 6 and report["generated"] > 0 and report["held_out"] > 0
    assert "Nearest training code, median of 6" in capsys.readouterr().out
    assert pipe([0], num_inference_steps=2).images


def test_what_fits_the_embedder_stays_where_it_does_and_a_guider_always(digits, pipeline, tmp_path):
    coded = train(pipeline, digits, tmp_path / "coded", "--max_train_steps", 1, "--code_guidance_scale", 1.5)
    parts = {
        "weak_transformer": DoDPipeline.from_pretrained(pipeline).transformer,
        "guider": ClassifierFreeGuidance(3.0),
    }
    DoDPipeline.from_pretrained(coded, **parts).save_pretrained(coded)
    start = ("--pretrained_model_name_or_path", coded, "--train_data_dir", digits, "--max_train_steps", 1)
    for parts, options in {"transformer": (), "lora": ("--lora_rank", 1), "embedder": ()}.items():
        argv = [*start, "--train", parts, *options, *OPTIONS[2:], "--output_dir", tmp_path / parts]
        assert train_pipeline([str(argument) for argument in argv]) == 0
        pipe = DoDPipeline.from_pretrained(tmp_path / parts)
        assert (pipe.code_transformer is not None) == (pipe.weak_transformer is not None) == (parts != "embedder")
        assert pipe.guider.guidance_scale == 3.0
        assert pipe.config.code_guidance_scale == (1.0 if parts == "embedder" else 1.5)


def test_a_killed_run_resumes_bit_equal_and_the_same_command_is_finished(digits, pipeline, tmp_path, capsys):
    options = ("--max_train_steps", 6, "--checkpointing_steps", 3)
    whole = train(pipeline, digits, tmp_path / "whole", *options)
    shutil.copytree(whole / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    assert_equal_tensors(code_weights(train(pipeline, digits, tmp_path / "resumed", *options)), code_weights(whole))
    with pytest.raises(ValueError, match="only the weights that are trained"):
        DoDPipeline.from_pretrained(whole / "checkpoint-3")
    train(pipeline, digits, whole, *options)
    assert "is finished" in capsys.readouterr().out


def test_a_run_is_not_resumed_on_another_pipeline(digits, pipeline, tmp_path, capsys):
    own = shutil.copytree(pipeline, tmp_path / "pipeline")
    run = train(own, digits, tmp_path / "run", "--max_train_steps", 2, "--checkpointing_steps", 1)
    pipe = DoDPipeline.from_pretrained(own)
    with torch.no_grad():
        next(pipe.latent_embedder.parameters()).add_(0.3)
    pipe.save_pretrained(own)
    for steps in (2, 4):
        train(own, digits, run, "--max_train_steps", steps, status=2)
        assert "configuration: frozen_latent_embedder_sha256 (" in capsys.readouterr().err


def test_codes_do_not_depend_on_the_number_of_processes(digits, tmp_path):
    """An autoencoder's latents are drawn, with noise that belongs to an image."""
    models = {
        "transformer": tiny_transformer(num_classes=3, prediction_type="flow", sample_size=7, patch_size=1),
        "latent_embedder": tiny_embedder(sample_size=7, patch_size=7, output_patch_size=1),
    }
    tiny_pipeline(**models, vae=tiny_vae("kl")).save_pretrained(tmp_path / "pipeline")
    command = [tmp_path / "pipeline", "--train_data_dir", digits, *OPTIONS, "--max_train_steps", 1]
    for count in (1, 2):
        argv = [*command, "--output_dir", tmp_path / str(count)]
        assert start_together(argv, tmp_path, count, command="train_codes") == [0] * count
    means = [
        json.loads((tmp_path / count / "latent_embedder" / "config.json").read_text())["codes_mean"]
        for count in ("1", "2")
    ]
    assert means[0] == pytest.approx(means[1], abs=1e-6)


def test_cached_latents_and_flips_are_encoded_too(digits, tmp_path):
    latents = cache_digits(digits, tmp_path, "--flips")
    models = {
        "transformer": tiny_transformer(num_classes=3, prediction_type="flow", sample_size=7, patch_size=1),
        "latent_embedder": tiny_embedder(sample_size=7, patch_size=7, output_patch_size=1),
    }
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    tiny_pipeline(**models, vae=vae).save_pretrained(tmp_path / "pipeline")
    argv = [tmp_path / "pipeline", "--latents_dir", latents, "--random_flip", "--output_dir", tmp_path / "run"]
    assert main([str(argument) for argument in (*argv, *OPTIONS, "--max_train_steps", 2)]) == 0
    assert DoDPipeline.from_pretrained(tmp_path / "run")([1], num_inference_steps=2).images


@pytest.mark.parametrize(
    "options, message",
    [
        (("--code_config", '{"in_channels": 5}'), "--code_config has in_channels 5"),
        (("--code_config", '{"patch_size": 3, "sample_size": 2}'), "patch"),
        (("--code_config", '{"layers": 3}'), "none of"),
        (("--held_out", 2), "is not from 0 to 1"),
        (("--train_data_dir", "nowhere"), "not a folder"),
        (("--num_classes", 0), "the model has 3 classes, but the data or --num_classes has 0"),
        (("--num_classes", 4), "the model has 3 classes, but the data or --num_classes has 4"),
    ],
)
def test_bad_input_is_one_line(digits, pipeline, tmp_path, capsys, options, message):
    train(pipeline, digits, tmp_path / "run", "--max_train_steps", 2, *options, status=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("diffusers-dod train-codes: error:") and message in line


def test_an_untrained_embedder_has_no_codes_to_learn(digits, tmp_path, capsys):
    models = {
        "transformer": tiny_transformer(in_channels=1, num_classes=3, prediction_type="flow", sample_size=14),
        "latent_embedder": tiny_embedder(in_channels=1, sample_size=14, patch_size=7, output_patch_size=2),
    }
    torch.nn.init.zeros_(models["latent_embedder"].to_codes.weight)
    tiny_pipeline(**models).save_pretrained(tmp_path / "pipeline")
    train(tmp_path / "pipeline", digits, tmp_path / "run", "--max_train_steps", 2, status=2)
    assert "codes do not vary" in capsys.readouterr().err


def test_the_distance_to_the_nearest():
    training = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    codes = torch.tensor([[0.0, 1.0], [3.0, 4.0], [6.0, 8.0]])
    assert float(nearest(codes, training)[0].median()) == pytest.approx(1.0)
