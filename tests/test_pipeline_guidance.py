"""What the transformer and the embedder are given in each stage, and how guidance combines what comes back."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import tiny_embedder, tiny_pipeline, tiny_transformer
from plain_sampling import plain_sample


def watch_transformer(pipe):
    """A list that fills with the keyword arguments of every forward of the transformer."""
    calls = []

    def remember(module, arguments, keywords):
        names = ("hidden_states", "timestep", "class_labels", "encoder_hidden_states")
        calls.append(dict(zip(names, arguments)) | keywords)

    pipe.transformer.register_forward_pre_hook(remember, with_kwargs=True)
    return calls


def sample(pipe, labels=(1, 3), **arguments):
    arguments = {"num_inference_steps": 4, "guidance_interval": (0.0, 1.0), "output_type": "latent"} | arguments
    generator = torch.Generator().manual_seed(0)
    return pipe(list(labels), generator=generator, return_stages=True, **arguments).stages


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_embedder_runs_once_a_stage(num_stages):
    pipe, calls = tiny_pipeline(), []
    pipe.latent_embedder.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0]))
    stages = sample(pipe, num_stages=num_stages, prior_guidance_scale=2.0)
    assert len(calls) == num_stages - 1
    for latents, stage in zip(calls, stages):
        assert torch.equal(latents, stage)


def test_prior_matters_and_reaches_the_next_stage_only_through_the_codes():
    pipe = tiny_pipeline()
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    pictures = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(2))

    def second_stage(picture):
        return sample(pipe, [2], image=picture, latents=noise)[-1]

    first, second = (second_stage(picture) for picture in pictures)
    assert (first - second).abs().max() > 1e-2
    without_prior = sample(pipe, [2], num_stages=1, latents=noise)[-1]
    assert (first - without_prior).abs().max() > 1e-2

    # With the codes cut, nothing of the picture is left.
    pipe.latent_embedder.to_codes.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    first, second = (second_stage(picture) for picture in pictures)
    assert torch.equal(first, second)


def test_timesteps_reach_the_model_through_its_own_map():
    pipe = tiny_pipeline(transformer=tiny_transformer(timestep_scale=-0.001, timestep_offset=1.0))
    seen = []
    pipe.transformer.time_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    sample(pipe, num_stages=1, guidance_scale=1.0)
    torch.testing.assert_close(torch.stack(seen)[:, 0], 1 - 0.001 * pipe.scheduler.timesteps)


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.0, "guidance_interval": (0.0, 0.0)},
        {"guidance_scale": 1.0, "prior_guidance_scale": 1.0},
    ],
)
def test_no_guidance_is_one_forward_of_the_batch(arguments):
    pipe = tiny_pipeline()
    calls = watch_transformer(pipe)
    stages = sample(pipe, **arguments)
    assert [len(call["hidden_states"]) for call in calls] == [2] * 8
    generator = torch.Generator().manual_seed(0)
    expected = plain_sample(pipe, FlowMatchEulerDiscreteScheduler, [1, 3], generator, 2, 4, interval=(0.0, 0.0))
    torch.testing.assert_close(torch.stack(stages), torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, rows",
    [
        ({}, [4] * 8),
        ({"guidance_drop": "both"}, [4] * 8),
        # Stage 1 has no prior to lose.
        ({"guidance_drop": "prior"}, [2] * 4 + [4] * 4),
        ({"prior_guidance_scale": 2.0}, [4] * 4 + [6] * 4),
        ({"prior_guidance_scale": 2.0, "guidance_scale": 1.0}, [2] * 4 + [6] * 4),
        ({"prior_guidance_scale": 2.0, "guidance_drop": "prior"}, [2] * 4 + [6] * 4),
        ({"guidance_interval": (0.25, 0.75)}, [2, 4, 4, 2] * 2),
        ({"guidance_interval": [(0.0, 0.0), (0.5, 1.0)]}, [2, 2, 2, 2, 2, 2, 4, 4]),
        ({"guidance_scale": [1.0, 2.0]}, [2] * 4 + [4] * 4),
        ({"num_inference_steps": [1, 2], "num_stages": 2}, [4] * 3),
        ({"num_inference_steps": [1, 2, 1], "num_stages": 3}, [4] * 4),
    ],
)
def test_guided_step_is_one_forward(arguments, rows):
    pipe = tiny_pipeline()
    calls = watch_transformer(pipe)
    sample(pipe, **{"guidance_scale": 2.0} | arguments)
    assert [len(call["hidden_states"]) for call in calls] == rows


@pytest.mark.parametrize("drop", ["class", "prior", "both"])
def test_dropped_rows_see_neither_the_class_nor_the_prior_that_they_go_without(drop):
    pipe = tiny_pipeline()
    calls = watch_transformer(pipe)
    sample(pipe, guidance_scale=2.0, guidance_drop=drop)
    for call in calls[-4:]:
        labels, dropped_labels = call["class_labels"].chunk(2)
        tokens, dropped_tokens = call["encoder_hidden_states"].chunk(2)
        assert labels.tolist() == [1, 3] and (tokens != 0).all()
        assert dropped_labels.tolist() == ([1, 3] if drop == "prior" else [10, 10])
        assert torch.equal(dropped_tokens, tokens if drop == "class" else torch.zeros_like(tokens))
    assert all(call["encoder_hidden_states"] is None for call in calls[:4])


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": 2.5, "drop": "class"},
        {"scale": 2.5, "drop": "prior"},
        {"scale": 2.5, "drop": "both"},
        {"scale": 0.5, "drop": "class"},
        {"scale": 0.0, "drop": "both"},
        {"scale": 2.0, "prior_scale": 3.0},
        {"scale": 1.0, "prior_scale": 3.0},
        {"scale": 2.0, "prior_scale": 0.0},
        {"scale": [1.5, 3.0, 0.5], "steps": [1, 4, 2], "interval": [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0)]},
        {"scale": [1.0, 2.0, 2.0], "prior_scale": [1.0, 1.0, 2.0], "steps": 2},
        {"scale": 2.0, "prior_scale": [None, None, 2.0], "steps": 2},
    ],
)
def test_guidance_equals_plain_computation(arguments):
    pipe = tiny_pipeline()
    num_stages = 3 if any(isinstance(value, list) for value in arguments.values()) else 2
    expected = plain_sample(
        pipe,
        FlowMatchEulerDiscreteScheduler,
        [1, 3],
        torch.Generator().manual_seed(0),
        num_stages,
        **{"steps": 3} | arguments,
    )
    names = {
        "scale": "guidance_scale",
        "prior_scale": "prior_guidance_scale",
        "drop": "guidance_drop",
        "steps": "num_inference_steps",
        "interval": "guidance_interval",
    }
    arguments = {"num_inference_steps": 3} | {names[name]: value for name, value in arguments.items()}
    stages = sample(pipe, num_stages=num_stages, **arguments)
    torch.testing.assert_close(torch.stack(stages), torch.stack(expected), rtol=0, atol=1e-4)


def test_unconditional_rows_see_the_null_class():
    pipe = tiny_pipeline()
    calls = watch_transformer(pipe)
    sample(pipe, [None, 2], guidance_scale=1.0)
    assert all(call["class_labels"].tolist() == [10, 2] for call in calls)


def test_coarse_bottleneck_and_oblong_latents():
    """An embedder with a larger patch than the transformer's, on latents that are not square."""
    pipe = tiny_pipeline(latent_embedder=tiny_embedder(patch_size=4, output_patch_size=2))
    calls = watch_transformer(pipe)
    images = pipe(0, num_inference_steps=2, guidance_scale=1.0, height=8, width=16, output_type="latent").images
    assert images.shape == (1, 4, 8, 16)
    assert calls[-1]["encoder_hidden_states"].shape == (1, 32, 16)
