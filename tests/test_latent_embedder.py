"""`DoDLatentEmbedder`: its mathematics, its bottleneck, and what the transformer learns through it."""

import pytest
import torch
from helpers import tiny_embedder, tiny_transformer
from plain_models import plain_embedder

from diffusers_dod import DoDLatentEmbedder, DoDTransformer2DModel
from diffusers_dod.training.objective import dod_loss, flow_example


def make_latents(batch=2, height=8, width=8, seed=0):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


# --- the mathematics


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        ({}, (8, 8)),
        ({}, (4, 12)),
        ({"num_encoder_layers": 2, "num_decoder_layers": 0, "mlp_ratio": 2.0, "rope_theta": 100.0}, (8, 8)),
        ({"patch_size": 4, "output_patch_size": 2}, (8, 8)),
        ({"patch_size": 4, "output_patch_size": 2}, (4, 12)),
        ({"patch_size": 2, "output_patch_size": 4}, (8, 16)),
        ({"patch_size": 7, "output_patch_size": 4, "bottleneck_dim": 1}, (28, 28)),
        ({"patch_size": 14, "output_patch_size": 4}, (28, 56)),
        ({"patch_size": 8, "output_patch_size": 2}, (8, 8)),
    ],
)
@torch.no_grad()
def test_forward_equals_the_plain_computation(overrides, size):
    model = tiny_embedder(**overrides)
    latents = make_latents(2, *size)
    output = model(latents)
    prior_tokens, codes = plain_embedder(model.config, model.state_dict(), latents)
    torch.testing.assert_close(output.codes, codes, atol=1e-5 * codes.abs().max().item(), rtol=0)
    torch.testing.assert_close(output.prior_tokens, prior_tokens, atol=1e-5 * prior_tokens.abs().max().item(), rtol=0)


# --- shapes


@pytest.mark.parametrize(
    ("patch_size", "output_patch_size", "size", "num_codes", "num_tokens"),
    [
        (2, None, (8, 8), 16, 16),
        (2, None, (4, 12), 12, 12),
        (4, 2, (8, 16), 8, 32),
        (7, 4, (28, 28), 16, 49),
        (14, 4, (28, 28), 4, 49),
    ],
)
@torch.no_grad()
def test_output_shape(patch_size, output_patch_size, size, num_codes, num_tokens):
    model = tiny_embedder(patch_size=patch_size, output_patch_size=output_patch_size, bottleneck_dim=3, output_dim=20)
    output = model(make_latents(3, *size))
    assert output.codes.shape == (3, num_codes, 3)
    assert output.prior_tokens.shape == (3, num_tokens, 20)
    prior_tokens, codes = model(make_latents(3, *size), return_dict=False)
    assert torch.equal(prior_tokens, output.prior_tokens) and torch.equal(codes, output.codes)
    assert torch.equal(output[0], output.prior_tokens)


@pytest.mark.parametrize(
    ("overrides", "size", "multiple"),
    [
        ({}, (8, 9), 2),
        ({"patch_size": 4, "output_patch_size": 2}, (8, 10), 4),
        ({"patch_size": 2, "output_patch_size": 4}, (10, 8), 4),
        ({"patch_size": 7, "output_patch_size": 4}, (28, 35), 4),
        ({"patch_size": 7, "output_patch_size": 4}, (28, 32), 7),
    ],
)
def test_a_size_the_patches_do_not_divide(overrides, size, multiple):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}.*multiples of {multiple}"):
        tiny_embedder(**overrides)(make_latents(1, *size))


def test_head_dim_that_is_no_multiple_of_4():
    with pytest.raises(ValueError, match="attention_head_dim.*10.*multiple of 4"):
        tiny_embedder(attention_head_dim=10)


@torch.no_grad()
def test_rows_are_independent():
    model = tiny_embedder()
    latents = make_latents(3)
    together = model(latents).prior_tokens
    for i in range(3):
        torch.testing.assert_close(model(latents[i : i + 1]).prior_tokens, together[i : i + 1], atol=1e-5, rtol=1e-4)


# --- the bottleneck


@torch.no_grad()
def test_codes_differ_between_latents_and_so_do_priors():
    output = tiny_embedder()(make_latents())
    for tensor in output.codes, output.prior_tokens:
        assert (tensor[0] - tensor[1]).abs().max() > 1e-2


