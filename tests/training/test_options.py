"""What the options of the training script do to its result: LoRA, frozen parts, kinds of data, bad batches."""

import json
import math
import shutil
import sys

import datasets
import numpy as np
import pytest
import torch
from diffusers.utils import is_bitsandbytes_available
from helpers import tiny_embedder, tiny_pipeline, tiny_transformer
from peft import LoraConfig
from safetensors.torch import load_file
from training_runs import NAMES, arguments, assert_equal_tensors, weights, write_digits

from diffusers_dod import DoDPipeline, DoDTransformer2DModel
from diffusers_dod.cli import BadInput
from diffusers_dod.training.__main__ import main, train_model
from diffusers_dod.training.guard import TooManyBadSteps
from diffusers_dod.training.options import parse_args


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data"), counts=(6, 2, 2))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A saved pipeline of random weights, none of them zero."""
    folder = tmp_path_factory.mktemp("pretrained") / "pipeline"
    models = {"transformer": {"in_channels": 1, "num_classes": 3, "prediction_type": "flow", "sample_size": 14}}
    tiny_pipeline(
        transformer=tiny_transformer(**models["transformer"]), latent_embedder=tiny_embedder(in_channels=1)
    ).save_pretrained(folder)
    return folder


def train(output_dir, data, *options, status=0):
    argv = arguments(output_dir, "--train_data_dir", data, "--resolution", 14, "--learning_rate", 1e-2, *options)
    assert main(argv) == status
    return output_dir


