"""The format of cached latents: what is written is read back, and a file that is not what it should be is refused."""

import json
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from helpers import tiny_vae
from torch.utils.data import DataLoader

from diffusers_dod.data.cache import CachedLatents, sample_posterior, select_flip
from diffusers_dod.data.cache_writing import LatentCacheWriter, cache_settings


NAMES = [f"klass/bild {row} ä.png" for row in range(7)]
LABELS = [2, 0, 1, 1, 0, 2, 2]


def make_cache(folder, kind="kl", seed=0, **options):
    """Seven random rows in three shards; returns the tensors that were written."""
    options = {"flips": True, "dtype": "float32", "shard_size": 3} | options
    settings = cache_settings(tiny_vae(kind), 16, NAMES, LABELS, **options)
    writer = LatentCacheWriter(folder, settings)
    generator = torch.Generator().manual_seed(seed)
    shape = (7, 1 + options["flips"], *settings["latent_shape"])
    tensors = {"mean": torch.randn(shape, generator=generator), "label": torch.tensor(LABELS)}
    tensors["id"] = torch.arange(7) * 10
    if settings["has_std"]:
        tensors["std"] = torch.rand(shape, generator=generator)
    if settings["features"]:
        tensors["features"] = torch.randn(*shape[:2], 4, 6, generator=generator)
    writer.begin()
    entries = []
    for number in (2, 0, 1):
        rows = writer.rows(number)
        part = {name: values[rows.start : rows.stop] for name, values in tensors.items()}
        entries.append(writer.write(number, part, NAMES[rows.start : rows.stop]))
    writer.finish(entries)
    return tensors


def shard(folder, number) -> Path:
    (path,) = Path(folder).glob(f"shard-{number:05d}-*.safetensors")
    return path


@pytest.mark.parametrize("dtype, precision", [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("flips", [True, False])
def test_what_is_written_is_read(tmp_path, dtype, precision, flips):
    written = make_cache(tmp_path, dtype=dtype, flips=flips, features={"grid": [2, 2], "width": 6})
    cache = CachedLatents(tmp_path)
    cache.verify()
    assert len(cache) == 7 and cache.flips == flips and cache.latent_shape == (4, 8, 8)
    assert cache.class_names is None and cache.num_classes == 3
    assert cache.labels.tolist() == LABELS
    for row in range(7):
        item = cache[row]
        assert item.keys() == {"mean", "std", "features", "label", "id"}
        assert (item["label"], item["id"], cache.name(row)) == (LABELS[row], row * 10, NAMES[row])
        for name in ("mean", "std", "features"):
            assert item[name].dtype == getattr(torch, dtype)
            torch.testing.assert_close(item[name].float(), written[name][row], rtol=precision, atol=1e-7)
    for row in (-1, 7):
        with pytest.raises(IndexError, match=f"{row} of a cache of 7"):
            cache[row]


@pytest.mark.parametrize("kind", ["tiny", "dc", "rae"])
def test_an_autoencoder_without_a_posterior_stores_no_deviation(tmp_path, kind):
    written = make_cache(tmp_path, kind)
    item = CachedLatents(tmp_path)[5]
    assert "std" not in item
    assert torch.equal(item["mean"], written["mean"][5])


def test_workers_load_the_same_rows(tmp_path):
    written = make_cache(tmp_path)
    cache = CachedLatents(tmp_path)
    assert cache[0]["label"] == 2  # the parent has mapped a shard already
    order = [6, 0, 3, 5, 1]
    batches = list(DataLoader(cache, batch_size=2, sampler=order, num_workers=1))
    assert [len(batch["id"]) for batch in batches] == [2, 2, 1]
    for name in written:
        assert torch.equal(torch.cat([batch[name] for batch in batches]), written[name][order]), name


def test_a_spawned_worker_maps_the_files_itself(tmp_path):
    """Workers that are not forked receive the data set through this pickler, which copies tensors to shared memory."""
    written = make_cache(tmp_path)
    cache = CachedLatents(tmp_path)
    for number in range(3):
        cache[3 * number]
    sent = bytes(ForkingPickler.dumps(cache))
    assert len(sent) < 4000 and b"torch" not in sent
    assert torch.equal(pickle.loads(sent)[4]["mean"], written["mean"][4])


def test_shards_are_mapped_not_read(tmp_path):
    make_cache(tmp_path)
    cache = CachedLatents(tmp_path)
    address = cache[4]["mean"].data_ptr()
    maps = Path("/proc/self/maps").read_text().splitlines()
    (mapped,) = [line for line in maps if str(shard(tmp_path, 1)) in line]
    start, end = (int(bound, 16) for bound in mapped.split()[0].split("-"))
    assert start <= address < end
    assert not any(str(shard(tmp_path, 0)) in line for line in maps)


def test_each_row_takes_the_flip_it_is_given(tmp_path):
    written = make_cache(tmp_path)
    mean = torch.stack([row["mean"] for row in CachedLatents(tmp_path)])
    assert torch.equal(select_flip(mean), written["mean"][:, 0])
    flipped = torch.tensor([True, False, False, True, True, False, True])
    chosen = select_flip(mean, flipped)
    for row in range(7):
        assert torch.equal(chosen[row], written["mean"][row, int(flipped[row])])


def test_samples_have_the_posteriors_moments():
    mean, std = torch.tensor([[-3.0], [5.0]]).half(), torch.tensor([[0.5], [2.0]]).half()
    noise = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    samples = sample_posterior(mean, std, noise)
    assert samples.dtype == torch.float32
    torch.testing.assert_close(samples.mean(1, keepdim=True), mean.float(), rtol=0, atol=0.03)
    torch.testing.assert_close(samples.std(1, keepdim=True), std.float(), rtol=0.02, atol=0)
    assert torch.equal(sample_posterior(mean), mean.float())


def test_equal_settings_make_equal_files(tmp_path):
    for folder in ("a", "b"):
        make_cache(tmp_path / folder)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 4 and files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def truncate(folder):
    path = shard(folder, 1)
    path.write_bytes(path.read_bytes()[:-100])
    return path.name, "bytes instead of"


def break_header(folder):
    path = shard(folder, 1)
    content = bytearray(path.read_bytes())
    content[8:40] = bytes(32)
    path.write_bytes(content)
    return path.name, "truncated or damaged"


def put_a_foreign_one(folder):
    make_cache(folder / "other", class_names=["a", "b", "c"])
    path = shard(folder, 1)
    path.write_bytes(shard(folder / "other", 1).read_bytes())
    return path.name, "belongs to another cache"


def exchange_two(folder):
    first, second = shard(folder, 0), shard(folder, 1)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return first.name, "belongs to another cache"


def remove(folder):
    path = shard(folder, 2)
    path.unlink()
    return path.name, "is missing"


def change_manifest(**changes):
    def damage(folder):
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        for key, value in changes.items():
            manifest[key] = {**manifest[key], **value} if isinstance(value, dict) else value
        path.write_text(json.dumps(manifest))
        return ("manifest.json" if changes.get("shards", 0) is not None else folder.name), ""

    return damage


def cut_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:-50])
    return path.name, "not the manifest of cached latents"


