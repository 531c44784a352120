"""What a pipeline returns, what a callback can change, and the ways in which diffusers runs pipelines."""

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import needs_group_offload, tiny_embedder, tiny_pipeline, tiny_transformer, tiny_vae

from diffusers_dod import DoDPipelineOutput


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(pipe, labels=(1, 3), seed=0, **arguments):
    arguments = {"num_inference_steps": 3, "guidance_interval": (0.0, 1.0), "output_type": "latent"} | arguments
    arguments.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipe(list(labels), **arguments)


# Output


@pytest.mark.parametrize("autoencoder", [True, False])
def test_output_types_hold_the_same_images(autoencoder):
    pipe = tiny_pipeline(vae=tiny_vae("kl")) if autoencoder else tiny_pipeline(channels=3)
    pil, array, tensor, latents = (sample(pipe, output_type=kind).images for kind in ("pil", "np", "pt", "latent"))
    side = 16 if autoencoder else 8
    assert isinstance(pil, list) and all(image.size == (side, side) and image.mode == "RGB" for image in pil)
    assert array.shape == (2, side, side, 3) and tensor.shape == (2, 3, side, side)
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in pil]), (array * 255).round())
    with torch.no_grad():
        pixels = pipe.vae.decode(latents / 0.5).sample if autoencoder else latents
    torch.testing.assert_close(tensor, (pixels / 2 + 0.5).clamp(0, 1))


def test_gray_images():
    images = sample(tiny_pipeline(channels=1), output_type="pil").images
    assert [image.mode for image in images] == ["L", "L"] and images[0].size == (8, 8)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_stages_are_returned_where_asked_for(output_type):
    pipe = tiny_pipeline(vae=tiny_vae("kl"))
    plain = sample(pipe, num_stages=3, output_type=output_type)
    output = sample(pipe, num_stages=3, output_type=output_type, return_stages=True)
    assert isinstance(plain, DoDPipelineOutput) and plain.stages is None
    assert len(output.stages) == 3 and output.stages[-1] is output.images
    two = sample(pipe, num_stages=2, output_type=output_type)
    for images, expected in ((output.images, plain.images), (output.stages[1], two.images)):
        if output_type == "pil":
            images, expected = (np.stack([np.asarray(image) for image in batch]) for batch in (images, expected))
        np.testing.assert_array_equal(np.asarray(images), np.asarray(expected))

    (images,) = sample(pipe, output_type="latent", return_dict=False)
    same, stages = sample(pipe, output_type="latent", return_dict=False, return_stages=True)
    assert torch.equal(images, same) and len(stages) == 2


# Noise


def test_generator_and_latents_decide_the_image():
    pipe, noise = tiny_pipeline(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(sample(pipe).images, sample(pipe).images)
    assert not torch.equal(sample(pipe).images, sample(pipe, seed=1).images)

    # The given noise is the one that the generator would have drawn.
    generator = torch.Generator().manual_seed(5)
    drawn = sample(pipe, num_stages=1, generator=generator).images
    assert torch.equal(sample(pipe, num_stages=1, latents=noise).images, drawn)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(sample(pipe, generator=generator).images, _after_first_draw(pipe, noise))
    # Later stages draw anew.
    stages = sample(pipe, latents=noise, seed=0, return_stages=True).stages
    others = sample(pipe, latents=noise, seed=1, return_stages=True).stages
    assert torch.equal(stages[0], others[0]) and not torch.equal(stages[1], others[1])


def _after_first_draw(pipe, noise):
    generator = torch.Generator().manual_seed(5)
    torch.randn(noise.shape, generator=generator)
    return sample(pipe, latents=noise, generator=generator).images


def test_latents_decide_the_size():
    pipe = tiny_pipeline(vae=tiny_vae("kl"))
    noise = torch.randn(1, 4, 4, 12)
    assert sample(pipe, [0], latents=noise, output_type="pt").images.shape == (1, 3, 8, 24)
    assert sample(pipe, [0], height=8, width=24, output_type="pt").images.shape == (1, 3, 8, 24)


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "DDPMScheduler"])
def test_generator_of_its_own_makes_an_image_independent_of_its_batch(scheduler):
    pipe = tiny_pipeline(scheduler=getattr(diffusers, scheduler)())
    batch = sample(pipe, [1, 3, 1], generator=generators(7, 8, 9)).images
    for row, (label, seed) in enumerate([(1, 7), (3, 8), (1, 9)]):
        alone = sample(pipe, [label], generator=generators(seed)).images
        torch.testing.assert_close(batch[row : row + 1], alone, rtol=1e-4, atol=1e-4)


