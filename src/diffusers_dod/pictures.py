"""What a picture must be for a model to see it: upright, 8 bits per channel, opaque, gray or RGB, and not too large."""

import PIL.Image
import PIL.ImageOps


ORIENTATION = 0x0112
MAX_MEGAPIXELS = 50
MAX_SIDE_RATIO = 50
GRAY_MODES = ("1", "L", "LA", "La")
COLOR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")


def check_picture(picture: PIL.Image.Image) -> None:
    """Refuses a picture by its size and mode, before its pixels are decoded.

    Args:
        picture (`PIL.Image.Image`): opened, loaded or not.

    Raises:
        ValueError: for no pixels, more than 50 megapixels, sides of more than 50 to 1, and for 16 bits per channel, floats
            and other modes whose range nobody knows. The message says what "it" is, so that a caller can name the file.
    """
    width, height = picture.size
    if min(width, height) < 1:
        raise ValueError(f"it is {width} x {height} and has no pixels")
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        raise ValueError(f"it is too large, {width} x {height}: make it smaller than {MAX_MEGAPIXELS} megapixels")
    if max(width, height) > MAX_SIDE_RATIO * min(width, height):
        raise ValueError(f"it is too narrow, {width} x {height}: crop it to sides of at most {MAX_SIDE_RATIO} to 1")
    if picture.mode not in GRAY_MODES + COLOR_MODES:
        raise ValueError(f"its mode is {picture.mode}: convert it to 8 bits per channel, in colour or gray")


def prepare_picture(picture: PIL.Image.Image, background: str | tuple[int, ...] = "white") -> PIL.Image.Image:
    """A picture as every part of this package sees it.

    It is turned as its EXIF orientation says. What is transparent lies on the background. Palettes, CMYK and other colours
    become RGB; gray stays gray, on a coloured background too.

    Args:
        picture (`PIL.Image.Image`): a picture, left as it is.
        background (`str` or `tuple` of `int`, defaults to `"white"`): colour that Pillow knows, of 8 bits per channel.

    Returns:
        `PIL.Image.Image`: of mode `"L"` or `"RGB"`.

    Raises:
        ValueError: as [`check_picture`]. A damaged file, not decoded yet, raises its decoder's own error.
    """
    check_picture(picture)
    mode = "L" if picture.mode in GRAY_MODES else "RGB"
    if picture.getexif().get(ORIENTATION, 1) != 1:  # else Pillow would copy what it need not turn
        picture = PIL.ImageOps.exif_transpose(picture)
    if picture.has_transparency_data or picture.mode in ("La", "RGBa"):
        # Pillow converts premultiplied gray to nothing but gray with alpha.
        layer = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")
        behind = PIL.Image.new("RGBA", layer.size, background)
        picture = PIL.Image.alpha_composite(behind, layer)
    return picture.convert(mode)
