"""Autoencoders of LightningDiT and REPA-E as diffusers' `AutoencoderKL`, alone and in a converted pipeline."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from helpers import tiny_vae
from original_models import load_autoencoder, load_original, of_channels, relative_error
from safetensors.torch import save_file

from diffusers_dod import DoDPipeline
from diffusers_dod.autoencoding import decode_latents, encode_images
from diffusers_dod.conversion.__main__ import main
from diffusers_dod.conversion.autoencoders import convert_autoencoder, read_latents_stats


NAMES = ["vavae", "repae_vae"]
STATS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 1.0, 2.0, 1.5]}


def converted(name, weights=None):
    return convert_autoencoder(load_autoencoder(name)[0] if weights is None else weights, STATS, latent_size=16)


def refusal(weights, stats=STATS):
    with pytest.raises(ValueError) as caught:
        convert_autoencoder(weights, stats, latent_size=16)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the outputs


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_encode_and_decode(name):
    """With attention in the lowest level, as VA-VAE at 256 pixels has it, and without."""
    weights, tensors = load_autoencoder(name)
    assert any(".down.2.attn.0." in key for key in weights) == (name == "vavae")
    vae = convert_autoencoder(weights, STATS, latent_size=tensors["latents"].shape[-1])
    posterior = vae.encode(tensors["images"]).latent_dist
    assert relative_error(posterior.mean, tensors["mean"]) < 1e-5
    assert relative_error(posterior.std, tensors["std"]) < 1e-5
    assert relative_error(vae.decode(tensors["latents"]).sample, tensors["decoded"]) < 1e-5
    assert (vae.config.latent_channels, vae.config.sample_size) == (4, 32)


@torch.no_grad()
def test_statistics_are_the_normalisation():
    """As `(latents - mean) / std`, with no other scale."""
    _, tensors = load_autoencoder("vavae")
    vae = converted("vavae")
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in STATS.values())
    assert relative_error(encode_images(vae, tensors["images"]), (tensors["mean"] - mean) / std) < 1e-5
    normalized = (tensors["latents"] - mean) / std
    assert relative_error(decode_latents(vae, normalized), tensors["decoded"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "channels", "latent_channels", "count"),
    [("vavae", (128, 128, 256, 256, 512), 32, 69_836_067), ("repae_vae", (128, 256, 512, 512), 4, 83_653_863)],
)
def test_published_sizes(name, channels, latent_channels, count):
    """To the parameter what the original constructors make."""
    tiny, plain_levels = converted(name).config, len(channels) - 1
    types = {
        "down_block_types": ["DownEncoderBlock2D"] * plain_levels + tiny.down_block_types[-1:],
        "up_block_types": tiny.up_block_types[:1] + ["UpDecoderBlock2D"] * plain_levels,
    }
    with torch.device("meta"):
        vae = AutoencoderKL(**types, block_out_channels=channels, latent_channels=latent_channels, layers_per_block=2)
    assert sum(parameter.numel() for parameter in vae.parameters()) == count


# --- what is not quite as it should be


@pytest.mark.parametrize("name", NAMES)
def test_every_missing_tensor_is_refused(name):
    weights, _ = load_autoencoder(name)
    for key in list(weights)[::5]:
        message = refusal({other: tensor for other, tensor in weights.items() if other != key})
        assert "tensors missing: " in message or key in message, (key, message)


def test_extra_and_misshapen_tensors_are_refused_by_name():
    weights, _ = load_autoencoder("vavae")
    for key, name in (
        ("encoder.extra", "encoder.extra"),
        ("encoder.down.0.extra.weight", "encoder.down_blocks.0.extra.weight"),
        ("decoder.up.2.attn.0.extra.weight", "decoder.up_blocks.0.attentions.0.extra.weight"),
    ):
        assert f"left over: {name}" in refusal(weights | {key: torch.zeros(1)})
    message = refusal(weights | {"decoder.conv_out.weight": weights["decoder.conv_out.weight"][..., :1]})
    assert "of the wrong shape: decoder.conv_out.weight is (3, 32, 3, 1), not (3, 32, 3, 3)" in message
    broken = weights | {"encoder.conv_in.bias": weights["encoder.conv_in.bias"] * float("nan")}
    assert "NaN or infinite values in encoder.conv_in.bias" in refusal(broken)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "first_stage_model."])
def test_training_checkpoint(prefix):
    """Lightning's, with the loss and VA-VAE's foundation model beside the autoencoder."""
    weights, _ = load_autoencoder("vavae")
    beside = {"loss.logvar": torch.zeros(()), "loss.discriminator.bn.num_batches_tracked": torch.tensor(3)}
    beside |= {"foundation_model.model.cls_token": torch.ones(1), "linear_proj.weight": torch.ones(2, 2)}
    prefixed = {f"{prefix}{key}": tensor for key, tensor in (weights | beside).items()}
    vae = converted("vavae", {"state_dict": prefixed, "epoch": 3})
    expected = converted("vavae").state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in vae.state_dict().items())


def test_statistics():
    mean, std = torch.randn(1, 4, 1, 1), torch.rand(1, 4, 1, 1) + 0.5
    for checkpoint in ({"mean": mean, "std": std}, {"latents_bias": mean, "latents_scale": 1 / std}):
        stats = read_latents_stats(checkpoint)
        torch.testing.assert_close(torch.tensor(stats["latents_mean"]), mean.flatten())
        torch.testing.assert_close(torch.tensor(stats["latents_std"]), std.flatten())
    for broken in ({}, [], {"mean": mean}, {"mean": mean, "std": -std}, {"mean": mean * float("nan"), "std": std}):
        with pytest.raises(ValueError, match="neither mean and std|not finite or deviations"):
            read_latents_stats(broken)
    stats = {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 3}
    assert "latents_mean has 3 numbers, but the autoencoder has 4 channels" in refusal(
        load_autoencoder("vavae")[0], stats
    )


# --- the command


@pytest.mark.parametrize("source", ["own", "file"])
@torch.no_grad()
def test_repaes_checkpoint_has_its_autoencoder(source, tmp_path, capsys):
    """Model, statistics and autoencoder of one file; `--vae` replaces the autoencoder."""
    original, (vae_weights, tensors) = load_original("repae"), load_autoencoder("repae_vae")
    checkpoint = {"ema": of_channels(original.weights, 4), "vae": vae_weights, "discriminator": {}, "steps": 7}
    torch.save(checkpoint, tmp_path / "repae.pt")
    command = ["sit", str(tmp_path / "repae.pt"), str(tmp_path / "output"), "--num_attention_heads", "2"]
    if source == "file":
        del checkpoint["vae"]
        torch.save(checkpoint, tmp_path / "repae.pt")
        save_file(vae_weights, tmp_path / "vae.safetensors")
        command += ["--vae", str(tmp_path / "vae.safetensors")]
    assert main(command) == 0
    assert "AutoencoderKL" in capsys.readouterr().out
    blocks = json.loads((tmp_path / "output" / "modular_model_index.json").read_text())
    assert blocks["transformer"][2]["pretrained_model_name_or_path"] == str(tmp_path / "output")
    pipe = DoDPipeline.from_pretrained(tmp_path / "output")
    variance = original.weights["bn.running_var"][:4]
    torch.testing.assert_close(torch.tensor(pipe.vae.config.latents_std), variance.sqrt())
    assert pipe.vae.config.scaling_factor == 1.0
    assert relative_error(pipe.vae.decode(tensors["latents"]).sample, tensors["decoded"]) < 1e-5
    pipe.set_progress_bar_config(disable=True)
    assert pipe(1, num_inference_steps=2, output_type="pt").images.shape == (1, 3, 8, 8)


def test_lightningdit_with_its_autoencoder_and_statistics(tmp_path, capsys):
    weights, _ = load_autoencoder("vavae")
    original = load_original("lightningdit")
    torch.save({"ema": of_channels(original.weights, 4)}, tmp_path / "model.pt")
    torch.save({"state_dict": weights}, tmp_path / "vae.ckpt")
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.full((1, 4, 1, 1), 2.0)}, tmp_path / "stats.pt")
    command = ["lightningdit", str(tmp_path / "model.pt"), str(tmp_path / "output")]
    command += ["--vae", str(tmp_path / "vae.ckpt")]
    assert main(command) == 2
    assert "no statistics of its latents: give the file of them as --latents_stats" in capsys.readouterr().err
    assert main([*command, "--latents_stats", str(tmp_path / "model.pt")]) == 2
    assert "neither mean and std" in capsys.readouterr().err
    assert main([*command, "--latents_stats", str(tmp_path / "stats.pt")]) == 0
    pipe = DoDPipeline.from_pretrained(tmp_path / "output")
    assert pipe.vae.config.latents_std == [2.0] * 4
    assert pipe.scheduler.config.shift == pytest.approx(1 / 0.3)
    # Of a folder of diffusers, whose own statistics are replaced
    tiny_vae().save_pretrained(tmp_path / "folder")
    command = ["lightningdit", str(tmp_path / "model.pt"), str(tmp_path / "other"), "--vae", str(tmp_path / "folder")]
    assert main([*command, "--latents_stats", str(tmp_path / "stats.pt")]) == 0
    config = DoDPipeline.from_pretrained(tmp_path / "other").vae.config
    assert (config.latents_std, config.scaling_factor) == ([2.0] * 4, 1.0)


def test_statistics_without_an_autoencoder(tmp_path, capsys):
    torch.save(load_original("lightningdit").weights, tmp_path / "model.pt")
    torch.save({"mean": torch.zeros(8), "std": torch.ones(8)}, tmp_path / "stats.pt")
    command = ["lightningdit", str(tmp_path / "model.pt"), str(tmp_path / "output")]
    assert main([*command, "--latents_stats", str(tmp_path / "stats.pt")]) == 2
    assert "--latents_stats are an autoencoder's: give --vae" in capsys.readouterr().err
