"""`convert_backbone`: stage 1 of the converted model computes what the original does, alone and in a sampler."""

import diffusers
import numpy as np
import pytest
import torch
from helpers import tiny_embedder, tiny_pipeline, tiny_vae
from original_models import diffusers_dit, load_original, relative_error
from peft import LoraConfig

from diffusers_dod import DoDTransformer2DModel
from diffusers_dod.conversion import convert_backbone
from diffusers_dod.conversion.backbones import convert_checkpoint
from diffusers_dod.conversion.converting import make_scheduler
from diffusers_dod.layers import sincos_embedding_2d
from diffusers_dod.training.objective import dod_loss, flow_example


# --- the outputs


@pytest.mark.parametrize("name", ["sit", "sit_learned_sigma"])
@torch.no_grad()
def test_sit(name):
    original = load_original(name)
    model = original.convert()
    latents, time, labels, velocity = (original.tensors[key] for key in ("latents", "time", "class_labels", "output"))
    assert {time.min().item() < 0.01, time.max().item() > 0.99, model.config.num_classes in labels} == {True}
    # Its time runs from noise to data, ours from data to noise.
    assert relative_error(model(latents, 1000 * (1 - time), labels).sample, -velocity) < 1e-5
    assert model.config.prediction_type == "flow" and model.config.out_channels is None


@torch.no_grad()
def test_repa():
    """Its projectors are dropped; its time and velocity run as ours do (its `loss.py`), unlike SiT's."""
    original = load_original("repa")
    assert any(name.startswith("projectors.") for name in original.weights)
    model = original.convert()
    latents, time, labels, velocity = (original.tensors[key] for key in ("latents", "time", "class_labels", "output"))
    assert relative_error(model(latents, 1000 * time, labels).sample, velocity) < 1e-5
    assert model.config.prediction_type == "flow"


def test_repas_first_layout():
    """Two of the three blocks come before the projector, the third is then counted anew."""
    original = load_original("repa")
    renamed = {name.replace("blocks.2.", "decoder_blocks.0."): tensor for name, tensor in original.weights.items()}
    assert "decoder_blocks.0.attn.qkv.weight" in renamed
    state, expected = original.convert(renamed).state_dict(), original.convert().state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize(("name", "channels"), [("dit", 4), ("dit_learned_sigma", 8)])
@torch.no_grad()
def test_dit(name, channels):
    original = load_original(name)
    model = original.convert()
    latents, time, labels, output = (original.tensors[key] for key in ("latents", "time", "class_labels", "output"))
    assert output.shape[1] == channels and {1, 998} < set(time.tolist()) and model.config.num_classes in labels
    assert relative_error(model(latents, time, labels).sample, output) < 1e-5
    assert model.config.prediction_type == "epsilon"


@pytest.mark.parametrize("name", ["fitv2", "fitv2_full_gelu"])
@pytest.mark.parametrize("shape", ["square", "rectangular"])
@torch.no_grad()
def test_fitv2(name, shape):
    original = load_original(name)
    model = original.convert()
    latents, time, labels, velocity = (
        original.tensors[f"{shape}.{key}"] for key in ("latents", "time", "class_labels", "output")
    )
    assert (latents.shape[2] == latents.shape[3]) == (shape == "square")
    assert relative_error(model(latents, 1000 * (1 - time), labels).sample, -velocity) < 1e-5
    assert model.config.prediction_type == "flow"


@pytest.mark.parametrize("name", ["lightningdit", "lightningdit_qk_norm"])
@torch.no_grad()
def test_lightningdit(name):
    original = load_original(name)
    model = original.convert()
    latents, time, labels, velocity = (original.tensors[key] for key in ("latents", "time", "class_labels", "output"))
    assert {time.min().item() < 0.01, time.max().item() > 0.99, model.config.num_classes in labels} == {True}
    assert relative_error(model(latents, 1000 * (1 - time), labels).sample, -velocity) < 1e-5
    assert (model.config.prediction_type, model.config.norm_type) == ("flow", "rms_norm")


@torch.no_grad()
def test_repae():
    """As REPA's; the statistics of its batch norm are the autoencoder's."""
    original = load_original("repae")
    model, _, stats = convert_checkpoint(original.weights, "sit", **original.options)
    latents, time, labels, velocity = (original.tensors[key] for key in ("latents", "time", "class_labels", "output"))
    assert {time.min().item() < 0.01, time.max().item() > 0.99, model.config.num_classes in labels} == {True}
    assert relative_error(model(latents, 1000 * time, labels).sample, velocity) < 1e-5
    mean, std = (torch.tensor(stats[f"latents_{name}"]).view(1, -1, 1, 1) for name in ("mean", "std"))
    endpoint, denormalized = (original.tensors[f"sampling.{key}"] for key in ("endpoint", "denormalized"))
    assert relative_error(endpoint * std + mean, denormalized) < 1e-6


