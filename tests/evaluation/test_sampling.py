"""`diffusers-dod sample` and `evaluate`: many images that depend on nothing but the seed and their number."""

import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from helpers import ON_CPU, process_context, tiny_embedder, tiny_pipeline, tiny_transformer
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

from diffusers_dod import DoDPipeline
from diffusers_dod.cli import BadInput
from diffusers_dod.evaluation import ImageSet
from diffusers_dod.evaluation.__main__ import main as evaluate
from diffusers_dod.evaluation.sample import main, parse_args
from diffusers_dod.evaluation.sampling import class_of, write_npz
from diffusers_dod.hub import check_folder
from diffusers_dod.hub.card import build_card


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pipe = tiny_pipeline(
        transformer=tiny_transformer(in_channels=3, num_classes=5), latent_embedder=tiny_embedder(in_channels=3)
    )
    pipe.save_pretrained(folder)
    return folder


def sample(model, folder, *arguments, threads=1):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    options = ["--num_inference_steps", "3", "--num_images", "40", "--stages", "all", *map(str, arguments)]
    status = main(["--model", str(model), "--output_dir", str(folder), *options])
    torch.set_num_threads(before)
    return status


def run_command(arguments, log, environment):
    """In a process of its own."""
    os.environ.update(environment)
    sys.stderr = open(log, "w", buffering=1)
    torch.set_num_threads(1)
    sys.exit(main(arguments))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("stage-2/*.png"))}


@pytest.fixture(scope="module")
def drawn(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    assert sample(model, folder, "--batch_size", 7, "--npz") == 0
    return folder


def test_batches_processes_and_kills_change_no_byte(model, drawn, tmp_path):
    assert sample(model, tmp_path / "large", "--batch_size", 64) == 0
    assert contents(tmp_path / "large") == contents(drawn) and len(contents(drawn)) == 40

    # Two processes, killed on the way; one finishes what they left.
    command = ["--model", model, "--output_dir", tmp_path / "killed", "--stages", "all"]
    command = [*map(str, command), *"--batch_size 3 --num_inference_steps 3 --num_images 40".split()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = ON_CPU | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in ("0", "1"):  # as torchrun starts them
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        log = str(tmp_path / f"errors-{rank}")
        processes.append(process_context().Process(target=run_command, args=(command, log, shared | own)))
        processes[-1].start()
    shares = set()
    while shares != {0, 1} and all(process.is_alive() for process in processes):
        time.sleep(0.01)
        shares = {int(Path(name).stem) % 2 for name in contents(tmp_path / "killed")}
    for process in processes:
        process.kill()
        process.join()
    errors = (tmp_path / "errors-0").read_text()
    assert shares == {0, 1} and "/20 [" in errors, errors  # each draws half
    assert sample(model, tmp_path / "killed", "--batch_size", 9) == 0
    assert contents(tmp_path / "killed") == contents(drawn)
    assert not list((tmp_path / "killed").rglob("tmp-*"))


def test_what_a_kill_left_of_an_image_is_no_image(model, tmp_path):
    assert sample(model, tmp_path, "--num_images", 2) == 0
    leftover = tmp_path / "stage-2" / "tmp-1-000002.png.part"
    leftover.write_bytes(b"half of a PNG")
    assert len(ImageSet(str(tmp_path / "stage-2"))) == 2
    assert sample(model, tmp_path, "--num_images", 3) == 0
    assert not leftover.exists()


def test_npz_holds_the_pictures_and_their_classes(drawn):
    arrays = np.load(drawn / "stage-2.npz")
    assert arrays["arr_0"].shape == (40, 8, 8, 3) and arrays["arr_0"].dtype == np.uint8
    for index in (0, 17, 39):
        picture = np.asarray(PIL.Image.open(drawn / "stage-2" / f"{index:06d}.png"))
        assert np.array_equal(arrays["arr_0"][index], picture)
    assert arrays["arr_1"].tolist() == [index % 5 for index in range(40)]  # 8 of each
    assert not np.array_equal(arrays["arr_0"], np.load(drawn / "stage-1.npz")["arr_0"])


@pytest.mark.parametrize("size", [(8, 9), (9, 8), (4, 4), (16, 16), (1, 64), None], ids=str)
def test_npz_takes_pictures_of_one_size_only(size, tmp_path):
    """The same number of pixels is another size too."""
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path in paths:
        PIL.Image.new("RGB", (8, 8)).save(path)
    if size is None:
        paths[1].write_bytes(paths[1].read_bytes()[:20])
    else:
        PIL.Image.new("RGB", size).save(paths[1])
    with pytest.raises(BadInput, match="1.png"):
        write_npz(tmp_path / "stage-2.npz", paths, [0, 1, 2])
    assert len(list(tmp_path.iterdir())) == 3


def test_what_lies_there_is_not_drawn_again(model, drawn, tmp_path):
    assert sample(model, tmp_path, "--num_images", 6) == 0
    kept = tmp_path / "stage-2" / "000003.png"
    kept.write_bytes(b"mine")
    assert sample(model, tmp_path, "--num_images", 8) == 0
    assert kept.read_bytes() == b"mine" and len(contents(tmp_path)) == 8
    (tmp_path / "stage-1" / "000003.png").unlink()
    assert sample(model, tmp_path, "--num_images", 8) == 0
    assert kept.read_bytes() == contents(drawn)["000003.png"]


def test_other_settings_in_the_same_folder_are_refused(model, drawn, capsys):
    before = contents(drawn)
    assert sample(model, drawn, "--guidance_scale", "2") == 2
    assert "holds images of another guidance_scale ([1.0])" in capsys.readouterr().err
    assert contents(drawn) == before


def test_flags_of_guidance_are_refused_beside_a_guider(model, tmp_path, capsys):
    pipe = DoDPipeline.from_pretrained(model)
    pipe.guider = ClassifierFreeGuidance(2.0)
    pipe.save_pretrained(tmp_path / "model")
    settings = ["--num_images", 2, "--num_stages", 1, "--num_inference_steps", 2, "--batch_size", 2]
    for flag in (["--guidance_scale", 1.5], ["--guidance_interval", 0, 0.5]):
        assert sample(tmp_path / "model", tmp_path / "drawn", *settings, *flag) == 2
        assert f"`{flag[0][2:]}` is given, but ClassifierFreeGuidance guides" in capsys.readouterr().err
        assert not (tmp_path / "drawn").exists()
    assert sample(tmp_path / "model", tmp_path / "drawn", *settings) == 0
    assert json.loads((tmp_path / "drawn/sampling.json").read_text())["guidance_scale"] is None


def test_random_classes_follow_from_the_seed():
    args = parse_args(["--model", "x", "--output_dir", "y", "--classes", "random"])
    classes = [class_of(index, 10, args) for index in range(2000)]
    assert classes == [class_of(index, 10, args) for index in range(2000)]
    assert min(np.bincount(classes)) > 150 and classes[:10] != list(range(10))
    assert class_of(3, 0, args) is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stages", "3"], "must be from 1 to 2"),
        (["--stages", "first"], "neither last, all nor numbers"),
        (["--guidance_scale", "1", "2", "3"], "one for each of the 2 stages"),
        (["--batch_size", "0"], "batch_size: 0 is not from 1"),
    ],
)
def test_settings_that_mean_nothing(arguments, message):
    with pytest.raises(BadInput, match=message):
        parse_args(["--model", "x", "--output_dir", "y", "--num_stages", "2", *arguments])


