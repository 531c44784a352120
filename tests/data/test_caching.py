"""The real `diffusers-dod cache`: killed and resumed, by one process and by two, and trained from."""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import ON_CPU, process_context, tiny_embedder, tiny_transformer, tiny_vae
from torch.utils.data import default_collate
from transformers import Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel, ViTImageProcessor

from diffusers_dod.autoencoding import encode_images
from diffusers_dod.cli import BadInput
from diffusers_dod.data.__main__ import cache_latents, main
from diffusers_dod.data.cache import CachedLatents, sample_posterior, select_flip
from diffusers_dod.data.features import REPAEncoder
from diffusers_dod.data.images import collate_images, load_labelled_images
from diffusers_dod.training.objective import dod_loss, flow_example


torch.set_num_threads(1)  # as in the processes below: the order of a sum changes its last bits


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """40 pictures of two classes in `data`, and saved models."""
    root = tmp_path_factory.mktemp("made")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 18, 22, 3), dtype=np.uint8)
    for row, image in enumerate(pixels):
        path = root / "data" / f"class {row // 20}" / f"{row:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)
    for kind in ("kl", "tiny"):
        tiny_vae(kind).save_pretrained(root / kind)
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    Dinov2Model(Dinov2Config(**size)).save_pretrained(root / "dino")
    shape = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**shape)).save_pretrained(root / "resnet")
    for name in ("dino", "resnet"):
        ViTImageProcessor().save_pretrained(root / name)
    return root


def arguments(made, output_dir, *args, vae="kl") -> list[str]:
    options = ["--train_data_dir", made / "data"] if "--train_data_dir" not in args else []
    options += ["--vae_name_or_path", made / vae, "--cache_dir", made / "hf", "--resolution", 16]
    options += ["--shard_size", 2, "--batch_size", 2]
    return [str(option) for option in (*options, "--output_dir", output_dir, *args)]


