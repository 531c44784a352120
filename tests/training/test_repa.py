"""Representation alignment: features of real vision transformers, hidden states of ours, and the loss between them."""

import multiprocessing

import numpy as np
import PIL.Image
import pytest
import torch
import torch.distributed as dist
import transformers
from helpers import tiny_embedder, tiny_transformer
from torch.nn.parallel import DistributedDataParallel

from diffusers_dod.processes import drain_process_group
from diffusers_dod.training.objective import dod_loss, flow_example
from diffusers_dod.training.repa import REPAEncoder, REPAProjector, repa_loss


SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
# Model, its configuration, its image processor, patch, and tokens in front of the patches
ENCODERS = {
    "dinov2": ("Dinov2Model", "Dinov2Config", DINO, "BitImageProcessor", 7, 1),
    "registers": (
        *("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO | {"num_register_tokens": 3}),
        *("BitImageProcessor", 7, 4),
    ),
    "vit": ("ViTModel", "ViTConfig", SIZE | {"patch_size": 8}, "ViTImageProcessor", 8, 1),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", SIZE | {"patch_size": 8}, "CLIPImageProcessor", 8, 1),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", SIZE | {"patch_size": 8}, "SiglipImageProcessor", 8, 0),
}


def save_encoder(kind, folder):
    """A vision model of random weights with its image processor; mean and std differ from channel to channel."""
    model_class, config_class, config, processor_class, _, _ = ENCODERS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**config)).eval()
    processor = getattr(transformers, processor_class)(image_mean=[0.3, 0.4, 0.6], image_std=[0.2, 0.3, 0.5])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def random_images(number, side):
    return torch.randint(256, (number, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def to_unit(pixels):
    return pixels.float() / 127.5 - 1


@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_features_are_the_patch_tokens_of_the_processors_images(kind, tmp_path):
    model, processor = save_encoder(kind, tmp_path)
    *_, config, _, patch, prefix = ENCODERS[kind]
    pixels = random_images(2, config["image_size"])
    images = [PIL.Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    inputs = processor(images, do_resize=False, do_center_crop=False, return_tensors="pt")
    expected = model(**inputs).last_hidden_state[:, prefix:]

    encoder = REPAEncoder.from_pretrained(tmp_path)
    features = encoder(to_unit(pixels), grid=(4, 4))
    assert encoder.width == 16 and features.shape == (2, 16, 16)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_any_grid_and_grayscale(kind, tmp_path):
    save_encoder(kind, tmp_path)
    encoder = REPAEncoder.from_pretrained(tmp_path)
    gray = to_unit(random_images(1, 40)[:, :1])
    for grid in ((3, 5), (2, 2), (16, 16)):
        features = encoder(gray, grid)
        assert features.shape == (1, grid[0] * grid[1], 16) and torch.isfinite(features).all()
        assert torch.equal(features, encoder(gray.expand(-1, 3, -1, -1), grid))


@pytest.mark.parametrize(
    "image, tokens, patch, side",
    [
        (256, 16, 14, 224),  # the paper's: SD-VAE latents of 256x256 with patch 2, DINOv2
        (512, 32, 14, 448),
        (256, 16, 16, 256),
        (256, 8, 14, 224),  # four patches a token
        (256, 128, 14, 252),  # more tokens than patches
        (8, 4, 14, 14),  # an image smaller than a patch
    ],
)
@torch.no_grad()
def test_the_encoder_sees_what_falls_on_the_tokens(image, tokens, patch, side, tmp_path):
    config = transformers.ViTConfig(**SIZE | {"patch_size": patch, "image_size": 2 * patch})
    encoder = REPAEncoder(transformers.ViTModel(config), [0.5] * 3, [0.5] * 3)
    seen = []
    encoder.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    encoder(torch.zeros(1, 3, image, image), (tokens, tokens))
    assert seen[0]["pixel_values"].shape == (1, 3, side, side)


@torch.no_grad()
def test_features_lie_where_their_tokens_lie(tmp_path):
    """Of four patches a token, the feature resembles its own four; a grid keeps rows and columns apart."""
    save_encoder("vit", tmp_path)
    encoder = REPAEncoder.from_pretrained(tmp_path)
    image = torch.zeros(1, 3, 32, 64)
    for column in range(4):
        image[:, :, :16, 16 * column : 16 * column + 16] = column / 2 - 1
        image[:, column % 3, 16:, 16 * column : 16 * column + 16] = 1
    fine = encoder(image, (4, 8)).unflatten(1, (4, 8))
    means = fine.unflatten(2, (4, 2)).unflatten(1, (2, 2)).mean(dim=(2, 4)).flatten(1, 2)[0]
    coarse = encoder(image, (2, 4))[0]
    assert torch.cdist(coarse, means).argmin(dim=1).tolist() == list(range(8))


@pytest.mark.parametrize(
    "model, config",
    [
        ("ResNetModel", {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}),
        ("SwinModel", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2, "image_size": 32}),
    ],
)
def test_a_model_without_its_patches_is_refused(model, config):
    model = getattr(transformers, model)(getattr(transformers, model.replace("Model", "Config"))(**config))
    with pytest.raises(ValueError, match="vision transformer"):
        REPAEncoder(model, [0.5] * 3, [0.5] * 3)(torch.zeros(1, 3, 32, 32), (4, 4))


def test_the_loss_is_the_mean_negative_cosine():
    a, b = (torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    plain = 0
    for row in range(2):
        for token in range(5):
            u, v = a[row, token].numpy(), b[row, token].numpy()
            plain -= u @ v / np.sqrt(u @ u * (v @ v)) / 10
    assert repa_loss(a, b).item() == pytest.approx(plain, rel=1e-5)
    assert repa_loss(3 * a, 0.1 * b).item() == pytest.approx(plain, rel=1e-5)
    assert repa_loss(a, 2 * a).item() == pytest.approx(-1) and repa_loss(a, -a).item() == pytest.approx(1)
    assert repa_loss(a.bfloat16(), b.half()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"\(2, 5, 7\) but the features are \(2, 1, 7\)"):
        repa_loss(a, b[:, :1])


def test_the_projector_is_the_papers_mlp(tmp_path):
    projector = REPAProjector(16, 24)
    shapes = [tuple(parameter.shape) for parameter in projector.parameters() if parameter.ndim == 2]
    assert shapes == [(2048, 16), (2048, 2048), (24, 2048)]
    x = torch.randn(2, 3, 16)
    first, second, third = (layer for layer in projector.layers if isinstance(layer, torch.nn.Linear))
    expected = third(torch.nn.functional.silu(second(torch.nn.functional.silu(first(x)))))
    torch.testing.assert_close(projector(x), expected)
    projector.save_pretrained(tmp_path)
    assert torch.equal(REPAProjector.from_pretrained(tmp_path)(x), projector(x))


def example(rows=4):
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(rows, 4, 8, 8, generator=generator) for _ in range(2))
    features = torch.randn(rows, 16, 6, generator=generator)
    return latents, torch.arange(rows), flow_example(latents, noise, torch.linspace(0.1, 0.9, rows)), features


@pytest.mark.parametrize("layer", [1, 2, 3])
@torch.no_grad()
def test_hidden_states_are_those_after_as_many_blocks(layer):
    transformer = tiny_transformer(num_layers=3)
    latents, labels, (noisy, timesteps, _), _ = example()
    outputs = []
    transformer.transformer_blocks[layer - 1].register_forward_hook(lambda _, inputs, output: outputs.append(output))
    output = transformer(noisy, timesteps, labels, hidden_states_layer=layer)
    assert torch.equal(output.hidden_states, outputs[0])
    plain = transformer(noisy, timesteps, labels)
    assert torch.equal(plain.sample, output.sample) and plain.hidden_states is None and len(plain) == 1
    assert len(transformer(noisy, timesteps, labels, return_dict=False)) == 1


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_a_layer_that_does_not_exist_is_refused(layer):
    latents, labels, (noisy, timesteps, _), _ = example()
    with pytest.raises(ValueError, match=f"`hidden_states_layer` is {layer}; choose one from 1 to 3"):
        tiny_transformer(num_layers=3)(noisy, timesteps, labels, hidden_states_layer=layer)


class Module(torch.nn.Module):
    """Models, projector and both losses in one forward, as a training wraps them."""

    def __init__(self):
        super().__init__()
        self.transformer, self.latent_embedder = tiny_transformer(num_layers=3), tiny_embedder()
        torch.manual_seed(0)
        self.projector = REPAProjector(16, 6, hidden_dim=32)
        self.train()

    def forward(self, latents, labels, batch, features):
        models = (self.transformer, self.latent_embedder)
        loss = dod_loss(*models, latents, labels, batch, len(latents) // 2, hidden_states_layer=2)
        alignment = repa_loss(self.projector(loss.hidden_states), features)
        return loss.total + 0.5 * alignment, alignment


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_alignment_reaches_the_blocks_up_to_its_layer_only():
    module = Module()
    _, alignment = module(*example())
    alignment.backward()
    grads = gradients(module)
    assert grads["transformer.transformer_blocks.1.attn.to_q.weight"].abs().max() > 0
    assert grads["latent_embedder.proj_out.weight"].abs().max() > 0
    later = ("transformer.transformer_blocks.2.", "transformer.proj_out.", "transformer.adaln_out.")
    assert all(grad is None for name, grad in grads.items() if name.startswith(later))


@pytest.mark.parametrize("how", ["checkpointing", "compiled", "compiled blocks", "compiled checkpointing"])
def test_gradients_are_the_same(how):
    plain = Module()
    plain(*example())[0].backward()
    module = Module()
    if "checkpointing" in how:
        module.transformer.enable_gradient_checkpointing()
        module.latent_embedder.enable_gradient_checkpointing()
    torch.compiler.reset()
    if how == "compiled":
        module.compile(backend="eager")
    elif "compiled" in how:
        module.transformer.compile_repeated_blocks(backend="aot_eager")
    module(*example())[0].backward()
    assert_close(gradients(module), gradients(plain))
    torch.compiler.reset()


def step_in_a_process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    module = DistributedDataParallel(Module())
    latents, labels, batch, features = example()
    # Each process holds every second row, so that both have one row with a prior and one without.
    own = slice(rank, None, 2)
    for _ in range(2):  # the second forward fails where the first left a parameter without its gradient
        module.zero_grad()
        module(latents[own], labels[own], type(batch)(*(part[own] for part in batch)), features[own])[0].backward()
    if rank == 0:
        torch.save(gradients(module.module), f"{folder}/gradients.pt")
    drain_process_group()
    dist.destroy_process_group()


def test_two_processes_average_their_gradients(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=step_in_a_process, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    module = Module()
    latents, labels, batch, features = example()
    order = torch.tensor([0, 1, 2, 3])  # rows 0 and 1 are the first of their processes, and see a prior
    module(latents[order], labels[order], batch, features)[0].backward()
    assert_close(torch.load(tmp_path / "gradients.pt", weights_only=True), gradients(module))


def test_training_aligns():
    module = Module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    batch = example()
    alignments = []
    for _ in range(60):
        total, alignment = module(*batch)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        alignments.append(alignment.item())
    assert abs(alignments[0]) < 0.3 and alignments[-1] < -0.7
