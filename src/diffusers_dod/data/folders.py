"""Which files of a folder are its images, and of which class: one rule for training, streaming, caching and evaluation."""

import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


SUFFIXES = frozenset(".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split(" "))


class ImageFolder(NamedTuple):
    """What a folder holds.

    Args:
        files (`list` of `str`): absolute paths of the images, sorted by class and path.
        labels (`list` of `int`): the class of each; all 0 without classes.
        class_names (`list` of `str`): names of the subfolders that hold images, in Unicode's composed form (NFC).
        left_out (`dict`): numbers of what was left out, by its kind.
    """

    files: list[str]
    labels: list[int]
    class_names: list[str]
    left_out: dict[str, int]

    def describe_left_out(self) -> str:
        """One line, empty if nothing was left out."""
        return ", ".join(f"{count} {kind}" for kind, count in self.left_out.items())


def is_hidden(name: str, is_folder: bool) -> bool:
    """Whether a name begins with a dot, as AppleDouble's `._0.png`; a folder's also with two underscores, as `__MACOSX`."""
    return name.startswith((".", "__") if is_folder else ".")


def _walk(folder: str, names: tuple[str, ...], above: tuple[str, ...], left_out: Counter) -> Iterator[tuple[str, ...]]:
    """The images below `folder`, each as the names that lead to it; `above` are the real paths of the folders above."""
    above = (*above, os.path.realpath(folder))
    with os.scandir(folder) as entries:
        found = list(entries)
    for entry in found:
        is_folder = entry.is_dir()  # also by way of a link
        if is_hidden(entry.name, is_folder):
            left_out["hidden folders" if is_folder else "hidden files"] += 1
        elif any("\ud800" <= letter <= "\udfff" for letter in entry.name):
            left_out["names that are not UTF-8"] += 1
        elif is_folder and os.path.realpath(entry.path) in above:
            left_out["links to a folder above"] += 1
        elif is_folder:
            yield from _walk(entry.path, (*names, entry.name), above, left_out)
        elif Path(entry.name).suffix.lower() not in SUFFIXES:
            left_out["files that are not images"] += 1
        elif not entry.is_file():
            left_out["broken links"] += 1
        else:
            yield (*names, entry.name)


def list_images(folder: str | Path, labelled: bool = True) -> ImageFolder:
    """Lists the images of a folder at any depth; links are followed, names are taken literally.

    Left out are hidden files and folders, files whose suffix is not that of an image (`metadata.csv` among them), broken
    links and links to a folder above.

    Args:
        folder (`str`): where to look.
        labelled (`bool`, defaults to `True`): take each subfolder as a class; images beside the subfolders are left out.

    Raises:
        ValueError: if it is not a folder, has no images, or has no subfolders of them though it should.
        OSError: for a folder in it that cannot be read.
    """
    root = os.path.abspath(folder)
    if not os.path.isdir(root):
        raise ValueError("it is not a folder")
    left_out: Counter = Counter()
    found = list(_walk(root, (), (), left_out))
    if labelled:
        inside = [names for names in found if len(names) > 1]
        if not inside and (found or not any(entry.is_dir() for entry in os.scandir(root))):
            raise ValueError("it has no subfolders, put the images of each class into one of their own")
        if len(inside) < len(found):
            left_out["images outside of the classes' folders"] = len(found) - len(inside)
        found = inside
    if not found:
        seen = ", ".join(f"{count} {kind}" for kind, count in left_out.items())
        raise ValueError("it holds no images" + (f", but {seen}" if seen else ""))

    # The same order and classes on every file system: some keep names decomposed.
    rows = sorted((tuple(unicodedata.normalize("NFC", name) for name in names), names) for names in found)
    files = [os.path.join(root, *names) for _, names in rows]
    if not labelled:
        return ImageFolder(files, [0] * len(files), [], dict(left_out))
    class_names = sorted({names[0] for names, _ in rows})
    ids = {name: class_id for class_id, name in enumerate(class_names)}
    empty = {
        unicodedata.normalize("NFC", entry.name)
        for entry in os.scandir(root)
        if entry.is_dir() and not is_hidden(entry.name, True)
    } - ids.keys()
    if empty:
        left_out["folders without images"] = len(empty)
    return ImageFolder(files, [ids[names[0]] for names, _ in rows], class_names, dict(left_out))


def say_left_out(source: str, images: ImageFolder) -> None:
    """Prints in one line what was left out, in the first process of a run."""
    if images.left_out and os.environ.get("RANK", "0") == "0":
        print(f"Left out of {source}: {images.describe_left_out()}.", file=sys.stderr)
