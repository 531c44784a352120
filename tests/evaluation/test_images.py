"""Sets of images and extractors: whatever holds the same pictures gives the same features."""

import pickle

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTImageProcessor, ViTMAEConfig, ViTMAEModel

from diffusers_dod.evaluation import ImageSet, TransformersExtractor, evaluate, extract_features, feature_statistics


def pictures(count=12, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_folder(folder, images):
    folder.mkdir()
    for number, image in enumerate(images):
        (folder / str(number % 2)).mkdir(exist_ok=True)
        PIL.Image.fromarray(image).save(folder / str(number % 2) / f"{number:03d}.png")
    order = sorted(range(len(images)), key=lambda number: (number % 2, number))
    return folder, images[order]


class Flat(torch.nn.Module):
    """An extractor without parameters: a few pixels."""

    label = "pixels"

    def forward(self, images):
        values = images.flatten(1).float()
        return {"features": values[:, :6], "spatial": values[:, 6:9], "logits": values[:, 10:14] / 50}


def test_every_source_gives_the_same_pictures(tmp_path):
    folder, images = write_folder(tmp_path / "folder", pictures())
    np.savez(tmp_path / "images.npz", arr_0=images)
    rows = {"image": [PIL.Image.fromarray(image) for image in images], "label": [0] * len(images)}
    datasets.Dataset.from_dict(
        rows, datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    ).save_to_disk(tmp_path / "saved")
    for source in (folder, tmp_path / "images.npz", tmp_path / "saved"):
        found = ImageSet(str(source))
        assert len(found) == len(images)
        batches = list(found.batches(5))
        assert [len(batch) for batch in batches] == [5, 5, 2] and batches[0].dtype == torch.uint8
        assert np.array_equal(torch.cat(batches).permute(0, 2, 3, 1), images), source


def test_statistics_of_an_adm_reference(tmp_path):
    features = torch.from_numpy(pictures().reshape(12, -1)[:, :6].astype(np.float64))
    statistics = feature_statistics(features)
    arrays = {"mu": statistics.mean.numpy(), "sigma": statistics.covariance.numpy()}
    np.savez(tmp_path / "reference.npz", **arrays)
    reference = ImageSet(str(tmp_path / "reference.npz"))
    assert len(reference) == 0
    assert torch.equal(reference.statistics["features"].covariance, statistics.covariance)
    # Statistics alone serve for the Fréchet distance, and for nothing that needs images.
    other = {"features": features.float()}
    (result,) = evaluate(other, reference, {}, "pixels")
    assert result["metric"] == "fd" and result["value"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="6 channels but the extractor has 5: they were made with another network"):
        evaluate({"features": features[:, :5]}, reference, {}, "pixels")


def test_all_metrics_of_an_extractor_that_is_passed_in(tmp_path):
    for name, seed in (("samples", 1), ("reference", 2)):
        np.savez(tmp_path / f"{name}.npz", arr_0=pictures(seed=seed))
    samples, reference = (ImageSet(str(tmp_path / f"{name}.npz")) for name in ("samples", "reference"))
    features, others = (extract_features(images, Flat(), batch_size=5) for images in (samples, reference))
    assert features["features"].shape == (12, 6)
    results = evaluate(features, reference, others, Flat.label)
    values = {result["metric"]: result["value"] for result in results}
    assert set(values) == set("fd sfd is is_std kid kid_std precision recall density coverage".split())
    assert all("(pixels)" in result["name"] for result in results)
    only = evaluate(features, reference, others, Flat.label, metrics=("sfd",))
    assert [result["metric"] for result in only] == ["sfd"] and only[0]["value"] == values["sfd"]
    # The usual names belong to the usual network.
    named = {result["metric"]: result["name"] for result in evaluate(features, reference, others, "inception")}
    assert named["fd"] == "FID" and named["sfd"] == "sFID" and named["precision"] == "precision"
    with pytest.raises(ValueError, match="'fid' is no metric; choose from fd, sfd"):
        evaluate(features, reference, others, "pixels", metrics=("fid",))


def test_sizes_are_brought_together_or_refused(tmp_path):
    (tmp_path / "mixed").mkdir()
    for size in (16, 24):
        PIL.Image.fromarray(pictures(1, size)[0]).save(tmp_path / "mixed" / f"{size}.png")
    with pytest.raises(ValueError, match="differ in size: give a resolution"):
        list(ImageSet(str(tmp_path / "mixed")).batches(2))
    (batch,) = ImageSet(str(tmp_path / "mixed"), resolution=8).batches(2)
    assert batch.shape == (2, 3, 8, 8)


def test_grayscale_pictures_become_colours(tmp_path):
    np.savez(tmp_path / "gray.npz", arr_0=pictures()[..., :1])
    (batch,) = ImageSet(str(tmp_path / "gray.npz")).batches(12)
    assert batch.shape == (12, 3, 16, 16) and torch.equal(batch[:, 0], batch[:, 2])


@pytest.mark.parametrize("arrays, message", [({}, "holds no images"), ({"arr_0": np.zeros((2, 4, 4, 3))}, "in uint8")])
def test_npz_that_holds_something_else(arrays, message, tmp_path):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        ImageSet(str(tmp_path / "x.npz"))


def test_npz_with_a_pickle_in_it_is_not_opened(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        ImageSet(str(tmp_path / "x.npz"))


def test_sets_are_read_by_workers_of_any_kind(tmp_path):
    """Processes that are not forked take what they read by pickle."""
    PIL.Image.fromarray(pictures(1, 8)[0]).save(tmp_path / "0.png")
    np.savez(tmp_path / "set.npz", arr_0=pictures(2, 8))
    for source in (tmp_path, tmp_path / "set.npz"):
        images = ImageSet(str(source))
        assert pickle.loads(pickle.dumps(images.read))(images.rows[0]).size == (8, 8)


def test_a_model_of_two_towers_gives_its_vision_and_one_without_pooling_is_refused(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**shape, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    clip = CLIPModel(
        CLIPConfig(text_config={**shape, "vocab_size": 99}, vision_config=vision, projection_dim=8)
    ).eval()
    mae = ViTMAEModel(ViTMAEConfig(**vision)).eval()
    processor = ViTImageProcessor(size={"height": 28, "width": 28}, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    for name, model in (("clip", clip), ("mae", mae)):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    images = torch.from_numpy(pictures(2, 28)).permute(0, 3, 1, 2)
    features = TransformersExtractor(str(tmp_path / "clip"))(images)["features"]
    with torch.no_grad():
        expected = clip.vision_model(pixel_values=images / 255).pooler_output
    assert torch.allclose(features, expected, atol=1e-5)
    with pytest.raises(ValueError, match="mae has no pooled output"):
        TransformersExtractor(str(tmp_path / "mae"))(images)


def test_vision_model_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "tiny-dino")
    size = {"height": 28, "width": 28}
    processor = ViTImageProcessor(size=size, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.1])
    processor.save_pretrained(tmp_path / "tiny-dino")
    extractor = TransformersExtractor(str(tmp_path / "tiny-dino"))
    images = torch.from_numpy(pictures(3, 28)).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.1]))
    with torch.no_grad():
        expected = model((images / 255 - mean) / std).last_hidden_state[:, 0]  # the normalised class token
    assert extractor.label == "tiny-dino"
    assert torch.allclose(extractor(images)["features"], expected, atol=1e-5)
    assert extractor(images.repeat_interleave(2, 2).repeat_interleave(2, 3))["features"].shape == (3, 16)