def test_repae_without_its_projectors():
    """Batch norm alone tells REPA-E's direction of time."""
    original = load_original("repae")
    weights = {name: tensor for name, tensor in original.weights.items() if not name.startswith("projectors.")}
    assert len(weights) < len(original.weights)
    assert original.convert(weights).config == original.convert().config


@pytest.mark.parametrize("name", ["jit", "jit_noise_scale"])
@torch.no_grad()
def test_jit(name):
    """The network's output is the clean image, `forward`'s the velocity; with noise of another scale, that of unit noise."""
    original = load_original(name)
    model = original.convert()
    noisy, time, labels, velocity = (original.tensors[key] for key in ("latents", "time", "class_labels", "velocity"))
    scale, sigma = model.config.noise_scale, (1 - time).view(-1, 1, 1, 1)
    assert {time.min().item() < 0.01, time.max().item() > 0.99, model.config.num_classes in labels} == {True}
    assert scale == {"jit": 1.0, "jit_noise_scale": 2.0}[name]
    # The same point between data and unit noise, and the clean image that the original's velocity leads to
    unit_sigma = scale * sigma / (1 - sigma + scale * sigma)
    unit_noisy, clean = noisy / (1 - sigma + scale * sigma), noisy + sigma * velocity
    expected = -velocity if scale == 1 else (unit_noisy - clean) / unit_sigma
    assert relative_error(model(unit_noisy, 1000 * unit_sigma.flatten(), labels).sample, expected) < 1e-5


def test_noise_scale_of_jit():
    """By default as published: 2 at 512 pixels, 1 at 256 and below."""
    original = load_original("jit")
    config = original.convert().config
    assert (config.sample_size, config.patch_size, config.noise_scale) == (8, 4, 1.0)
    weights = {**original.weights, "net.pos_embed": sincos_embedding_2d(128, 128, 16, 128, "cpu").unsqueeze(0)}
    config = original.convert(weights).config
    assert (config.sample_size, config.base_size, config.noise_scale) == (512, 128, 2.0)
    assert original.convert(noise_scale=1.5).config.noise_scale == 1.5
    with pytest.raises(ValueError, match="`noise_scale` is JiT's"):
        load_original("sit").convert(noise_scale=2.0)


@pytest.mark.parametrize("out_channels", [None, 8])
@pytest.mark.parametrize("size", [8, 12])
@torch.no_grad()
def test_diffusers_dit(out_channels, size):
    """As the original DiT computes. Another square size than its own is interpolated; rectangles it cannot put together."""
    reference = diffusers_dit(out_channels=out_channels)
    model = convert_backbone(reference.state_dict(), "dit", num_attention_heads=2, sample_size=8)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 4, size, size, generator=generator)
    time, labels = torch.tensor([1, 1, 500, 500, 998, 998]), torch.tensor([1, 10, 4, 10, 7, 10])
    expected = reference(latents, time, labels).sample
    assert expected.shape[1] == (out_channels or 4)
    # Tighter than for the others, since the class's own epsilon in the feed-forward's norm makes 2e-6.
    assert relative_error(model(latents, time, labels).sample, expected) < 1e-6
    assert model.config.prediction_type == "epsilon"


# --- what is inferred from the tensors


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "sit",
            {"sample_size": 16, "base_size": 4, "patch_size": 4, "num_layers": 3, "num_classes": 7, "mlp_ratio": 2.0},
        ),
        ("repa", {"sample_size": 8, "base_size": 4, "patch_size": 2, "num_layers": 3, "num_classes": 10}),
        ("dit_learned_sigma", {"out_channels": 8, "activation_fn": "gelu-approximate", "pos_embed_type": "sincos"}),
        ("fitv2", {"activation_fn": "swiglu", "adaln_type": "low_rank", "adaln_rank": 8, "qk_norm": "layer_norm"}),
        ("fitv2", {"sample_size": 32, "pos_embed_type": "rope", "patch_size": 2, "mlp_ratio": 4.0}),
        ("fitv2_full_gelu", {"activation_fn": "gelu-approximate", "adaln_type": "full", "mlp_ratio": 4.0}),
        (
            "lightningdit",
            {"activation_fn": "swiglu", "pos_embed_type": "rope_sincos", "base_size": 4, "qk_norm": None},
        ),
        ("lightningdit_qk_norm", {"norm_type": "rms_norm", "qk_norm": "rms_norm", "in_channels": 8, "patch_size": 1}),
        ("repae", {"sample_size": 4, "in_channels": 8, "pos_embed_type": "sincos", "timestep_scale": 0.001}),
        ("jit", {"patch_bottleneck_dim": 8, "in_context_len": 3, "in_context_start": 1, "x_prediction": True}),
    ],
)
def test_config(name, expected):
    config = load_original(name).convert().config
    assert {key: config[key] for key in expected} == expected


