"""The demo in a real browser: a real server, headless Chromium, and the code that it shows run on its own.

Needs Debian's package chromium and the extra `test`; without them these tests are skipped, but fail where CI=true.
"""

import base64
import importlib.util
import json
import os
import re
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
from demo_models import coded_digits, digits_like
from helpers import EXAMPLES, tiny_transformer
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

from diffusers_dod.demo.page import build, launch, model_name  # noqa: E402
from diffusers_dod.demo.studio import NO_CLASS, Studio, class_choices  # noqa: E402


TIMEOUT = 120_000  # milliseconds, for machines with other work to do
LONG = 120  # steps, so that stages take long enough to be seen one by one
# Notes what the page shows whenever it changes: how many pictures, and whether a progress bar.
WATCH = """() => {
  window.seen = [];
  const look = () => window.seen.push({
    time: Date.now(),
    pictures: document.querySelectorAll('#samples img.sample').length,
    waiting: document.querySelectorAll('#samples .sample.waiting').length,
    progress: document.querySelector('#status progress')?.value ?? null,
  });
  new MutationObserver(look).observe(document.body, {childList: true, subtree: true, attributes: true});
}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space") / "tiny <b>digits"
    pipe = coded_digits()
    pipe.register_to_config(code_guidance_scale=2.0)
    pipe.save_pretrained(folder)
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
        page.locator("#samples img.sample").first.wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert elsewhere == []


def radio(page, title, choice):
    """A button of the group with a title, which is no name of its to a browser."""
    group = page.locator("fieldset").filter(has_text=re.compile(rf"^\s*{title}"))
    return group.get_by_label(str(choice), exact=True)


def fill(page, label, value):
    """Fills a number's field. gradio sets one that has just appeared to its value once more, which waits for no user."""
    field = page.get_by_label(label, exact=True)
    field.wait_for()
    page.evaluate("() => new Promise(done => requestIdleCallback(() => requestIdleCallback(() => done())))")
    field.fill(str(value))
    field.press("Tab")


def choose(page, class_name=None, seed=None, samples=None, stages=None, steps=(), start=None):
    if class_name is not None:
        page.get_by_label("Class", exact=True).click()
        page.get_by_role("option", name=class_name, exact=True).click()
    if seed is not None:
        page.get_by_label("New seed each time").uncheck()
        fill(page, "Seed", seed)
    if samples is not None:
        radio(page, "Samples", samples).check()
    if start is not None or stages is not None or steps:
        settings = page.get_by_role("button", name="Stages, steps and guidance")
        if not radio(page, "Stages", 2).is_visible():
            settings.click()
    if start is not None:
        page.get_by_role("radio", name=start).check()
    if stages is not None:
        radio(page, "Stages", stages).check()
    for stage, count in enumerate(steps, start=1):
        if count is not None:
            fill(page, f"Stage {stage} steps", count)


def draws(page, act):
    """Does what starts a drawing and waits for its end."""
    page.evaluate(WATCH)
    act()
    wait_for_end(page)


def wait_for_end(page):
    page.wait_for_function(
        "window.seen.some(look => look.progress !== null) && !document.querySelector('#status progress')"
        " && !document.querySelector('#samples .sample.waiting, #samples .busy')"
    )


def generate(page):
    page.get_by_role("button", name="Generate").click()


def pictures(page):
    """The files that the page shows, by their names."""
    found = {}
    for image in page.locator("#samples img.sample").all():
        found[image.get_attribute("alt")] = base64.b64decode(image.get_attribute("src").partition(",")[2])
    return found


def colours(page):
    """Those of the codes."""
    return page.locator("#samples .cell").evaluate_all("cells => cells.map(cell => cell.style.backgroundColor)")


def copy_code(page):
    copy = page.get_by_role("button", name="Copy")
    if not copy.is_visible():
        page.get_by_role("button", name="The same in Python").click()
    copy.click()
    return page.evaluate("navigator.clipboard.readText()")


def files_of(folder):
    """Pictures that the page's Python wrote."""
    return sorted(file.read_bytes() for file in folder.glob("stage-*.png"))


