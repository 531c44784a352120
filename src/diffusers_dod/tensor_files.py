"""Reads files of tensors without running code that they hold."""

import argparse
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from .cli import BadInput, first_line


LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def load_tensors(path: Path) -> dict:
    """Reads a checkpoint without ever running code that it holds.

    Args:
        path (`Path`): `.safetensors`, or a file of `torch.save` (`.pt`, `.pth`, `.bin`, `.ckpt`).

    Raises:
        BadInput: if it cannot be read, or only by running its code.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise BadInput(f"{path} is a git-lfs pointer, not the file itself: fetch that with `git lfs pull`.")
        # FiT's own loader says that some files called .safetensors were written by torch.save.
        if path.suffix == ".safetensors" and not zipfile.is_zipfile(path):
            return load_file(path)
        # The training scripts of DiT, SiT and REPA save their command line along; a Namespace runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle that torch did not write, which fails below or loads whole
            with path.open("rb") as file:  # of a path torch would believe the suffix
                return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise BadInput(
            f"{path} is broken or holds other objects than tensors, which are not loaded because that can run code: "
            "save its state dict alone, best as .safetensors."
        ) from error
    except BadInput:
        raise
    except Exception as error:  # a foreign file can make the readers raise anything
        raise BadInput(f"{path} cannot be read: {first_line(error)}") from error
