"""A damaged last checkpoint is named and the older whole one is used; recipes and records that are broken are one line."""

import pickle
import shutil

import pytest
import torch
from training_runs import arguments, assert_equal_tensors, weights, write_digits

from diffusers_dod.cli import BadInput
from diffusers_dod.training.__main__ import main, train_model
from diffusers_dod.training.checkpoints import what_is_damaged, write_checksums


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("run")
    options = ("--train_data_dir", write_digits(folder / "data"), "--resolution", 14, "--checkpointing_steps", 2)
    argv = arguments(folder / "run", *options, "--max_train_steps", 6)
    assert main(argv) == 0
    return folder / "run", argv


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "truncated weights": lambda folder: truncate(folder / "transformer/diffusion_pytorch_model.safetensors"),
    "a flipped bit": lambda folder: flip_a_bit(folder / "latent_embedder/diffusion_pytorch_model.safetensors"),
    "empty optimizer": lambda folder: (folder / "optimizer.bin").write_bytes(b""),
    "averages gone": lambda folder: (folder / "averages.json").unlink(),
    "no checksums": lambda folder: (folder / "checksums.json").unlink(),
    "checksums of a list": lambda folder: (folder / "checksums.json").write_text("[1]"),
    "broken configuration": lambda folder: (folder / "training_config.json").write_text("{"),
    "a guard of another": lambda folder: (folder / "guard.json").write_text("{}"),
    "an empty folder": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_older_whole_checkpoint_is_used(run, tmp_path, caplog, name):
    whole, argv = run
    shutil.copytree(whole / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    shutil.copytree(whole / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    damaged = tmp_path / "run" / "checkpoint-4"
    DAMAGE[name](damaged)
    assert what_is_damaged(damaged) is not None and what_is_damaged(whole / "checkpoint-4") is None
    command = [str(tmp_path / "run") if value == str(whole) else value for value in argv]
    assert main(command) == 0
    assert any("checkpoint-4 is damaged" in message and "passed over" in message for message in caplog.messages)
    assert_equal_tensors(weights(tmp_path / "run"), weights(whole))


def test_a_named_damaged_checkpoint_and_a_run_without_a_whole_one_are_one_line(run, tmp_path, capsys):
    whole, argv = run
    shutil.copytree(whole / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    flip_a_bit(tmp_path / "run" / "checkpoint-4" / "optimizer.bin")
    command = [str(tmp_path / "run") if value == str(whole) else value for value in argv]
    assert main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "no checkpoint of" in line and "is whole" in line
    with pytest.raises(BadInput, match="checkpoint-4 is damaged .optimizer.bin differs from its checksum"):
        train_model([*command, "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-4")])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_later_checkpoint_is_not_called_an_earlier_step(run, steps, capsys):
    whole, argv = run
    before = (whole / "training_config.json").read_text()
    assert main([*argv, "--max_train_steps", str(steps)]) == 2
    assert f"checkpoint-6 is of a later step than --max_train_steps {steps}" in capsys.readouterr().err
    assert (whole / "training_config.json").read_text() == before


LINKS = {
    "a linked checkpoint": lambda folder, whole: (folder / "checkpoint-2").symlink_to(whole / "checkpoint-2"),
    "a link to nowhere": lambda folder, whole: (folder / "checkpoint-3").symlink_to("nowhere"),
    "a file": lambda folder, whole: (folder / "checkpoint-3").write_text("no folder"),
    "an unfinished one that is a link": lambda folder, whole: (folder / "tmp-checkpoint-3").symlink_to(whole),
    "an unfinished one that is a file": lambda folder, whole: (folder / "tmp-checkpoint-3").write_text(""),
    "a linked model": lambda folder, whole: (folder / "transformer").symlink_to(whole / "transformer"),
}


@pytest.mark.parametrize("name", LINKS)
def test_links_and_files_in_the_place_of_folders_do_not_end_a_run(run, tmp_path, name):
    whole, argv = run
    shutil.copytree(whole / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    LINKS[name](tmp_path / "run", whole)
    command = [str(tmp_path / "run") if value == str(whole) else value for value in argv]
    assert main([*command, "--checkpoints_total_limit", "1"]) == 0
    assert_equal_tensors(weights(tmp_path / "run"), weights(whole))
    # What links led to is as it was.
    assert what_is_damaged(whole / "checkpoint-2") is None and (whole / "transformer" / "config.json").is_file()
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint-*")] == ["checkpoint-6"]


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (self.file, "w"))


def test_nothing_of_a_checkpoint_is_run(run, tmp_path):
    """No state of ours is a pickle; a checkpoint to which somebody adds one is passed over."""
    whole, argv = run
    assert not list((whole / "checkpoint-4").glob("custom_checkpoint*"))
    for step in (2, 4):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    bomb = tmp_path / "run" / "checkpoint-4" / "custom_checkpoint_0.pkl"
    bomb.write_bytes(pickle.dumps(Bomb(str(tmp_path / "was run"))))
    command = [str(tmp_path / "run") if value == str(whole) else value for value in argv]
    assert main(command) == 0
    assert not (tmp_path / "was run").exists()


DOCTORED = ["optimizer.bin", "scheduler.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "guard.json"]


@pytest.mark.parametrize("name", [*DOCTORED, "transformer/diffusion_pytorch_model.safetensors"])
def test_a_doctored_checkpoint_with_right_checksums_runs_nothing(run, tmp_path, name, capsys):
    """Of what accelerate loads before it, a checkpoint's random states are not needed; all else is one line."""
    whole, argv = run
    doctored = shutil.copytree(whole / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    torch.save({"state": Bomb(str(tmp_path / "was run"))}, doctored / name)
    write_checksums(doctored)
    assert what_is_damaged(doctored) is None
    command = [str(tmp_path / "run") if value == str(whole) else value for value in argv]
    assert main(command) == (0 if name.startswith("random") else 2)
    assert not (tmp_path / "was run").exists()
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert lines == [] if name.startswith("random") else "checkpoint-4 cannot be loaded" in lines[0]


@pytest.mark.parametrize("text", ["{", "[1, 2]", "", "null", "\x00"])
def test_a_damaged_record_of_the_run_is_one_line(run, tmp_path, text):
    whole, argv = run
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "training_config.json").write_text(text)
    command = [str(tmp_path / "run") if value == str(whole) else value for value in argv]
    with pytest.raises(BadInput, match="training_config.json is damaged"):
        train_model(command)


def replace_an_image(data):
    first, second = sorted(data.glob("*/*.png"))[:2]
    shutil.copy(second, first)


def move_an_image(data):
    image = next((data / "digit 0").iterdir())
    image.rename(data / "digit 1" / "moved.png")


def move_the_last_image_to_be_the_next_class_s_first(data):
    """The images stay in their order."""
    sorted((data / "digit 0").iterdir())[-1].rename(data / "digit 1" / "!.png")


def rename_an_image(data):
    image = sorted((data / "digit 0").iterdir())[0]
    image.rename(data / "digit 0" / "zzz.png")


def swap_two(data):
    first, second = sorted(data.glob("*/*.png"))[0], sorted(data.glob("*/*.png"))[-1]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def change_a_byte_after_the_pixels(data):
    image = sorted(data.glob("*/*.png"))[0]
    image.write_bytes(image.read_bytes() + b"\0")


@pytest.mark.parametrize(
    "change",
    [
        replace_an_image,
        move_an_image,
        move_the_last_image_to_be_the_next_class_s_first,
        rename_an_image,
        swap_two,
        change_a_byte_after_the_pixels,
    ],
    ids=lambda change: change.__name__,
)
def test_a_run_is_not_resumed_on_other_images(tmp_path, change, capsys):
    """Of the same number; the same images at another place are the same."""
    data = write_digits(tmp_path / "data", counts=(3, 2, 2))
    options = ("--resolution", 14, "--checkpointing_steps", 2)
    assert main(arguments(tmp_path / "run", "--train_data_dir", data, *options, "--max_train_steps", 2)) == 0
    shutil.copytree(data, tmp_path / "copy")
    change(data)
    longer = (*options, "--max_train_steps", 4)
    assert main(arguments(tmp_path / "run", "--train_data_dir", data, *longer)) == 2
    assert "images_sha256" in capsys.readouterr().err
    shutil.rmtree(data)
    shutil.copytree(tmp_path / "copy", data)
    assert main(arguments(tmp_path / "run", "--train_data_dir", data, *longer)) == 0