def remove_manifest(folder):
    (folder / "manifest.json").unlink()
    return folder.name, "holds no cached latents"


@pytest.mark.parametrize(
    "damage, reason",
    [
        (truncate, None),
        (break_header, None),
        (put_a_foreign_one, None),
        (exchange_two, None),
        (remove, None),
        (cut_manifest, None),
        (remove_manifest, None),
        (change_manifest(shards=None), "is not finished"),
        (change_manifest(format_version=2), "format version 2"),
        (change_manifest(settings={"resolution": 32}), "settings are not those"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_named_when_the_cache_is_opened(tmp_path, damage, reason):
    make_cache(tmp_path)
    CachedLatents(tmp_path)
    name, expected = damage(tmp_path)
    with pytest.raises(ValueError, match=reason or expected) as error:
        CachedLatents(tmp_path)
    assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"file": "../other/{name}"},
        {"file": "{folder}/{name}"},
        {"file": "below/../{name}"},
        {"file": "link"},
        {"file": ".."},
        {"file": ""},
        {"file": ["{name}"]},
        {"file": None},
        {"file": "{name}\0"},
        {"bytes": "many"},
        {"sha256": None},
    ],
    ids=json.dumps,
)
def test_a_manifest_names_nothing_but_shards_of_its_folder(tmp_path, entry):
    """Though the file that it names is the right one."""
    for folder in ("cache", "other"):
        make_cache(tmp_path / folder)
    name = shard(tmp_path / "cache", 1).name
    (tmp_path / "cache" / "below").mkdir()
    (tmp_path / "cache" / "link").symlink_to(tmp_path / "other" / name)
    file = tmp_path / "cache" / "manifest.json"
    manifest = json.loads(file.read_text())
    values = {
        key: value.format(name=name, folder=tmp_path / "other") if isinstance(value, str) else value
        for key, value in entry.items()
    }
    manifest["shards"][1] |= values
    file.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{file} does not list the shards of this folder"):
        CachedLatents(tmp_path / "cache")


@pytest.mark.parametrize("shards", [[], {}, "all", [1, 2, 3], [{}], 5], ids=json.dumps)
def test_a_manifest_without_its_shards_is_refused(tmp_path, shards):
    make_cache(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "shards": shards}))
    with pytest.raises(ValueError, match="does not list the shards of this folder"):
        CachedLatents(tmp_path)


def test_verifying_finds_a_single_changed_bit(tmp_path):
    make_cache(tmp_path)
    path = shard(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[-200] ^= 1
    path.write_bytes(content)
    cache = CachedLatents(tmp_path)
    with pytest.raises(ValueError, match="damaged") as error:
        cache.verify()
    assert path.name in str(error.value)


@pytest.mark.parametrize("dtype, value", [("float16", 1e5), ("float32", float("nan"))])
def test_a_number_that_the_type_cannot_hold_is_refused_with_its_image(tmp_path, dtype, value):
    settings = cache_settings(tiny_vae("tiny"), 16, NAMES, LABELS, dtype=dtype)
    writer = LatentCacheWriter(tmp_path, settings)
    writer.begin()
    mean = torch.zeros(7, 1, 4, 8, 8)
    mean[3, 0, 1, 2, 3] = value
    tensors = {"mean": mean, "label": torch.tensor(LABELS), "id": torch.arange(7)}
    with pytest.raises(ValueError, match=f"mean of {NAMES[3]} is not finite in {dtype}"):
        writer.write(0, tensors, NAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