def run_code(page, folder, monkeypatch):
    """Runs the page's Python, and returns the pictures that it wrote."""
    for file in folder.glob("stage-*.png"):
        file.unlink()
    monkeypatch.chdir(folder)
    exec(copy_code(page), {})
    return files_of(folder)


def test_a_picture_is_there_when_the_page_opens(open_page, model, tmp_path):
    page = open_page()
    assert page.title() == "tiny <b>digits – Diffusion on Diffusion"
    expect(page.get_by_role("heading")).to_have_text("tiny <b>digits")
    pipe = DoDPipeline.from_pretrained(model)
    pipe(0, generator=torch.manual_seed(0)).images[0].save(tmp_path / "default.png")
    assert pictures(page) == {"Stage 1": (tmp_path / "default.png").read_bytes()}
    code = copy_code(page)
    assert "class_labels=0,  # 'goose'" in code and "manual_seed(0)" in code and "num_stages=1" in code
    assert len(colours(page)) == 16


def test_stages_appear_one_by_one_and_the_copied_code_draws_them(open_page, tmp_path):
    page = open_page()
    choose(page, "crane (2)", seed=12345, samples=4, stages=2, steps=(20, 60))
    expect(page.get_by_label("Stage 3 steps")).to_be_hidden()
    fill(page, "Stage 2 guidance", 3.5)
    draws(page, lambda: generate(page))

    seen = page.evaluate("window.seen")
    counts = [(look["pictures"], look["waiting"]) for look in seen]
    # The picture of before, then the frames of four samples.
    assert list(dict.fromkeys(counts)) == [(1, 0), (4, 4), (8, 0)]
    fractions = [look["progress"] for look in seen if look["progress"] is not None]
    assert fractions == sorted(fractions) and len(set(fractions)) > 5
    shown = pictures(page)
    assert (
        len(shown) == len(set(shown.values())) == 8 and "Sample 4, stage 2" in shown and len(colours(page)) == 4 * 16
    )

    code = copy_code(page)
    assert "class_labels=2" in code and "range(12345, 12349)" in code and "guidance_scale=[2, 3.5]" in code
    # As a user would, in a process of its own.
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=env)
    assert files_of(tmp_path) == sorted(shown.values())


def test_codes_are_redrawn_mixed_and_painted_on(open_page, tmp_path, monkeypatch):
    page = open_page()
    choose(page, "goose", seed=3, stages=1, steps=(3,))
    draws(page, lambda: generate(page))

    def acts(act):
        """The picture changes, and the Python draws it. Returns the colours before and after."""
        before, picture = colours(page), pictures(page)
        draws(page, act)
        assert pictures(page) != picture
        assert run_code(page, tmp_path, monkeypatch) == [*pictures(page).values()]
        return before, colours(page)

    # 1. The same codes, new noise
    before, after = acts(lambda: page.get_by_role("button", name="Redraw").click())
    assert max(map(distance, before, after)) <= 1  # codes are rounded
    assert page.get_by_label("Seed", exact=True).input_value() != "3"

    # 2. A stroke
    def stroke():
        page.locator("#samples .cell").first.scroll_into_view_if_needed()
        cells = [page.locator("#samples .cell").nth(cell).bounding_box() for cell in (0, 1, 5)]
        middles = [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in cells]
        page.mouse.move(*middles[0])
        page.mouse.down()
        for middle in middles[1:]:
            page.mouse.move(*middle)
        page.mouse.up()

    before, after = acts(stroke)
    assert after[0] == after[1] == after[5] and len(set(after)) < len(set(before))

    # 3. A code anew, by the keyboard
    page.locator("#samples .cell").nth(6).focus()
    before, after = acts(lambda: page.keyboard.press("Enter"))
    far = [cell for cell in range(16) if distance(before[cell], after[cell]) > 16]
    assert far in ([6], []) and before[6] != after[6]

    # 4. Mixed, and with another share of what was there before
    mix = page.get_by_role("button", name="Mix", exact=True)
    page.get_by_label("With codes of").click()
    page.get_by_role("option", name="crane (1)", exact=True).click()
    acts(mix.click)
    fill(page, "number input for Share", 1)
    _, crane = acts(mix.click)
    fill(page, "number input for Share", 0)
    _, back = acts(mix.click)
    assert max(map(distance, back, after)) < 16 < max(map(distance, crane, after))


