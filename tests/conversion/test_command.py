"""`diffusers-dod convert`: a checkpoint's file or folder becomes a whole pipeline."""

import os
import subprocess
import sys

import diffusers
import pytest
import torch
from helpers import tiny_pipeline, tiny_vae
from original_models import diffusers_dit, load_original, relative_error
from safetensors.torch import save_file

from diffusers_dod import DoDPipeline
from diffusers_dod.conversion import convert_backbone
from diffusers_dod.conversion.__main__ import main
from diffusers_dod.conversion.converting import imagenet_labels, save_pipeline


def assert_same_weights(model, other):
    state, other_state = model.state_dict(), other.state_dict()
    assert list(state) == list(other_state)
    for name, tensor in state.items():
        assert torch.equal(tensor, other_state[name]), name


def refused(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    message = capsys.readouterr().err
    assert status == 2 and message.count("\n") == 1 and message.startswith("diffusers-dod convert: error: ")
    return message


def test_as_a_command(tmp_path):
    """A real process, from a file with ImageNet's thousand classes and an autoencoder to images."""
    original = load_original("sit_learned_sigma")
    table = torch.randn(1001, 32, generator=torch.Generator().manual_seed(0))
    weights = original.weights | {"y_embedder.embedding_table.weight": table}
    torch.save({"ema": weights}, tmp_path / "model.pt")
    tiny_vae().save_pretrained(tmp_path / "vae")
    command = [sys.executable, "-m", "diffusers_dod", "convert", "sit"]
    command += [
        tmp_path / "model.pt",
        tmp_path / "new/pipeline",
        "--num_attention_heads",
        "4",
        "--vae",
        tmp_path / "vae",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("sit: ", "patch 2, width 32, 2 blocks, 4 heads, 1000 classes", "4x4 grid", "nested under 'ema'"):
        assert part in done.stdout
    for part in (
        "learned sigma, dropped",
        "FlowMatchEulerDiscreteScheduler",
        "S embedder",
        "AutoencoderKL",
        "ImageNet",
    ):
        assert part in done.stdout

    pipe = DoDPipeline.from_pretrained(tmp_path / "new/pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert_same_weights(pipe.transformer, original.convert(weights))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pipeline"]
    output = pipe(["tench", 207, None], num_stages=2, num_inference_steps=2, output_type="pt", return_stages=True)
    assert output.images.shape == (3, 3, 16, 16) and len(output.stages) == 2


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sit", diffusers.FlowMatchEulerDiscreteScheduler),
        ("repa", diffusers.FlowMatchEulerDiscreteScheduler),
        ("fitv2", diffusers.FlowMatchEulerDiscreteScheduler),
        ("dit_learned_sigma", diffusers.DDIMScheduler),
        ("lightningdit", diffusers.FlowMatchEulerDiscreteScheduler),
        ("repae", diffusers.FlowMatchEulerDiscreteScheduler),
        ("jit_noise_scale", diffusers.FlowMatchEulerDiscreteScheduler),
    ],
)
@torch.no_grad()
def test_pipeline_folder(name, scheduler, tmp_path):
    original = load_original(name)
    save_file(original.weights, tmp_path / "model.safetensors")
    options = [f"--{key}={value}" for key, value in original.options.items()]
    assert main([original.source, str(tmp_path / "model.safetensors"), str(tmp_path / "output"), *options]) == 0

    pipe = DoDPipeline.from_pretrained(tmp_path / "output")
    pipe.set_progress_bar_config(disable=True)
    assert_same_weights(pipe.transformer, original.convert())
    assert isinstance(pipe.scheduler, scheduler) and pipe.vae is None and pipe.config.id2label is None
    # The later stages start as what stage 1 is.
    size = pipe.transformer.config.sample_size
    latents = torch.randn(2, pipe.transformer.config.in_channels, size, size)
    tokens = pipe.latent_embedder(latents).prior_tokens
    assert tokens.abs().max() == 0
    inputs = (latents, torch.tensor([100.0, 900.0]), torch.tensor([0, 1]))
    assert torch.equal(pipe.transformer(*inputs, tokens).sample, pipe.transformer(*inputs).sample)
    # And the whole is a pipeline that runs.
    assert pipe([0], num_inference_steps=2, output_type="latent").images.isfinite().all()


