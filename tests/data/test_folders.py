"""What a folder's images are: the same for training, streaming and evaluation, whatever lies beside them."""

import os
import unicodedata
from pathlib import Path

import PIL.Image
import pytest

from diffusers_dod.data.folders import list_images
from diffusers_dod.data.images import load_labelled_images
from diffusers_dod.evaluation import ImageSet


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if Path(name).suffix.lower() in (".png", ".jpeg", ".webp"):
            PIL.Image.new("RGB", (8, 8)).save(root / name)
        else:
            (root / name).write_text("no picture")
    return root


def hidden(root):
    write(root, "owl/1.png", "owl/.2.png", "owl/.thumbs/3.png", ".git/4.png", "__pycache__/5.png", "yak/__6.png")
    return ["owl/1.png", "yak/__6.png"], {"hidden folders": 3, "hidden files": 1}


def deep(root):
    write(root, "owl/barn/young/1.png", "owl/2.JPEG", "yak/2021/05/3.webp")
    return ["owl/2.JPEG", "owl/barn/young/1.png", "yak/2021/05/3.webp"], {}


def characters(root):
    names = ["a*b/?.png", "axb/1.png", "c::d/x y.png", "e{1,2}/#%20.png", "f!/~'\"&.png", "ü\n/**.png", "ü\n/y.png"]
    write(root, *names)
    return sorted(names), {}


def links(root):
    write(root, "owl/1.png")
    write(root.with_name("elsewhere"), "nest/2.png", "3.png")
    (root / "yak").symlink_to(root.with_name("elsewhere"))
    (root / "owl" / "linked.png").symlink_to(root.with_name("elsewhere") / "3.png")
    (root / "owl" / "gone.png").symlink_to("nowhere.png")
    (root / "owl" / "loop").symlink_to(root)
    found = ["owl/1.png", "owl/linked.png", "yak/3.png", "yak/nest/2.png"]
    return found, {"broken links": 1, "links to a folder above": 1}


def other_files(root):
    write(root, "owl/1.png", "owl/metadata.jsonl", "yak/2.png", "yak/notes.txt", "metadata.csv", "3.png", "state.json")
    write(root, "empty/readme.md")
    left_out = {
        "files that are not images": 5,
        "images outside of the classes' folders": 1,
        "folders without images": 1,
    }
    return ["owl/1.png", "yak/2.png"], left_out


def splits(root):  # names that `datasets` would take for something else
    write(root, "train/1.png", "test/2.png", "validation/3.png")
    return ["test/2.png", "train/1.png", "validation/3.png"], {}


def below_a_hidden_folder(root):
    write(root / ".cache" / "__set", "owl/1.png", "yak/2.png")
    return [".cache/__set/owl/1.png", ".cache/__set/yak/2.png"], {}


@pytest.mark.parametrize(
    "make",
    [hidden, deep, characters, links, other_files, splits, below_a_hidden_folder],
    ids=lambda make: make.__name__,
)
def test_every_way_of_reading_finds_the_same(make, tmp_path, capsys):
    root = tmp_path / "set"
    root.mkdir()
    wanted, left_out = make(root)
    wanted = [str(root / name) for name in wanted]
    if make is below_a_hidden_folder:
        root = root / ".cache" / "__set"
    images = list_images(root)
    classes = [os.path.relpath(file, root).split(os.sep)[0] for file in wanted]
    assert images.files == wanted and images.left_out == left_out
    assert [images.class_names[label] for label in images.labels] == classes
    capsys.readouterr()
    for streaming in (False, True):
        data, names = load_labelled_images(str(root), cache_dir=str(tmp_path / "hf"), streaming=streaming)
        found = sorted((row["image"]["path"], names[row["label"]]) for row in data)
        assert found == sorted(zip(wanted, classes)) and names == images.class_names
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Left out")]
        assert len(lines) == bool(left_out)
        assert all(f"{count} {kind}" in lines[0] for kind, count in left_out.items())
    # Without classes, what lies beside the folders is an image too.
    loose = left_out.get("images outside of the classes' folders", 0)
    assert len(ImageSet(str(root))) == len(list_images(root, labelled=False).files) == len(wanted) + loose


def test_one_class_in_two_unicode_forms(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "Café 犬が") for form in ("NFC", "NFD"))
    assert composed != decomposed
    write(tmp_path, f"{composed}/1.png", f"{decomposed}/2.png", "Caff/3.png")
    images = list_images(tmp_path)
    assert images.class_names == ["Caff", composed] and images.labels == [0, 1, 1]
    assert [Path(file).name for file in images.files] == ["3.png", "1.png", "2.png"]


def test_a_name_that_is_not_utf8_is_counted(tmp_path):
    write(tmp_path, "owl/1.png")
    os.rename(tmp_path / "owl" / "1.png", os.fsencode(tmp_path / "owl") + b"/caf\xe9.png")
    write(tmp_path, "owl/2.png")
    images = list_images(tmp_path)
    assert [Path(file).name for file in images.files] == ["2.png"]
    assert images.left_out == {"names that are not UTF-8": 1}


@pytest.mark.parametrize(
    "names, messages",
    [
        (["1.png", "2.png"], ["no subfolders, put the images of each class into one of their own"]),
        ([".hidden/1.png", "1.png"], ["no subfolders"]),
        (["owl/notes.txt", "owl/.1.png"], ["no images", "1 files that are not images", "1 hidden files"]),
        (["owl/clip.mp4"], ["no images, but 1 files that are not images"]),
        ([], ["no subfolders"]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True], ids=["plain", "streaming"])
def test_a_folder_without_images_of_classes_is_refused(names, messages, streaming, tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    write(root, *names)
    with pytest.raises(ValueError, match=f"No images could be loaded from {root}: ") as error:
        load_labelled_images(str(root), cache_dir=str(tmp_path / "hf"), streaming=streaming)
    assert all(message in str(error.value) for message in messages)


def test_changed_images_are_checked_anew_and_others_are_not(tmp_path):
    write(tmp_path / "set", "owl/1.png", "owl/2.png")

    def fingerprint():
        return load_labelled_images(str(tmp_path / "set"), cache_dir=str(tmp_path / "hf"))[0]._fingerprint

    first = fingerprint()
    assert fingerprint() == first
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "set" / "owl" / "2.png")
    assert fingerprint() != first
