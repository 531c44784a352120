"""`DoDTransformer2DModel`: its mathematics, what the prior does to it, and what it refuses."""

import math

import pytest
import torch
from helpers import tiny_transformer
from plain_models import plain_transformer

from diffusers_dod import DoDTransformer2DModel


# Every switch as in DiT
DIT = {
    "pos_embed_type": "sincos",
    "base_size": 4,
    "activation_fn": "gelu-approximate",
    "qk_norm": None,
    "adaln_type": "full",
}

# Every switch of the architecture as in JiT
JIT = {
    "pos_embed_type": "rope_sincos",
    "base_size": 4,
    "norm_type": "rms_norm",
    "qk_norm": "rms_norm",
    "adaln_type": "full",
    "patch_bottleneck_dim": 6,
    "in_context_len": 3,
    "in_context_start": 1,
}


def make_inputs(batch=2, channels=4, height=8, width=8, num_classes=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, channels, height, width, generator=generator)
    timesteps = 1000 * torch.rand(batch, generator=generator)
    labels = torch.randint(num_classes + 1, (batch,), generator=generator)
    return latents, timesteps, labels


def make_prior(batch=2, tokens=16, dim=16, seed=1):
    return torch.randn(batch, tokens, dim, generator=torch.Generator().manual_seed(seed))


# --- the mathematics


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"patch_size": 1, "num_attention_heads": 3, "attention_head_dim": 4},
        {"out_channels": 8, "adaln_rank": 3, "mlp_ratio": 2.0, "rope_theta": 100.0},
        {"timestep_offset": 1.0, "timestep_scale": -0.001},
        {"pos_embed_type": "sincos", "base_size": 4, "attention_head_dim": 6},
        {"activation_fn": "gelu-approximate", "mlp_ratio": 3.0},
        {"qk_norm": None},
        {"adaln_type": "full"},
        {"norm_type": "rms_norm"},
        {"qk_norm": "rms_norm"},
        {"pos_embed_type": "rope_sincos", "base_size": 4},
        {"patch_bottleneck_dim": 3},
        {"in_context_len": 3, "in_context_start": 1},
        {"in_context_len": 2, "pos_embed_type": "sincos"},
        DIT,
        JIT,
    ],
)
@pytest.mark.parametrize("size", [(8, 8), (4, 10)])
@pytest.mark.parametrize("with_prior", [False, True])
@torch.no_grad()
def test_forward_equals_the_plain_computation(overrides, size, with_prior):
    model = tiny_transformer(**overrides)
    inputs = make_inputs(3, 4, *size)
    prior = None
    if with_prior:
        tokens = size[0] * size[1] // model.config.patch_size**2
        prior = make_prior(3, tokens, model.inner_dim)
    output = model(*inputs, encoder_hidden_states=prior).sample
    expected = plain_transformer(model.config, model.state_dict(), *inputs, prior)
    torch.testing.assert_close(output, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_timestep_embedding_has_cosines_first():
    timesteps = torch.tensor([0.0, 17.5, 1000.0])
    embedding = tiny_transformer().time_proj(timesteps)
    assert embedding.shape == (3, 256)
    for i, timestep in enumerate(timesteps.tolist()):
        for channel in (0, 1, 64, 127):
            angle = timestep * 10000 ** (-channel / 128)
            assert embedding[i, channel].item() == pytest.approx(math.cos(angle), abs=2e-4)
            assert embedding[i, 128 + channel].item() == pytest.approx(math.sin(angle), abs=2e-4)


@torch.no_grad()
def test_timestep_map():
    latents, timesteps, labels = make_inputs()
    identity = tiny_transformer()
    mirrored = tiny_transformer(timestep_offset=1.0, timestep_scale=-0.001)
    mirrored.load_state_dict(identity.state_dict())
    output = mirrored(latents, timesteps, labels).sample
    torch.testing.assert_close(output, identity(latents, 1 - timesteps / 1000, labels).sample)
    assert (output - identity(latents, timesteps, labels).sample).abs().max() > 1e-3


# --- shapes


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (4, 12), (12, 4), (2, 2)])
@pytest.mark.parametrize("out_channels", [None, 8])
@torch.no_grad()
def test_output_shape(size, out_channels):
    model = tiny_transformer(out_channels=out_channels)
    latents, timesteps, labels = make_inputs(3, 4, *size)
    output = model(latents, timesteps, labels)
    assert output.sample.shape == (3, out_channels or 4, *size)
    as_tuple = model(latents, timesteps, labels, return_dict=False)
    assert len(as_tuple) == 1 and torch.equal(as_tuple[0], output.sample)


@pytest.mark.parametrize("sample_size", [8, (4, 12)])
def test_sample_size_is_kept_in_the_config(sample_size, tmp_path):
    tiny_transformer(sample_size=sample_size).save_pretrained(tmp_path)
    loaded = DoDTransformer2DModel.from_pretrained(tmp_path).config.sample_size
    assert loaded == sample_size if isinstance(sample_size, int) else tuple(loaded) == sample_size