@pytest.mark.parametrize("patch_size", [2, 4])
@torch.no_grad()
def test_equal_codes_give_equal_priors(patch_size):
    model = tiny_embedder(patch_size=patch_size, output_patch_size=2)
    model.to_codes.weight.zero_()
    output = model(make_latents())
    assert torch.equal(output.codes[0], output.codes[1])
    assert torch.equal(output.prior_tokens[0], output.prior_tokens[1])


@pytest.mark.parametrize(("patch_size", "bottleneck_dim"), [(4, 1), (4, 2), (8, 3)])
def test_the_prior_holds_no_more_numbers_than_the_codes(patch_size, bottleneck_dim):
    model = tiny_embedder(patch_size=patch_size, output_patch_size=2, bottleneck_dim=bottleneck_dim)
    latents = make_latents(1)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x).prior_tokens, latents).reshape(256, 256)
    singular_values = torch.linalg.svdvals(jacobian)
    num_codes = (8 // patch_size) ** 2 * bottleneck_dim
    assert singular_values[num_codes - 1] > 1e-3 * singular_values[0]
    assert singular_values[num_codes] < 1e-5 * singular_values[0]


# --- together with the transformer


def fresh_models():
    torch.manual_seed(0)
    transformer = DoDTransformer2DModel(
        sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=10
    )
    embedder = DoDLatentEmbedder(
        sample_size=8,
        num_encoder_layers=1,
        num_decoder_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        bottleneck_dim=2,
        output_dim=16,
    )
    return transformer, embedder


@torch.no_grad()
def test_fresh_embedder_leaves_any_transformer_as_it_is():
    _, embedder = fresh_models()
    transformer = tiny_transformer()
    latents, timesteps, labels = make_latents(), torch.tensor([300.0, 700.0]), torch.tensor([1, 10])
    prior_tokens = embedder(make_latents(seed=1)).prior_tokens
    assert prior_tokens.abs().max() == 0
    with_prior = transformer(latents, timesteps, labels, prior_tokens).sample
    assert torch.equal(with_prior, transformer(latents, timesteps, labels).sample)


@torch.no_grad()
def test_transformer_hears_the_embedder():
    transformer, embedder = tiny_transformer(), tiny_embedder()
    latents, timesteps, labels = make_latents(), torch.tensor([300.0, 700.0]), torch.tensor([1, 10])
    outputs = [
        transformer(latents, timesteps, labels, embedder(make_latents(seed=seed)).prior_tokens).sample
        for seed in (1, 2)
    ]
    assert (outputs[0] - outputs[1]).abs().amax(dim=(1, 2, 3)).min() > 1e-2


def test_joint_loss_trains_every_parameter_of_both_models():
    """Zero starts open one after the other: output, then modulation and prior projection, then all the rest."""
    transformer, embedder = fresh_models()
    models = {"transformer": transformer, "embedder": embedder}
    optimizer = torch.optim.AdamW([*transformer.parameters(), *embedder.parameters()], lr=1e-2)
    latents, labels = make_latents(11), torch.arange(11)  # all classes and the null class
    trained = []
    for step in range(4):
        example = flow_example(latents, make_latents(11, seed=step + 1), torch.linspace(0.1, 0.9, 11))
        loss = dod_loss(transformer, embedder, latents, labels, example, num_prior_rows=6)
        optimizer.zero_grad()
        loss.total.backward()
        trained.append(
            {
                f"{side}.{name}"
                for side, model in models.items()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None and parameter.grad.abs().max() > 0
            }
        )
        optimizer.step()
    assert trained[0] == {"transformer.proj_out.weight", "transformer.proj_out.bias"}
    assert {"embedder.proj_out.weight", "embedder.proj_out.bias"} <= trained[1]
    everything = {f"{side}.{name}" for side, model in models.items() for name, _ in model.named_parameters()}
    assert trained[3] == everything


def test_rows_without_prior_send_the_embedder_no_gradient():
    transformer, embedder = tiny_transformer(), tiny_embedder()
    latents = make_latents(4)
    example = flow_example(latents, make_latents(4, seed=1), torch.linspace(0.1, 0.9, 4))
    labels = torch.arange(4)
    dod_loss(transformer, embedder, latents, labels, example, num_prior_rows=0).total.backward()
    assert all(parameter.grad is None for parameter in embedder.parameters())
    assert transformer.patch_embed.weight.grad.abs().max() > 0
