"""Which files of a folder `check` reads and `push` sends: the same ones, none of them hidden or outside of the folder."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffusers_dod.hub import check_folder, collect_upload
from diffusers_dod.hub.__main__ import main
from diffusers_dod.hub.check import list_files


SECRET = '{"password": "open sesame"}'


def dry_run(folder, capsys):
    """The status of a push and what it prints."""
    status = main(["push", str(folder), "user/never", "--license", "mit", "--dry-run"])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize(
    "hidden",
    [
        "vae/.env.json",
        "transformer/._diffusion_pytorch_model.safetensors",
        "latent_embedder/.ipynb_checkpoints/config-checkpoint.json",
        ".git/config.json",
        ".cache/token.json",
        "scheduler/.#scheduler_config.json",
        "samples/._step-2.png",
    ],
)
def test_hidden_files_are_no_part_of_the_model(hidden, folder, capsys):
    (folder / hidden).parent.mkdir(exist_ok=True)
    (folder / hidden).write_bytes(b"\0\5\26\7")
    assert check_folder(folder, "mit") == []
    status, listed, _ = dry_run(folder, capsys)
    assert status == 0 and hidden not in listed
    assert all(not path.startswith(".") and "/." not in path for path in collect_upload(folder, "card"))


def link_a_config(folder, outside):
    (folder / "vae/config.json").unlink()
    (folder / "vae/config.json").symlink_to(outside)
    return "vae/config.json"


def link_a_component(folder, outside):
    moved = folder.parent / "elsewhere"
    shutil.move(folder / "latent_embedder", moved)
    (folder / "latent_embedder").symlink_to(moved)
    return "latent_embedder/config.json"


def link_the_evaluation(folder, outside):
    (folder / "evaluation.json").symlink_to(outside)
    return "evaluation.json"


def link_the_training(folder, outside):
    (folder / "training_config.json").symlink_to(outside)
    return "training_config.json"


def link_the_card(folder, outside):
    (folder / "README.md").symlink_to(os.path.relpath(outside, folder))
    return "README.md"


def link_the_picture(folder, outside):
    (folder / "samples").symlink_to(outside.parent)
    shutil.copy(outside, outside.with_suffix(".png"))
    return "samples/outside.png"


def link_over_a_link(folder, outside):
    (folder / "hop").symlink_to(outside)
    (folder / "LICENSE.md").symlink_to("hop")
    return "LICENSE.md"


def link_to_a_hidden_file(folder, outside):
    shutil.copy(outside, folder / ".netrc")
    (folder / "scheduler/more.json").symlink_to("../.netrc")
    return "scheduler/more.json"


def broken_link(folder, outside):
    (folder / "LICENSE").symlink_to("nowhere")
    return "LICENSE"


def ring_of_links(folder, outside):
    (folder / "transformer/a.json").symlink_to("b.json")
    (folder / "transformer/b.json").symlink_to("a.json")
    return "transformer/b.json"


def pipe_that_blocks(folder, outside):
    os.mkfifo(folder / "transformer/extra.json")
    return "transformer/extra.json"


LINKS = [
    link_a_config,
    link_a_component,
    link_the_evaluation,
    link_the_training,
    link_the_card,
    link_the_picture,
    link_over_a_link,
    link_to_a_hidden_file,
    broken_link,
    ring_of_links,
    pipe_that_blocks,
]


@pytest.mark.parametrize("link", LINKS)
def test_what_is_no_file_of_the_folder_is_named_and_not_sent(link, folder, tmp_path, capsys):
    outside = tmp_path / "outside.json"
    outside.write_text(SECRET)
    name = link(folder, outside)
    problems = [problem for problem in check_folder(folder, "mit") if problem.startswith(f"{name}: ")]
    assert len(problems) == 1 and ("a link out of the folder" in problems[0] or "not a file" in problems[0])
    status, listed, error = dry_run(folder, capsys)
    assert status == 2 and listed == "" and problems[0] in error
    assert name not in list_files(folder)[0]


def test_links_within_the_folder_are_followed(folder, tmp_path):
    (folder / "texts").mkdir()
    (folder / "texts/mit.txt").write_text("Do what you like.")
    (folder / "LICENSE").symlink_to("texts/mit.txt")
    os.rename(folder / "vae", folder / "autoencoder")
    (folder / "vae").symlink_to("autoencoder")
    (tmp_path / "name").symlink_to(folder)  # the folder itself may be one
    assert check_folder(tmp_path / "name", "mit") == []
    upload = collect_upload(tmp_path / "name", "card")
    assert upload["LICENSE"].read_text() == "Do what you like."
    assert {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"} <= set(upload)


@pytest.mark.parametrize("name", ["../outside", "/etc", ".ssh", "vae/deep", "", "a b"])
def test_a_component_is_no_path(name, folder, capsys):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, name: ["diffusers", "AutoencoderKL"]}))
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside/config.json").write_text(SECRET)
    assert any(problem.startswith(f"model_index.json: {name!r} is not") for problem in check_folder(folder, "mit"))
    assert dry_run(folder, capsys)[0] == 2
    assert all("outside" not in str(path) for path in list_files(folder)[0].values())


def test_check_opens_what_push_sends_and_nothing_else(folder):
    """By Python's audit events; safetensors are opened outside of Python, so they are told apart by their listing."""
    Image.new("RGB", (4, 4)).save(folder / "stages.png")
    (folder / "evaluation.json").write_text(
        json.dumps({"reference": "mnist", "results": [{"metric": "fid", "value": 1}]})
    )
    (folder / "training_config.json").write_text("{}")
    (folder / "LICENSE").write_text("mine")
    for stray in ("notes.txt", "transformer/events.log", "optimizer.json", "other/config.json", "vae/.x.json"):
        (folder / stray).parent.mkdir(exist_ok=True)
        (folder / stray).write_text("stray")
    opened, watching = set(), True

    def watch(event, arguments):  # a hook cannot be removed
        if (
            watching
            and event == "open"
            and isinstance(arguments[0], str)
            and Path(arguments[0]).is_relative_to(folder)
        ):
            opened.add(Path(arguments[0]).relative_to(folder).as_posix())

    sys.addaudithook(watch)
    assert check_folder(folder, "mit") == []
    watching = False
    upload = collect_upload(folder, "card")
    sent = {path for path in upload if not path.endswith((".py", "README.md", ".safetensors"))}
    written = {"modular_config.json", "modular_model_index.json"}  # anew by every push
    assert opened == (sent - written) | {"training_config.json"} and written <= sent
    weights = {path for path, content in upload.items() if path.endswith(".safetensors")}
    assert weights == {
        f"{part}/diffusion_pytorch_model.safetensors" for part in ("transformer", "latent_embedder", "vae")
    }
