"""Pictures that users upload."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from ..data.images import read_image


# A picture of 50 megapixels is 200 MB for Pillow, and the memory of a thread stays with it: one thread reads them all.
READER = ThreadPoolExecutor(1, thread_name_prefix="read-picture")


def open_picture(path: str, largest: int | None = None) -> Image.Image:
    """Reads a user's picture as the pipeline and the training do.

    Args:
        path (`str`): file on the server.
        largest (`int`, *optional*): longer side in pixels; a larger picture is shrunk to it.

    Raises:
        ValueError: if the file is not an image, is too large or too narrow, or has an unsupported mode.
    """

    def read() -> Image.Image:
        picture = read_image({"path": path, "bytes": None})
        if largest is not None:
            picture.thumbnail((largest, largest))
        return picture

    try:
        return READER.submit(read).result()
    except ValueError as error:
        # The server's folders are nobody's business.
        raise ValueError(f"{str(error).replace(path, Path(path).name)}: try another picture.") from None
