"""The study of `study/`: its parts at tiny sizes, and that the report makes its tables from the committed results."""

import json
import re
from dataclasses import replace

import pytest
import report
import torch
from autoguidance import guided_by
from data_sets import DataSet, digits, draw_letter
from experiments import ABLATIONS, DOD, RESULTS, VARIANTS, settings
from measure_model import Setting, explain, measure, sample, sample_labels, unguided
from PIL import ImageFont
from referee import Referee
from train_model import Size, build_models, train, training_step

from diffusers_dod import DoDPipeline


SIZE = Size(width=64, heads=2, layers=1, batch_size=8)


@pytest.fixture(scope="module", autouse=True)
def without_compiling():
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def data():
    return digits(None)


@pytest.fixture(scope="module")
def referee(data):
    return Referee(data, steps=150)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    train(data, DOD, SIZE, [3, 6], seed=0, folder=folder)
    return folder


def test_nothing_held_out_is_trained_on(data):
    assert (len(data.images), len(data.held_out_images)) == (4000, 1000)
    both = torch.cat([data.images, data.held_out_images]).flatten(1)
    assert len(both.unique(dim=0)) == 5000
    assert data.images.min() == -1 and data.images.max() == 1


def test_a_letter_fills_the_same_square_in_every_face():
    for size in (60, 96):
        image = draw_letter(ImageFont.load_default(size), "W")
        left, top, right, bottom = image.getbbox()
        assert image.size == (32, 32) and abs(right - left - 26) <= 1 and bottom - top < 26
    assert draw_letter(ImageFont.load_default(96), " ") is None


@pytest.mark.parametrize(
    "setting, stage, evaluations",
    [
        (unguided(12, 12), 1, 12),
        (unguided(12, 12), 2, 24),
        (unguided(6, 18), 2, 24),
        (unguided(12, 12, real_prior=True), 2, 12),
        (Setting((12, 12), (1.5, 1.0)), 2, 30),
        (Setting((12, 12), (1.5, 1.5)), 2, 36),
        (Setting((12, 12), (1.5, 1.5), prior_guidance=1.5), 2, 42),
        (Setting((12, 12), (1.0, 1.0), prior_guidance=1.5), 2, 36),
        (Setting((12, 12), (1.5, 1.5), intervals=((0.0, 1.0), (0.0, 0.25))), 2, 39),
        (Setting((12, 12), (1.5, 1.5), drop="both"), 2, 36),
    ],
)
def test_evaluations_count_what_the_transformer_computes(data, trained, setting, stage, evaluations):
    assert setting.evaluations(stage) == evaluations
    pipe = DoDPipeline.from_pretrained(trained / "step-3")
    rows = []
    pipe.transformer.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    shorter = replace(setting, steps=setting.steps[:stage], guidance=setting.guidance[:stage])
    sample(pipe, shorter, torch.arange(10), data, seed=0)
    assert sum(rows) == 10 * evaluations


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_what_it_should(data, name):
    variant = VARIANTS[name]
    torch.manual_seed(0)
    transformer, embedder = build_models(data, variant, SIZE)
    torch.nn.init.normal_(embedder.proj_out.weight)
    torch.nn.init.normal_(transformer.proj_out.weight)
    training_step(transformer, embedder, data, variant, SIZE.batch_size).backward()
    assert all(parameter.grad.isfinite().all() for parameter in transformer.parameters())
    has_gradient = {parameter.grad is not None for parameter in embedder.parameters()}
    assert has_gradient == {variant.has_prior}
    codes = embedder(data.images[:2]).codes
    assert codes.shape == (2, variant.bottleneck[0] ** 2, variant.bottleneck[1])


def test_a_token_fits_the_width(data):
    with pytest.raises(ValueError, match="A token of 49 numbers.* does not pass through a width of 32"):
        build_models(data, DOD, replace(SIZE, width=32))


def test_only_ablations_differ_from_the_model(data):
    assert DOD not in ABLATIONS.values() and len(set(map(repr, VARIANTS.values()))) == len(VARIANTS)


def test_a_run_saves_averaged_weights_at_its_marks(data, trained, tmp_path):
    early, late = (DoDPipeline.from_pretrained(trained / f"step-{step}") for step in (3, 6))
    assert early.config.id2label["7"] == "7"
    assert not torch.equal(early.transformer.patch_embed.weight, late.transformer.patch_embed.weight)
    # Saving on the way changes nothing of what comes after.
    train(data, DOD, SIZE, [6], seed=0, folder=tmp_path)
    again = DoDPipeline.from_pretrained(tmp_path / "step-6")
    for one, other in zip(late.transformer.parameters(), again.transformer.parameters()):
        torch.testing.assert_close(one, other)


