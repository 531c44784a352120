"""`convert_backbone`: stage 1 of the converted model computes what the original does, alone and in a sampler."""

import diffusers
import pytest
import torch
from helpers import tiny_embedder, tiny_pipeline, tiny_vae
from original_models import diffusers_dit, load_original, relative_error
from peft import LoraConfig

from diffusers_dod.conversion import convert_backbone
from diffusers_dod.conversion.converting import make_scheduler
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


@pytest.mark.parametrize("out_channels", [None, 8])
@pytest.mark.parametrize("size", [8, 12])
@torch.no_grad()
def test_diffusers_dit(out_channels, size):
    """Another square size than its own is interpolated; rectangles it cannot put together."""
    reference = diffusers_dit(out_channels=out_channels)
    model = convert_backbone(reference.state_dict(), "diffusers-dit", num_attention_heads=2, sample_size=8)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 4, size, size, generator=generator)
    time, labels = torch.tensor([1, 1, 500, 500, 998, 998]), torch.tensor([1, 10, 4, 10, 7, 10])
    expected = reference(latents, time, labels).sample
    assert expected.shape[1] == (out_channels or 4)
    # Tighter than for the others, since the wrong epsilon in the feed-forward's norm makes 2e-6.
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
    ],
)
def test_config(name, expected):
    config = load_original(name).convert().config
    assert {key: config[key] for key in expected} == expected


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
    pipe = tiny_pipeline(transformer=model, latent_embedder=embedder, scheduler=make_scheduler(model))
    classes = [None if label == model.config.num_classes else label for label in labels.tolist()]
    assert None in classes and len(sigmas) == 26
    output = pipe(
        classes, num_stages=1, num_inference_steps=25, guidance_scale=1.0, latents=noise, output_type="latent"
    ).images
    torch.testing.assert_close(pipe.scheduler.sigmas, sigmas)
    assert relative_error(output, endpoint) < 1e-4


@pytest.mark.parametrize("out_channels", [4, 8])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_dit_with_ddim_is_diffusers_pipeline(out_channels, guidance_scale):
    reference = diffusers_dit(num_classes=1000, out_channels=out_channels)  # its pipeline's null class is always 1000
    vae = tiny_vae()
    model = convert_backbone(reference.state_dict(), "diffusers-dit", num_attention_heads=2, sample_size=8)
    # The noise that DiT was trained with; its latents have no range to clip to.
    noise = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
    theirs = diffusers.DiTPipeline(reference, vae, diffusers.DDIMScheduler(**noise, clip_sample=False))
    theirs.set_progress_bar_config(disable=True)
    embedder = tiny_embedder(output_dim=model.inner_dim)
    ours = tiny_pipeline(transformer=model, latent_embedder=embedder, scheduler=make_scheduler(model), vae=vae)

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


@pytest.mark.parametrize("name", ["sit_learned_sigma", "dit_learned_sigma", "fitv2"])
@pytest.mark.parametrize("lora", [False, True])
def test_training_goes_on(name, lora):
    """Everything, or the embedder and a LoRA only: what should be trained gets a gradient."""
    model, embedder = load_original(name).convert().train(), tiny_embedder(output_dim=32).train()
    if lora:
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 8, 8, generator=generator)
    example = flow_example(latents, noise, torch.tensor([0.1, 0.5, 0.7, 0.9]))
    dod_loss(model, embedder, latents, torch.tensor([1, 2, 10, 4]), example, num_prior_rows=2).total.backward()
    for parameter_name, parameter in [*model.named_parameters(), *embedder.named_parameters()]:
        assert parameter.requires_grad == (parameter.grad is not None), parameter_name
    trained = [parameter_name for parameter_name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora_" in parameter_name for parameter_name in trained) == lora