@pytest.mark.parametrize("num_classes", [0, 1, 7])
@torch.no_grad()
def test_every_class_and_the_null_class(num_classes):
    model = tiny_transformer(num_classes=num_classes)
    latents = make_inputs(1)[0].expand(num_classes + 1, -1, -1, -1)
    outputs = model(latents, torch.full((num_classes + 1,), 500.0), torch.arange(num_classes + 1)).sample
    for i, output in enumerate(outputs):
        for other in outputs[:i]:
            assert (output - other).abs().max() > 1e-3
    with pytest.raises(IndexError):
        model(latents[:1], torch.tensor([500.0]), torch.tensor([num_classes + 1]))


@torch.no_grad()
def test_scalar_timestep_is_every_rows_timestep():
    model = tiny_transformer()
    latents, _, labels = make_inputs()
    expected = model(latents, torch.tensor([300.0, 300.0]), labels).sample
    for timestep in (torch.tensor(300.0), torch.tensor([300.0]), torch.tensor(300)):
        assert torch.equal(model(latents, timestep, labels).sample, expected)
    assert (model(latents, torch.tensor([300.0, 700.0]), labels).sample - expected)[1].abs().max() > 1e-3


@torch.no_grad()
def test_rows_are_independent():
    model = tiny_transformer()
    latents, timesteps, labels = make_inputs(3)
    prior = make_prior(3)
    together = model(latents, timesteps, labels, prior).sample
    for i in range(3):
        row = slice(i, i + 1)
        alone = model(latents[row], timesteps[row], labels[row], prior[row]).sample
        torch.testing.assert_close(alone, together[row], atol=1e-5, rtol=1e-4)


# --- the prior


@torch.no_grad()
def test_prior_changes_the_output():
    model = tiny_transformer()
    inputs = make_inputs()
    without = model(*inputs).sample
    one, other = (model(*inputs, encoder_hidden_states=make_prior(seed=seed)).sample for seed in (1, 2))
    for difference in (one - without, other - without, one - other):
        assert (difference.abs().amax(dim=(1, 2, 3)) > 1e-2).all()


@torch.no_grad()
def test_prior_reaches_its_own_token():
    """Token by token, before attention mixes them: the prior of a patch adds to that very patch."""
    model = tiny_transformer(num_layers=0)
    inputs = make_inputs()
    prior = torch.zeros(2, 16, 16)
    prior[:, 6] = make_prior()[:, 6]  # row 1, column 2 of the 4x4 grid
    difference = (model(*inputs, encoder_hidden_states=prior).sample - model(*inputs).sample).abs().amax(dim=(0, 1))
    assert (difference[2:4, 4:6] > 0).all()
    difference[2:4, 4:6] = 0
    assert difference.max() == 0


@torch.no_grad()
def test_zero_prior_equals_none_exactly():
    model = tiny_transformer()
    inputs = make_inputs()
    assert torch.equal(model(*inputs, encoder_hidden_states=torch.zeros(2, 16, 16)).sample, model(*inputs).sample)


@torch.no_grad()
def test_prior_does_not_leak_into_rows_without_one():
    model = tiny_transformer()
    inputs = make_inputs(4)
    without = model(*inputs).sample
    for seed in (1, 2):
        prior = make_prior(4, seed=seed)
        prior[2:] = 0
        mixed = model(*inputs, encoder_hidden_states=prior).sample
        assert torch.equal(mixed[2:], without[2:])
        assert (mixed[:2] - without[:2]).abs().max() > 1e-2


# --- how it starts


@pytest.mark.parametrize("overrides", [{}, DIT, JIT])
def test_fresh_model_predicts_zero_with_and_without_prior(overrides):
    model = DoDTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, num_classes=10, **overrides
    )
    inputs = make_inputs()
    assert model(*inputs).sample.abs().max() == 0
    assert model(*inputs, encoder_hidden_states=make_prior()).sample.abs().max() == 0
    if model.config.in_context_len:
        assert 0.01 < model.in_context_embed.std() < 0.03


@pytest.mark.parametrize("overrides", [{}, DIT])
def test_initialization(overrides):
    torch.manual_seed(0)
    model = DoDTransformer2DModel(
        num_layers=1, num_attention_heads=8, attention_head_dim=32, num_classes=100, **overrides
    )
    parameters = dict(model.named_parameters())
    zero = {"adaln_global", "adaln_out", "proj_out", "transformer_blocks.0.adaln_up", "transformer_blocks.0.adaln"}
    small = {"time_embed.linear_1", "time_embed.linear_2", "class_embed"}
    for name, parameter in parameters.items():
        module, kind = name.rsplit(".", 1)
        if kind == "bias" or module in zero:
            assert parameter.abs().max() == 0, name
        elif module in small:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert parameter.abs().max().item() <= bound + 1e-6, name
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06), name


