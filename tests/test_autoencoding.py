"""Images to latents and back, against the formulas of each autoencoder written out."""

import pytest
import torch
from helpers import tiny_vae

from diffusers_dod.autoencoding import (
    decode_latents,
    encode_images,
    encode_posterior,
    vae_latent_channels,
    vae_spatial_factor,
)


MEAN, STD = [0.1, -0.2, 0.3, -0.4], [0.5, 1.5, 2.0, 0.8]
KINDS = ["kl", "tiny", "dc", "rae"]


def images(number=2, side=16):
    return torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_shapes(kind):
    vae, channels = tiny_vae(kind), 64 if kind == "rae" else 4
    assert vae_spatial_factor(vae) == 2 and vae_latent_channels(vae) == channels
    latents = encode_images(vae, images())
    assert latents.shape == (2, channels, 8, 8)
    decoded = decode_latents(vae, latents)
    assert decoded.shape == (2, 3, 16, 16)
    assert torch.isfinite(decoded).all()


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_spatial_factor_is_that_of_the_real_latents(levels):
    kinds = {
        "kl": {
            "block_out_channels": (8,) * levels,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        },
        "tiny": {
            name: value
            for side in ("encoder", "decoder")
            for name, value in ((f"{side}_block_out_channels", (8,) * levels), (f"num_{side}_blocks", (1,) * levels))
        },
    }
    for kind, config in kinds.items():
        vae = tiny_vae(kind, **config)
        with torch.no_grad():
            assert 16 // encode_images(vae, images(1)).shape[-1] == vae_spatial_factor(vae)


@pytest.mark.parametrize(
    "config, scale, shift",
    [
        ({"scaling_factor": 0.5}, 0.5, 0.0),
        ({"scaling_factor": 0.36, "shift_factor": 0.12}, 0.36, 0.12),
        ({"scaling_factor": None}, 1.0, 0.0),
        (
            {"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
            0.5 / torch.tensor(STD),
            torch.tensor(MEAN),
        ),
    ],
)
@torch.no_grad()
def test_kl_scaling(config, scale, shift):
    vae = tiny_vae("kl", **config)
    scale, shift = (torch.as_tensor(value).view(-1, 1, 1).expand(4, 1, 1) for value in (scale, shift))
    posterior = vae.encode(images()).latent_dist
    latents = encode_images(vae, images())
    torch.testing.assert_close(latents, (posterior.mode() - shift) * scale)

    drawn = encode_images(vae, images(), generator=torch.Generator().manual_seed(7), sample_posterior=True)
    plain = posterior.mean + posterior.std * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(drawn, (plain - shift) * scale)
    assert not torch.allclose(drawn, latents, atol=1e-2)

    mean, std = encode_posterior(vae, images())
    torch.testing.assert_close(mean, latents)
    torch.testing.assert_close(std, posterior.std * scale)

    torch.testing.assert_close(decode_latents(vae, latents), vae.decode(posterior.mode()).sample)


@pytest.mark.parametrize("kind, scale", [("tiny", 1.0), ("dc", 0.4)])
@torch.no_grad()
def test_deterministic_autoencoders(kind, scale):
    vae = tiny_vae(kind)
    encoded = vae.encode(images(), return_dict=False)[0]
    latents = encode_images(vae, images(), sample_posterior=True)
    torch.testing.assert_close(latents, encoded * scale)
    assert torch.equal(encode_posterior(vae, images())[0], latents) and encode_posterior(vae, images())[1] is None
    torch.testing.assert_close(decode_latents(vae, latents), vae.decode(encoded).sample)


@torch.no_grad()
def test_rae_takes_unit_images_and_scales_itself():
    statistics = {"latents_mean": [[[0.3]]] * 64, "latents_std": [[[2.0]]] * 64, "scaling_factor": 0.5}
    vae = tiny_vae("rae", **statistics)
    raw = tiny_vae("rae").encode(images() / 2 + 0.5).latent
    latents = encode_images(vae, images())
    torch.testing.assert_close(latents, (raw - 0.3) / 2.0 * 0.5, rtol=1e-4, atol=1e-4)
    unit = tiny_vae("rae").decode(raw).sample
    torch.testing.assert_close(decode_latents(vae, latents), unit * 2 - 1, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_pixel_space_is_the_identity():
    assert vae_spatial_factor(None) == 1
    assert torch.equal(encode_images(None, images()), images())
    assert torch.equal(decode_latents(None, images()), images())


@torch.no_grad()
def test_autoencoder_in_half_precision():
    vae = tiny_vae("kl").to(torch.bfloat16)
    latents = encode_images(vae, images())
    assert latents.dtype == torch.bfloat16
    assert decode_latents(vae, latents.float()).dtype == torch.bfloat16
    torch.testing.assert_close(latents.float(), encode_images(tiny_vae("kl"), images()), rtol=0.1, atol=0.1)