@pytest.mark.parametrize("form", ["model", "shards", "pickle", "pipeline"])
@torch.no_grad()
def test_diffusers_folder(form, tmp_path, capsys):
    """Head count, size and channels are the config's."""
    reference = diffusers_dit(in_channels=3, out_channels=6, sample_size=12)
    folder, shard_size = tmp_path / "model", "20KB" if form == "shards" else "1GB"
    if form == "pipeline":
        diffusers.DiTPipeline(reference, tiny_vae(), diffusers.DDIMScheduler()).save_pretrained(folder)
    else:
        reference.save_pretrained(folder, max_shard_size=shard_size, safe_serialization=form != "pickle")
    if form == "shards":
        assert len(list(folder.glob("*.safetensors"))) > 1
    assert main(["dit", str(folder), str(tmp_path / "output")]) == 0
    assert "2 heads" in capsys.readouterr().out

    pipe = DoDPipeline.from_pretrained(tmp_path / "output")
    options = {"num_attention_heads": 2, "sample_size": 12, "in_channels": 3}
    assert_same_weights(pipe.transformer, convert_backbone(reference.state_dict(), "dit", **options))
    inputs = (torch.randn(1, 3, 12, 12), torch.tensor([500]), torch.tensor([3]))
    assert relative_error(pipe.transformer(*inputs).sample, reference(*inputs).sample) < 1e-5


@pytest.mark.parametrize(
    ("options", "width"), [([], 192), (["--embedder_preset", "B"], 256), (["--embedder_preset", "L"], 384)]
)
def test_embedder_preset(options, width, tmp_path):
    """By default that of the nearest width: S (384) for 32."""
    original = load_original("dit")
    save_file(original.weights, tmp_path / "model.safetensors")
    heads = ["--num_attention_heads", "2"]
    assert main(["dit", str(tmp_path / "model.safetensors"), str(tmp_path / "output"), *heads, *options]) == 0
    config = DoDPipeline.from_pretrained(tmp_path / "output").latent_embedder.config
    assert config.num_attention_heads * config.attention_head_dim == width
    assert (config.output_dim, config.patch_size, config.sample_size) == (32, 2, 8)


def test_head_count_of_a_published_width(tmp_path, capsys):
    """One block of width 384 is told to have S's 6 heads; a width that nobody published is refused."""
    reference = diffusers_dit(num_classes=1, num_layers=1, num_attention_heads=4, attention_head_dim=96)
    save_file(reference.state_dict(), tmp_path / "s.safetensors")
    assert main(["dit", str(tmp_path / "s.safetensors"), str(tmp_path / "output"), "--sample_size", "8"]) == 0
    assert "6 heads" in capsys.readouterr().out
    save_file(load_original("dit").weights, tmp_path / "tiny.safetensors")
    message = refused(capsys, "dit", tmp_path / "tiny.safetensors", tmp_path / "other")
    assert "no published model has a width of 32" in message and "num_attention_heads" in message


def test_refusals(tmp_path, capsys):
    path, output = tmp_path / "model.safetensors", tmp_path / "output"
    save_file(load_original("dit").weights, path)
    heads = ["--num_attention_heads", "2"]
    # A folder that holds something is never touched.
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    assert "exists already" in refused(capsys, "dit", path, tmp_path / "full", *heads)
    assert (tmp_path / "full/file").read_text() == "mine"
    assert "exists already" in refused(capsys, "dit", path, path, *heads)
    assert "cannot be written" in refused(capsys, "dit", path, path / "output", *heads)
    # Folders
    assert "only dit reads diffusers folders" in refused(capsys, "sit", tmp_path, output)
    assert "config.json is missing or no JSON" in refused(capsys, "dit", tmp_path, output)
    diffusers_dit().save_pretrained(tmp_path / "dit")
    message = refused(capsys, "dit", tmp_path / "dit", output, *heads)
    assert "--num_attention_heads cannot be given" in message
    diffusers_dit(norm_eps=1e-3).save_pretrained(tmp_path / "other")
    assert "norm_eps is 0.001, not 1e-05" in refused(capsys, "dit", tmp_path / "other", output)
    (tmp_path / "dit/diffusion_pytorch_model.safetensors").unlink()
    assert "has no diffusion_pytorch_model" in refused(capsys, "dit", tmp_path / "dit", output)
    # The autoencoder
    assert "cannot be loaded as an autoencoder" in refused(capsys, "dit", path, output, *heads, "--vae", tmp_path)
    tiny_vae(latent_channels=8).save_pretrained(tmp_path / "vae")
    message = refused(capsys, "dit", path, output, *heads, "--vae", tmp_path / "vae")
    assert "8 channels but the transformer takes 4" in message
    assert not output.exists()


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o027, 0o077], ids=oct)
def test_the_folder_has_the_rights_of_the_user_s_umask(umask, tmp_path):
    before = os.umask(umask)
    try:
        save_pipeline(tiny_pipeline(), tmp_path / "output")
    finally:
        os.umask(before)
    folders = [tmp_path / "output", tmp_path / "output" / "transformer"]
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o777 & ~umask] * 2
    assert (tmp_path / "output" / "model_index.json").stat().st_mode & 0o777 == 0o666 & ~umask
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_imagenet_labels():
    labels = imagenet_labels()
    assert list(labels) == list(range(1000)) and all(name == name.strip() != "" for name in labels.values())
    known = {
        0: "tench, Tinca tinca",
        207: "golden retriever",
        388: "giant panda",
        817: "sports car",
        999: "toilet tissue",
    }
    assert all(labels[class_id].startswith(name) for class_id, name in known.items())
