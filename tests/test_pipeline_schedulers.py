"""Every family of schedulers with every kind of autoencoder, against sampling written out plainly."""

import diffusers
import pytest
import torch
from helpers import tiny_embedder, tiny_pipeline, tiny_transformer, tiny_vae
from plain_sampling import plain_sample


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_SCHEDULERS = {
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 2.0}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow_lcm": ("FlowMatchLCMScheduler", {}),
    "flow_dpm": ("DPMSolverMultistepScheduler", FLOW),
    "flow_unipc": ("UniPCMultistepScheduler", FLOW),
}
NOISE_SCHEDULERS = {
    f"{prefix}_{prediction_type}": (name, {"prediction_type": prediction_type} | options)
    for prediction_type in ("epsilon", "v_prediction")
    for prefix, name, options in (
        ("ddim", "DDIMScheduler", {}),
        ("ddpm", "DDPMScheduler", {}),
        ("dpm", "DPMSolverMultistepScheduler", {}),
        ("euler", "EulerDiscreteScheduler", {"timestep_spacing": "leading"}),
        ("unipc", "UniPCMultistepScheduler", {}),
    )
}
SCHEDULERS = FLOW_SCHEDULERS | NOISE_SCHEDULERS
# What the pipeline does where nothing is said
DEFAULT_GUIDANCE = {"scale": [1.5, 1.25], "interval": (0.25, 0.75)}
AUTOENCODERS = ["kl", "tiny", "dc", "pixels-3", "pixels-1", "rae"]


def make_scheduler(name):
    class_name, config = SCHEDULERS[name]
    return getattr(diffusers, class_name)(**config)


def make_pipeline(scheduler, autoencoder, **overrides):
    if autoencoder.startswith("pixels"):
        return tiny_pipeline(scheduler=scheduler, channels=int(autoencoder[-1]), **overrides)
    vae = tiny_vae(autoencoder)
    return tiny_pipeline(scheduler=scheduler, vae=vae, channels=64 if autoencoder == "rae" else 4, **overrides)


