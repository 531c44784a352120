"""The demo in a real browser: a real server, headless Chromium, and the code that it shows run on its own.

Needs Debian's package chromium and the extra `test`; without them these tests are skipped, but fail where CI=true.
"""

import base64
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
import torch
import yaml
from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler
from helpers import EXAMPLES, tiny_embedder, tiny_pipeline, tiny_transformer, tiny_vae
from PIL import Image

from diffusers_dod import DoDPipeline


CHROMIUM = shutil.which("chromium")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["Debian's package chromium"]
if MISSING and os.environ.get("CI") == "true":
    raise RuntimeError(f"The demo's tests need {' and '.join(MISSING)}.")
if MISSING:
    # The page runs in a browser: there is nothing to test without one.
    pytest.skip(f"{' and '.join(MISSING)} not installed: the demo is tested in a browser", allow_module_level=True)

import gradio  # noqa: E402 - only where it is there
from playwright.sync_api import expect, sync_playwright  # noqa: E402

from diffusers_dod.demo.drawing import Drawing, Finished, Progress, draw, open_picture  # noqa: E402
from diffusers_dod.demo.page import NO_CLASS, class_choices, stages_html  # noqa: E402


TIMEOUT = 120_000  # milliseconds, for machines with other work to do
LONG = 120  # steps, so that stages take long enough to be seen one by one
# Notes what the page shows whenever it changes: how many stages, and whether a progress bar.
WATCH = """() => {
  window.seen = [];
  const look = () => window.seen.push({
    time: Date.now(),
    stages: document.querySelectorAll('#stages img.sample').length,
    waiting: document.querySelectorAll('#stages .sample.waiting').length,
    progress: document.querySelector('#status progress')?.value ?? null,
  });
  new MutationObserver(look).observe(document.body, {childList: true, subtree: true, attributes: true});
}"""


def digits_like(**overrides):
    """Pixel space, one channel, a scheduler with a memory, and names."""
    components = {
        "channels": 1,
        "transformer": tiny_transformer(in_channels=1),
        "latent_embedder": tiny_embedder(in_channels=1, bottleneck_dim=1),
        "scheduler": DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        "id2label": {0: "goose", 1: "crane", 2: "crane", 3: 'it\'s "odd" <b>&\n', 4: "n" * 200},
    }
    return tiny_pipeline(**components | overrides)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "model"
    digits_like().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """A server started by the README's command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "diffusers_dod", "demo", "--model", str(model)]
    with log.open("w") as output:
        env = {**os.environ, "GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1"}
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env)
        while "Running on" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        server.terminate()
        server.wait()
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        expect.set_options(timeout=TIMEOUT)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, timeout=TIMEOUT)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Opens the page as a user of its own; requests to anywhere else than the server fail the test."""
    contexts, elsewhere = [], []

    def open_page(**options):
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"], **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT)
        page.on(
            "request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else elsewhere.append(r.url)
        )
        page.goto(address)
        page.get_by_role("button", name="Generate").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert elsewhere == []


def choose(page, class_name=None, seed=None, num_stages=None, steps=()):
    if class_name is not None:
        page.get_by_label("Class").click()
        page.get_by_role("option", name=class_name, exact=True).click()
    if seed is not None:
        page.get_by_label("New seed each time").uncheck()
        page.get_by_label("Seed", exact=True).fill(str(seed))
    if num_stages is not None:
        page.get_by_role("radio", name=str(num_stages)).check()
    for stage, count in enumerate(steps, start=1):
        if count is not None:
            page.get_by_label(f"Stage {stage} steps").fill(str(count))
            page.get_by_label(f"Stage {stage} steps").press("Tab")


def generate(page):
    page.evaluate(WATCH)
    page.get_by_role("button", name="Generate").click()


def wait_for_end(page, num_stages):
    page.wait_for_function(
        "n => document.querySelectorAll('#stages img.sample').length == n && !document.querySelector('#status progress')"
        " && window.seen.some(look => look.waiting)",
        arg=num_stages,
    )


def pictures(page, css_class="sample"):
    """The files that the page shows, by their names."""
    found = {}
    for image in page.locator(f"#stages img.{css_class}").all():
        found[image.get_attribute("alt")] = base64.b64decode(image.get_attribute("src").partition(",")[2])
    return found


