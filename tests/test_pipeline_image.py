"""A picture of the user's own in the place of stage 1's sample."""

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import tiny_pipeline, tiny_vae

from diffusers_dod.autoencoding import encode_images


MEAN, STD = [0.1, -0.2, 0.3, -0.4], [0.5, 1.5, 2.0, 0.8]


def picture(height=16, width=16, mode="RGB", seed=0):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def as_array(image):
    return np.asarray(image, dtype=np.float32) / 255


def as_tensor(image):
    return torch.from_numpy(as_array(image)).permute(2, 0, 1)


def prior_latents(pipe, image, labels=0, **arguments):
    """What the embedder was given, and the sample."""
    seen = []
    handle = pipe.latent_embedder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    arguments = {"num_inference_steps": 1, "output_type": "latent"} | arguments
    output = pipe(labels, image=image, generator=torch.Generator().manual_seed(0), return_stages=True, **arguments)
    handle.remove()
    assert len(seen) == len(output.stages) == 1  # stage 1 did not run
    return seen[0]


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.5},
        {"scaling_factor": 0.36, "shift_factor": 0.12},
        {"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
    ],
)
@torch.no_grad()
def test_picture_goes_through_the_autoencoder(config):
    vae, image = tiny_vae("kl", **config), picture()
    pipe = tiny_pipeline(vae=vae)
    mode = vae.encode(2 * as_tensor(image)[None] - 1).latent_dist.mode()
    if "latents_mean" in config:
        mode = (mode - torch.tensor(MEAN).view(1, 4, 1, 1)) / torch.tensor(STD).view(1, 4, 1, 1)
    expected = (mode - config.get("shift_factor", 0.0)) * config["scaling_factor"]
    for form in (image, [image], as_array(image), as_array(image)[None], as_tensor(image), as_tensor(image)[None]):
        torch.testing.assert_close(prior_latents(pipe, form), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_latents_are_taken_as_they_are():
    pipe = tiny_pipeline(vae=tiny_vae("kl"))
    latents = torch.rand(1, 4, 8, 8)  # not negative, so only the shape says that they are latents
    assert torch.equal(prior_latents(pipe, latents), latents)
    assert torch.equal(prior_latents(pipe, latents[0]), latents)


@torch.no_grad()
def test_three_channel_latents_are_told_from_pictures():
    pipe = tiny_pipeline(vae=tiny_vae("kl", latent_channels=3), channels=3)
    latents = torch.rand(1, 3, 8, 8)
    assert torch.equal(prior_latents(pipe, latents), latents)
    expected = encode_images(pipe.vae, 2 * as_tensor(picture())[None] - 1)
    torch.testing.assert_close(prior_latents(pipe, as_tensor(picture())), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (9, 50), (300, 200)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@torch.no_grad()
def test_pictures_of_any_size_are_cropped_not_squeezed(size, mode):
    pipe, image = tiny_pipeline(vae=tiny_vae("kl")), picture(*size, mode)
    latents = prior_latents(pipe, image)
    resized = pipe.image_processor.resize(image, 16, 16, resize_mode="crop").convert("RGB")
    expected = encode_images(pipe.vae, 2 * as_tensor(resized)[None] - 1)
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_picture_follows_height_and_width():
    pipe = tiny_pipeline(vae=tiny_vae("kl"))
    assert prior_latents(pipe, picture(16, 32), height=16, width=32).shape == (1, 4, 8, 16)


@pytest.mark.parametrize("channels, mode", [(3, "RGB"), (3, "L"), (1, "L"), (1, "RGB")])
@torch.no_grad()
def test_pixel_space(channels, mode):
    pipe, image = tiny_pipeline(channels=channels), picture(8, 8, mode)
    latents = prior_latents(pipe, image)
    array = as_array(image.convert("RGB" if channels == 3 else "L"))
    expected = 2 * torch.from_numpy(array).reshape(8, 8, channels).permute(2, 0, 1)[None] - 1
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(prior_latents(pipe, expected / 2 + 0.5), expected)
    # Negative values mark latents.
    assert torch.equal(prior_latents(pipe, expected), expected)


@torch.no_grad()
def test_one_for_all_one_a_label_or_one_a_sample():
    pipe = tiny_pipeline(vae=tiny_vae("kl"))
    pictures = [picture(seed=seed) for seed in range(4)]
    encoded = torch.cat([prior_latents(pipe, image) for image in pictures])

    def seen(image):
        return prior_latents(pipe, image, labels=[1, 2], num_images_per_prompt=2)

    torch.testing.assert_close(seen(pictures[0]), encoded[[0, 0, 0, 0]])
    torch.testing.assert_close(seen(pictures[:2]), encoded[[0, 0, 1, 1]])
    torch.testing.assert_close(seen(pictures), encoded)
    torch.testing.assert_close(seen(encoded[:2]), encoded[[0, 0, 1, 1]])


@torch.no_grad()
def test_stage_numbers_and_lists_count_the_stage_that_the_picture_replaces():
    pipe, seen = tiny_pipeline(vae=tiny_vae("kl")), []

    def remember(pipe, step, timestep, tensors):
        seen.append((pipe.current_stage, step, pipe.guidance_scale))
        return {}

    pipe(
        0,
        image=picture(),
        num_stages=3,
        num_inference_steps=[7, 1, 2],
        guidance_scale=[9.0, 2.0, 3.0],
        callback_on_step_end=remember,
    )
    assert seen == [(2, 0, 2.0), (3, 1, 3.0), (3, 2, 3.0)]


BAD_PICTURES = {
    "replaces stage 1": ({"image": picture(), "num_stages": 1}, "at least 2"),
    "empty list": ({"image": []}, "empty list"),
    "too many": ({"image": [picture()] * 3}, "one for each label"),
    "too few": ({"image": [picture()] * 2, "class_labels": [0, 1, 2, 3]}, "one for each label"),
    "8-bit array": ({"image": np.asarray(picture())}, "divide an 8-bit image by 255"),
    "8-bit tensor": ({"image": 255 * as_tensor(picture())}, "divide an 8-bit image by 255"),
    "NaN picture": ({"image": torch.full((3, 16, 16), torch.nan)}, "`image` holds NaN"),
    "NaN latents": ({"image": torch.full((1, 4, 8, 8), torch.nan)}, "`image` holds NaN"),
    "infinite latents": ({"image": torch.full((1, 4, 8, 8), torch.inf)}, "`image` holds NaN or infinite"),
    "latents of another size": ({"image": torch.rand(1, 4, 6, 6)}, "`image` has 4 channels"),
    "gray tensor": ({"image": torch.rand(1, 16, 16)}, "`image` has 1 channels"),
    "a path": ({"image": "picture.png"}, "incorrect format"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_bad_picture_is_refused(case):
    arguments, message = BAD_PICTURES[case]
    pipe = tiny_pipeline(vae=tiny_vae("kl"))
    before = pipe.scheduler.timesteps.clone()
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [0, 1], "num_inference_steps": 1} | arguments)
    assert torch.equal(pipe.scheduler.timesteps, before)
    assert len(pipe(0, num_inference_steps=1, image=picture()).images) == 1
