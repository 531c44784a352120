"""Pictures that users upload: refused with a message, or as the pipeline sees them."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from own_process import in_own_process
from PIL import Image

from diffusers_dod.demo.uploads import open_picture


def write_text(file):
    file.write_text("not a picture")


def write_cut(file):
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:1000])


def write_huge(file):
    Image.new("1", (8000, 7000)).save(file)


def write_bomb(file):
    Image.new("1", (20000, 20000)).save(file)


def write_16_bit(file):
    Image.new("I;16", (8, 8)).save(file)


def write_narrow(file):
    Image.new("L", (200_000, 1)).save(file)


BAD_PICTURES = {
    write_text: "not a picture that can be read",
    write_cut: "truncated",
    write_huge: "too large",
    write_bomb: "too large",
    write_16_bit: "its mode is I;16: convert it to 8 bits per channel",
    write_narrow: "too narrow, 200000 x 1",
}


@pytest.mark.parametrize("write", BAD_PICTURES, ids=lambda write: write.__name__)
def test_a_bad_picture_is_refused(write, tmp_path):
    write(tmp_path / "bad.png")
    with pytest.raises(ValueError, match=BAD_PICTURES[write]) as error:
        open_picture(str(tmp_path / "bad.png"))
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_usual_mode_is_taken(mode, tmp_path):
    image = Image.new("RGB", (4, 4), "teal").convert(mode)
    image.save(tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"))
    assert open_picture(str(next(tmp_path.iterdir()))).mode == ("L" if mode in ("1", "L", "LA") else "RGB")


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK"])
@in_own_process()
def test_pictures_that_come_together_take_the_memory_of_one(mode, tmp_path):
    file = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    Image.new(mode, (4000, 3000)).save(file)

    def peak(requests):
        """The most bytes that the process had meanwhile, which Linux counts anew on demand."""
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")
        with ThreadPoolExecutor(requests) as users:
            sizes = {picture.size for picture in users.map(lambda _: open_picture(str(file), 256), range(requests))}
        assert sizes == {(256, 192)}
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    assert peak(1) + 2 * 4000 * 3000 * len(mode) > peak(8)


def test_a_transparent_picture_lies_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_picture(str(tmp_path / "a.png")).getpixel((0, 0)) == (255, 255, 255)