def assert_same(actual, expected, tolerance=1e-4):
    """Equal to `tolerance` of the largest value: some schedulers' samples of a random model are large."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("autoencoder", AUTOENCODERS)
def test_two_guided_stages_equal_plain_sampling(name, autoencoder):
    pipe = make_pipeline(make_scheduler(name), autoencoder)
    output = pipe(
        [1, 3],
        num_inference_steps=[2, 3],
        guidance_scale=[1.5, 2.0],
        guidance_interval=(0.25, 0.75),
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        return_stages=True,
    )
    expected = plain_sample(
        pipe,
        lambda: make_scheduler(name),
        [1, 3],
        torch.Generator().manual_seed(0),
        2,
        [2, 3],
        [1.5, 2.0],
        (0.25, 0.75),
    )
    assert len(output.stages) == 2
    for actual, plain in zip(output.stages, expected):
        assert torch.isfinite(actual).all()
        assert_same(actual, plain)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)

    with torch.no_grad():
        images = pipe.decode(output.images, "pt")
    side = 16 if pipe.vae is not None else 8
    assert images.shape == (2, pipe.transformer.config.in_channels if pipe.vae is None else 3, side, side)
    assert torch.isfinite(images).all() and 0 <= images.min() and images.max() <= 1


def test_euler_by_hand():
    """The whole method in a few lines: two guided stages of Euler steps along the velocity."""
    pipe = tiny_pipeline()
    ids, null, steps, scale = torch.tensor([0, 4]), torch.tensor([10, 10]), 4, 2.5
    generator = torch.Generator().manual_seed(3)
    # The plain scheduler's levels: from 1 to 1 / 1000 in equal steps, then 0.
    sigmas = [*torch.linspace(1, 1e-3, steps).tolist(), 0.0]
    latents, prior = None, None
    with torch.no_grad():
        for _ in range(2):
            if latents is not None:
                prior = pipe.latent_embedder(latents).prior_tokens
            latents = torch.randn((2, 4, 8, 8), generator=generator)
            for i, (sigma, next_sigma) in enumerate(zip(sigmas, sigmas[1:])):
                velocity = pipe.transformer(latents, torch.tensor([1000 * sigma]), ids, prior).sample
                if i in (1, 2):
                    uncond = pipe.transformer(latents, torch.tensor([1000 * sigma]), null, prior).sample
                    velocity = uncond + scale * (velocity - uncond)
                latents = latents + (next_sigma - sigma) * velocity

    sample = pipe(
        [0, 4],
        num_inference_steps=steps,
        guidance_scale=scale,
        guidance_interval=(0.25, 0.75),
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    torch.testing.assert_close(sample, latents, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_second_stage_knows_nothing_of_the_first_but_its_sample(name):
    """Stage 2 of two equals stage 2 alone of a new pipeline, so no scheduler state survives a stage."""
    steps, states = 4, {}

    def remember(pipe, step, timestep, tensors):
        states[step] = generator.get_state()
        return tensors

    pipe, generator = make_pipeline(make_scheduler(name), "kl"), torch.Generator().manual_seed(0)
    stages = pipe(
        2,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        return_stages=True,
        callback_on_step_end=remember,
    ).stages

    last_step_of_stage_1 = len(pipe.scheduler.timesteps) - 1
    generator = torch.Generator()
    generator.set_state(states[last_step_of_stage_1])
    noise = torch.randn(stages[0].shape, generator=generator)
    alone = make_pipeline(make_scheduler(name), "kl")(
        2, num_inference_steps=steps, image=stages[0], latents=noise, generator=generator, output_type="latent"
    ).images
    assert torch.equal(alone, stages[1])


@pytest.mark.parametrize("name", ["flow_heun", "flow_unipc", "dpm_epsilon", "ddpm_epsilon", "euler_epsilon"])
def test_second_call_equals_the_first(name):
    pipe = make_pipeline(make_scheduler(name), "pixels-3")
    first, _, again = (
        pipe(1, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="latent").images
        for steps in (3, 5, 3)
    )
    assert torch.equal(first, again)


@pytest.mark.parametrize("source", ["ddpm_epsilon", "flow_dpm"])
def test_scheduler_is_swapped_by_from_config(source):
    """What a config carries over from the scheduler that it was made of does not confuse the pipeline."""
    pipe = tiny_pipeline(scheduler=make_scheduler(source))
    arguments = {"class_labels": 0, "num_inference_steps": 3, "output_type": "latent"}
    pipe(**arguments)
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    sample = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    expected = plain_sample(
        pipe,
        lambda: diffusers.UniPCMultistepScheduler.from_config(make_scheduler(source).config),
        [0],
        torch.Generator().manual_seed(0),
        **DEFAULT_GUIDANCE,
    )[-1]
    assert_same(sample, expected)

    pipe.transformer.register_to_config(prediction_type="flow")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert torch.isfinite(pipe(**arguments).images).all()


LEARNED = {"in_channels": 3, "out_channels": 6, "prediction_type": "epsilon"}


def learned_variance_pipeline(scheduler):
    return tiny_pipeline(
        scheduler=scheduler, transformer=tiny_transformer(**LEARNED), latent_embedder=tiny_embedder(in_channels=3)
    )


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_learned_variance_is_ignored(name):
    pipe = learned_variance_pipeline(getattr(diffusers, name)())
    sample = pipe(
        [1, 2], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images
    expected = plain_sample(
        pipe, getattr(diffusers, name), [1, 2], torch.Generator().manual_seed(0), **DEFAULT_GUIDANCE
    )[-1]
    assert_same(sample, expected)


def test_learned_variance_is_used_by_ddpm():
    def make():
        return diffusers.DDPMScheduler(variance_type="learned_range")

    pipe = learned_variance_pipeline(make())
    ids, null = torch.tensor([1, 2]), torch.full((2,), pipe.transformer.config.num_classes)
    arguments = {"num_stages": 1, "num_inference_steps": 3, "guidance_scale": 2.0, "guidance_interval": (0.0, 1.0)}
    sample = pipe([1, 2], **arguments, generator=torch.Generator().manual_seed(0), output_type="latent").images

    generator, scheduler = torch.Generator().manual_seed(0), make()
    scheduler.set_timesteps(3)
    latents = torch.randn((2, 3, 8, 8), generator=generator)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            # Guidance is of the mean; the variance is the one of the class.
            mean, variance = pipe.transformer(latents, timestep.expand(2), ids).sample.chunk(2, dim=1)
            uncond = pipe.transformer(latents, timestep.expand(2), null).sample[:, :3]
            prediction = torch.cat([uncond + 2.0 * (mean - uncond), variance], dim=1)
            latents = scheduler.step(prediction, timestep, latents, generator=generator).prev_sample
    assert_same(sample, latents)


BAD_SCHEDULERS = {
    "flow without flow sigmas": (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction"},
        None,
        "contrad",
    ),
    "flow sigmas without flow": ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, None, "contradict"),
    "flow model, epsilon": (
        "DDIMScheduler",
        {},
        "flow",
        r"pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config\(pipe.scheduler.config\)",
    ),
    "epsilon model, flow": (
        "FlowMatchEulerDiscreteScheduler",
        {},
        "epsilon",
        r"use `pipe.scheduler = DDIMScheduler.from_config\(",
    ),
    "v model, epsilon": ("EulerDiscreteScheduler", {}, "v_prediction", "reads 'epsilon'"),
    "no variance to read": ("DDPMScheduler", {"variance_type": "learned_range"}, None, "variance_type='fixed_small'"),
    "cannot read variance": ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, None, "variance_type=None"),
}


@pytest.mark.parametrize("case", BAD_SCHEDULERS)
def test_scheduler_that_contradicts_is_refused(case):
    name, config, prediction_type, message = BAD_SCHEDULERS[case]
    scheduler = getattr(diffusers, name)(**config)
    pipe = tiny_pipeline(scheduler=scheduler, transformer=tiny_transformer(prediction_type=prediction_type))
    before = scheduler.timesteps.clone()
    with pytest.raises(ValueError, match=message):
        pipe(0, num_inference_steps=2)
    assert torch.equal(scheduler.timesteps, before)


def test_flow_config_does_not_hide_in_a_scheduler_that_cannot_read_it():
    flow = make_scheduler("flow_unipc")
    pipe = tiny_pipeline(scheduler=diffusers.DDIMScheduler.from_config(flow.config))
    with pytest.raises(ValueError, match="contradict"):
        pipe(0, num_inference_steps=2)
