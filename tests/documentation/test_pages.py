"""Every command and every Python block of the documentation runs, in order, page by page, as somebody would type it.

Each page starts in a fresh copy of the repository. What its commands name is there at a small size: see `lay_out`, and
the Hub, which is the small one of `hub_server.py`. `REPLACED` and `CUT` list all that differs from the page.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from helpers import tiny_embedder, tiny_pipeline, tiny_transformer, tiny_vae
from hub_server import HubServer
from original_models import load_autoencoder, load_original, of_channels
from safetensors.torch import save_file
from training_runs import write_digits
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor


ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TINY = (
    '{"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}',
    '{"num_encoder_layers": 1, "num_decoder_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}',
)

# A text of the pages, what stands in its place when it runs, and why.
REPLACED = [
    ("make test", "make --dry-run test", "it is what runs this"),
    ("make lint", "make --dry-run lint", "`make test` has run it"),
    ("make bench", "make --dry-run bench", "minutes of measuring"),
    ("make docs", "make --dry-run docs", ".ci/run makes them"),
    ("make evidence", "make --dry-run evidence", "most of an hour"),
    (
        "diffusers-dod demo --model",
        "diffusers-dod demo --help --model",
        "serves for ever; test_demo.py opens it in a browser",
    ),
    ("study/run_study.py", "study/run_study.py --help", "hours; test_study.py runs its parts"),
    ("study/report.py", "study/report.py --help", "reads what the study wrote"),
    ("make release-check", "make --dry-run release-check", "minutes of installing; .ci/run runs it"),
    ("make diffusers-tests", "make --dry-run diffusers-tests", "needs a checkout of diffusers"),
    ("apt-get install", "true", "needs the network"),
    ("npm install", "true", "the same"),
    ("pip install", "true", "needs the network; release_check.sh installs for real"),
    ("wget -O", "cp tiny.safetensors", "needs the network, and gigabytes"),
    (
        "wget https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt",
        "cp tiny.pt DiT-XL-2-256x256.pt",
        "the same",
    ),
    *(
        (f"wget https://huggingface.co/hustvl/{repository}/resolve/main/{name}", f"cp tiny_{name} {name}", "the same")
        for repository, name in (
            ("lightningdit-xl-imagenet256-800ep", "lightningdit-xl-imagenet256-800ep.pt"),
            ("vavae-imagenet256-f16d32-dinov2", "vavae-imagenet256-f16d32-dinov2.pt"),
            ("vavae-imagenet256-f16d32-dinov2", "latents_stats.pt"),
        )
    ),
    ("num_attention_heads=16", "num_attention_heads=4", "of the tiny DiT"),
    ("https://huggingface.co/InfImagine/FiTv2/resolve/main/FiTv2_XL/model_ema.safetensors", "", "belongs to wget"),
    ("--config_file examples/accelerate_configs/ddp.yaml", "", "needs 8 GPUs; another test reads the file"),
    ("--train_data_dir digits ", "--train_data_dir path/to/images ", "size; the 5,000 were written"),
    ("enable_model_cpu_offload()", 'enable_model_cpu_offload(device="cpu")', "looks for a GPU"),
]
# Words of a Python command, what is appended to it, and why; later options win.
CUT = [
    ("examples/quickstart.py", ["--steps", "30", "--num_samples", "20"], "size"),
    ("study/write_images.py", ["--source", "fonts"], "two of the typefaces that Debian's packages have"),
    ("examples/train_autoencoder.py", ["--max_train_steps", "2"], "size"),
    ("diffusers_dod train", ["--max_train_steps", "2", "--train_batch_size", "4"], "size"),
    ("diffusers_dod train-codes", ["--max_train_steps", "2", "--train_batch_size", "4"], "size"),
    ("diffusers_dod train --preset", ["--transformer_config", TINY[0], "--embedder_config", TINY[1]], "size"),
    ("diffusers_dod train --keep_checkpoint_at", ["--keep_checkpoint_at", "1"], "size"),
    ("diffusers_dod train --repa_encoder", ["--repa_layer", "1"], "of one layer"),
    ("diffusers_dod train --recipe", ["--validation_steps", "0"], "size"),
    ("diffusers_dod cache", ["--batch_size", "4", "--dataloader_num_workers", "0"], "size"),
    ("diffusers_dod sample", ["--num_images", "12", "--num_inference_steps", "2"], "size"),
    ("diffusers_dod evaluate", ["--extractor", "facebook/dinov2-large"], "torch-fidelity's network is a download"),
    ("diffusers_dod convert", ["--embedder_preset", "S"], "size"),
    ("diffusers_dod convert fitv2", ["--num_attention_heads", "4"], "of the tiny checkpoint"),
    ("diffusers_dod convert dit", ["--num_attention_heads", "4"], "of the tiny checkpoint"),
]


def blocks(text: str) -> list[tuple[int, str, str]]:
    """Line, language and text of the fenced blocks that are code to run."""
    found = re.finditer(r"^```(bash|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start()].count("\n") + 2, match[1], match[2]) for match in found]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(hub: HubServer, scratch: Path) -> None:
    """What the pages load of the Hub, tiny: a pipeline, autoencoders of 8 pixels a latent, vision models."""
    tiny_pipeline(vae=tiny_vae("kl")).save_pretrained(scratch / "model")
    hub.put("user/my-model", files_of(scratch / "model"))
    blocks = {"block_out_channels": (4,) * 4, "norm_num_groups": 2}
    blocks |= {
        f"{way}_block_types": [f"{name}DecoderBlock2D".replace("DownDe", "DownEn")] * 4
        for way, name in (("down", "Down"), ("up", "Up"))
    }
    tiny_vae("kl", **blocks).save_pretrained(scratch / "vae")
    hub.put("stabilityai/sd-vae-ft-ema", files_of(scratch / "vae"))
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(scratch / "dino")
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(scratch / "dino")
    for size in ("small", "base", "large"):
        hub.put(f"facebook/dinov2-{size}", files_of(scratch / "dino"))


def lay_out(folder: Path, page: str) -> None:
    """A copy of the repository, an environment in it, and what the pages take from the user's own disk."""
    ignored = shutil.ignore_patterns(".*", "outputs", "__pycache__", "*.egg-info", "build", "dist", "data")
    shutil.copytree(ROOT, folder, ignore=ignored)
    write_digits(folder / "path/to/images", counts=(9, 9, 9))
    random = np.random.default_rng(0)
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", arr_0=random.integers(0, 256, (12, 32, 32, 3), np.uint8))
    (folder / "fonts").mkdir()
    for font in ("DejaVuSans", "STIXGeneral"):
        shutil.copy(Path(matplotlib.get_data_path(), "fonts/ttf", f"{font}.ttf"), folder / "fonts")
    save_file(load_original("fitv2").weights, folder / "tiny.safetensors")
    torch.save(load_original("dit").weights, folder / "tiny.pt")
    lightningdit = of_channels(load_original("lightningdit").weights, 4)
    torch.save({"ema": lightningdit}, folder / "tiny_lightningdit-xl-imagenet256-800ep.pt")
    torch.save({"state_dict": load_autoencoder("vavae")[0]}, folder / "tiny_vavae-imagenet256-f16d32-dinov2.pt")
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, folder / "tiny_latents_stats.pt")
    if page == "README.md":
        return  # whoever starts there has nothing else
    gray = {"in_channels": 1, "num_classes": 10}
    tiny_pipeline(
        transformer=tiny_transformer(sample_size=28, **gray),
        latent_embedder=tiny_embedder(sample_size=28, in_channels=1),
    ).save_pretrained(folder / "outputs/quickstart/pipeline")
    tiny_pipeline(
        transformer=tiny_transformer(sample_size=32, patch_size=4, **gray),
        latent_embedder=tiny_embedder(sample_size=32, patch_size=4, in_channels=1),
    ).save_pretrained(folder / "outputs/mine")
    weak = tiny_transformer(sample_size=32, patch_size=4, num_layers=1, **gray)
    weak.save_pretrained(folder / "outputs/mine/checkpoint-2000/transformer_ema_0.9999")


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Environment in which `python`, `accelerate` and `torchrun` are run by a process that has imported their libraries."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "bin").mkdir()
    program = (ROOT / "tests/documentation/command.py").read_text()
    for name in ("python", "diffusers-dod", "accelerate", "torchrun"):
        (folder / "bin" / name).write_text(f"#!{sys.executable} -IS\n{program}")
        (folder / "bin" / name).chmod(0o755)
    (folder / "bin" / "activate").write_text("")
    (folder / "cuts.json").write_text(json.dumps([(words.split(), more) for words, more, _ in CUT]))
    with HubServer() as hub:
        fill(hub, folder)
        # Compiling takes a minute where nothing was compiled yet.
        environment = hub.environment(folder / "home", TORCHDYNAMO_DISABLE="1")
        environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        with open(folder / "log", "w") as log:
            command = [sys.executable, ROOT / "tests/documentation/server.py", folder]
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        while not (folder / "socket").exists():
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield environment, folder, hub
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def run_page(text: str, page: str, commands, tmp_path: Path) -> None:
    environment, programs, _ = commands
    folder = tmp_path / "diffusers_dod"
    lay_out(folder, page)
    shutil.copytree(
        programs / "bin", folder / ".venv/bin", copy_function=lambda source, target: os.symlink(source, target)
    )
    for target in ("quickstart", "installed"):
        (folder / ".venv" / target).touch()
    listed = []
    for line, language, block in blocks(text):
        for old, new, _ in REPLACED:
            block = block.replace(old, new)
        listed.append((f"{page}:{line}", language, block))
    (tmp_path / "blocks.json").write_text(json.dumps(listed))
    session = [programs / "bin" / "python", ROOT / "tests/documentation/session.py", tmp_path / "blocks.json"]
    with open(tmp_path / "log", "w") as log:
        status = subprocess.run(session, cwd=folder, env=environment, stdout=log, stderr=log).returncode
    assert status == 0, (tmp_path / "log").read_text()[-6000:]


def test_what_differs_from_the_pages_is_in_them():
    """No entry of the tables is left over."""
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    commands = (
        (text + (ROOT / "Makefile").read_text()).replace("\\\n", " ").replace("diffusers-dod ", "diffusers_dod ")
    )
    assert [old for old, _, _ in REPLACED if old not in text] == []
    for words, _, _ in CUT:
        assert any(set(words.split()) <= set(line.split()) for line in commands.splitlines()), words


@pytest.mark.parametrize("page", [page for page in PAGES if blocks((ROOT / page).read_text())])
def test_page(page, commands, tmp_path):
    run_page((ROOT / page).read_text(), page, commands, tmp_path)
    if page == "README.md":
        card = commands[2].files("user/my-model")["README.md"].decode()
        run_page(card, "the model card", commands, tmp_path / "card")
