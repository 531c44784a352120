"""Tiny models with random weights, so that parts that start at zero act."""

import multiprocessing
import os
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from packaging import version

from diffusers_dod import DoDLatentEmbedder, DoDPipeline, DoDTransformer2DModel


EXAMPLES = Path(__file__).parents[1] / "examples"
needs_group_offload = pytest.mark.skipif(
    version.parse(diffusers.__version__) < version.parse("0.41") and not torch.accelerator.is_available(),
    reason="group offload of diffusers before 0.41 asks torch for an accelerator even to offload to the CPU",
)


def randomize_weights(model, seed=0, std=0.2):
    """Gives every parameter a normal value, the same ones for the same seed; returns the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_transformer(**overrides):
    config = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 10}
    return randomize_weights(DoDTransformer2DModel(**config | overrides), seed=1)


def tiny_embedder(**overrides):
    config = {
        "sample_size": 8,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "output_dim": 16,
        "bottleneck_dim": 2,
    }
    config |= {"num_attention_heads": 2, "attention_head_dim": 8}
    return randomize_weights(DoDLatentEmbedder(**config | overrides), seed=2)


def tiny_vae(kind="kl", **overrides):
    """One of diffusers' autoencoders: "kl", "tiny" and "dc" have 4 latent channels, "rae" has 64; 2 pixels a latent."""
    torch.manual_seed(0)
    if kind == "kl":
        config = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "scaling_factor": 0.5}
        config |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
        return diffusers.AutoencoderKL(**config | overrides).eval()
    if kind == "tiny":
        config = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        config |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1), "latent_channels": 4}
        return diffusers.AutoencoderTiny(**config | overrides).eval()
    if kind == "dc":
        config = {"latent_channels": 4, "attention_head_dim": 2, "scaling_factor": 0.4}
        for side in ("encoder", "decoder"):
            config[f"{side}_block_types"] = ("ResBlock", "EfficientViTBlock")
            config[f"{side}_block_out_channels"] = (8, 8)
            config[f"{side}_layers_per_block"] = (1, 1)
            config[f"{side}_qkv_multiscales"] = ((), (5,))
        return diffusers.AutoencoderDC(**config | overrides).eval()
    config = {"encoder_hidden_size": 64, "encoder_patch_size": 8, "encoder_input_size": 64, "patch_size": 2}
    config |= {"encoder_num_hidden_layers": 1, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1}
    config |= {"decoder_num_attention_heads": 4, "decoder_intermediate_size": 32, "image_size": 16}
    return diffusers.AutoencoderRAE(**config | overrides).eval()


def tiny_pipeline(**overrides):
    """A pipeline in pixel space with 4 channels' worth of latents unless `vae` is given; no progress bar."""
    components = {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler(), "vae": None} | overrides
    channels = overrides.pop("channels", 4)
    components.pop("channels", None)
    components.setdefault("transformer", tiny_transformer(in_channels=channels))
    components.setdefault("latent_embedder", tiny_embedder(in_channels=channels))
    pipe = DoDPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_coded_pipeline(**overrides):
    """A pipeline with a model of its 4x4 codes of 2 numbers."""
    embedder = tiny_embedder(in_channels=4, codes_mean=[0.1, -0.2], codes_std=[0.5, 2.0])
    code_model = tiny_transformer(in_channels=2, sample_size=4, patch_size=2, prediction_type="flow")
    components = {"latent_embedder": embedder, "code_transformer": code_model}
    components["code_scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    return tiny_pipeline(**components | overrides)


# For processes that must train on the CPU, whatever there is. accelerate's barrier names a GPU for each process, gloo or not.
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}


def process_context():
    """Real processes that start fast: forked from a server that has imported libraries and scripts and run nothing yet."""
    context = multiprocessing.get_context("forkserver")
    # The server finds what it imports by the environment alone, and is silent about what it does not find.
    # Whether there is a GPU is asked of the driver's library: asking CUDA starts it in the server, and then no fork can use it.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(EXAMPLES), str(Path(__file__).parent), *sys.path]))
    context.set_forkserver_preload(["torch.distributed", "training_runs", "diffusers_dod.training.loop"])
    return context