def test_images_per_prompt_stand_together():
    pipe = tiny_pipeline()
    images = sample(pipe, [1, 3], num_images_per_prompt=2, generator=generators(0, 1, 2, 3)).images
    assert torch.equal(images, sample(pipe, [1, 1, 3, 3], generator=generators(0, 1, 2, 3)).images)
    assert not torch.allclose(images[0], images[1], atol=1e-2)


# Callbacks


def test_callback_sees_every_step_of_every_stage():
    pipe, seen = tiny_pipeline(), []

    def remember(pipe, step, timestep, tensors):
        assert pipe.current_timestep == timestep
        prior = tensors["prior_tokens"]
        seen.append((pipe.current_stage, step, timestep.item(), None if prior is None else tuple(prior.shape)))
        return tensors

    both = ["latents", "prior_tokens"]
    expected = sample(pipe).images
    images = sample(
        pipe, callback_on_step_end=remember, callback_on_step_end_tensor_inputs=both, num_inference_steps=3
    ).images
    timesteps = pipe.scheduler.timesteps.tolist()
    assert seen == [(1, i, t, None) for i, t in enumerate(timesteps)] + [
        (2, 3 + i, t, (2, 16, 16)) for i, t in enumerate(timesteps)
    ]
    assert torch.equal(images, expected)
    assert pipe.num_timesteps == 6 and pipe.current_timestep is None


@pytest.mark.parametrize(
    "scale, rows", [(2.0, [4, 2, 2, 2] + [2, 2, 6, 4]), ([2.0, 2.0], [4, 2, 2, 2] + [4, 2, 6, 4])]
)
def test_callback_changes_guidance(scale, rows):
    """Until the end, or until the next stage where a list gives that its own."""
    pipe, seen = tiny_pipeline(), []
    pipe.transformer.register_forward_pre_hook(
        lambda module, arguments, keywords: seen.append(len(keywords["class_labels"])), with_kwargs=True
    )

    def change(pipe, step, timestep, tensors):
        if step in (0, 4):
            pipe._guidance_scale = 1.0
        if step == 5:
            pipe._prior_guidance_scale = 2.0
        if step == 6:
            pipe._prior_guidance_scale, pipe._guidance_scale = None, 3.0
        return tensors

    sample(pipe, num_inference_steps=4, guidance_scale=scale, callback_on_step_end=change)
    assert seen == rows


def test_guidance_changed_halfway_has_the_new_scale():
    pipe = tiny_pipeline()

    def change(pipe, step, timestep, tensors):
        pipe._guidance_scale = [2.0, 5.0][step % 2]
        return tensors

    changed = sample(pipe, num_inference_steps=2, guidance_scale=5.0, callback_on_step_end=change).images
    plain = sample(pipe, num_inference_steps=2, guidance_scale=5.0).images
    lower = sample(pipe, num_inference_steps=2, guidance_scale=2.0).images
    assert not torch.allclose(changed, plain, atol=1e-3) and not torch.allclose(changed, lower, atol=1e-3)