def test_the_referee_tells_real_from_noise_and_can_be_stored(data, referee):
    images, labels = data.held_out_images[::2], data.held_out_labels[::2]
    held_out = referee.measure(images, labels)
    noise = referee.measure(torch.rand_like(images) * 2 - 1, labels)
    assert held_out["fd"] < noise["fd"] / 5 and held_out["fd_pca"] < noise["fd_pca"] / 5
    assert held_out["accuracy"] > 0.8 > 0.4 > noise["accuracy"]
    assert min(held_out["precision"], held_out["recall"], held_out["coverage"]) > 0.8 > 0.4 > noise["coverage"]
    loaded = Referee.load(referee.state(), data)
    assert loaded.accuracy == referee.accuracy
    assert loaded.measure(data.images[:100], data.labels[:100]) == referee.measure(
        data.images[:100], data.labels[:100]
    )


def test_classes_are_sampled_as_often_as_they_occur(data):
    assert sample_labels(data, 30).tolist() == [*range(10)] * 3
    uneven = data._replace(labels=torch.tensor([0] * 60 + [1] * 29 + [2] * 11))
    labels = sample_labels(uneven, 10)
    assert torch.bincount(labels).tolist() == [6, 3, 1]
    assert torch.bincount(labels[:5]).tolist() == [3, 1, 1]  # mixed


def test_autoguidance_goes_away_from_the_weaker_model(data, trained):
    pipe, twin, weak = (DoDPipeline.from_pretrained(trained / f"step-{step}") for step in (6, 6, 3))
    for model in (pipe, twin, weak):  # whose last layers are still near their start, zero
        model.set_progress_bar_config(disable=True)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.latent_embedder.proj_out.weight)
        torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    everywhere = ((0.0, 1.0),) * 2
    labels = torch.arange(10)
    plain = sample(pipe, unguided(2, 2), labels, data, seed=0)

    def guided(by, *scales):
        with guided_by(pipe, by):
            return sample(pipe, Setting((2, 2), scales, intervals=everywhere), labels, data, seed=0)

    # Away from itself is nowhere; away from another is as far as the scale says.
    for stage, same in zip(plain, guided(twin, 3.0, 3.0)):
        torch.testing.assert_close(same, stage, atol=1e-4, rtol=0)
    near, far = (guided(weak, 1.0, scale)[1] - plain[1] for scale in (1.01, 1.02))
    assert near.abs().max() > 1e-5
    assert (far - 2 * near).norm() < 0.1 * near.norm()
    # It reads the prior through its own embedder.
    weak.register_modules(transformer=twin.transformer)
    assert (guided(weak, 1.0, 1.5)[1] - plain[1]).abs().max() > 1e-5
    # Outside, the null class guides again.
    null = sample(pipe, Setting((2, 2), (3.0, 3.0), intervals=everywhere), labels, data, seed=0)
    assert (null[0] - plain[0]).abs().max() > 1e-3


def test_explanations_of_known_stages(data, trained):
    pipe = DoDPipeline.from_pretrained(trained / "step-6")
    copied = explain(pipe, [data.images, data.images], data)
    assert copied["code_fd"] < 0.02 and copied["stage_2_to_1"] == 0 and copied["nearest_training"] < 1e-3
    assert copied["nearest_training_held_out"] > 0.1
    moved = explain(pipe, [-data.images, data.images], data)
    assert moved["code_fd"] > 10 * copied["code_fd"] and moved["stage_2_to_1"] > 1


def test_figures_of_a_model(data, referee, trained):
    pipe = DoDPipeline.from_pretrained(trained / "step-6")
    pipe.set_progress_bar_config(disable=True)
    rows = measure(pipe, pipe, [unguided(2, 2), unguided(2, 2, real_prior=True)], 20, data, referee, seed=0)
    assert [(row["stage"], row["evaluations"]) for row in rows] == [(1, 2), (2, 4), (2, 2)]
    assert "code_fd" in rows[1] and "code_fd" not in rows[0]