def copy_code(page):
    page.get_by_role("button", name="Copy").click()
    return page.evaluate("navigator.clipboard.readText()")


def run_code(code, folder):
    """Runs code as a user would, and returns the pictures that it wrote."""
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return {f"Stage {file.stem[-1]}": file.read_bytes() for file in folder.glob("stage-*.png")}


def test_stages_appear_one_by_one_and_the_copied_code_draws_them(open_page, tmp_path):
    page = open_page()
    expect(page.get_by_label("Stage 2 steps")).to_be_visible()
    expect(page.get_by_label("Stage 3 steps")).to_be_hidden()
    choose(page, "crane (2)", seed=12345, num_stages=3, steps=(20, LONG, LONG))
    page.get_by_label("Stage 2 guidance").fill("3.5")
    generate(page)
    wait_for_end(page, 3)

    seen = page.evaluate("window.seen")
    numbers = [look["stages"] for look in seen]
    assert sorted(set(numbers)) == [0, 1, 2, 3] and numbers == sorted(numbers)
    assert all(look["stages"] + look["waiting"] == 3 for look in seen if look["waiting"])
    fractions = [look["progress"] for look in seen if look["progress"] is not None]
    assert fractions == sorted(fractions) and len(set(fractions)) > 5
    shown, maps = pictures(page), pictures(page, "codes")
    assert list(shown) == ["Stage 1", "Stage 2", "Stage 3"] and len(set(shown.values())) == 3
    assert list(maps) == [f"{name}: codes" for name in shown]

    code = copy_code(page)
    assert "class_labels=2" in code and "manual_seed(12345)" in code and "guidance_scale=[1.5, 3.5, 1.5]" in code
    assert run_code(code, tmp_path) == shown


def test_a_picture_takes_the_place_of_stage_1(open_page, model, tmp_path, monkeypatch):
    file = tmp_path / "my own (1).png"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    page = open_page()
    choose(page, "no class", seed=7, num_stages=1)
    page.get_by_role("button", name="Start from a picture").click()
    page.locator("input[type=file]").set_input_files(file)
    page.get_by_alt_text("preview").wait_for()
    expect(page.get_by_label("Stage 1 steps")).to_be_hidden()
    expect(page.get_by_role("radio", name="2")).to_be_checked()
    choose(page, steps=(None, 5))
    generate(page)
    wait_for_end(page, 2)
    shown = pictures(page)
    assert list(shown) == ["Your picture", "Stage 2"]
    (tmp_path / "shown.png").write_bytes(shown.pop("Your picture"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "shown.png")), pixels)

    code = copy_code(page)
    assert "class_labels=None" in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "stage-2.png").read_bytes() == shown["Stage 2"] and not (tmp_path / "stage-1.png").exists()

    page.get_by_role("button", name="Clear").click()
    expect(page.get_by_label("Stage 1 steps")).to_be_visible()


def write_text(file):
    file.write_text("not a picture")


def write_cut(file):
    Image.effect_noise((64, 64), 50).save(file)
    file.write_bytes(file.read_bytes()[:1000])


def write_huge(file):
    Image.new("1", (8000, 7000)).save(file)


def write_bomb(file):
    Image.new("1", (20000, 20000)).save(file)


def write_16_bit(file):
    Image.new("I;16", (8, 8)).save(file)


def write_narrow(file):
    Image.new("L", (200_000, 1)).save(file)


BAD_PICTURES = {
    write_text: "not a picture that can be read",
    write_cut: "truncated",
    write_huge: "too large",
    write_bomb: "too large",
    write_16_bit: "its mode is I;16: convert it to 8 bits per channel",
    write_narrow: "too narrow, 200000 x 1",
}


@pytest.mark.parametrize("write", BAD_PICTURES, ids=lambda write: write.__name__)
def test_a_bad_picture_is_refused(write, tmp_path):
    write(tmp_path / "bad.png")
    with pytest.raises(ValueError, match=BAD_PICTURES[write]) as error:
        open_picture(str(tmp_path / "bad.png"))
    assert str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_usual_mode_is_taken(mode, tmp_path):
    image = Image.new("RGB", (4, 4), "teal").convert(mode)
    image.save(tmp_path / ("a.tiff" if mode == "CMYK" else "a.png"))
    assert open_picture(str(next(tmp_path.iterdir()))).mode == ("L" if mode in ("1", "L", "LA") else "RGB")


