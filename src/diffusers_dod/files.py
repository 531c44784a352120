"""Files that are whole or absent, and SHA-256 sums by which files, settings and models are recognised."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Within it write to the path that it yields; the file gets its name at the end, or is left out after an error."""
    path = Path(path)
    unfinished = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Finds out before the work whether its result can be written.

    Raises:
        OSError: if it cannot, with the file's name.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    probe = Path(path).with_name(f"tmp-{os.getpid()}-{Path(path).name}")
    probe.touch()
    probe.unlink()


def remove(path: Path) -> None:
    """Removes a file, a whole folder, or a link without what it leads to; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as indented JSON, whole or not at all."""
    with whole_file(path) as file:
        file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_sha256(path: str | Path) -> str:
    """The sum that `sha256sum` prints."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """The sum of a value's JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def weights_sha256(model: nn.Module, frozen_only: bool = False) -> str:
    """The sum of a model's weights with their names, types and shapes, wherever the model was loaded from.

    Args:
        frozen_only (`bool`, defaults to `False`): Leave out the parameters that need a gradient.
    """
    trained = {name for name, value in model.named_parameters() if frozen_only and value.requires_grad}
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name in trained:
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
