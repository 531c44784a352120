"""Noise on the codes whose level the embedder reads."""

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import tiny_coded_pipeline, tiny_embedder, tiny_pipeline, tiny_transformer
from test_pipeline_codes import euler, sample

from diffusers_dod import DoDPipeline
from diffusers_dod.training import dod_loss, flow_example
from diffusers_dod.training.__main__ import parse_args
from diffusers_dod.training.step import draw_step, make_inputs


def reading_embedder():
    return tiny_embedder(in_channels=4, codes_mean=[0.1, -0.2], codes_std=[0.5, 2.0], noise_level_input=True)


def reading_pipeline():
    return tiny_coded_pipeline(latent_embedder=reading_embedder())


def noisy(codes, noise, level):
    return codes + level * noise * codes.square().mean(dim=(1, 2), keepdim=True).sqrt()


@torch.no_grad()
def test_the_decoder_reads_the_level_of_each_sample():
    embedder = reading_embedder()
    codes, noise = torch.randn(3, 16, 2), torch.randn(3, 16, 2)
    levels = torch.tensor([0.0, 0.4, 1.0])
    tokens = embedder.decode(codes, 8, 8, noise, levels)
    for i, level in enumerate(levels.tolist()):
        one = embedder.decode(codes[i : i + 1], 8, 8, noise[i : i + 1], level)
        torch.testing.assert_close(one, tokens[i : i + 1], atol=1e-5, rtol=1e-5)
        clean = embedder.decode(noisy(codes, noise, level)[i : i + 1], 8, 8, None, level)
        torch.testing.assert_close(one, clean, atol=1e-5, rtol=1e-5)
    assert torch.equal(embedder.decode(codes, 8, 8), embedder.decode(codes, 8, 8, noise, 0.0))
    assert not torch.allclose(embedder.decode(codes, 8, 8, None, 0.5), embedder.decode(codes, 8, 8), atol=1e-3)
    plain = tiny_embedder(in_channels=4)
    assert torch.equal(plain.decode(codes, 8, 8, None, 0.5), plain.decode(codes, 8, 8))  # reads none
    latents = torch.randn(3, 4, 8, 8)
    output = embedder(latents, code_noise=noise, noise_level=levels)
    assert torch.equal(output.prior_tokens, embedder.decode(output.codes, 8, 8, noise, levels))


@torch.no_grad()
@pytest.mark.parametrize(("given", "level"), [(None, 0.3), (0.0, 0.0), (0.7, 0.7)])
def test_codes_noise_and_stage_by_hand(given, level):
    """Noise of the codes, noise on them, noise of the stage, in that order; the codes that are returned are clean."""
    pipe = reading_pipeline()
    output = sample(pipe, code_noise_level=given, guidance_scale=1.0)
    generator, labels = torch.Generator().manual_seed(0), torch.tensor([1, 3])
    start = torch.randn(2, 2, 4, 4, generator=generator)
    code_noise = torch.randn(2, 16, 2, generator=generator)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    codes = pipe.latent_embedder.denormalize_codes(euler(pipe.code_transformer, start, labels, 4))
    torch.testing.assert_close(output.codes, codes, atol=1e-4, rtol=1e-4)
    prior = pipe.latent_embedder.decode(noisy(codes, code_noise, level), 8, 8, None, level)
    expected = euler(pipe.transformer, noise, labels, 3, prior=prior)
    torch.testing.assert_close(output.images, expected, atol=1e-4, rtol=1e-4)


def test_each_stage_has_noise_of_its_own_and_no_level_changes_the_others_draws():
    pipe = reading_pipeline()
    low, high = (
        sample(pipe, num_stages=2, prior_source="stage", return_stages=True, code_noise_level=level).stages
        for level in (0.1, 0.9)
    )
    assert torch.equal(low[0], high[0]) and not torch.allclose(low[1], high[1], atol=1e-3)
    picture = torch.randn(1, 4, 8, 8)
    low, high = (sample(pipe, num_stages=2, image=picture, code_noise_level=level).images for level in (0.1, 0.9))
    assert not torch.allclose(low, high, atol=1e-3)


