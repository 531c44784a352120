"""Training a saved pipeline further: what stays of it, what is left out with a line, and what is refused."""

import datasets
import pytest
import torch
from helpers import tiny_coded_pipeline, tiny_embedder, tiny_pipeline, tiny_transformer, tiny_vae
from training_runs import arguments, cache_digits, write_digits

from diffusers_dod import DoDPipeline
from diffusers_dod.hub import check_folder
from diffusers_dod.training.__main__ import main
from diffusers_dod.training.train_codes import main as train_codes


NAMES = {0: "zero", 1: "one", 2: "two", 3: "three"}
SHAPE = {"in_channels": 1, "sample_size": 28}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data"), counts=(4, 2, 2))


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A saved pixel pipeline of 4x4 codes, whose code model has them as one token."""
    folder = tmp_path_factory.mktemp("coded")
    codes = {"codes_mean": [0.0] * 2, "codes_std": [1.0] * 2}
    tiny_coded_pipeline(
        transformer=tiny_transformer(**SHAPE, num_classes=4, prediction_type="flow"),
        latent_embedder=tiny_embedder(**SHAPE, patch_size=7, output_patch_size=2, **codes),
        code_transformer=tiny_transformer(
            in_channels=2, sample_size=4, patch_size=4, num_classes=4, prediction_type="flow"
        ),
        weak_transformer=tiny_transformer(**SHAPE, num_classes=4, prediction_type="flow", num_layers=1),
        code_guidance_scale=1.5,
        id2label=NAMES,
    ).save_pretrained(folder)
    return folder


def train(coded, data, output_dir, *options, status=0):
    start = ("--pretrained_model_name_or_path", coded, "--train_data_dir", data)
    assert main(arguments(output_dir, *start, *options)) == status
    return output_dir


@pytest.mark.parametrize("options", [(), ("--streaming", "--num_classes", 4)], ids=["rows", "stream"])
def test_data_of_ids_alone_keep_the_models_names(digits, coded, tmp_path, options):
    rows = datasets.load_dataset("imagefolder", data_dir=str(digits), split="train")
    rows = rows.cast_column("label", datasets.Value("int64"))
    rows.to_parquet(tmp_path / "data" / "rows.parquet")
    kind = ("--dataset_name", tmp_path / "data") if options else ("--train_data_dir", tmp_path / "saved")
    rows.save_to_disk(tmp_path / "saved")
    argv = arguments(tmp_path / "run", "--pretrained_model_name_or_path", coded, *kind, *options)
    assert main(argv) == 0
    assert DoDPipeline.from_pretrained(tmp_path / "run").config.id2label == {str(k): v for k, v in NAMES.items()}


def test_names_that_match_none_replace_those_of_their_positions(digits, coded, tmp_path):
    run = train(coded, digits, tmp_path / "run", "--train", "transformer")
    names = {"0": "digit 0", "1": "digit 1", "2": "digit 4", "3": "three"}
    assert DoDPipeline.from_pretrained(run).config.id2label == names


def test_what_belonged_to_the_old_embedder_is_left_out_with_a_line(digits, coded, tmp_path, capsys):
    run = train(coded, digits, tmp_path / "run", "--train", "embedder")
    assert "The code model and the weaker model are left out" in capsys.readouterr().out
    pipe = DoDPipeline.from_pretrained(run)
    assert pipe.code_transformer is None and pipe.latent_embedder.config.codes_mean is None


def test_a_resolution_that_the_code_model_cannot_serve_is_refused(digits, coded, tmp_path, capsys):
    options = ("--train", "lora", "--lora_rank", 1)
    train(coded, digits, tmp_path / "run", *options, "--resolution", 42, status=2)
    assert "A 42x42 image has 6x6 codes" in capsys.readouterr().err and not (tmp_path / "run").exists()
    pipe = DoDPipeline.from_pretrained(coded)
    pipe.transformer.register_to_config(sample_size=42)
    pipe.latent_embedder.register_to_config(sample_size=42)
    pipe.save_pretrained(tmp_path / "broken")
    assert any("does not divide" in problem for problem in check_folder(tmp_path / "broken", "mit"))


def test_a_checkpoint_of_an_adapter_is_not_offered_as_a_model(digits, coded, tmp_path):
    run = train(coded, digits, tmp_path / "run", "--train", "lora", "--lora_rank", 1, "--checkpointing_steps", 1)
    with pytest.raises(ValueError, match="only the weights that are trained, to resume from"):
        DoDPipeline.from_pretrained(run / "checkpoint-1")
    run = train(coded, digits, tmp_path / "whole", "--checkpointing_steps", 1)
    with pytest.raises(ValueError, match="subfolder='transformer'"):
        DoDPipeline.from_pretrained(run / "checkpoint-1")


def test_codes_of_another_autoencoders_latents_are_refused(digits, tmp_path, capsys):
    latents = cache_digits(digits, tmp_path)
    models = {
        "transformer": tiny_transformer(num_classes=3, prediction_type="flow", sample_size=7, patch_size=1),
        "latent_embedder": tiny_embedder(sample_size=7, patch_size=7, output_patch_size=1),
    }
    other = tiny_vae("kl")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    tiny_pipeline(**models, vae=other).save_pretrained(tmp_path / "pipeline")
    argv = [tmp_path / "pipeline", "--latents_dir", latents, "--output_dir", tmp_path / "run", "--max_train_steps", 1]
    assert train_codes([str(argument) for argument in argv]) == 2
    assert "was not made with the VAE of" in capsys.readouterr().err


def test_classes_cannot_be_balanced_where_there_are_none(digits, tmp_path, capsys):
    options = ("--train_data_dir", digits, "--num_classes", 0, "--sampling", "balanced")
    assert main(arguments(tmp_path / "run", *options)) == 2
    assert "--num_classes is 0" in capsys.readouterr().err and not (tmp_path / "run").exists()
