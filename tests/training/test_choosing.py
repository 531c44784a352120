"""What is trained where the user names no size."""

import argparse
import json

import pytest
from training_runs import write_digits

from diffusers_dod import DoDPipeline
from diffusers_dod.cli import BadInput
from diffusers_dod.training.__main__ import main
from diffusers_dod.training.choosing import choose_models


def options(**given):
    names = (
        "learning_rate",
        "logit_mean",
        "timestep_density",
        "prediction_type",
        "transformer_config",
        "embedder_config",
    )
    return argparse.Namespace(**dict.fromkeys(names) | {"prior_drop": 0.5} | given)


@pytest.mark.parametrize(
    ("size", "is_pixels", "patch", "tokens"),
    [
        *((28, True, 7, 4), (32, True, 8, 4), (64, True, 8, 8), (128, True, 8, 16), (256, True, 16, 16)),
        *((32, False, 2, 16), (16, False, 1, 16), (8, False, 1, 8), (64, False, 2, 32)),
    ],
)
def test_patches_make_few_tokens_and_codes_half_of_their_side(size, is_pixels, patch, tokens):
    transformer, embedder, lines = choose_models(options(), size, is_pixels, 500, "cpu")
    assert transformer["patch_size"] == patch and embedder["patch_size"] == 2 * patch
    assert transformer["x_prediction"] == (is_pixels and patch >= 4)
    assert f"{tokens}x{tokens} tokens" in lines[0] and f"{tokens // 2}x{tokens // 2} of 4 numbers" in lines[2]


@pytest.mark.parametrize("size, cure", [(62, 56), (31, 28), (74, 64)])
def test_a_size_that_only_large_patches_divide_is_refused(size, cure):
    with pytest.raises(BadInput, match=f"--resolution of {cure}"):
        choose_models(options(), size, True, 500, "cpu")


@pytest.mark.parametrize(("size", "is_pixels", "codes"), [(28, True, 4), (64, True, 4), (128, True, 8), (8, False, 4)])
def test_a_model_for_codes_has_at_least_4x4(size, is_pixels, codes):
    _, embedder, lines = choose_models(options(prior_drop=0.125), size, is_pixels, 500, "cpu")
    assert size // embedder["patch_size"] == codes and embedder["noise_level_input"]
    assert f"Codes: {codes}x{codes} of 4 numbers, for a code model" in lines[2]


def test_the_study_s_model_for_small_images_and_what_is_given_stays():
    args = options()
    transformer, *_ = choose_models(args, 28, True, 5000, "cuda")
    width = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    assert (transformer["num_layers"], width, args.learning_rate, args.logit_mean) == (4, 128, 3e-3, 0.4)
    args = options(learning_rate=5e-4, logit_mean=0.0)
    choose_models(args, 28, True, 5000, "cuda")
    assert (args.learning_rate, args.logit_mean) == (5e-4, 0.0)
    args = options(prediction_type="epsilon")
    assert not choose_models(args, 28, True, 5000, "cuda")[0]["x_prediction"] and args.logit_mean is None


def test_given_entries_replace_chosen_ones():
    given = {"transformer_config": {"patch_size": 4, "x_prediction": False}, "embedder_config": {"bottleneck_dim": 3}}
    transformer, embedder, lines = choose_models(options(prior_drop=0.125, **given), 32, True, 500, "cpu")
    assert (transformer["num_layers"], transformer["patch_size"], transformer["x_prediction"]) == (6, 4, False)
    assert (embedder["patch_size"], embedder["bottleneck_dim"]) == (8, 3)
    assert "4x4 pixels, 8x8 tokens" in lines[0] and "4x4 of 3 numbers, for a code model, with noise" in lines[2]
    assert not any("clean image" in line for line in lines)


@pytest.mark.parametrize(
    ("images", "device", "layers"),
    [(1_300_000, "cuda", 36), (1_300_000, "cpu", 8), (300_000, "cuda", 15), (50_000, "cuda", 15), (None, "cuda", 15)],
)
def test_more_images_on_a_gpu_get_a_preset(images, device, layers):
    assert choose_models(options(), 32, False, images, device)[0]["num_layers"] == layers


def test_a_folder_of_small_images_and_nothing_else(tmp_path, capsys):
    digits = write_digits(tmp_path / "digits", counts=(3, 3))
    run = tmp_path / "run"
    argv = ["--train_data_dir", digits, "--output_dir", run, "--max_train_steps", 1, "--train_batch_size", 2]
    argv += ["--embedder_config", '{"bottleneck_dim": 3}']
    assert main([str(value) for value in (*argv, "--report_to", "none", "--validation_steps", 1)]) == 0
    printed = capsys.readouterr().out
    for start in (
        "Patch: 7x7 pixels",
        "Size: 4 layers of width 128",
        "Codes: 2x2 of 3 numbers",
        "Learning rate: 0.003",
    ):
        assert start in printed
    config = json.loads((run / "training_config.json").read_text())
    assert (config["resolution"], config["logit_mean"], config["learning_rate"]) == (28, 0.4, 3e-3)
    assert DoDPipeline.from_pretrained(run).transformer.config.x_prediction