def distance(colour, other):
    numbers = [[int(number) for number in re.findall(r"\d+", each)] for each in (colour, other)]
    return max(abs(a - b) for a, b in zip(*numbers))


def test_a_picture_takes_the_place_of_stage_1(open_page, tmp_path, monkeypatch):
    file = tmp_path / "my own (1).png"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    page = open_page()
    choose(page, "no class", seed=7, start="Your own picture")
    expect(page.get_by_label("Stage 1 steps")).to_be_hidden()
    expect(radio(page, "Stages", 2)).to_be_checked()
    page.locator("input[type=file]").set_input_files(file)
    page.get_by_alt_text("preview").wait_for()
    choose(page, steps=(None, 5))
    draws(page, lambda: generate(page))
    shown = pictures(page)
    assert list(shown) == ["Your picture", "Stage 2"] and len(colours(page)) == 16
    (tmp_path / "shown.png").write_bytes(shown.pop("Your picture"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "shown.png")), pixels)
    assert run_code(page, tmp_path, monkeypatch) == [shown["Stage 2"]]

    choose(page, start="Stage 1, which")
    expect(page.get_by_label("Stage 1 steps")).to_be_visible()
    expect(page.get_by_label("Stage 1 guidance")).to_have_value("1.5")


def test_bad_input_gets_a_message_and_leaves_the_result(open_page, tmp_path):
    page = open_page()
    shown, code, alert = pictures(page), copy_code(page), page.get_by_role("alert")

    # A step count that is not there
    choose(page, seed=1, steps=("",))
    generate(page)
    expect(alert).to_contain_text("num_inference_steps")
    # Numbers that are none of a model's
    choose(page, steps=(-5,))
    generate(page)
    expect(alert).to_contain_text("`num_inference_steps` is -5")
    choose(page, seed=-1, steps=(3,))
    generate(page)
    expect(alert).to_contain_text("seed must be from 0")
    choose(page, seed=1, samples=9, steps=(67,))
    generate(page)
    expect(alert).to_contain_text("at most 600 steps")
    choose(page, samples=1, start="Your own picture")
    # No picture, and one that is none, said when it is chosen and again when it is used
    generate(page)
    expect(alert).to_contain_text("Choose a picture")
    (tmp_path / "bad.png").write_text("not a picture")
    page.locator("input[type=file]").set_input_files(tmp_path / "bad.png")
    expect(alert.filter(has_text="not a picture")).to_have_count(1)
    generate(page)
    expect(alert.filter(has_text="not a picture")).to_have_count(2)
    # What was on the screen is still there, with its code.
    assert pictures(page) == shown and copy_code(page) == code

    page.get_by_role("button", name="Clear").click()
    choose(page, start="Codes of", steps=(3,))
    draws(page, lambda: generate(page))
    expect(alert).to_have_count(0)
    assert pictures(page) != shown


def test_two_users_at_once_get_what_each_would_get_alone(open_page, model, tmp_path):
    users = [("goose", 3, (LONG, 90)), ("crane (1)", 4, (90, LONG))]
    pages = [open_page(), open_page()]
    for page, (class_name, seed, steps) in zip(pages, users):
        choose(page, class_name, seed, stages=2, steps=steps)
        page.evaluate(WATCH)
    for page in pages:  # a real click waits for the page to be still, in which the other drawing could end
        page.get_by_role("button", name="Generate").dispatch_event("click")
    for page in pages:
        wait_for_end(page)

    spans = []
    for page in pages:
        times = [look["time"] for look in page.evaluate("window.seen") if look["progress"] is not None]
        spans.append((times[0], times[-1]))
    assert spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1], "the two never ran at the same time"
    pipe = DoDPipeline.from_pretrained(model)
    for page, class_id, (_, seed, steps) in zip(pages, (0, 1), users):
        generator = torch.manual_seed(seed)
        options = {"generator": generator, "return_stages": True}
        alone = pipe(class_id, 2, list(steps), [2.0, 1.25], **options).stages
        for name, picture in zip(("Stage 1", "Stage 2"), alone):
            picture[0].save(tmp_path / "alone.png")
            assert pictures(page)[name] == (tmp_path / "alone.png").read_bytes()