def test_what_lightningdits_tables_tell():
    """The head count; the channels are those of the patch embedding."""
    original = load_original("lightningdit")
    model, *_ = convert_checkpoint(original.weights, "lightningdit")
    assert (model.config.num_attention_heads, model.config.in_channels) == (2, 8)


LIGHTNINGDIT = {"pos_embed_type": "rope_sincos", "norm_type": "rms_norm", "qk_norm": None, "adaln_type": "full"}
SIT = {"pos_embed_type": "sincos", "activation_fn": "gelu-approximate", "qk_norm": None, "adaln_type": "full"}
JIT = LIGHTNINGDIT | {"qk_norm": "rms_norm", "in_channels": 3, "in_context_len": 32, "patch_bottleneck_dim": 128}


@pytest.mark.parametrize(
    ("switches", "patch_size", "layers", "width", "heads", "millions", "count"),
    [
        (LIGHTNINGDIT | {"in_channels": 32}, 1, 28, 1152, 16, 675, 674_961_824),  # XL/1
        (LIGHTNINGDIT | {"in_channels": 32}, 1, 12, 768, 12, 130, 130_359_584),  # B/1
        (SIT | {"in_channels": 32}, 1, 28, 1152, 16, 675, 674_853_152),  # REPA-E's XL/1
        (SIT | {"in_channels": 4}, 2, 28, 1152, 16, 675, 674_816_272),  # REPA-E's XL/2
        (JIT | {"in_context_start": 4}, 16, 12, 768, 12, 131, 131_123_712),  # B/16
        (JIT | {"in_context_start": 4}, 32, 12, 768, 12, 133, 133_190_400),
        (JIT | {"in_context_start": 8}, 16, 24, 1024, 16, 459, 458_877_664),
        (JIT | {"in_context_start": 8}, 32, 24, 1024, 16, 462, 461_534_176),
        (JIT | {"in_context_start": 10, "patch_bottleneck_dim": 256}, 16, 32, 1280, 16, 953, 952_514_368),
        (JIT | {"in_context_start": 10, "patch_bottleneck_dim": 256}, 32, 32, 1280, 16, 956, 956_055_616),
    ],
)
def test_published_sizes(switches, patch_size, layers, width, heads, millions, count):
    """To the parameter what the original repositories' constructors make, REPA-E's projectors aside."""
    sizes = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": width // heads}
    with torch.device("meta"):
        model = DoDTransformer2DModel(patch_size=patch_size, **sizes, **switches)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (parameters, round(parameters / 1e6)) == (count, millions)


@pytest.mark.parametrize("hidden", [85, 64, 127, 100])
@torch.no_grad()
def test_any_feed_forward_width(hidden):
    """FiT's SwiGLU of another width, such as its `use_swiglu_large`; 32 is the width of the model."""
    original = load_original("fitv2")
    weights = dict(original.weights)
    for name, tensor in weights.items():
        if ".mlp.fc1" in name:
            weights[name] = torch.randn(hidden, *tensor.shape[1:])
        elif name.endswith(".mlp.fc2.weight"):
            weights[name] = torch.randn(tensor.shape[0], hidden)
    model = original.convert(weights)
    assert model.transformer_blocks[0].ff.net[2].in_features == hidden


def test_sample_size_can_be_chosen():
    """It is the default size only: sine-cosine positions stay those of the checkpoint."""
    model = load_original("sit_learned_sigma").convert(sample_size=16)
    assert (model.config.sample_size, model.config.base_size) == (16, 4)


def test_the_checkpoint_is_left_alone():
    original = load_original("sit")
    before = {name: tensor.clone() for name, tensor in original.weights.items()}
    model = original.convert()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert list(original.weights) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.weights.items())


def test_saving(tmp_path):
    model = load_original("fitv2").convert()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