def test_callback_changes_tensors():
    pipe = tiny_pipeline()

    def no_prior(pipe, step, timestep, tensors):
        if tensors["prior_tokens"] is not None:
            tensors["prior_tokens"] = torch.zeros_like(tensors["prior_tokens"])
        return tensors

    def zero(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    # From the second step on, a prior of zeros is no prior.
    picture, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    after_first = []

    def keep_first(pipe, step, timestep, tensors):
        after_first.extend([tensors["latents"]] * (step == 0))
        return no_prior(pipe, step, timestep, tensors)

    names = ["latents", "prior_tokens"]
    arguments = {"latents": noise, "num_inference_steps": 2, "guidance_scale": 2.0}
    changed = sample(
        pipe, image=picture, callback_on_step_end=keep_first, callback_on_step_end_tensor_inputs=names, **arguments
    ).images

    def take_first(pipe, step, timestep, tensors):
        return {"latents": after_first[0]} if step == 0 else {}

    plain = sample(pipe, num_stages=1, callback_on_step_end=take_first, **arguments).images
    torch.testing.assert_close(changed, plain, rtol=0, atol=1e-5)
    assert (sample(pipe, callback_on_step_end=zero).images == 0).all()


@pytest.mark.parametrize("stop, stages, steps", [(1, 1, 2), (3, 2, 4)])
def test_interrupt_ends_everything(stop, stages, steps):
    pipe, seen = tiny_pipeline(vae=tiny_vae("kl")), []

    def interrupt(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = step == stop
        return tensors

    output = sample(pipe, callback_on_step_end=interrupt, return_stages=True)
    assert len(seen) == steps and len(output.stages) == stages
    assert torch.equal(output.images, seen[-1])
    # The next call is not interrupted.
    assert len(sample(pipe, return_stages=True).stages) == 2


def test_progress_bar_names_the_stage(capsys):
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=False)
    sample(pipe, num_inference_steps=[2, 3])
    bars = capsys.readouterr().err
    assert "Stage 1/2" in bars and "2/2" in bars and "Stage 2/2" in bars and "3/3" in bars
    pipe.set_progress_bar_config(disable=True)
    sample(pipe)
    assert "Stage" not in capsys.readouterr().err


# Ways to run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    pipe = tiny_pipeline(vae=tiny_vae("kl"))
    noise = torch.randn(2, 4, 8, 8).to(dtype)
    expected = sample(pipe, num_stages=1, latents=noise).images
    pipe.to(dtype)
    latents = sample(pipe, num_stages=1, latents=noise).images
    assert latents.dtype == dtype
    torch.testing.assert_close(latents.float(), expected, rtol=0.1, atol=0.15)
    assert sample(pipe, output_type="pil", image=PIL.Image.new("RGB", (16, 16))).images[0].size == (16, 16)


def test_autoencoder_may_have_its_own_dtype():
    pipe = tiny_pipeline(vae=tiny_vae("kl"))
    pipe.transformer.to(torch.bfloat16)
    pipe.latent_embedder.to(torch.bfloat16)
    images = sample(pipe, output_type="pt", image=PIL.Image.new("RGB", (16, 16))).images
    assert images.dtype == torch.float32 and pipe.transformer.dtype == torch.bfloat16


def test_autoencoder_slicing_and_tiling():
    pipe = tiny_pipeline(vae=tiny_vae("kl", sample_size=16))
    calls = []
    pipe.vae.decoder.register_forward_hook(lambda module, inputs, output: calls.append(tuple(inputs[0].shape)))
    expected = sample(pipe, output_type="pt").images
    pipe.vae.enable_slicing()
    assert calls == [(2, 4, 8, 8)]
    torch.testing.assert_close(sample(pipe, output_type="pt").images, expected)
    assert calls[1:] == [(1, 4, 8, 8)] * 2
    pipe.vae.enable_tiling()
    large = sample(pipe, [0], output_type="pt", height=32, width=32).images
    assert large.shape == (1, 3, 32, 32) and len(calls) > 4 and all(call[-1] <= 8 for call in calls)


def test_model_offload():
    """With the CPU as its accelerator: every model has its hook, and no hook changes the images."""
    pipe = tiny_pipeline(vae=tiny_vae("kl"))
    picture = PIL.Image.new("RGB", (16, 16))
    expected = [sample(pipe, output_type="pt", image=image).images for image in (None, picture)]
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        hook = pipe.transformer._hf_hook
        offloaded = [sample(pipe, output_type="pt", image=image).images for image in (None, picture)]
        assert all(hasattr(model, "_hf_hook") for model in (pipe.transformer, pipe.latent_embedder, pipe.vae))
        assert torch.equal(torch.stack(offloaded), torch.stack(expected))
        assert pipe.transformer._hf_hook is not hook  # diffusers frees the models and hooks them anew


@needs_group_offload
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload(offload_type):
    expected = sample(tiny_pipeline(vae=tiny_vae("kl")), output_type="pt").images
    pipe = tiny_pipeline(vae=tiny_vae("kl"))
    for model in (pipe.transformer, pipe.latent_embedder):
        blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
        model.enable_group_offload(torch.device("cpu"), offload_type=offload_type, **blocks)
    torch.testing.assert_close(sample(pipe, output_type="pt").images, expected)


def pyramid_attention_broadcast(pipe):
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


CACHES = {
    "first block": lambda pipe: diffusers.FirstBlockCacheConfig(threshold=1e9),
    "pyramid attention": pyramid_attention_broadcast,
}


def count_attention(pipe):
    calls = []
    pipe.transformer.transformer_blocks[-1].attn.to_q.register_forward_hook(
        lambda module, inputs, output: calls.append(len(output))
    )
    return calls


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75)])
def test_feature_caches(cache, interval):
    """A cache saves computation, starts anew in each stage, with other rows and in each call, and can be turned off."""
    pipe = tiny_pipeline()
    arguments = {"num_inference_steps": 8, "guidance_interval": interval}
    expected = sample(tiny_pipeline(), **arguments).images  # before 0.41 diffusers' caches want a model that never ran
    calls = count_attention(pipe)
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    cached = sample(pipe, **arguments).images
    assert torch.isfinite(cached).all() and not torch.equal(cached, expected)

    segments = [(4, 8)] if interval == (0.0, 1.0) else [(2, 2), (4, 4), (2, 2)]
    per_segment = 1 if cache == "first block" else None
    expected_calls = []
    for rows, steps in segments * 2:
        expected_calls += [rows] * (per_segment or (steps + 1) // 2)
    assert calls == expected_calls

    assert torch.equal(sample(pipe, **arguments).images, cached)
    pipe.transformer.disable_cache()
    torch.testing.assert_close(sample(pipe, **arguments).images, expected)


def test_second_stage_does_not_read_the_cache_of_the_first():
    pipe = tiny_pipeline()
    pipe.transformer.enable_cache(CACHES["first block"](pipe))
    picture = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def swap(pipe, step, timestep, tensors):
        """Makes stage 1's sample the picture."""
        return {"latents": picture} if step == 2 else {}

    generator = torch.Generator().manual_seed(1)
    torch.randn(2, 4, 8, 8, generator=generator)
    second_noise = torch.randn(2, 4, 8, 8, generator=generator)
    alone = sample(pipe, image=picture, latents=second_noise).images
    after_first = sample(pipe, seed=1, callback_on_step_end=swap).images
    assert torch.equal(after_first, alone)


def test_adapter_on_the_transformer():
    from peft import LoraConfig

    pipe = tiny_pipeline()
    expected = sample(pipe).images
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    adapted = sample(pipe).images
    assert not torch.allclose(adapted, expected, atol=1e-3)
    pipe.transformer.disable_adapters()
    torch.testing.assert_close(sample(pipe).images, expected)
    pipe.transformer.enable_adapters()
    torch.testing.assert_close(sample(pipe).images, adapted)
    pipe.transformer.fuse_lora()
    pipe.transformer.unload_lora()
    torch.testing.assert_close(sample(pipe).images, adapted, rtol=1e-4, atol=1e-4)


def test_fused_projections():
    pipe = tiny_pipeline()
    expected = sample(pipe).images
    pipe.transformer.fuse_qkv_projections()
    pipe.latent_embedder.fuse_qkv_projections()
    torch.testing.assert_close(sample(pipe).images, expected, rtol=1e-4, atol=1e-4)


def test_compiled_transformer():
    pipe = tiny_pipeline(
        transformer=tiny_transformer(num_layers=1),
        latent_embedder=tiny_embedder(num_encoder_layers=0, num_decoder_layers=0),
    )
    expected = sample(pipe, guidance_scale=1.0).images
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    torch.testing.assert_close(sample(pipe, guidance_scale=1.0).images, expected, rtol=1e-4, atol=1e-4)