def test_stop_and_a_closed_page_end_a_drawing(browser):
    """On a server in this process, which can be looked into."""
    pipe, calls = coded_digits(), []
    # Slow enough to be stopped in time.
    pipe.transformer.register_forward_hook(lambda *_: (calls.append(1), time.sleep(0.02))[0])
    server = build(pipe, "nowhere")
    _, address, _ = launch(server, prevent_thread_lock=True, quiet=True)
    try:
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT)
        page.goto(address)
        page.locator("#samples img.sample").wait_for()
        shown, planned = pictures(page), 2 * 250

        def start():
            calls.clear()
            generate(page)
            page.locator("#status progress").wait_for()

        choose(page, stages=2, steps=(250, 250))
        start()
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#status")).to_have_text("Stopped.")
        wait_for_threads()
        assert len(calls) < planned and pictures(page) == shown
        # The stage that was finished stays.
        choose(page, steps=(1, 250))
        start()
        page.locator("#samples .waiting").wait_for()
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#status")).to_have_text("Stopped.")
        wait_for_threads()
        assert len(calls) < planned and list(pictures(page)) == ["Stage 1"] and pictures(page) != shown
        # Another wish takes the place of the one before, however soon it comes.
        start()
        draws(page, page.get_by_role("button", name="Redraw").click)
        wait_for_threads()
        assert len(calls) < 1.5 * 250, "the first drawing went on beside the second"

        choose(page, steps=(250, 250))
        start()
        page.close()
        wait_for_threads()
        assert len(calls) < planned
    finally:
        server.close()


def wait_for_threads():
    """Until nothing is drawn any more."""
    for thread in threading.enumerate():
        if thread.name == "draw":
            thread.join(TIMEOUT / 1000)
            assert not thread.is_alive()


def test_a_phone_shows_pictures_first_and_all_within_its_width(open_page):
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    choose(page, samples=9, stages=2, steps=(2, 2))
    draws(page, lambda: generate(page))
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
    boxes = [image.bounding_box() for image in page.locator("#samples img.sample").all()]
    assert len(boxes) == 18
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["width"] > 40 for box in boxes)
    last = max(box["y"] + box["height"] for box in boxes)
    controls = [page.get_by_role("button", name="Generate"), page.get_by_label("Class", exact=True)]
    assert all(control.bounding_box()["y"] > last for control in controls)


def test_a_model_without_a_code_model_starts_with_stages():
    studio = Studio(digits_like(), "nowhere")
    first = studio.first()
    assert first.drawing.start == "stage" and first.codes.shape == (1, 16, 2)
    assert first.html.count("<img") == 2 and first.html.count("<button") == 16
    drawing = first.drawing.from_codes(studio.pipe, -first.codes)
    *_, painted = studio.results(drawing)
    assert painted.html.count("<img") == 1 and "codes=codes" in painted.code
    with pytest.raises(ValueError, match="no code model"):
        studio.new_codes(0, range(1), 1.0)
    build(studio.pipe, "nowhere")


def test_classes_are_named_apart_and_briefly():
    choices = class_choices(digits_like())
    assert choices[0] == ("no class", NO_CLASS)
    assert choices[1:4] == [("goose", 0), ("crane (1)", 1), ("crane (2)", 2)]
    assert choices[6:] == [(f"class {i}", i) for i in range(5, 10)]
    assert all(len(name) <= 60 for name, _ in choices)
    unconditional = digits_like(transformer=tiny_transformer(in_channels=1, num_classes=0), id2label=None)
    assert class_choices(unconditional) == [("no class", NO_CLASS)]
    assert Studio(unconditional, "nowhere").first().drawing.class_id is None