def test_a_list_of_generators_makes_an_image_independent_of_its_batch():
    pipe = reading_pipeline()
    options = {"num_inference_steps": 3, "code_num_inference_steps": 3, "output_type": "latent"}
    both = pipe([1, 3], generator=[torch.Generator().manual_seed(i) for i in (5, 6)], **options).images
    alone = pipe([3], generator=[torch.Generator().manual_seed(6)], **options).images
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["package", "own code"])
def test_saved_and_loaded_it_draws_the_same(kind, tmp_path):
    pipe = reading_pipeline()
    pipe.save_pretrained(tmp_path)
    load = {
        "package": lambda: DoDPipeline.from_pretrained(tmp_path),
        "own code": lambda: DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=True),
    }[kind]
    assert torch.equal(sample(load(), code_noise_level=0.5).images, sample(pipe, code_noise_level=0.5).images)
    offloaded = load()
    offloaded.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(sample(offloaded).images, sample(pipe).images)


@pytest.mark.parametrize(
    ("make", "level", "message"),
    [
        (reading_pipeline, 1.5, "`code_noise_level` is 1.5; it must be a number from 0 to 1"),
        (reading_pipeline, float("nan"), "`code_noise_level` is nan"),
        (reading_pipeline, "much", "`code_noise_level` is 'much'"),
        (tiny_coded_pipeline, 0.3, "has no `noise_level_input`: leave it out"),
        (tiny_pipeline, 0.0, "has no `noise_level_input`: leave it out"),
    ],
)
def test_bad_input_is_one_clear_line(make, level, message):
    with pytest.raises(ValueError, match=message) as error:
        sample(make(), code_noise_level=level)
    assert "\n" not in str(error.value)


def test_training_draws_a_level_per_row_up_to_the_option(tmp_path):
    options = ["--train_data_dir", str(tmp_path), "--output_dir", str(tmp_path), "--prediction_type", "flow"]
    args = parse_args([*options, "--bottleneck_noise", "0.8", "--prior_drop", "0"])
    args.logit_mean, args.logit_std, args.timestep_density, args.weighting = 0.0, 1.0, "logit_normal", "none"
    embedder, transformer, rows = reading_embedder(), tiny_transformer(), 500
    latents = torch.randn(rows, 4, 8, 8)

    def inputs(step, embedder):
        draws = draw_step(args, step, rows, None)
        generators = [torch.Generator().manual_seed(row) for row in range(rows)]
        return make_inputs(args, latents, draws.times, draws.noise_levels, generators, None, embedder)

    made = inputs(1, embedder)
    assert 0 <= made.noise_level.min() < 0.05 and 0.75 < made.noise_level.max() <= 0.8
    assert made.noise_level.mean() == pytest.approx(0.4, abs=0.05) and made.code_noise.std() == pytest.approx(
        1, abs=0.02
    )
    assert not torch.equal(made.noise_level, inputs(2, embedder).noise_level)
    plain = inputs(1, tiny_embedder(in_channels=4))
    assert plain.noise_level is None and plain.code_noise.std() == pytest.approx(0.8, abs=0.02)
    assert torch.equal(made.example.noisy, plain.example.noisy)

    # The loss is that of the prior tokens of noisy codes and their levels.
    few = slice(0, 4)
    labels, example = torch.arange(4), flow_example(latents[few], torch.randn(4, 4, 8, 8), torch.full((4,), 0.5))
    noise, level = made.code_noise[few], made.noise_level[few]
    loss = dod_loss(transformer, embedder, latents[few], labels, example, 4, code_noise=noise, noise_level=level)
    prior = embedder(latents[few], code_noise=noise, noise_level=level).prior_tokens
    prediction = transformer(example.noisy, example.timesteps, labels, encoder_hidden_states=prior).sample
    torch.testing.assert_close(loss.total, (prediction - example.target).square().mean())