def test_a_transparent_picture_lies_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert open_picture(str(tmp_path / "a.png")).getpixel((0, 0)) == (255, 255, 255)


def test_bad_input_gets_a_message_and_leaves_the_page_usable(open_page, tmp_path):
    page = open_page()
    choose(page, "goose", seed=1, num_stages=1, steps=(3,))
    generate(page)
    wait_for_end(page, 1)
    shown, code = pictures(page), copy_code(page)

    # A step count that is not there
    page.get_by_label("Stage 1 steps").fill("")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("num_inference_steps")
    # More than one user may have
    choose(page, num_stages=2, steps=(250, 51))
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("at most 300 steps")
    choose(page, num_stages=1, steps=(3,))
    # A picture that is none, said when it is chosen and again when it is used
    write_text(tmp_path / "bad.png")
    page.get_by_role("button", name="Start from a picture").click()
    page.locator("input[type=file]").set_input_files(tmp_path / "bad.png")
    expect(page.get_by_role("alert").filter(has_text="not a picture")).to_have_count(1)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert").filter(has_text="not a picture")).to_have_count(2)
    # What was on the screen is still there, with its code.
    assert pictures(page) == shown and copy_code(page) == code

    page.get_by_role("button", name="Clear").click()
    choose(page, seed=2, num_stages=2, steps=(3, 3))
    generate(page)
    wait_for_end(page, 2)
    expect(page.get_by_role("alert")).to_have_count(0)
    assert pictures(page)["Stage 1"] != shown["Stage 1"]


def test_two_users_at_once_get_what_each_would_get_alone(open_page, model, tmp_path):
    users = [("goose", 3, (LONG, 90)), ("crane (1)", 4, (90, LONG))]
    pages = [open_page(), open_page()]
    for page, (class_name, seed, steps) in zip(pages, users):
        choose(page, class_name, seed, 2, steps)
    for page in pages:
        generate(page)
    for page in pages:
        wait_for_end(page, 2)

    spans = []
    for page in pages:
        times = [look["time"] for look in page.evaluate("window.seen") if look["progress"] is not None]
        spans.append((times[0], times[-1]))
    assert spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1], "the two never ran at the same time"
    pipe = DoDPipeline.from_pretrained(model)
    for page, class_id, (_, seed, steps) in zip(pages, (0, 1), users):
        generator = torch.manual_seed(seed)
        alone = pipe(class_id, 2, list(steps), [1.5, 1.5], generator=generator, return_stages=True).stages
        for name, picture in zip(("Stage 1", "Stage 2"), alone):
            picture[0].save(tmp_path / "alone.png")
            assert pictures(page)[name] == (tmp_path / "alone.png").read_bytes()


def test_a_phone_shows_all_within_its_width(open_page):
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    choose(page, num_stages=4, steps=(2, 2, 2, 2))
    generate(page)
    wait_for_end(page, 4)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
    for image in page.locator("#stages img.sample").all():
        box = image.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["width"] > 100


def test_classes_are_named_apart_and_briefly():
    choices = class_choices(digits_like())
    assert choices[0] == ("no class", NO_CLASS)
    assert choices[1:4] == [("goose", 0), ("crane (1)", 1), ("crane (2)", 2)]
    assert choices[6:] == [(f"class {i}", i) for i in range(5, 10)]
    assert all(len(name) <= 60 for name, _ in choices)
    unconditional = tiny_transformer(in_channels=1, num_classes=0)
    assert class_choices(digits_like(transformer=unconditional, id2label=None)) == [("no class", NO_CLASS)]


def test_names_cannot_break_out_of_the_code_or_the_page():
    name = "x'\"\nimport os  # <script>"
    drawing = Drawing(1, 0, [1], [1.0], picture='/tmp/it\'s "odd".png')
    lines = drawing.code(name, name, "cpu").splitlines()
    compile("\n".join(lines), "code", "exec")
    assert not any(line.startswith("import os") for line in lines)
    assert "<script>" not in stages_html(Drawing(1, 0, [1], [1.0]), [])


CASES = {
    "pixels": (digits_like, 28),
    "autoencoder": (lambda: tiny_pipeline(vae=tiny_vae("kl")), 16),
    # Takes two model calls a step.
    "second order": (lambda: tiny_pipeline(vae=tiny_vae("kl"), scheduler=FlowMatchHeunDiscreteScheduler()), 16),
}