# --- in a sampler


@pytest.mark.parametrize("name", ["sit", "sit_learned_sigma"])
def test_sit_with_the_flow_scheduler_is_the_euler_loop(name):
    original = load_original(name)
    noise, labels, sigmas, endpoint = (
        original.tensors[f"sampling.{key}"] for key in ("noise", "class_labels", "sigmas", "endpoint")
    )
    model, channels = original.convert(), noise.shape[1]
    embedder = tiny_embedder(in_channels=channels, output_dim=model.inner_dim, patch_size=model.config.patch_size)
    pipe = tiny_pipeline(transformer=model, latent_embedder=embedder, scheduler=make_scheduler(model, "sit"))
    classes = [None if label == model.config.num_classes else label for label in labels.tolist()]
    assert None in classes and len(sigmas) == 26
    output = pipe(
        classes, num_stages=1, num_inference_steps=25, guidance_scale=1.0, latents=noise, output_type="latent"
    ).images
    torch.testing.assert_close(pipe.scheduler.sigmas, sigmas)
    assert relative_error(output, endpoint) < 1e-4


@pytest.mark.parametrize("name", ["lightningdit", "lightningdit_qk_norm", "repae", "jit", "jit_noise_scale"])
@torch.no_grad()
def test_the_scheduler_takes_the_steps_of_the_original_sampler(name):
    """25 even steps of the source's own time: LightningDiT's are shifted, JiT's start from its own scale of noise."""
    original = load_original(name)
    latents, labels, endpoint = (original.tensors[f"sampling.{key}"] for key in ("noise", "class_labels", "endpoint"))
    model = original.convert()
    scheduler = make_scheduler(model, original.source)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 25, 25))
    assert model.config.num_classes in labels
    for timestep in scheduler.timesteps:
        velocity = model(latents, timestep, labels).sample
        latents = scheduler.step(velocity, timestep, latents).prev_sample
    assert relative_error(latents, endpoint) < 1e-4


@pytest.mark.parametrize("out_channels", [4, 8])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_dit_with_ddim_is_diffusers_pipeline(out_channels, guidance_scale):
    reference = diffusers_dit(num_classes=1000, out_channels=out_channels)  # its pipeline's null class is always 1000
    vae = tiny_vae()
    model = convert_backbone(reference.state_dict(), "dit", num_attention_heads=2, sample_size=8)
    # The noise that DiT was trained with; its latents have no range to clip to.
    noise = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
    theirs = diffusers.DiTPipeline(reference, vae, diffusers.DDIMScheduler(**noise, clip_sample=False))
    theirs.set_progress_bar_config(disable=True)
    embedder = tiny_embedder(output_dim=model.inner_dim)
    ours = tiny_pipeline(transformer=model, latent_embedder=embedder, scheduler=make_scheduler(model, "dit"), vae=vae)

    options = {"class_labels": [3, 207], "num_inference_steps": 10, "guidance_scale": guidance_scale}
    expected = theirs(**options, generator=torch.manual_seed(5), output_type="np").images
    images = ours(
        **options,
        num_stages=1,
        guidance_interval=(0.0, 1.0),
        generator=torch.manual_seed(5),
        output_type="np",
    ).images
    assert expected.shape == (2, 16, 16, 3) and expected.std() > 0.05
    assert abs(images - expected).max() < 1e-4


# --- trained further


@pytest.mark.parametrize("name", ["sit_learned_sigma", "dit_learned_sigma", "fitv2", "lightningdit_qk_norm", "jit"])
@pytest.mark.parametrize("lora", [False, True])
def test_training_goes_on(name, lora):
    """Everything, or the embedder and a LoRA only: what should be trained gets a gradient."""
    model = load_original(name).convert().train()
    config = {key: model.config[key] for key in ("in_channels", "patch_size", "sample_size")}
    embedder = tiny_embedder(output_dim=model.inner_dim, **config).train()
    if lora:
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, model.config.in_channels, 8, 8, generator=generator)
    example = flow_example(latents, noise, torch.tensor([0.1, 0.5, 0.7, 0.9]))
    dod_loss(
        model, embedder, latents, torch.tensor([1, 2, model.config.num_classes, 4]), example, num_prior_rows=2
    ).total.backward()
    for parameter_name, parameter in [*model.named_parameters(), *embedder.named_parameters()]:
        assert parameter.requires_grad == (parameter.grad is not None), parameter_name
    trained = [parameter_name for parameter_name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in parameter_name for parameter_name in trained) == lora
