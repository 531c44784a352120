"""Writing a cache of latents ([`CachedLatents`]) shard by shard, by any number of processes, in any number of goes."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import save_file

from ..autoencoding import encode_posterior
from ..files import file_sha256, json_sha256, weights_sha256, write_json
from .cache import ADVICE, FORMAT_VERSION, MANIFEST_NAME, check_shard, read_manifest


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def vae_settings(vae: ModelMixin) -> dict[str, Any]:
    """By what an autoencoder is known again in a cache's settings, wherever it was loaded from."""
    scaling = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    settings = {
        "vae_class": type(vae).__name__,
        "vae_weights_sha256": weights_sha256(vae),
        "vae_scaling": {name: vae.config[name] for name in scaling if vae.config.get(name) is not None},
    }
    return json.loads(json.dumps(settings))


@torch.no_grad()
def cache_settings(
    vae: ModelMixin,
    resolution: int,
    names: list[str],
    labels: list[int],
    class_names: list[str] | None = None,
    flips: bool = False,
    dtype: str = "float16",
    shard_size: int = 2048,
    features: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a cache depends on; two caches of equal settings hold the same latents.

    Args:
        vae (`ModelMixin`): any autoencoder that [`encode_posterior`] takes.
        resolution (`int`): side of the square images.
        names (`list` of `str`): names of all images, in order.
        labels (`list` of `int`): their labels.
        class_names (`list` of `str`, *optional*): names of the classes.
        flips (`bool`, defaults to `False`): whether mirrored images are cached too.
        dtype (`str`, defaults to `"float16"`): of the stored numbers, or `"bfloat16"` or `"float32"`.
        shard_size (`int`, defaults to 2048): rows of a shard.
        features (`dict`, *optional*): what the features beside the latents depend on.

    Returns:
        `dict`: the settings, as JSON reads them.
    """
    mean, std = encode_posterior(vae, torch.zeros(1, 3, resolution, resolution, device=vae.device))
    settings = {
        **vae_settings(vae),
        "resolution": resolution,
        "latent_shape": mean.shape[1:],
        "has_std": std is not None,
        "dtype": dtype,
        "flips": flips,
        "features": features,
        "count": len(names),
        "shard_size": shard_size,
        "images_sha256": json_sha256([names, labels]),
        "class_names": class_names,
        "num_classes": len(class_names) if class_names else max(labels) + 1,
    }
    return json.loads(json.dumps(settings))


class LatentCacheWriter:
    """Writes the shards of a cache, whole or not at all, and then its manifest.

    Every process makes a writer of its own. [`~LatentCacheWriter.find`] separates the shards that are there from those
    that [`~LatentCacheWriter.write`] has to write; one process calls [`~LatentCacheWriter.begin`] before the first
    and [`~LatentCacheWriter.finish`] after the last. A shard depends on the settings and its number only, so it does
    not matter which process writes it, nor whether it was interrupted before.

    Args:
        folder (`str`): of the cache, made by `begin`.
        settings (`dict`): of [`cache_settings`].
        origin (`dict`, *optional*): what else the manifest holds, such as the VAE's name; it is not compared.

    Raises:
        ValueError: if the folder holds something else, or a cache of other settings.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any], origin: dict[str, Any] | None = None):
        self.folder = Path(folder)
        existing = read_manifest(folder)
        strangers = set(self.folder.glob("*")) - set(self._unfinished())
        if existing is None and strangers:
            raise ValueError(f"{folder} is not empty and holds no cached latents: choose another folder.")
        if existing is not None and existing["settings"] != settings:
            there = existing["settings"]
            differing = [
                f"{key} ({str(there.get(key))[:60]} there, {str(settings.get(key))[:60]} here)"
                for key in sorted(there.keys() | settings.keys())
                if there.get(key) != settings.get(key)
            ]
            raise ValueError(f"{folder} holds latents of other settings: {', '.join(differing)}.")
        self.settings = settings
        self.manifest = existing or {
            "format_version": FORMAT_VERSION,
            "settings": settings,
            "settings_sha256": json_sha256(settings),
            **(origin or {}),
            "shards": None,
        }
        self.num_shards = -(-settings["count"] // settings["shard_size"])

    def _unfinished(self) -> list[Path]:
        # `.tmp*` is what safetensors (0.8) itself writes to before it renames.
        kinds = ("tmp-shard-*.safetensors", f"tmp-*{MANIFEST_NAME}", ".tmp*")
        return [path for kind in kinds for path in self.folder.glob(kind)]

    def rows(self, number: int) -> range:
        """The rows of a shard."""
        size = self.settings["shard_size"]
        return range(number * size, min((number + 1) * size, self.settings["count"]))

    def find(self, number: int) -> dict[str, Any] | None:
        """The manifest's entry of a shard that is already there, read in full; `None` if it is not.

        Raises:
            ValueError: if it is truncated, damaged or of another cache.
        """
        found = sorted(self.folder.glob(f"shard-{number:05d}-*.safetensors"))
        for path in found:
            check_shard(path, self.manifest, number)
            if path.stem.rpartition("-")[2] != (sha256 := file_sha256(path)):
                raise ValueError(f"{path} is damaged, its checksum differs: {ADVICE}.")
        return self._entry(found[-1], number, sha256) if found else None

    def _entry(self, path: Path, number: int, sha256: str) -> dict[str, Any]:
        return {"file": path.name, "rows": len(self.rows(number)), "bytes": path.stat().st_size, "sha256": sha256}

    def begin(self) -> None:
        """Makes the folder and its unfinished manifest, and removes what an interrupted run left half-written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._unfinished():
            leftover.unlink()
        write_json(self.folder / MANIFEST_NAME, self.manifest)

    def write(self, number: int, tensors: dict[str, torch.Tensor], names: list[str]) -> dict[str, Any]:
        """Writes a shard under another name and renames it when it is whole.

        Args:
            number (`int`): of the shard.
            tensors (`dict` of `str` to `torch.Tensor`): `mean`, `label`, `id` and, where the cache has them, `std` and
                `features`, as [`CachedLatents`] describes them, in any floating-point type.
            names (`list` of `str`): of the images.

        Returns:
            `dict`: the manifest's entry.

        Raises:
            ValueError: if a number is not finite in the type it is stored in.
        """
        stored = {}
        for name, values in tensors.items():
            stored[name] = values.to(DTYPES[self.settings["dtype"]]) if values.is_floating_point() else values
            finite = stored[name].flatten(1).isfinite().all(1) if values.is_floating_point() else torch.ones(1)
            if not finite.all():
                image, dtype = names[int(finite.int().argmin())], self.settings["dtype"]
                advice = "" if dtype == "float32" else ": store bfloat16 or float32"
                raise ValueError(f"The {name} of {image} is not finite in {dtype}{advice}.")
        encoded = [name.encode() for name in names]
        stored["name_bytes"] = torch.tensor(list(b"".join(encoded)), dtype=torch.uint8)
        stored["name_offsets"] = torch.tensor([0, *map(len, encoded)]).cumsum(0)
        # One entry: safetensors writes several in no fixed order, and equal shards shall be equal files.
        origin = json.dumps({"cache": self.manifest["settings_sha256"], "shard": number})
        unfinished = self.folder / f"tmp-shard-{number:05d}.safetensors"
        save_file(stored, unfinished, metadata={"origin": origin})
        sha256 = file_sha256(unfinished)
        path = self.folder / f"shard-{number:05d}-{sha256}.safetensors"
        unfinished.rename(path)
        return self._entry(path, number, sha256)

    def finish(self, shards: list[dict[str, Any]]) -> None:
        """Writes the manifest, with which the cache is whole.

        Args:
            shards (`list` of `dict`): the entries of all shards, in any order.
        """
        self.manifest["shards"] = sorted(shards, key=lambda shard: shard["file"])
        write_json(self.folder / MANIFEST_NAME, self.manifest)
