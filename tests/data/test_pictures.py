"""How a picture is read: one way for training, the pipeline's `image=`, evaluation and the demo."""

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import tiny_pipeline

from diffusers_dod.data.images import collate_images, inspect_images, load_labelled_images, read_image
from diffusers_dod.demo.drawing import open_picture
from diffusers_dod.evaluation import ImageSet
from diffusers_dod.pictures import MAX_MEGAPIXELS, prepare_picture


SIZE = 16


def halves(left, right, mode="RGB"):
    """A picture whose left half has one value and the right half another."""
    picture = PIL.Image.new(mode, (SIZE, SIZE), right)
    picture.paste(left, (0, 0, SIZE // 2, SIZE))
    return picture


def through_training(file):
    pixels, _ = collate_images([{"image": {"path": str(file), "bytes": None}, "label": 0}], SIZE, 3)
    return pixels[0]


def through_bytes(file):
    pixels, _ = collate_images([{"image": {"path": None, "bytes": file.read_bytes()}, "label": 0}], SIZE, 3)
    return pixels[0]


def through_evaluation(file):
    (batch,) = ImageSet(str(file.parent)).batches(1)
    return batch[0]


def through_pipeline(file):
    latents = tiny_pipeline(channels=3).prepare_image_latents(
        PIL.Image.open(file), 1, 1, SIZE, SIZE, torch.float32, torch.device("cpu")
    )
    return ((latents[0] + 1) * 127.5).round().to(torch.uint8)


def through_demo(file):
    return torch.from_numpy(np.array(open_picture(str(file)).convert("RGB"))).permute(2, 0, 1)


WAYS = [through_training, through_bytes, through_evaluation, through_pipeline, through_demo]
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def mirrored_by_exif(folder):
    exif = PIL.Image.Exif()
    exif[0x0112] = 2  # stored mirrored
    halves(BLUE, RED).save(folder / "a.png", exif=exif)
    return RED, BLUE


def upside_down_by_exif(folder):
    exif = PIL.Image.Exif()
    exif[0x0112] = 3
    halves(BLUE, RED).save(folder / "a.webp", exif=exif, lossless=True)
    return RED, BLUE


def half_clear(folder):
    halves((255, 0, 0, 0), (0, 0, 255, 255), "RGBA").save(folder / "a.png")
    return WHITE, BLUE


def half_opaque(folder):
    halves((255, 0, 0, 128), (0, 0, 255, 255), "RGBA").save(folder / "a.webp", lossless=True)
    return (255, 127, 127), BLUE


def gray_with_alpha(folder):
    halves((0, 0), (100, 255), "LA").save(folder / "a.png")
    return WHITE, (100, 100, 100)


def clear_palette(folder):
    picture = PIL.Image.new("P", (SIZE, SIZE), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(0, (0, 0, SIZE // 2, SIZE))
    picture.save(folder / "a.gif", transparency=0)
    return WHITE, BLUE


def clear_colour(folder):
    halves(RED, BLUE).save(folder / "a.png", transparency=RED)
    return WHITE, BLUE


def ink(folder):
    halves((0, 255, 255, 0), (255, 255, 0, 0), "CMYK").save(folder / "a.tiff")
    return RED, BLUE


def bits(folder):
    halves(1, 0, "1").save(folder / "a.bmp")
    return WHITE, (0, 0, 0)


@pytest.mark.parametrize(
    "make",
    [
        mirrored_by_exif,
        upside_down_by_exif,
        half_clear,
        half_opaque,
        gray_with_alpha,
        clear_palette,
        clear_colour,
        ink,
        bits,
    ],
    ids=lambda make: make.__name__,
)
def test_every_way_of_reading_sees_the_same(make, tmp_path):
    left, right = make(tmp_path)
    (file,) = tmp_path.iterdir()
    for way in WAYS:
        pixels = way(file)
        for colour, half in ((left, pixels[..., : SIZE // 2]), (right, pixels[..., SIZE // 2 :])):
            difference = half.int() - torch.tensor(colour).view(3, 1, 1)
            assert difference.abs().max() <= 1, (way.__name__, half[:, 0, 0])


def save_array(array, name):
    return lambda folder: PIL.Image.fromarray(array).save(folder / name)


def cut(folder):
    PIL.Image.effect_noise((64, 64), 50).save(folder / "a.jpg")
    whole = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(whole[: len(whole) // 2])


REFUSED = {
    "16 bits": (save_array(np.full((8, 8), 30000, np.uint16), "a.png"), "its mode is I;16: convert it to 8 bits"),
    "16 bits, TIFF": (save_array(np.full((8, 8), 3, np.uint16), "a.tif"), "its mode is I;16: convert it to 8 bits"),
    "32 bits": (save_array(np.full((8, 8), 300, np.int32), "a.tiff"), "its mode is I: convert it to 8 bits"),
    "floats": (save_array(np.full((8, 8), 0.5, np.float32), "a.tiff"), "its mode is F: convert it to 8 bits"),
    "a wide strip": (lambda folder: PIL.Image.new("L", (90_000, 3)).save(folder / "a.png"), "too narrow, 90000 x 3"),
    "a tall strip": (lambda folder: PIL.Image.new("1", (2, 101)).save(folder / "a.bmp"), "too narrow, 2 x 101"),
    "pixels": (lambda folder: PIL.Image.new("1", (7200, 7000)).save(folder / "a.png"), "smaller than 50 megapixels"),
    "a cut file": (cut, "truncated"),
}
UNREADABLE = {
    "a bomb": (
        lambda folder: PIL.Image.new("1", (20_000, 20_000)).save(folder / "a.png"),
        "smaller than 50 megapixels",
    ),
    "text": (lambda folder: (folder / "a.png").write_text("hello"), "not a picture that can be read"),
    "nothing": (lambda folder: (folder / "a.jpg").write_bytes(b""), "not a picture that can be read"),
}


@pytest.mark.parametrize("name", [*REFUSED, *UNREADABLE])
def test_every_way_of_reading_refuses_the_same_and_names_the_file(name, tmp_path):
    make, message = {**REFUSED, **UNREADABLE}[name]
    make(tmp_path)
    (file,) = tmp_path.iterdir()
    for way in WAYS:
        if way is through_pipeline and name in UNREADABLE:
            continue  # Pillow opens none of them for the user
        with pytest.raises(ValueError, match=message) as error:
            way(file)
        named = {through_pipeline: "`image`", through_bytes: "an unnamed image"}.get(way, file.name)
        assert named in str(error.value), way.__name__


def test_sizes_at_the_limit_are_taken():
    assert prepare_picture(PIL.Image.new("L", (2, 100))).size == (2, 100)
    assert prepare_picture(PIL.Image.new("1", (MAX_MEGAPIXELS * 100, 10_000))).size == (5000, 10_000)


def test_nothing_is_decoded_before_the_size_is_known(tmp_path):
    """A file cut in its pixels, whose head tells a size that is refused: the size is what is said."""
    PIL.Image.effect_noise((9000, 6000), 50).save(tmp_path / "a.png", compress_level=1)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:5000])
    with pytest.raises(ValueError, match="too large, 9000 x 6000"):
        read_image({"path": str(tmp_path / "a.png"), "bytes": None})


def test_the_background_can_be_chosen():
    clear = PIL.Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    assert prepare_picture(clear, "navy").getpixel((0, 0)) == (0, 0, 128)
    assert prepare_picture(clear, (1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)
    assert prepare_picture(PIL.Image.new("LA", (4, 4), (9, 0)), "black").getpixel((0, 0)) == 0
    assert clear.mode == "RGBA" and clear.getpixel((0, 0)) == (9, 9, 9, 0)


def test_the_check_of_a_folder_names_what_cannot_be_read(tmp_path):
    for number, (make, _) in enumerate(REFUSED.values()):
        folder = tmp_path / "set" / f"class {number}"
        folder.mkdir(parents=True)
        make(folder)
    halves(RED, BLUE).save(tmp_path / "set" / "class 0" / "good.png")
    PIL.Image.new("LA", (8, 8)).save(tmp_path / "set" / "class 0" / "gray.png")
    data, _ = load_labelled_images(str(tmp_path / "set"), cache_dir=str(tmp_path / "hf"))
    report = inspect_images(data)
    bad = [row["image"]["path"] for row in data if not row["image"]["path"].endswith(("good.png", "gray.png"))]
    assert [problem.split(" (")[0] for problem in report["problem"] if problem] == bad and len(bad) == len(REFUSED)
    good = [(problem, gray) for problem, gray in zip(report["problem"], report["is_gray"]) if not problem]
    assert good == [("", False), ("", True)]


def test_evaluation_names_the_file_from_a_worker_too(tmp_path):
    halves(RED, BLUE).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("hello")
    with pytest.raises(ValueError, match=r"^\S+b.png cannot be read \(it is not a picture that can be read\)$"):
        list(ImageSet(str(tmp_path)).batches(2, num_workers=1))
