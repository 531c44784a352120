"""Cached latents: their folder's format, and the data set that a training reads from it.

A cache is a folder of `manifest.json` and shards `shard-<number>-<sha256>.safetensors`, each of as many rows as the
manifest's `shard_size`, the last one of the rest. A shard's tensors, with a row for each image:

    mean, std   (rows, flips, channels, height, width)   the posterior, normalized as a diffusion model sees latents
    features    (rows, flips, tokens, width)             patch tokens of a vision model, where the cache has them
    label, id   (rows,)                                  class, and row in the data that was cached
    name_bytes, name_offsets                             file names in UTF-8, one after the other, and where each starts

`flips` is 1, or 2 where the mirrored image is cached too; an autoencoder without a posterior has no `std`. The sha256 is
that of the whole file, so a shard vouches for itself before there is a manifest to list it.

    cache = CachedLatents("latents")
    for batch in DataLoader(cache, batch_size=256, shuffle=True, num_workers=4):
        flipped = torch.rand(len(batch["id"])) < 0.5 if cache.flips else None
        mean = select_flip(batch["mean"], flipped)
        std = select_flip(batch["std"], flipped) if "std" in batch else None
        latents = sample_posterior(mean, std, torch.randn(mean.shape))
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.utils.data import Dataset

from ..files import file_sha256, json_sha256


MANIFEST_NAME = "manifest.json"
SHARD_NAME = re.compile(r"shard-\d{5,}-[0-9a-f]{64}\.safetensors")
FORMAT_VERSION = 1
ADVICE = "delete it and repeat the `diffusers-dod cache` command of this folder, which writes it anew"


def sample_posterior(
    mean: torch.Tensor, std: torch.Tensor | None = None, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """A sample of the posterior, `mean + std * noise`, in float32.

    Args:
        mean (`torch.Tensor`): `(batch, channels, height, width)`.
        std (`torch.Tensor`, *optional*): of the same shape.
        noise (`torch.Tensor`, *optional*): standard normal, of the same shape; not read where there is no `std`.

    Raises:
        ValueError: if there is a `std` but no noise.
    """
    if std is None:
        return mean.float()
    if noise is None:
        raise ValueError("A posterior with a standard deviation needs `noise` of its shape.")
    return mean.float() + std.float() * noise


def select_flip(values: torch.Tensor, flipped: torch.Tensor | None = None) -> torch.Tensor:
    """Of each row of a batch, the cached image as it is or its mirror image.

    Args:
        values (`torch.Tensor`): `(batch, flips, ...)`.
        flipped (`torch.Tensor`, *optional*): `(batch,)` of booleans, for a cache of both flips; `None` mirrors nothing.

    Returns:
        `torch.Tensor`: `(batch, ...)`.
    """
    if flipped is None:
        return values[:, 0]
    return values[torch.arange(len(values), device=values.device), flipped.long()]


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a cache, whole or not; `None` if there is none.

    Raises:
        ValueError: if it cannot be read, or another version of this package wrote it.
    """
    path = Path(folder, MANIFEST_NAME)
    try:
        manifest = json.loads(path.read_text())
        version, settings, _ = manifest["format_version"], manifest["settings"], manifest["shards"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the manifest of cached latents ({error}).") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} is of format version {version}, this package reads version {FORMAT_VERSION}.")
    if manifest.get("settings_sha256") != json_sha256(settings):
        raise ValueError(f"{path} was changed: its settings are not those that the cache was made with.")
    return manifest