def test_report_goes_into_the_card(model, drawn, tmp_path, capsys):
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "tiny-dino")
    ViTImageProcessor(size={"height": 14, "width": 14}).save_pretrained(tmp_path / "tiny-dino")
    output = model / "evaluation.json"
    arguments = ["--samples", drawn / "stage-2", "--reference", drawn / "stage-1.npz", "--stage", 2]
    arguments += ["--extractor", tmp_path / "tiny-dino", "--settings", drawn / "sampling.json", "--output", output]
    assert evaluate([*map(str, arguments)]) == 0
    report = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert (report["num_samples"], report["reference"], report["extractor"]) == (40, "stage-1.npz", "tiny-dino")
    assert report["num_inference_steps"] == [3] and report["seed"] == 0 and "torch" in report["versions"]
    assert {result["metric"] for result in report["results"]} >= {"fd", "kid", "precision", "coverage"}
    card = build_card(model, "user/model", "mit")
    assert "Fréchet distance (tiny-dino)" in card and "| 2 |" in card
    assert str(tmp_path) not in card
    assert check_folder(model, "mit") == []


def test_evaluation_that_cannot_be_is_one_line(drawn, tmp_path, capsys):
    arguments = ["--samples", str(drawn / "stage-2"), "--reference", str(tmp_path), "--extractor", "x"]
    assert evaluate(arguments) == 2
    message = f"No images could be loaded from {tmp_path}: it holds no images"
    assert capsys.readouterr().err == f"diffusers-dod evaluate: error: {message}\n"


@pytest.mark.parametrize("settings", ["[1]", '{"versions": 1}', "{", "missing"])
def test_settings_that_are_none_are_one_line(settings, drawn, tmp_path, capsys):
    file = tmp_path / "sampling.json"
    if settings != "missing":
        file.write_text(settings)
    arguments = ["--samples", str(drawn / "stage-2"), "--reference", str(drawn / "stage-1.npz"), "--extractor", "x"]
    assert evaluate([*arguments, "--settings", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--settings" in line


@pytest.mark.parametrize("part", ["transformer", "latent_embedder"])
def test_a_folder_belongs_to_weights_and_not_to_a_path(model, tmp_path, capsys, part):
    """The same model at another place continues; another model at the same place is refused."""
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    assert sample(moved, tmp_path / "out", "--num_images", 4) == 0
    shutil.rmtree(moved)
    assert sample(model, tmp_path / "out", "--num_images", 6) == 0
    pipe = DoDPipeline.from_pretrained(model)
    with torch.no_grad():
        getattr(pipe, part).proj_out.bias[0].add_(0.1)
    pipe.save_pretrained(moved)
    assert sample(moved, tmp_path / "out", "--num_images", 8) == 2
    assert "holds images of another weights_sha256" in capsys.readouterr().err
