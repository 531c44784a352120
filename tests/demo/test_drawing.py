"""Drawing, codes and the Python that is shown, without the page."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from demo_models import coded_digits, digits_like
from diffusers import ClassifierFreeGuidance, FlowMatchHeunDiscreteScheduler
from helpers import tiny_coded_pipeline, tiny_pipeline, tiny_vae
from PIL import Image

from diffusers_dod.demo.codes import check_path, colour_maps, paint, reference_codes, rounded
from diffusers_dod.demo.drawing import Codes, Drawing, Finished, Progress, draw, private_pipeline
from diffusers_dod.demo.rendering import samples_html
from diffusers_dod.demo.snippet import python_code
from diffusers_dod.demo.studio import Studio


CASES = {
    "pixels": (digits_like, "stage"),
    "autoencoder": (lambda: tiny_pipeline(vae=tiny_vae("kl")), "stage"),
    # Takes two model calls a step.
    "second order": (lambda: tiny_pipeline(vae=tiny_vae("kl"), scheduler=FlowMatchHeunDiscreteScheduler()), "stage"),
    "codes": (coded_digits, "codes"),
    "codes, autoencoder": (lambda: tiny_coded_pipeline(vae=tiny_vae("kl")), "codes"),
    "a code model that is not used": (coded_digits, "stage"),
}


def pixels(images):
    return [image.tobytes() for image in images]


def test_a_guider_of_the_pipeline_guides_and_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = digits_like()
    pipe.guider = ClassifierFreeGuidance(guidance_scale=2.0)
    pipe.save_pretrained("model")
    studio = Studio(pipe, "model")
    result = studio.first()
    assert "guidance_scale" not in result.code
    assert private_pipeline(pipe).guider is not pipe.guider
    assert private_pipeline(pipe).guider.guidance_scale == 2.0


def outcome(pipe, drawing):
    """Codes, and pictures by stage."""
    events = list(draw(pipe, drawing))
    (codes,) = [event.codes for event in events if isinstance(event, Codes)]
    return codes, {event.stage: event.images for event in events if isinstance(event, Finished)}


@pytest.mark.parametrize("case", CASES)
def test_a_drawing_reports_what_the_pipeline_returns(case):
    pipe, start = CASES[case][0](), CASES[case][1]
    scheduler = pipe.scheduler.timesteps.clone()
    events = list(draw(pipe, Drawing(2, 5, 2, [3, 4], [2.0, 1.0], start)))
    assert torch.equal(pipe.scheduler.timesteps, scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    options = {"num_images_per_prompt": 2, "generator": generators, "prior_source": start, "return_stages": True}
    expected = pipe(2, 2, [3, 4], [2.0, 1.0], **options)

    finished = [event for event in events if isinstance(event, Finished)]
    assert [event.stage for event in finished] == [1, 2]
    assert [pixels(event.images) for event in finished] == [pixels(images) for images in expected.stages]
    assert [event.codes.tolist() for event in events if isinstance(event, Codes)] == [expected.codes.tolist()]
    steps = [event for event in events if isinstance(event, Progress)]
    fractions = [event.fraction for event in steps]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    # Half of the drawing is done when stage 1 is; two thirds, when there were codes before.
    before = events[: events.index(finished[0])]
    last = [event for event in before if isinstance(event, Progress)][-1]
    assert last.stage == 1 and last.fraction == (1 / 2 if start == "stage" else 2 / 3)
    assert {event.stage for event in steps} == ({1, 2} if start == "stage" else {0, 1, 2})


@pytest.mark.parametrize("make, start", [(coded_digits, "codes"), (digits_like, "stage")])
def test_the_same_codes_meet_the_same_noise(make, start):
    pipe, first = make(), Drawing(1, 3, 2, [4, 4], [1.5, 1.5], start)
    codes, stages = outcome(pipe, first)
    again = first.from_codes(pipe, codes)
    seen, redrawn = outcome(pipe, again)
    assert torch.equal(seen, again.codes) and (seen - codes).abs().max() < 1e-4
    # Four decimals of the codes are left.
    for new, old in zip(redrawn[again.num_stages], stages[2]):
        assert np.abs(np.asarray(new, float) - np.asarray(old)).max() <= 1
    assert again.from_codes(pipe, again.codes).noise_before == again.noise_before
    _, other = outcome(pipe, replace(again, seed=70))
    assert pixels(other[again.num_stages]) != pixels(redrawn[again.num_stages])


def test_samples_can_share_the_codes_of_the_first():
    pipe, drawing = coded_digits(), Drawing(1, 3, 4, [3], [1.0], "codes", same_codes=True)
    codes, stages = outcome(pipe, drawing)
    first, _ = outcome(pipe, replace(drawing, num_samples=1, same_codes=False))
    torch.testing.assert_close(codes, first.expand(4, -1, -1), atol=1e-3, rtol=0)
    assert torch.equal(codes, codes[:1].expand(4, -1, -1)) and len(set(pixels(stages[1]))) == 4


DRAWINGS = {
    "one": Drawing(1, 3, 1, [3], [1.5], "codes"),
    "four": Drawing(None, 3, 4, [3, 2], [1.5, 2.0], "codes"),
    "stages": Drawing(1, 3, 2, [3, 2], [1.5, 2.0], "stage"),
    "guided codes": Drawing(1, 3, 2, [3], [1.5], "codes", code_guidance_scale=3.0),
    "codes of one": Drawing(1, 3, 1, [3], [1.5], "codes"),
    "codes of stages": Drawing(1, 3, 2, [3, 2], [1.5, 2.0], "stage"),
    "same codes": Drawing(1, 3, 4, [3], [1.5], "codes", same_codes=True),
    "picture": Drawing(1, 3, 2, [3, 2], [1.5, 2.0], "picture", picture="my own.png"),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_python_draws_the_same(name, tmp_path, monkeypatch):
    pipe, drawing = coded_digits(), DRAWINGS[name]
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("model")
    Image.effect_noise((8, 8), 90).save("my own.png")
    codes, stages = outcome(pipe, drawing)
    if name.startswith(("codes of", "same codes")):
        drawing = drawing.from_codes(pipe, codes if drawing.same_codes else -codes)
        stages = outcome(pipe, drawing)[1] if not name.startswith("same") else stages
    names: dict = {}
    exec(python_code(drawing, "model", "crane", "cpu"), names)
    if drawing.codes is not None:
        assert torch.equal(names["codes"].expand_as(drawing.codes), drawing.codes)
    drawn = {stage: images for stage, images in stages.items() if stage >= drawing.first_stage}
    for stage, images in drawn.items():
        for sample, image in enumerate(images, start=1):
            assert Image.open(f"stage-{stage}-sample-{sample}.png").tobytes() == image.tobytes()
    assert len(list(tmp_path.glob("stage-*"))) == sum(map(len, drawn.values()))


def test_rounded_codes_are_the_floats_of_their_decimals():
    codes = rounded(torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0)) * 10)
    assert torch.equal(torch.tensor(eval(str([[[round(x, 4) for x in y] for y in z] for z in codes.tolist()]))), codes)


def test_a_stroke_copies_its_first_cell():
    codes = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    painted = paint(codes, check_path(codes, [[1, 3], [1, 2], [0, 0]]))
    assert torch.equal(painted[1, 2], codes[1, 3]) and torch.equal(painted[0, 0], codes[1, 3])
    assert (painted != codes).any(dim=-1).sum() == 2
    assert torch.equal(paint(codes, [(0, 1)]), codes)


@pytest.mark.parametrize(
    "path", [None, [], {}, [[0, 4]], [[2, 0]], [[-1, 0]], [[0]], [[0, True]], [[0, 0.0]], [[0, 0]] * 9]
)
def test_a_stroke_that_cannot_be_is_refused(path):
    with pytest.raises(ValueError, match="no cell|list of cells"):
        check_path(torch.zeros(2, 4, 3), path)


def test_colours_hardly_depend_on_what_else_is_shown():
    pipe = coded_digits()
    reference = reference_codes(pipe)
    assert reference.shape == (128, 16, 2) and reference_codes(digits_like()) is None
    codes, _ = outcome(pipe, Drawing(1, 3, 4, [1], [1.0], "codes"))
    four, one = colour_maps(pipe, codes, reference), colour_maps(pipe, codes[:1], reference)
    assert len(four) == 4 and len(one) == 1
    assert np.abs(np.asarray(four[0], float) - np.asarray(one[0])).max() < 16


def test_a_drawing_that_nobody_waits_for_ends():
    pipe, before, calls = digits_like(), threading.active_count(), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    drawing = draw(pipe, Drawing(2, 5, 1, [1000, 1000], [2.0, 1.0]))
    next(drawing)
    assert threading.active_count() == before + 1
    drawing.close()
    assert threading.active_count() == before and len(calls) < 1000


@pytest.mark.parametrize(
    "samples, steps, start",
    [
        (1, [601], "codes"),
        (4, [151], "codes"),
        (9, [34, 33], "stage"),
        (1, [1, 1, 1, 598], "stage"),
        (9, [600, 67], "picture"),
        (1, [10**9], "codes"),
    ],
)
def test_a_drawing_of_too_many_steps_is_refused_before_it_begins(samples, steps, start):
    pipe, calls = coded_digits(), []
    studio = Studio(pipe, "nowhere")
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="at most 600 steps of all stages and samples together"):
        next(studio.results(Drawing(1, 0, samples, steps, [1.5] * len(steps), start)))
    assert not calls


@pytest.mark.parametrize("make, start", [(coded_digits, "codes"), (digits_like, "stage")])
def test_a_fault_while_drawing_reaches_whoever_asked(make, start):
    with pytest.raises(ValueError, match="num_inference_steps"):
        list(draw(make(), Drawing(2, 5, 1, [0], [2.0], start)))


def test_names_cannot_break_out_of_the_code_or_the_page():
    name = "x'\"\nimport os  # <script>"
    drawing = Drawing(1, 0, 1, [1, 1], [1.0, 1.0], "picture", picture='/tmp/it\'s "odd".png')
    lines = python_code(drawing, name, name, "cpu").splitlines()
    compile("\n".join(lines), "code", "exec")
    assert not any(line.startswith("import os") for line in lines)
    assert "<script>" not in samples_html(drawing, [], {})