def run_command(argv: list[str], log: Path, environment: dict[str, str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.exit(main(argv))


def start(argv: list[str], log: Path, environment: dict[str, str] | None = None):
    process = process_context().Process(target=run_command, args=(argv, log, environment or {}))
    process.start()
    return process


def start_two(argv: list[str], log: Path) -> list:
    """Two processes as `torch.distributed.run` starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"} | ON_CPU
    return [start(argv, log, {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_and_resumed_by_other_numbers_of_processes_it_ends_the_same(made, tmp_path):
    options = ("--flips", "--repa_encoder", made / "dino")
    cache_latents(arguments(made, tmp_path / "whole", *options))
    whole = contents(tmp_path / "whole")
    assert len(whole) == 21

    folder, log, chance, kills = tmp_path / "killed", tmp_path / "log", random.Random(0), 0
    argv = arguments(made, folder, *options)
    for shards in sorted(chance.sample(range(14), 6)):
        process = start(argv, log)
        while len(list(folder.glob("shard-*"))) < shards or not folder.exists():
            assert process.is_alive(), log.read_text()[-3000:]
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.01))  # somewhere within a shard
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        with pytest.raises(ValueError, match="not finished|holds no cached latents"):
            CachedLatents(folder)
    assert kills == 6
    # What a process killed while writing leaves, of its own and of safetensors'
    (folder / "tmp-shard-00019.safetensors").write_bytes(b"half")
    (folder / ".tmpAbCdEf").write_bytes(b"half")
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert 9 <= len(kept) < 20

    # Several shards are left for the two processes.
    for path in sorted(kept)[3:9]:
        path.unlink()
        del kept[path]
    log.unlink()
    processes = start_two(argv, log)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], log.read_text()[-3000:]
    assert log.read_text().count("holds the latents of 40 images in 20 shards") == 1  # two processes, not one twice
    assert contents(folder) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    CachedLatents(folder).verify()


def raw_batch(made) -> tuple[torch.Tensor, torch.Tensor]:
    data, _ = load_labelled_images(str(made / "data"), cache_dir=str(made / "hf"))
    pixels, labels = collate_images(list(data), 16, 3)
    return pixels.float() / 127.5 - 1, labels


def loss_of(latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    example = flow_example(latents, torch.randn(latents.shape), torch.rand(len(latents)))
    with torch.no_grad():
        return dod_loss(tiny_transformer(), tiny_embedder(), latents, labels, example, 20).per_sample


@pytest.mark.parametrize(
    "vae, dtype, tolerance", [("kl", "float32", 1e-5), ("kl", "float16", 1e-3), ("tiny", "float32", 0)]
)
def test_raw_images_and_cached_latents_give_the_same_loss_for_the_same_seed(made, tmp_path, vae, dtype, tolerance):
    # One batch, for a convolution's last bits may depend on the batch's size
    cache_latents(
        arguments(made, tmp_path, "--flips", "--dtype", dtype, "--batch_size", 40, "--shard_size", 64, vae=vae)
    )
    (images, labels), autoencoder = raw_batch(made), tiny_vae(vae)

    def raw_loss(seed):
        torch.manual_seed(seed)
        flipped = torch.rand(len(images)) < 0.5
        views = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
        with torch.no_grad():
            return loss_of(encode_images(autoencoder, views, sample_posterior=True), labels)

    def cached_loss(seed):
        torch.manual_seed(seed)
        flipped = torch.rand(len(cache)) < 0.5
        mean = select_flip(batch["mean"], flipped)
        if "std" not in batch:
            return loss_of(sample_posterior(mean), batch["label"])
        latents = sample_posterior(mean, select_flip(batch["std"], flipped), torch.randn(mean.shape))
        return loss_of(latents, batch["label"])

    cache = CachedLatents(tmp_path)
    batch = default_collate(list(cache))
    assert ("std" in batch) == (vae == "kl")
    for seed in (0, 1):
        torch.testing.assert_close(cached_loss(seed), raw_loss(seed), rtol=tolerance, atol=0)
    assert ((raw_loss(0) / raw_loss(1) - 1).abs() > 10 * tolerance).float().mean() > 0.8


def test_every_epoch_draws_latents_anew_around_what_the_vae_gives(made, tmp_path):
    cache_latents(arguments(made, tmp_path))
    batch = default_collate(list(CachedLatents(tmp_path)))
    mean, std = select_flip(batch["mean"]), select_flip(batch["std"])
    first, second = (sample_posterior(mean, std, torch.randn(mean.shape)) for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-2)
    with torch.no_grad():
        posterior = tiny_vae("kl").encode(raw_batch(made)[0]).latent_dist
    scores = (first / 0.5 - posterior.mean) / posterior.std
    assert abs(scores.mean()) < 0.05 and abs(scores.std() - 1) < 0.05


@torch.no_grad()
def test_features_of_both_flips(made, tmp_path):
    cache_latents(arguments(made, tmp_path, "--flips", "--dtype", "float32", "--repa_encoder", made / "dino"))
    batch = default_collate(list(CachedLatents(tmp_path)))
    encoder, (images, _) = REPAEncoder.from_pretrained(made / "dino"), raw_batch(made)
    assert batch["features"].shape == (40, 2, 16, 16)
    torch.testing.assert_close(batch["features"][:, 0], encoder(images, (4, 4)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch["features"][:, 1], encoder(images.flip(-1), (4, 4)), rtol=1e-4, atol=1e-4)


def test_a_saved_dataset_with_a_broken_image(made, tmp_path, caplog):
    images = [{"bytes": path.read_bytes(), "path": None} for path in sorted((made / "data").glob("*/*"))[:5]]
    images[2]["bytes"] = images[2]["bytes"][:100]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    columns = {"image": images, "label": [4, 0, 0, 0, 1]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")
    argv = arguments(made, tmp_path / "out", "--train_data_dir", tmp_path / "saved")
    with pytest.raises(BadInput, match="1 of 5 images cannot be read"):
        cache_latents(argv)
    cache_latents([*argv, "--on_broken_image", "skip"])
    assert "Skipped 1 images, 4 are left" in caplog.text
    cache = CachedLatents(tmp_path / "out")
    assert [cache[row]["id"].item() for row in range(4)] == [0, 1, 3, 4]
    assert [cache.name(row) for row in range(4)] == ["0", "1", "3", "4"]
    assert cache.labels.tolist() == [4, 0, 0, 1] and cache.num_classes == 5 and cache.class_names is None


@pytest.fixture(scope="module")
def cached(made, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cached") / "latents"
    cache_latents(arguments(made, folder))
    return folder


def test_the_manifest_says_what_the_cache_was_made_of(cached, made):
    manifest = json.loads((cached / "manifest.json").read_text())
    settings = manifest["settings"]
    assert manifest["vae_name_or_path"] == str(made / "kl") and len(manifest["vae_config_sha256"]) == 64
    assert settings["vae_scaling"] == {"scaling_factor": 0.5}
    assert (settings["resolution"], settings["count"], settings["flips"]) == (16, 40, False)
    assert settings["class_names"] == ["class 0", "class 1"]
    assert CachedLatents(cached).name(21) == "class 1/21.png"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--resolution", 32], r"resolution \(16 there, 32 here\)"),
        (["--flips"], r"flips \(False there, True here\)"),
        (["--dtype", "bfloat16"], r"dtype \(float16 there, bfloat16 here\)"),
        (["--vae_name_or_path", "{made}/tiny"], r"vae_class \(AutoencoderKL there, AutoencoderTiny here\)"),
        (["--vae_name_or_path", "{tmp}/reweighted"], "vae_weights_sha256"),
        (["--repa_encoder", "{made}/dino"], r"features \(None there"),
        (["--train_data_dir", "{tmp}/renamed"], "images_sha256"),
        (["--resolution", 17], "multiple of 2"),
        (["--resolution", 18, "--repa_encoder", "{made}/dino"], "multiple of 4"),
        (["--repa_encoder", "{made}/resnet"], "resnet cannot be loaded: ResNetModel is no vision transformer"),
        (["--vae_name_or_path", "{tmp}/none"], "none cannot be loaded"),
        (["--output_dir", "{made}/data"], "is not empty and holds no cached latents"),
        (["--dataset_name", "some/where"], "either --train_data_dir or --dataset_name"),
    ],
)
def test_other_settings_are_refused_and_change_nothing(made, cached, tmp_path, options, message):
    vae = tiny_vae("kl")
    with torch.no_grad():
        vae.encoder.conv_in.bias.add_(1)
    vae.save_pretrained(tmp_path / "reweighted")
    shutil.copytree(made / "data", tmp_path / "renamed")
    (tmp_path / "renamed" / "class 0" / "00.png").rename(tmp_path / "renamed" / "class 0" / "0.png")
    before = contents(cached)
    argv = arguments(made, cached, *[str(option).format(made=made, tmp=tmp_path) for option in options])
    with pytest.raises(BadInput, match=message) as error:
        cache_latents(argv)
    assert "\n" not in str(error.value)
    assert contents(cached) == before


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "foreign"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_damaged_shard_is_named_and_written_anew_once_deleted(made, cached, tmp_path, damage, finished):
    folder = tmp_path / "latents"
    shutil.copytree(cached, folder)
    whole, path = contents(cached), sorted(folder.glob("shard-*"))[7]
    content = path.read_bytes()
    if not finished:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "shards": None}))
    if damage == "foreign":
        cache_latents(arguments(made, tmp_path / "other", "--flips"))
        content = sorted((tmp_path / "other").glob("shard-*"))[7].read_bytes()
    changed = {"truncated": content[:-9], "corrupted": content[:-9] + b"?" + content[-8:], "foreign": content}
    path.write_bytes(changed[damage])
    with pytest.raises(BadInput, match=path.name):
        cache_latents(arguments(made, folder))
    path.unlink()
    cache_latents(arguments(made, folder))
    assert contents(folder) == whole


def test_a_bad_launch_ends_with_one_line_and_an_exit_code(made, tmp_path):
    process = start(arguments(made, tmp_path / "out", "--train_data_dir", tmp_path / "nowhere"), tmp_path / "log")
    process.join()
    output = (tmp_path / "log").read_text()
    assert process.exitcode == 2
    (line,) = [line for line in output.splitlines() if "error" in line.lower()]
    assert line.startswith("diffusers-dod cache: error: ") and "nowhere" in line
    assert "Traceback" not in output and not (tmp_path / "out").exists()