def test_a_model_is_named_by_its_folder_or_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_name(".") == tmp_path.name and model_name("user/my-model") == "user/my-model"


def test_a_space_would_start_this_with_the_gradio_that_was_tested():
    front_matter = yaml.safe_load((EXAMPLES / "space" / "README.md").read_text().split("---")[1])
    assert front_matter["sdk"] == "gradio" and front_matter["license"] == "apache-2.0"
    assert front_matter["sdk_version"] == gradio.__version__
    assert (EXAMPLES / "space" / front_matter["app_file"]).is_file()
    # What the Hub takes
    assert len(front_matter["short_description"]) <= 60


PLAIN = {  # a request of each kind, with two states of the page
    "generate": [None, None, 1, 1, False, 2, 0, False, "stage", 2, None, *[2] * 4, *[1.5] * 4],
    "mix": [None, None, 1, 0.5],
}
RUDE = {
    "a class that is none": ("generate", 2, True, "Class True is out of range"),
    "no samples": ("generate", 3, None, "`num_samples` is None"),
    "a seed of 300 digits": ("generate", 6, 1e300, "The seed must be from 0"),
    "no stages": ("generate", 9, None, "Choose the number of stages"),
    "no steps": ("generate", 11, None, "`num_inference_steps` is None"),
    "guidance of NaN": ("generate", 15, float("nan"), "`guidance_scale` is nan"),
    "guidance of True": ("generate", 15, True, "`guidance_scale` is True"),
    "guidance of letters": ("generate", 15, "much", "`guidance_scale` is "),
    "no guidance": ("generate", 16, None, "`guidance_scale` is None"),
    "codes guided by NaN": ("generate", 5, float("nan"), "`code_guidance_scale` is nan"),
    "codes guided by letters": ("generate", 5, "much", "`code_guidance_scale` is "),
    "a share of NaN": ("mix", 3, float("nan"), "by a share from 0 to 1"),
    "a class to mix that is none": ("mix", 2, True, "Class True is out of range"),
}


@pytest.mark.parametrize("name", RUDE)
def test_a_request_of_bad_values_gets_a_message_and_blanks_nothing(address, name):
    """What gradio itself lets through."""
    config = httpx.get(f"{address}/config").json()
    kind, place, value, message = RUDE[name]
    function = next(each["id"] for each in config["dependencies"] if each["api_name"] == kind)
    data = [*PLAIN[kind]]
    data[place] = value
    body = json.dumps({"data": data, "fn_index": function, "session_hash": name})
    httpx.post(f"{address}/gradio_api/queue/join", content=body, headers={"content-type": "application/json"})
    shown = []
    with httpx.stream("GET", f"{address}/gradio_api/queue/data", params={"session_hash": name}, timeout=60) as events:
        for line in events.iter_lines():
            event = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            shown += [event["output"]] if "output" in event else []
            if event.get("msg") == "process_completed":
                break
    assert event["success"] and 'role="alert"' in str(shown) and message in str(shown)
    assert "sample" in str(shown)  # the last result is still there


def test_requests_that_nobody_listens_to_do_not_fill_the_queue_without_end(address):
    config = httpx.get(f"{address}/config").json()
    names = {each["api_name"]: each for each in config["dependencies"] if each["api_visibility"] == "public"}
    assert {*names} == {"generate", "redraw", "mix"}
    data = [None, None, 0, 1, False, 2, 1, False, "codes", 1, None, *[LONG] * 4, *[1.5] * 4]

    def join(number):
        body = {"data": data, "fn_index": names["generate"]["id"], "session_hash": f"nobody{number}"}
        return httpx.post(f"{address}/gradio_api/queue/join", json=body).status_code

    codes = [join(number) for number in range(60)]  # some are drawn meanwhile, which makes room for others
    assert codes[:20] == [200] * 20 and codes.count(503) > 15