def changed(a: dict, b: dict) -> bool:
    return any(not torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "options, parts",
    [
        (("--train", "transformer"), {"transformer"}),
        (("--train", "embedder"), {"embedder"}),
        (("--lora_rank", 2), {"embedder", "lora"}),
        (("--train", "lora", "--lora_rank", 2), {"lora"}),
    ],
)
def test_frozen_parts_stay_and_the_folder_holds_the_trained_model(digits, pretrained, tmp_path, options, parts):
    options = (
        "--pretrained_model_name_or_path",
        pretrained,
        "--max_train_steps",
        4,
        "--checkpointing_steps",
        2,
        *options,
    )
    run = train(tmp_path / "run", digits, *options, "--ema_decay", 0.5)
    before, after = weights(pretrained), weights(run)
    is_lora_target = {
        key: key.split(".attn.")[-1].startswith(("to_q.w", "to_k.w", "to_v.w", "to_out.0.w")) for key in before
    }
    for key in before:
        in_transformer = "transformer" in parts or ("lora" in parts and is_lora_target[key])
        trained = "embedder" in parts if key.startswith("latent") else in_transformer
        assert torch.equal(before[key], after[key]) != trained, key
    assert DoDPipeline.from_pretrained(run)(0, num_inference_steps=2).images
    assert (run / "checkpoint-2" / "transformer").exists() == (parts != {"embedder"})
    assert (run / "checkpoint-2" / "latent_embedder").exists() == ("embedder" in parts)

    if "lora" in parts:
        # The LoRA by itself, put on the transformer it was trained for, is the same model.
        lora = DoDTransformer2DModel.from_pretrained(pretrained, subfolder="transformer")
        lora.load_lora_adapter(run / "lora", weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
        fused = DoDTransformer2DModel.from_pretrained(run, subfolder="transformer")
        inputs = (torch.randn(2, 1, 14, 14), torch.tensor([10.0, 900.0]), torch.tensor([0, 1]))
        torch.testing.assert_close(lora(*inputs).sample, fused(*inputs).sample, rtol=1e-4, atol=1e-5)
        assert all(
            key.startswith("transformer.") for key in load_file(run / "lora" / "pytorch_lora_weights.safetensors")
        )
    # From the checkpoint in the middle
    shutil.copytree(run / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    assert_equal_tensors(weights(train(tmp_path / "resumed", digits, *options, "--ema_decay", 0.5)), after)


def test_unconditional_training_needs_no_labels_and_no_subfolders(digits, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(digits.glob("*/*.png"))):
        shutil.copy(path, flat / f"{i}.png")
    runs = [train(tmp_path / f"run-{i}", folder, "--num_classes", 0) for i, folder in enumerate((flat, digits))]
    for run in runs:
        assert weights(run)["transformer.class_embed.weight"].shape[0] == 1
        assert DoDPipeline.from_pretrained(run)(None, num_inference_steps=2).images
    streamed = train(tmp_path / "streamed", flat, "--num_classes", 0, "--streaming", "--validation_steps", 2)
    assert (streamed / "samples" / "step_2.png").is_file()


def test_a_class_count_of_ones_own_and_what_does_not_fit_it(digits, tmp_path):
    run = train(tmp_path / "run", digits, "--num_classes", 9)
    assert DoDPipeline.from_pretrained(run).transformer.config.num_classes == 9
    with pytest.raises(BadInput, match="the data has 3 classes, so --num_classes cannot be 2"):
        train_model(arguments(tmp_path / "x", "--train_data_dir", digits, "--resolution", 14, "--num_classes", 2))


def test_a_stream_skips_broken_images_or_names_the_first(digits, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    whole = (data / "digit 0" / "0.png").read_bytes()
    (data / "digit 1" / "broken.png").write_bytes(whole[: len(whole) // 2])
    options = ("--streaming", "--max_train_steps", 4, "--train_batch_size", 4)
    with pytest.warns(UserWarning, match="broken.png cannot be read"):
        train(tmp_path / "skipped", data, *options, "--on_broken_image", "skip")
    train(tmp_path / "stopped", data, *options, "--dataloader_num_workers", 1, status=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "diffusers-dod train: error" in line]
    assert "broken.png cannot be read" in line and "--on_broken_image skip" in line


def test_bad_batches_are_skipped_named_and_end_the_run_when_they_do_not_end(digits, pretrained, tmp_path, caplog):
    pipeline = DoDPipeline.from_pretrained(pretrained)
    with torch.no_grad():
        pipeline.transformer.proj_out.bias.fill_(math.nan)
    pipeline.save_pretrained(tmp_path / "broken")
    options = ("--pretrained_model_name_or_path", tmp_path / "broken", "--max_train_steps", 9, "--train_batch_size", 2)
    with pytest.raises(TooManyBadSteps, match="3 updates in a row were skipped, .*its loss is nan"):
        train_model(
            arguments(
                tmp_path / "run", *options, "--train_data_dir", digits, "--resolution", 14, "--max_skipped_steps", 2
            )
        )
    messages = [message for message in caplog.messages if "is skipped" in message]
    assert [message.split(":")[0].removeprefix("[RANK 0] ") for message in messages] == [
        "Step 1 is skipped",
        "Step 2 is skipped",
        "Step 3 is skipped",
    ]
    assert all(message.count(".png") == 2 for message in messages)
    train(tmp_path / "again", digits, *options, "--max_skipped_steps", 2, status=3)


def test_a_spike_changes_no_weight_but_costs_a_step(digits, pretrained, tmp_path):
    # With a factor this small every step after the guard's warm-up is a spike.
    options = ("--pretrained_model_name_or_path", pretrained, "--checkpointing_steps", 101, "--no-ema")
    options += (
        "--no-random_flip",
        "--max_train_steps",
        104,
        "--train_batch_size",
        1,
        "--spike_factor",
        1e-6,
        "--prior_drop",
        0,
    )
    run = train(tmp_path / "run", digits, *options)
    early = load_file(run / "checkpoint-101" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert not changed(early, load_file(run / "transformer" / "diffusion_pytorch_model.safetensors"))
    assert changed(early, load_file(pretrained / "transformer" / "diffusion_pytorch_model.safetensors"))
    guard = json.loads((run / "checkpoint-104" / "guard.json").read_text())
    assert guard["steps"] == 100 and guard["skipped"] == 4


@pytest.mark.parametrize(
    "option",
    [
        ("--weighting", "cosmap"),
        ("--timestep_density", "mode"),
        ("--timestep_density", "uniform"),
        ("--embedder_noise", 0.5),
        ("--bottleneck_noise", 0.5),
        ("--optimizer", "adamw_fused"),
        ("--sampling", "balanced"),
        ("--max_grad_norm", 0),
        ("--streaming",),
    ],
    ids=lambda option: "-".join(map(str, option)),
)
def test_an_option_changes_the_training_and_leaves_it_finite(digits, pretrained, plain, tmp_path, option):
    options = ("--pretrained_model_name_or_path", pretrained, "--prior_drop", 0, "--max_train_steps", 3)
    after = weights(train(tmp_path / "run", digits, *options, *option))
    assert all(torch.isfinite(value).all() for value in after.values())
    if option[0] == "--optimizer":  # the same arithmetic in another order
        torch.testing.assert_close(after, plain, rtol=1e-4, atol=1e-6)
    else:
        assert changed(after, plain)


@pytest.fixture(scope="module")
def plain(digits, pretrained, tmp_path_factory):
    options = ("--pretrained_model_name_or_path", pretrained, "--prior_drop", 0, "--max_train_steps", 3)
    return weights(train(tmp_path_factory.mktemp("plain") / "run", digits, *options))


def test_the_result_is_the_first_of_several_averages(digits, tmp_path):
    run = train(tmp_path / "run", digits, "--ema_decay", 0.5, 0.1, "--max_train_steps", 4)
    for name in NAMES:
        last = run / "checkpoint-4"
        final, first, second = (
            load_file(folder / "diffusion_pytorch_model.safetensors")
            for folder in (run / name, last / f"{name}_ema_0.5", last / f"{name}_ema_0.1")
        )
        assert_equal_tensors(final, first)
        assert changed(final, second)
    DoDTransformer2DModel.from_pretrained(last, subfolder="transformer_ema_0.1")


def test_throughput_and_utilisation_are_logged(digits, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train(tmp_path / "run", digits, "--report_to", "tensorboard", "--peak_tflops", 1)
    events = EventAccumulator(str(run / "logs" / "train_dod"))
    events.Reload()
    series = {name: [e.value for e in events.Scalars(name)] for name in ("images_per_second", "mfu", "loading_share")}
    assert all(len(values) == 2 and min(values) > 0 for values in series.values())
    # Both follow from the same seconds.
    ratio = np.array(series["mfu"]) / np.array(series["images_per_second"])
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (("--train", "lora"), "LoRA needs both"),
        (("--train", "embedder", "--lora_rank", 2), "LoRA needs both"),
        (("--train", "all,lora"), "none of all, transformer, embedder, lora, embedder,lora"),
        (("--train", "transformer,lora", "--lora_rank", 2), "'transformer,lora' is none of"),
        (("--train", "transformer"), "needs a trained model"),
        (("--lora_rank", 2), "needs a trained model"),
        (("--streaming", "--sampling", "balanced"), "so not --streaming"),
        (("--preset", "B", "--pretrained_model_name_or_path", "x"), "exclude each other"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_error(tmp_path, options, message):
    argv = ["--train_data_dir", str(tmp_path), "--output_dir", "x", "--max_train_steps", "1", *map(str, options)]
    with pytest.raises(BadInput, match=message):
        parse_args(argv, "")


def test_a_tracker_is_the_default_only_where_it_is_installed(tmp_path, monkeypatch):
    argv = ["--train_data_dir", str(tmp_path), "--output_dir", "x", "--max_train_steps", "1"]
    assert parse_args(argv, "").report_to == "tensorboard"
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as Python finds a package that is not there
    assert parse_args(argv, "").report_to == "none"
    with pytest.raises(BadInput, match="tensorboard is not installed"):
        parse_args([*argv, "--report_to", "tensorboard"], "")


def test_8_bit_adam_trains_or_says_what_it_needs(tmp_path):
    argv = [
        "--train_data_dir",
        str(tmp_path),
        "--output_dir",
        "x",
        "--max_train_steps",
        "1",
        "--optimizer",
        "adamw_8bit",
    ]
    if is_bitsandbytes_available():
        assert parse_args(argv, "").optimizer == "adamw_8bit"
    else:
        with pytest.raises(BadInput, match="needs bitsandbytes: `pip install bitsandbytes`"):
            parse_args(argv, "")


def test_rows_without_a_prior_everywhere_are_refused_where_only_the_embedder_learns(digits, pretrained, tmp_path):
    options = ("--pretrained_model_name_or_path", pretrained, "--train", "embedder", "--train_batch_size", 1)
    with pytest.raises(BadInput, match="--train embedder cannot do"):
        train_model(arguments(tmp_path / "run", *options, "--train_data_dir", digits))


def test_the_lora_of_peft_is_the_identity_before_training():
    model = tiny_transformer()
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([10.0]), torch.tensor([0]))
    before = model(*inputs).sample
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    torch.testing.assert_close(model(*inputs).sample, before)


@pytest.fixture(scope="module")
def parquet(digits, tmp_path_factory):
    """A folder such as a dataset's repository on the Hub: three Parquet files, columns of other names."""
    folder = tmp_path_factory.mktemp("hub")
    paths = sorted(digits.glob("*/*.png"))
    rows = [
        {"picture": {"bytes": path.read_bytes(), "path": None}, "kind": int(path.parent.name[-1]) // 2}
        for path in paths
    ]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("int64")})
    for shard in range(3):
        datasets.Dataset.from_list(rows[shard::3], features=features).to_parquet(folder / f"train-{shard}.parquet")
    return folder


def test_a_dataset_of_the_hub_streams_and_resumes_and_must_tell_its_classes(parquet, tmp_path):
    data = ("--dataset_name", parquet, "--streaming", "--image_column", "picture", "--label_column", "kind")

    def hub(run, *options, status=0):
        options = ("--resolution", 14, "--checkpointing_steps", 3, "--shuffle_buffer_size", 4, *options)
        argv = arguments(tmp_path / run, *data, *options)
        assert main(argv) == status
        return tmp_path / run

    options = ("--num_classes", 3, "--max_train_steps", 6, "--train_batch_size", 3)
    straight = hub("straight", *options)
    shutil.copytree(straight / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    assert_equal_tensors(weights(hub("resumed", *options, "--dataloader_num_workers", 2)), weights(straight))
    with pytest.raises(BadInput, match="how many classes there are: give --num_classes"):
        train_model(arguments(tmp_path / "x", *data))
    hub("few", "--num_classes", 2, "--max_train_steps", 9, status=2)
