"""What only a GPU shows; all of it is skipped without one. `make gpu-check` runs it beside the benchmark."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from helpers import randomize_weights, tiny_pipeline, tiny_vae
from training_runs import arguments, assert_equal_tensors, weights, write_digits

from diffusers_dod import DoDPipeline, DoDTransformer2DModel


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.15}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float16", "bfloat16"])


def sample(pipe, **options):
    """Two guided stages in the latents of a VAE, from the same noise on every device."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    options = {"num_inference_steps": 4, "guidance_interval": (0.0, 1.0), "output_type": "pt"} | options
    return pipe([1, 2], generator=generators, **options).images.float().cpu()


def pipeline(dtype=torch.float32):
    return tiny_pipeline(vae=tiny_vae()).to(dtype)


def assert_near(images, dtype):
    torch.testing.assert_close(images, sample(pipeline(dtype)), rtol=0, atol=TOLERANCE[dtype])


@dtypes
def test_pipeline(dtype):
    assert_near(sample(pipeline(dtype).to("cuda")), dtype)


@dtypes
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offload(offload, dtype):
    pipe = pipeline(dtype)
    getattr(pipe, offload)()
    for _ in range(2):
        assert_near(sample(pipe), dtype)


@pytest.mark.parametrize("use_stream", [False, True])
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(offload_type, use_stream):
    pipe = pipeline()
    pipe.vae.to("cuda")
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    for model in (pipe.transformer, pipe.latent_embedder):
        devices = (torch.device("cuda"), torch.device("cpu"))
        model.enable_group_offload(*devices, offload_type=offload_type, use_stream=use_stream, **blocks)
    assert_near(sample(pipe), torch.float32)


def test_weights_in_float8():
    pipe = pipeline(torch.bfloat16).to("cuda")
    for model in (pipe.transformer, pipe.latent_embedder):
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert torch.isfinite(sample(pipe)).all()


@pytest.mark.parametrize("device_map", ["cuda", "balanced"])
def test_loading_onto_the_gpu(device_map, tmp_path):
    pipeline().save_pretrained(tmp_path)
    assert_near(sample(DoDPipeline.from_pretrained(tmp_path, device_map=device_map)), torch.float32)


def test_generators_of_the_gpu_repeat():
    pipe = pipeline().to("cuda")
    runs = [pipe([1, 2], generator=torch.Generator("cuda").manual_seed(0), output_type="pt").images for _ in range(2)]
    assert torch.equal(*runs)


def test_steps_do_not_wait_for_the_gpu():
    """From the end of the first step to that of the last, PyTorch sees nothing that makes the host wait."""

    def callback(pipe, step, timestep, tensors):
        torch.cuda.set_sync_debug_mode("error" if step < 3 else "default")
        return tensors

    try:
        sample(pipeline().to("cuda"), num_stages=1, callback_on_step_end=callback)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
@pytest.mark.parametrize(
    "backend",
    [
        "native",
        "_native_flash",
        "_native_cudnn",
        "_native_efficient",
        "_native_math",
        "flash",
        "_flash_3",
        "sage",
        "xformers",
    ],
)
def test_attention_backends(backend):
    """Two blocks of DoD-XL/2's width, in bfloat16, against float32."""
    torch.manual_seed(0)
    model = randomize_weights(DoDTransformer2DModel(num_layers=2), std=0.03).to("cuda")
    inputs = (torch.randn(4, 4, 32, 32), torch.full((4,), 500.0), torch.arange(4))
    latents, timesteps, labels = (values.to("cuda") for values in inputs)
    reference = model(latents, timesteps, labels).sample
    model.to(torch.bfloat16)
    with attention_backend("native"):  # `set_attention_backend` is global too: leaving this puts it back
        try:
            model.set_attention_backend(backend)
        except RuntimeError as error:
            pytest.skip(f"the backend {backend} does not work on this machine: {str(error).splitlines()[0]}")
        prediction = model(latents.bfloat16(), timesteps, labels).sample
    assert (prediction - reference).norm() <= 0.03 * reference.norm()


def test_cuda_graphs():
    """The transformer compiled as a whole, for both stages, guided and not."""
    pipe = pipeline().to("cuda")
    options = {"guidance_interval": (0.25, 0.75)}
    reference = sample(pipe, **options)
    pipe.transformer.compile(mode="reduce-overhead", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(sample(pipe, **options), reference, rtol=0, atol=TOLERANCE[torch.float32])


def test_a_push_on_the_way_leaves_the_autoencoder_where_training_needs_it(tmp_path):
    from diffusers_dod.training.results import save_for_push

    pipe = pipeline().to("cuda")
    save_for_push(pipe, {}, str(tmp_path), str(tmp_path / "pushed"))
    assert pipe.vae.device.type == "cuda" and pipe.transformer.device.type == "cpu"
    assert_near(sample(DoDPipeline.from_pretrained(tmp_path / "pushed")), torch.float32)


def train(argv, **environment):
    """The command in a process of its own, which NCCL joins to a group of one if it is told so."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    if environment:
        environment |= {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "diffusers_dod", "train", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-4000:]


NCCL = {"ACCELERATE_USE_FSDP": "false"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP |= {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}


@pytest.mark.parametrize(
    "environment, options",
    [
        ({}, ("--mixed_precision", "fp16")),
        ({}, ("--mixed_precision", "bf16", "--compile")),
        (NCCL, ("--mixed_precision", "bf16")),
        (FSDP, ("--mixed_precision", "bf16")),
        (FSDP, ("--mixed_precision", "bf16", "--compile", "--gradient_checkpointing")),
    ],
    ids=["fp16", "bf16 compiled", "nccl ddp", "nccl fsdp2", "nccl fsdp2 compiled checkpointing"],
)
def test_training(environment, options, tmp_path):
    """Trains, samples on the way, and ends the same after a stop in the middle."""
    data = write_digits(tmp_path / "data", counts=(8, 8, 8))
    options += ("--train_data_dir", data, "--resolution", 14, "--train_batch_size", 8, "--validation_steps", 8)
    options += ("--max_train_steps", 16, "--checkpointing_steps", 8, "--optimizer", "adamw_fused")
    train(arguments(tmp_path / "run", *options), **environment)
    assert (tmp_path / "run/samples/step_16.png").is_file()
    assert DoDPipeline.from_pretrained(tmp_path / "run")(0, num_inference_steps=2).images
    shutil.copytree(tmp_path / "run/checkpoint-8", tmp_path / "resumed/checkpoint-8")
    train(arguments(tmp_path / "resumed", *options), **environment)
    assert_equal_tensors(weights(tmp_path / "resumed"), weights(tmp_path / "run"))