def test_the_class_only_rival_is_measured_as_often():
    steps = [1000, 2000, 4000, 4400]
    guided = [setting for setting in settings("class_only", 4000, steps) if max(setting.guidance) > 1]
    dod = [setting for setting in settings("dod", 4000, steps[:3]) if max(setting.guidance) > 1]
    assert len(guided) >= len(dod)
    assert max(setting.evaluations(1) for setting in guided) == max(setting.evaluations(2) for setting in dod)


def results_of(distances):
    """Two seeds' results in which every figure is the one distance of (variant, setting, stage), times 1 and times 2."""
    runs = []
    for variant in ("class_only", "dod"):
        steps = [500, 1000, 1100] if variant == "class_only" else [500, 1000]
        for seed in (0, 1):
            rows = [
                {
                    "step": step,
                    "setting": str(setting),
                    "stage": stage,
                    **dict.fromkeys(report.FIGURES, value * (seed + 1)),
                }
                for (of, setting, stage), value in distances.items()
                if of == variant
                for step in steps
            ]
            runs.append({"variant": variant, "seed": seed, "steps": steps, "rows": rows})
    return report.Results({}, runs)


def test_the_best_split_is_that_of_the_least_distance():
    distances = {
        ("class_only", report.LONG, 1): 10.0,
        ("dod", report.ALL_STAGES, 2): 8.0,
        ("dod", unguided(18, 6), 2): 7.0,
        ("dod", unguided(8, 8, 8), 1): 1.0,
        ("dod", unguided(8, 8, 8), 3): 6.0,
    }
    results = results_of(distances)
    text, one, other = report.best_split(results)
    assert "8/8/8 steps, the best of 3 splits" in text
    assert report.ratio(results, one, other, "fd") == "0.60 (0.60, 0.60)"
    text, *_ = report.best_split(results_of(distances | {("dod", report.ALL_STAGES, 2): 5.0}))
    assert "12/12 steps, the best of 3 splits" in text


def test_guidance_is_compared_with_the_rivals_best_of_no_more_evaluations():
    plain, dear = report.CLASS_ONLY_GUIDED[0], report.MORE_GUIDANCE["class_only"][-1]
    one_stage, autoguided = Setting((12, 12), (2.0, 1.0)), report.MORE_GUIDANCE["dod"][-1]
    assert (plain.evaluations(1), dear.evaluations(1)) == (36, 48)
    assert (one_stage.evaluations(2), autoguided.evaluations(2)) == (30, 48)
    distances = {("class_only", plain, 1): 10.0, ("class_only", dear, 1): 5.0}
    distances |= {("dod", report.DOD_GUIDED[0], 2): 9.0, ("dod", one_stage, 2): 8.0, ("dod", autoguided, 2): 4.0}
    lines = report.guidance_table(results_of(distances)).splitlines()[2:]
    ratios = {line.split(" | ")[0].strip("| "): line.split(" | ")[-1].strip(" |") for line in lines}
    assert ratios == {
        f"DoD, {report.DOD_GUIDED[0]}": "0.90 (0.90, 0.90)",
        f"DoD, {one_stage}": "0.80 (0.80, 0.80)",
        f"DoD, {autoguided}": "0.80 (0.80, 0.80)",
        f"class-only, equal time, {plain}": "1.00 (1.00, 1.00)",
        f"class-only, equal time, {dear}": "1.00 (1.00, 1.00)",
    }


def test_every_table_is_regenerated_from_the_committed_results():
    report_page, readme = report.REPORT.read_text(), report.README.read_text()
    # Rows of figures give way to nothing, so that a table that is not made again would stay empty.
    emptied = [
        re.sub(r"(<!-- [a-z-]+:[a-z]+ -->\n).*?(\n<!-- end -->)", r"\1\2", page, flags=re.DOTALL)
        for page in (report_page, readme)
    ]
    assert len(emptied[0]) < len(report_page) / 2
    assert report.regenerate(*emptied, report.load_committed()) == (report_page, readme)


def test_results_are_of_variants_that_the_code_has_but_for_dropped_ones():
    for results in report.load_committed().values():
        assert {run["variant"] for run in results.runs} <= VARIANTS.keys()
    dropped = json.loads((RESULTS / "dropped.json").read_text())
    assert dropped and all(run["variant"] not in VARIANTS for runs in dropped.values() for run in runs)


def test_data_sets_are_named_with_their_classes(data):
    assert isinstance(data, DataSet) and data.class_names == [str(digit) for digit in range(10)]