@pytest.mark.parametrize("case", CASES)
def test_a_drawing_tells_of_every_stage_what_the_pipeline_returns(case):
    pipe = CASES[case][0]()
    scheduler = pipe.scheduler.timesteps.clone()
    events = list(draw(pipe, Drawing(2, 5, [3, 4], [2.0, 1.0])))
    assert torch.equal(pipe.scheduler.timesteps, scheduler)
    expected = pipe(2, 2, [3, 4], [2.0, 1.0], generator=torch.manual_seed(5), return_stages=True).stages

    finished = [event for event in events if isinstance(event, Finished)]
    assert [event.stage for event in finished] == [1, 2]
    assert [event.image.tobytes() for event in finished] == [stage[0].tobytes() for stage in expected]
    assert [len(event.code_maps) for event in finished] == [1, 2]
    fractions = [event.fraction for event in events if isinstance(event, Progress)]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0
    # Half of the drawing is done when stage 1 is.
    before = events[events.index(finished[0]) - 1]
    assert before.stage == 1 and before.fraction == 0.5
    second = [event.fraction for event in events if isinstance(event, Progress) and event.stage == 2]
    assert second[0] == 0.5 + 0.5 / len(second)


def test_a_drawing_that_nobody_waits_for_ends():
    pipe, before, calls = digits_like(), threading.active_count(), []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    drawing = draw(pipe, Drawing(2, 5, [1000, 1000], [2.0, 1.0]))
    next(drawing)
    assert threading.active_count() == before + 1
    drawing.close()
    assert threading.active_count() == before and len(calls) < 1000


def test_a_fault_while_drawing_reaches_whoever_asked():
    with pytest.raises(ValueError, match="num_inference_steps"):
        list(draw(digits_like(), Drawing(2, 5, [0], [2.0])))


def test_a_space_would_start_this_with_the_gradio_that_was_tested():
    front_matter = yaml.safe_load((EXAMPLES / "space" / "README.md").read_text().split("---")[1])
    assert front_matter["sdk"] == "gradio" and front_matter["license"] == "apache-2.0"
    assert front_matter["sdk_version"] == gradio.__version__
    assert (EXAMPLES / "space" / front_matter["app_file"]).is_file()
    # What the Hub takes
    assert len(front_matter["short_description"]) <= 60


RUDE = {
    "a class that is none": (0, True),
    "no stages": (3, None),
    "no steps": (5, None),
    "guidance of NaN": (9, float("nan")),
    "guidance of True": (9, True),
    "no guidance": (10, None),
}


@pytest.mark.parametrize("name", RUDE)
def test_a_request_of_bad_values_gets_a_message_and_blanks_nothing(address, name):
    """What gradio itself lets through."""
    config = httpx.get(f"{address}/config").json()
    function = next(each["id"] for each in config["dependencies"] if each["api_name"] == "generate")
    data = [1, 1, False, 2, None, *[2] * 4, *[1.5] * 4]
    data[RUDE[name][0]] = RUDE[name][1]
    body = json.dumps({"data": data, "fn_index": function, "session_hash": name})
    httpx.post(f"{address}/gradio_api/queue/join", content=body, headers={"content-type": "application/json"})
    shown = []
    with httpx.stream("GET", f"{address}/gradio_api/queue/data", params={"session_hash": name}, timeout=60) as events:
        for line in events.iter_lines():
            event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            shown += [event["output"]] if "output" in event else []
            if event.get("msg") == "process_completed":
                break
    assert event["success"] and 'role="alert"' in str(shown)
    assert "<figure>" not in str(shown)  # nothing takes the place of the last result


def test_requests_that_nobody_listens_to_do_not_fill_the_queue_without_end(address):
    config = httpx.get(f"{address}/config").json()
    function = next(each["id"] for each in config["dependencies"] if each["api_name"] == "generate")
    data = [0, 1, False, 1, None, *[LONG] * 4, *[1.5] * 4]

    def join(number):
        body = {"data": data, "fn_index": function, "session_hash": f"nobody{number}"}
        return httpx.post(f"{address}/gradio_api/queue/join", json=body).status_code

    codes = [join(number) for number in range(40)]
    assert codes[:20] == [200] * 20 and codes.count(200) < 30 and codes.count(503) > 10
