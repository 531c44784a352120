import math

import pytest
import torch
from diffusers import DDPMScheduler
from helpers import tiny_embedder, tiny_transformer

from diffusers_dod.training.objective import (
    DiffusionExample,
    count_prior_rows,
    ddpm_example,
    dod_loss,
    drop_labels,
    flow_example,
)


BATCH = 4


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(BATCH, 4, 8, 8, generator=generator)
    noise = torch.randn(BATCH, 4, 8, 8, generator=generator)
    sigmas = torch.rand(BATCH, generator=generator)
    return latents, noise, sigmas, torch.tensor([0, 1, 2, 3])


def test_flow_example_is_the_linear_path_in_diffusers_convention():
    latents, noise, sigmas, _ = make_batch()
    example = flow_example(latents, noise, sigmas)
    for row in range(BATCH):
        sigma = float(sigmas[row])
        torch.testing.assert_close(example.noisy[row], (1 - sigma) * latents[row] + sigma * noise[row])
        torch.testing.assert_close(example.target[row], noise[row] - latents[row])
        assert float(example.timesteps[row]) == pytest.approx(1000 * sigma)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_ddpm_target_is_what_the_scheduler_turns_back_into_the_clean_latents(prediction_type):
    latents, noise, _, _ = make_batch()
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
    timesteps = torch.tensor([1, 250, 500, 750])
    example = ddpm_example(latents, noise, timesteps, scheduler)
    for row, timestep in enumerate(timesteps):
        alpha = scheduler.alphas_cumprod[timestep]
        expected = alpha.sqrt() * latents[row] + (1 - alpha).sqrt() * noise[row]
        torch.testing.assert_close(example.noisy[row], expected)
        step = scheduler.step(example.target[row], timestep, example.noisy[row])
        torch.testing.assert_close(step.pred_original_sample, latents[row], atol=1e-4, rtol=1e-4)


def test_labels_are_dropped_at_their_rate_and_otherwise_kept():
    labels = torch.arange(10).repeat(2000)
    dropped = drop_labels(labels, 10, 0.1, torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    is_null = dropped == 10
    assert 0.09 < is_null.float().mean() < 0.11
    assert torch.equal(dropped[~is_null], labels[~is_null])
    assert torch.equal(drop_labels(labels, 10, 0.0), labels)
    assert (drop_labels(labels, 10, 1.0) == 10).all()


@pytest.mark.parametrize("batch_size, prior_drop", [(8, 0.5), (5, 0.5), (1, 0.3), (3, 0.0), (3, 1.0)])
def test_the_count_of_prior_rows_has_the_right_expectation_and_at_most_two_values(batch_size, prior_drop):
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([count_prior_rows(batch_size, prior_drop, generator) for _ in range(2000)]).double()
    expected = batch_size * (1 - prior_drop)
    assert counts.mean().item() == pytest.approx(expected, abs=0.05)
    assert set(counts.tolist()) <= {math.floor(expected), math.ceil(expected)}


@pytest.mark.parametrize("rows", [0, 1, 3, BATCH])
def test_the_loss_is_the_squared_error_of_every_row_computed_by_itself(rows):
    transformer, embedder = tiny_transformer(), tiny_embedder()
    latents, noise, sigmas, labels = make_batch()
    weighting = torch.tensor([0.5, 1.0, 2.0, 4.0])
    loss = dod_loss(transformer, embedder, latents, labels, flow_example(latents, noise, sigmas), rows, weighting)

    expected = []
    for row in range(BATCH):
        one = slice(row, row + 1)
        prior = embedder(latents[one]).prior_tokens if row < rows else None
        noisy = (1 - sigmas[row]) * latents[one] + sigmas[row] * noise[one]
        prediction = transformer(noisy, 1000 * sigmas[one], labels[one], encoder_hidden_states=prior).sample
        expected.append(weighting[row] * (prediction - (noise - latents)[one]).square().mean())
    expected = torch.stack(expected)
    torch.testing.assert_close(loss.per_sample, expected)
    torch.testing.assert_close(loss.total, expected.mean())
    for mean, part in ((loss.with_prior, expected[:rows]), (loss.without_prior, expected[rows:])):
        torch.testing.assert_close(mean, part.mean(), equal_nan=True)
    assert loss.total.requires_grad and not loss.per_sample.requires_grad


def test_rows_without_a_prior_have_the_loss_of_stage_1_exactly():
    transformer, embedder = tiny_transformer(), tiny_embedder()
    latents, noise, sigmas, labels = make_batch()
    example = flow_example(latents, noise, sigmas)
    mixed = dod_loss(transformer, embedder, latents, labels, example, 2)
    stage_1 = dod_loss(transformer, embedder, latents, labels, example, 0)
    assert torch.equal(mixed.per_sample[2:], stage_1.per_sample[2:])
    assert not torch.isclose(mixed.per_sample[:2], stage_1.per_sample[:2]).any()


def test_a_row_sees_no_prior_but_its_own():
    transformer, embedder = tiny_transformer(), tiny_embedder()
    latents, noise, sigmas, labels = make_batch()
    example = flow_example(latents, noise, sigmas)
    before = dod_loss(transformer, embedder, latents, labels, example, 2).per_sample
    # Only the embedder reads `latents`; noisy and target stay as they are.
    changed = latents.clone()
    changed[0] += 1
    changed[3] += 1
    after = dod_loss(transformer, embedder, changed, labels, example, 2).per_sample
    assert not torch.isclose(before[0], after[0])
    torch.testing.assert_close(before[1:], after[1:], rtol=0, atol=1e-6)


def test_both_models_learn_and_the_embedder_only_from_rows_with_a_prior():
    transformer, embedder = tiny_transformer(), tiny_embedder()
    latents, noise, sigmas, labels = make_batch()
    example = flow_example(latents, noise, sigmas)
    dod_loss(transformer, embedder, latents, labels, example, 0).total.backward()
    assert all(parameter.grad is None for parameter in embedder.parameters())
    dod_loss(transformer, embedder, latents, labels, example, 2).total.backward()
    for model in (transformer, embedder):
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_a_learned_variance_has_no_part_in_the_loss():
    transformer, embedder = tiny_transformer(out_channels=8), tiny_embedder()
    latents, noise, sigmas, labels = make_batch()
    noisy, timesteps, _ = flow_example(latents, noise, sigmas)
    target = transformer(noisy, timesteps, labels).sample[:, :4].detach()
    loss = dod_loss(transformer, embedder, latents, labels, DiffusionExample(noisy, timesteps, target), 0)
    assert loss.total.item() < 1e-10
    loss.total.backward()
    # Channels are slowest within a patch, so the variance is the second half of the projection.
    assert transformer.proj_out.bias.grad[16:].abs().sum() == 0
