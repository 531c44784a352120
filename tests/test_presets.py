"""The table of presets against the figures that FiTv2's paper gives for its models."""

import pytest
import torch

from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel
from diffusers_dod.presets import PRESETS


# Millions of parameters and billions of multiply-accumulates a forward, each as the paper rounds it (None: not its
# model) and as this code has it
FIGURES = {
    "S": (None, 32.3, None, 6.8),
    "B": (129, 128.1, 27.3, 27.2),
    "L": (None, 443.8, None, 96.6),
    "XL": (671, 671.0, 147, 146.8),
    "3B": (3000, 2971.9, 653, 652.3),
}


def count_macs(model, *inputs):
    """Multiply-accumulates of every linear layer that ran on tokens.

    As the paper counts: without the modulation and the embeddings of timestep and class, which run once an image, and
    without attention's two products, which no linear layer makes.
    """
    macs = 0

    def count(linear, args):
        nonlocal macs
        if args[0].ndim == 3:
            macs += args[0].shape[1] * linear.in_features * linear.out_features

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(count)
    model(*inputs)
    return macs


@pytest.fixture(params=FIGURES, scope="module")
def models(request):
    preset = PRESETS[request.param]
    with torch.device("meta"):
        transformer = DoDTransformer2DModel(**preset.transformer)
        embedder = DoDLatentEmbedder(**preset.latent_embedder)
    return request.param, transformer.eval(), embedder.eval()


def test_parameters(models):
    name, transformer, _ = models
    of_paper, measured, _, _ = FIGURES[name]
    millions = sum(parameter.numel() for parameter in transformer.parameters()) / 1e6
    assert millions == pytest.approx(measured, abs=0.06)
    if of_paper is not None:
        assert millions == pytest.approx(of_paper, rel=0.01)


@torch.no_grad()
def test_multiply_accumulates_at_256_tokens(models):
    name, transformer, embedder = models
    _, _, of_paper, measured = FIGURES[name]
    latents = torch.zeros(1, 4, 32, 32, device="meta")
    timestep, label = torch.zeros(1, device="meta"), torch.zeros(1, device="meta", dtype=torch.long)
    billions = count_macs(transformer, latents, timestep, label) / 1e9
    assert billions == pytest.approx(measured, abs=0.06)
    if of_paper is not None:
        assert billions == pytest.approx(of_paper, rel=0.005)
    # The embedder runs once per stage and must cost next to nothing over its 30 steps.
    assert count_macs(embedder, latents) / 1e9 < 0.2 * billions


def test_transformer_and_embedder_fit_each_other(models):
    _, transformer, embedder = models
    DoDPipeline(transformer, embedder, scheduler=None)


def test_the_default_model_is_xl():
    with torch.device("meta"):
        config = DoDTransformer2DModel().config
    assert {name: config[name] for name in PRESETS["XL"].transformer} == PRESETS["XL"].transformer