@pytest.mark.parametrize(
    ("overrides", "millions"),
    [
        ({}, 671),
        ({"num_layers": 15, "num_attention_heads": 12, "attention_head_dim": 64}, 128),
        ({"num_layers": 40, "num_attention_heads": 24, "attention_head_dim": 96}, 2971),
    ],
)
def test_parameter_counts(overrides, millions):
    with torch.device("meta"):
        model = DoDTransformer2DModel(**overrides)
    assert int(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions
    width = model.config.num_attention_heads * model.config.attention_head_dim
    assert model.transformer_blocks[0].adaln_down.out_features == width // 4


# --- class tokens and noise of another scale


@pytest.mark.parametrize("layer", [1, 2])
@torch.no_grad()
def test_hidden_states_are_those_of_the_latents_tokens(layer):
    """Class tokens come before the second block and are in no output."""
    model, inputs = tiny_transformer(**JIT), make_inputs()
    hidden_states = model(*inputs, hidden_states_layer=layer).hidden_states
    assert hidden_states.shape == (2, 16, 16)
    expected = []
    hook = model.transformer_blocks[layer - 1].register_forward_hook(lambda *call: expected.append(call[-1]))
    model(*inputs)
    hook.remove()
    assert expected[0].shape == (2, 16 + 3 * (layer - 1), 16)
    assert torch.equal(hidden_states, expected[0][:, -16:])


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("x_prediction", [False, True])
@torch.no_grad()
def test_noise_scale_is_a_change_of_variables(scale, x_prediction):
    """What the network makes of data and its own noise, said of data and unit noise: the clean sample is the same."""
    config = {"prediction_type": "flow", "x_prediction": x_prediction, "timestep_scale": 0.001}
    network, model = tiny_transformer(**config), tiny_transformer(**config, noise_scale=scale)
    data, _, labels = make_inputs(3)
    noise, _, _ = make_inputs(3, seed=1)
    sigma = torch.tensor([0.1, 0.5, 0.9]).view(-1, 1, 1, 1)
    own = (1 - sigma) * data + sigma * scale * noise
    own_velocity = network(own, 1000 * sigma.flatten(), labels).sample
    factor = 1 - sigma + scale * sigma
    unit_sigma = scale * sigma / factor
    velocity = model(own / factor, 1000 * unit_sigma.flatten(), labels).sample
    torch.testing.assert_close(own / factor - unit_sigma * velocity, own - sigma * own_velocity)
    # From either the other end of the path is the same noise, in its own unit.
    torch.testing.assert_close(
        scale * (own / factor + (1 - unit_sigma) * velocity), own + (1 - sigma) * own_velocity, rtol=1e-4, atol=1e-4
    )


def test_what_goes_with_class_tokens_and_noise_scale():
    with pytest.raises(ValueError, match="`noise_scale` needs `prediction_type='flow'`"):
        tiny_transformer(noise_scale=2.0, prediction_type="epsilon")
    with pytest.raises(ValueError, match="`in_context_start` is 2, but there are 2 blocks"):
        tiny_transformer(in_context_len=1, in_context_start=2)


# --- what it refuses


@pytest.mark.parametrize("size", [(8, 9), (7, 8)])
def test_a_size_the_patch_does_not_divide(size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}.*multiples of 2"):
        tiny_transformer()(*make_inputs(2, 4, *size))


@pytest.mark.parametrize("shape", [(2, 15, 16), (2, 16, 8), (1, 16, 16), (2, 16, 1), (16, 16)])
def test_prior_tokens_that_do_not_fit(shape):
    with pytest.raises(ValueError, match="Prior tokens.*output_dim.*output_patch_size"):
        tiny_transformer()(*make_inputs(), encoder_hidden_states=torch.zeros(shape))


@pytest.mark.parametrize("head_dim", [2, 6, 9])
def test_head_dim_that_is_no_multiple_of_4(head_dim):
    with pytest.raises(ValueError, match=f"attention_head_dim.*{head_dim}.*multiple of 4"):
        tiny_transformer(attention_head_dim=head_dim)


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="prediction_type.*velocity.*'flow'"):
        tiny_transformer(prediction_type="velocity")


@pytest.mark.parametrize("name", ["pos_embed_type", "activation_fn", "norm_type", "qk_norm", "adaln_type"])
def test_unknown_switch(name):
    with pytest.raises(ValueError, match=f"`{name}` is 'other'; use '"):
        tiny_transformer(**{name: "other"})


def test_width_that_sine_cosine_positions_cannot_fill():
    with pytest.raises(ValueError, match="width is 6.*sine-cosine.*multiple of 4"):
        tiny_transformer(pos_embed_type="sincos", num_attention_heads=2, attention_head_dim=3)


@pytest.mark.parametrize("prediction_type", [None, "flow", "epsilon", "v_prediction", "sample"])
@torch.no_grad()
def test_prediction_type_does_not_change_the_computation(prediction_type):
    inputs = make_inputs()
    model = tiny_transformer(prediction_type=prediction_type)
    assert torch.equal(model(*inputs).sample, tiny_transformer()(*inputs).sample)
    assert model.config.prediction_type == prediction_type