def check_shard_list(folder: Path, manifest: dict[str, Any]) -> None:
    """Checks that a finished manifest names as many shards as there are, each by a name that cannot lead elsewhere.

    Raises:
        ValueError: naming the manifest.
    """

    def is_entry(shard: Any) -> bool:
        kinds = {"file": str, "bytes": int, "sha256": str}
        has_all = isinstance(shard, dict) and all(isinstance(shard.get(key), kind) for key, kind in kinds.items())
        return has_all and SHARD_NAME.fullmatch(shard["file"]) is not None

    shards, settings = manifest["shards"], manifest["settings"]
    count = -(-settings["count"] // settings["shard_size"])
    if not isinstance(shards, list) or len(shards) != count or not all(map(is_entry, shards)):
        raise ValueError(
            f"{folder / MANIFEST_NAME} does not list the shards of this folder: repeat the `diffusers-dod cache` command of "
            "this folder, which rewrites the list."
        )


def tensor_names(settings: dict[str, Any]) -> set[str]:
    """The tensors of every shard of a cache with these settings."""
    names = {"mean", "label", "id", "name_bytes", "name_offsets"}
    return names | ({"std"} if settings["has_std"] else set()) | ({"features"} if settings["features"] else set())


def check_shard(path: Path, manifest: dict[str, Any], number: int, num_bytes: int | None = None) -> None:
    """Checks a shard by its size and header, without reading its rows.

    Args:
        path (`Path`): the shard.
        manifest (`dict`): of the cache, complete or not.
        number (`int`): place of the shard in the cache.
        num_bytes (`int`, *optional*): size of the file, where it is known.

    Raises:
        ValueError: if it is missing, truncated, damaged or of another cache.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: repeat the `diffusers-dod cache` command of this folder.")
    if num_bytes is not None and os.path.getsize(path) != num_bytes:
        raise ValueError(f"{path} has {os.path.getsize(path)} bytes instead of {num_bytes}: {ADVICE}.")
    try:
        with safe_open(path, framework="pt") as shard:
            origin, names = json.loads((shard.metadata() or {}).get("origin", "{}")), set(shard.keys())
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): {ADVICE}.") from error
    expected = {"cache": manifest["settings_sha256"], "shard": number}
    if origin != expected or names != tensor_names(manifest["settings"]):
        raise ValueError(f"{path} belongs to another cache: {ADVICE}.")


class CachedLatents(Dataset):
    """The cached latents of a folder, memory-mapped: rows are read from the disk when they are asked for.

    A row is a `dict` of `mean`, `std` and `features` (those that the cache has, both flips, see [`select_flip`]),
    `label` and `id`; views of the mapped file, in the type they were stored in. `DataLoader`'s own collation copies
    them to a batch; its worker processes map the files themselves.

    Args:
        folder (`str`): what `diffusers-dod cache` wrote. All shards are checked by size and header;
            [`~CachedLatents.verify`] reads them in full.

    Attributes:
        settings (`dict`): what the cache was made of and how.
        flips (`bool`): whether mirrored images are cached too.
        class_names (`list` of `str`, *optional*): names of the classes.
        num_classes (`int`): number of classes.
        latent_shape (`tuple` of `int`): `(channels, height, width)`.
        class_ids (`torch.Tensor`, *optional*): `(classes,)`, the `label` that replaces each cached class.

    Raises:
        ValueError: if the folder holds no finished cache, or one of its shards is not what it should be.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None:
            raise ValueError(f"{folder} holds no cached latents: make them with `diffusers-dod cache`.")
        self.manifest = manifest
        if self.manifest["shards"] is None:
            raise ValueError(f"{folder} is not finished: repeat its `diffusers-dod cache` command to resume.")
        check_shard_list(self.folder, self.manifest)
        for number, shard in enumerate(self.manifest["shards"]):
            check_shard(self.folder / shard["file"], self.manifest, number, shard["bytes"])
        self.settings = self.manifest["settings"]
        self.flips: bool = self.settings["flips"]
        self.class_names: list[str] | None = self.settings["class_names"]
        self.num_classes: int = self.settings["num_classes"]
        self.latent_shape = tuple(self.settings["latent_shape"])
        self.class_ids: torch.Tensor | None = None
        self._mapped: dict[int, dict[str, torch.Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Mapped tensors would travel to a spawned worker as copies.
        return {**self.__dict__, "_mapped": {}}

    def __len__(self) -> int:
        return self.settings["count"]

    def _shard(self, number: int) -> dict[str, torch.Tensor]:
        if number not in self._mapped:
            # safetensors maps the file: nothing is read here.
            self._mapped[number] = load_file(self.folder / self.manifest["shards"][number]["file"])
        return self._mapped[number]

    def _locate(self, index: int) -> tuple[dict[str, torch.Tensor], int]:
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} of a cache of {len(self)} latents.")
        number, row = divmod(index, self.settings["shard_size"])
        return self._shard(number), row

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        shard, row = self._locate(index)
        values = {name: values[row] for name, values in shard.items() if not name.startswith("name_")}
        return values if self.class_ids is None else {**values, "label": self.class_ids[values["label"]]}

    @property
    def labels(self) -> torch.Tensor:
        """The class of every row, `(rows,)`, for sampling by class."""
        labels = torch.cat([self._shard(number)["label"] for number in range(len(self.manifest["shards"]))])
        return labels if self.class_ids is None else self.class_ids[labels]

    def name(self, index: int) -> str:
        """The file that a row was made of, relative to the data's folder, or its number where it had no file."""
        shard, row = self._locate(index)
        start, end = shard["name_offsets"][row : row + 2].tolist()
        return bytes(shard["name_bytes"][start:end].tolist()).decode()

    def verify(self) -> None:
        """Reads every shard in full and compares its checksum.

        Raises:
            ValueError: naming the first shard that differs.
        """
        for shard in self.manifest["shards"]:
            if file_sha256(self.folder / shard["file"]) != shard["sha256"]:
                raise ValueError(f"{self.folder / shard['file']} is damaged, its checksum differs: {ADVICE}.")
