"""Nothing is guessed from the first row, and a saved model's classes go by their names."""

import logging
import unicodedata
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from helpers import tiny_embedder, tiny_pipeline, tiny_transformer, tiny_vae

from diffusers_dod.cli import BadInput
from diffusers_dod.data.batches import load_data, make_batches
from diffusers_dod.data.cache import CachedLatents
from diffusers_dod.data.cache_writing import LatentCacheWriter, cache_settings
from diffusers_dod.data.classes import match_classes
from diffusers_dod.training.build import build_pipeline
from diffusers_dod.training.options import parse_args
from diffusers_dod.training.train_codes import parse_args as parse_codes


LABELS = {0: "ant", 1: "kite, fighter kite", 2: "crane", 3: "crane", 4: "Café", 5: "kite", 6: "owl, night bird"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    parts = {
        "transformer": tiny_transformer(in_channels=3, num_classes=7, prediction_type="flow"),
        "latent_embedder": tiny_embedder(in_channels=3),
    }
    tiny_pipeline(channels=3, id2label=LABELS, **parts).save_pretrained(folder)
    return folder


def write(root: Path, classes, count=3, mode="RGB") -> Path:
    for shade, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            PIL.Image.new("RGB", (16, 16), (shade, 9, number)).convert(mode).save(root / name / f"{number}.png")
    return root


def load(tmp_path, *options):
    options = ("--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "hf", "--max_train_steps", 1, *options)
    args = parse_args([str(option) for option in (*options, "--report_to", "none")])
    accelerator = Accelerator(cpu=True)
    return args, load_data(args, accelerator), accelerator


# 1. Streams


def first_gray(root):
    write(root, "ab")
    first = sorted(root.glob("*/*"))[np.random.default_rng(0).permutation(6)[0]]
    PIL.Image.open(first).convert("L").save(first)


def first_gray_with_alpha(root):
    write(root, "ab")
    first = sorted(root.glob("*/*"))[np.random.default_rng(0).permutation(6)[0]]
    PIL.Image.open(first).convert("LA").save(first)


def all_but_the_last_gray(root):
    write(root, "ab", mode="1")
    last = sorted(root.glob("*/*"))[np.random.default_rng(0).permutation(6)[-1]]
    PIL.Image.new("RGB", (16, 16), "red").save(last)


def one_gray(root):
    write(root, "a", count=1, mode="L")


def saved_with_a_gray_row(root):
    images = [PIL.Image.new(mode, (16, 16)) for mode in ("L", "RGB", "RGB")]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a"]))
    datasets.Dataset.from_dict({"image": images, "label": [0] * 3}, features).save_to_disk(root)


@pytest.mark.parametrize(
    "make",
    [first_gray, first_gray_with_alpha, all_but_the_last_gray, one_gray, saved_with_a_gray_row],
    ids=lambda make: make.__name__,
)
def test_a_stream_is_in_colour_whatever_its_first_image_is(make, tmp_path):
    make(tmp_path / "set")
    _, data, _ = load(tmp_path, "--train_data_dir", tmp_path / "set", "--streaming")
    assert not data.is_gray
    _, data, _ = load(tmp_path, "--train_data_dir", tmp_path / "set")
    assert data.is_gray == (make is one_gray)


def test_a_stream_is_gray_when_the_model_is(tmp_path):
    write(tmp_path / "set", "ab", mode="L")
    tiny = '{"in_channels": 1, "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "patch_size": 4}'
    embedder = '{"num_encoder_layers": 1, "num_decoder_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}'
    options = ("--streaming", "--resolution", 16, "--transformer_config", tiny, "--embedder_config", embedder)
    args, data, _ = load(tmp_path, "--train_data_dir", tmp_path / "set", *options)
    assert build_pipeline(args, data).transformer.config.in_channels == 1


@pytest.mark.parametrize("broken", range(6))
def test_a_stream_may_begin_with_a_broken_image(broken, tmp_path):
    write(tmp_path / "set", "ab")
    sorted(tmp_path.glob("set/*/*"))[broken].write_bytes(b"broken")
    options = ("--train_data_dir", tmp_path / "set", "--streaming", "--resolution", 16, "--train_batch_size", 6)
    args, data, accelerator = load(tmp_path, *options, "--on_broken_image", "skip")
    with pytest.warns(UserWarning, match="png cannot be read"):
        batch = next(make_batches(args, data, 3, accelerator, 0, None))
    assert len(batch["pixels"]) == 6 and len(set(batch["name"])) == 5


def test_where_no_image_can_be_read_skipping_is_no_cure(tmp_path):
    write(tmp_path / "set", "ab")
    for file in tmp_path.glob("set/*/*"):
        file.write_bytes(b"broken")
    with pytest.raises(BadInput, match="6 of 6 images cannot be read, .*: no image is left"):
        load(tmp_path, "--train_data_dir", tmp_path / "set", "--resolution", 16, "--on_broken_image", "skip")


# 2. Names


@pytest.mark.parametrize(
    "names, ids",
    [
        (["owl, night bird", "ant"], [6, 0]),
        (["night bird"], [6]),
        (["kite"], [5]),  # a whole label before a part of another
        (["fighter kite", "kite"], [1, 5]),
        ([unicodedata.normalize("NFD", "Café"), "ant "], [4, 0]),
        (list(LABELS.values()), list(LABELS)),  # even two that are called the same
        (["zebra", "gnu"], None),
        (["Ant"], None),
    ],
)
def test_names_find_their_classes(names, ids):
    assert match_classes(names, LABELS) == ids


@pytest.mark.parametrize(
    "names, message",
    [
        (["ant", "zebra"], r"1 classes of the data are the model's, but not 'zebra'"),
        (["owl", *"abcdefg"], r"not 'a', 'b', 'c', 'd', 'e' and 2 more: rename"),
        (["crane"], r"'crane' names the classes \[2, 3\]"),
        (["night bird", "owl"], r"'night bird', 'owl' are one class of the model, 'owl, night bird'"),
        (["kite", "owl", "ants"], r"2 classes of the data are the model's, but not 'ants'"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, message, model, tmp_path):
    with pytest.raises(ValueError, match=message):
        match_classes(names, LABELS)
    write(tmp_path / "set", names)
    with pytest.raises(BadInput, match=message):
        load(tmp_path, "--train_data_dir", tmp_path / "set", "--pretrained_model_name_or_path", model)


def from_folder(root, names):
    write(root, names)
    return ("--train_data_dir", root)


def from_stream(root, names):
    write(root, names)
    return ("--train_data_dir", root, "--streaming", "--shuffle_buffer_size", 4)


def from_balanced(root, names):
    write(root, names)
    return ("--train_data_dir", root, "--sampling", "balanced")


def from_saved(root, names):
    images = [PIL.Image.new("RGB", (16, 16), (shade, 9, number)) for shade in range(len(names)) for number in range(3)]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    rows = {"image": images, "label": [shade for shade in range(len(names)) for _ in range(3)]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(root)
    return ("--train_data_dir", root)


def from_saved_stream(root, names):
    return (*from_saved(root, names), "--streaming")


SOURCES = [from_folder, from_stream, from_balanced, from_saved, from_saved_stream]


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_a_saved_model_is_trained_on_its_own_classes(make, model, tmp_path):
    names = ["fighter kite", "owl"]
    options = make(tmp_path / "set", names)
    options += ("--pretrained_model_name_or_path", model, "--train_batch_size", 6)
    args, data, accelerator = load(tmp_path, *options)
    pipeline = build_pipeline(args, data)
    assert pipeline.config.id2label == {str(class_id): label for class_id, label in LABELS.items()}
    batches = make_batches(args, data, 3, accelerator, 0, None)
    for _ in range(3):
        batch = next(batches)
        assert batch["label"].tolist() == [[1, 6][shade] for shade in batch["pixels"][:, 0, 0, 0].tolist()]
        assert set(batch["label"].tolist()) == {1, 6}
    if args.streaming:  # and from a state
        following = next(make_batches(args, data, 3, accelerator, 0, batch["state"]))
        expected = next(batches)
        assert torch.equal(following["label"], expected["label"]) and following["state"] == expected["state"]


def test_the_same_for_a_code_model(model, tmp_path):
    write(tmp_path / "set", ["owl"])
    options = [str(model), "--train_data_dir", str(tmp_path / "set"), "--output_dir", str(tmp_path / "out")]
    args = parse_codes(
        [*options, "--max_train_steps", "1", "--report_to", "none", "--cache_dir", str(tmp_path / "hf")]
    )
    data = load_data(args, Accelerator(cpu=True))
    assert data.rows["label"][:] == [6] * 3 and data.num_classes == 7


def test_cached_latents_go_by_name(model, tmp_path):
    names = [f"{number}.png" for number in range(4)]
    settings = cache_settings(
        tiny_vae("kl"), 16, names, [0, 1, 1, 0], ["owl", "ant"], flips=False, dtype="float32", shard_size=4
    )
    writer = LatentCacheWriter(tmp_path / "cache", settings, {"vae_name_or_path": None, "vae_subfolder": None})
    writer.begin()
    tensors = {name: torch.randn(4, 1, *settings["latent_shape"]) for name in ("mean", "std")}
    tensors |= {"label": torch.tensor([0, 1, 1, 0]), "id": torch.arange(4)}
    writer.finish([writer.write(0, tensors, names)])
    _, data, _ = load(tmp_path, "--latents_dir", tmp_path / "cache", "--pretrained_model_name_or_path", model)
    assert data.rows.labels.tolist() == [6, 0, 0, 6] and data.num_classes == 7
    assert [data.rows[row]["label"].item() for row in range(4)] == [6, 0, 0, 6]
    assert CachedLatents(tmp_path / "cache").labels.tolist() == [0, 1, 1, 0]


def test_classes_of_other_names_go_by_position_and_a_table_says_so(model, tmp_path, caplog):
    write(tmp_path / "set", ["gnu", "zebra"])
    with caplog.at_level(logging.WARNING):
        _, data, _ = load(tmp_path, "--train_data_dir", tmp_path / "set", "--pretrained_model_name_or_path", model)
    assert sorted(set(data.rows["label"][:])) == [0, 1] and data.id2label == {**LABELS, 0: "gnu", 1: "zebra"}
    assert "  data 'gnu': model 0 ('ant')\n  data 'zebra': model 1 ('kite, fighter kite')" in caplog.text


def test_a_number_of_classes_that_leaves_out_a_named_one_is_refused(model, tmp_path):
    write(tmp_path / "set", ["owl"])
    options = ("--train_data_dir", tmp_path / "set", "--pretrained_model_name_or_path", model, "--num_classes")
    with pytest.raises(BadInput, match="class 6 of the model, so --num_classes cannot be 2"):
        load(tmp_path, *options, 2)
    assert load(tmp_path, *options, 7)[1].num_classes == 7
