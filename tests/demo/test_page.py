"""The demo in a real browser: the command is started, pictures are dropped, questions asked, answers and panels seen.

`DEMO_PICTURES=1` writes the screenshots of docs/demo.md too.
"""

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

from .serving import running_demo


ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "examples" / "miniature" / "checkpoints"
PICTURES = ROOT / "examples" / "images" / "miniature"
QUESTIONS = json.loads((PICTURES / "questions.json").read_text("utf-8"))
UHD = ROOT / "tests" / "fixtures" / "llava_uhd"
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT = 60_000  # milliseconds
expect.set_options(timeout=TIMEOUT)
LENGTH = "Longest answer, in tokens"

pytestmark = pytest.mark.slow


@contextmanager
def opened(arguments, width=1280):
    """A page of the command; it must ask nobody but its own server, and write no error to the console."""
    browser_path = shutil.which("chromium")
    if browser_path is None:
        reason = "The demo's page needs a browser: `apt-get install chromium`."
        if os.environ.get("LLAVA_BROWSER") == "1":  # as in CI
            pytest.fail(reason)
        pytest.skip(reason)
    hosts, problems = set(), []
    with running_demo(["demo", *arguments]) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=ARGUMENTS)
        context = browser.new_context(viewport={"width": width, "height": 800})
        context.set_default_timeout(TIMEOUT)
        context.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        yield page
        browser.close()
    assert hosts - {None} == {"127.0.0.1"}
    assert not problems


def add_files(page, *files):
    page.locator("#question input[type=file]").set_input_files([str(PICTURES / file) for file in files])
    page.locator("#question img").nth(len(files) - 1).wait_for()


def set_number(page, label, number):
    """Under "Decoding", which must have been opened before the server did something else.

    gradio writes the default into a field once more, some 50 ms after it has appeared. People are slower than that,
    this is not.
    """
    field = page.get_by_label(f"number input for {label}")
    field.fill(number)
    expect(page.get_by_label(f"range slider for {label}")).to_have_value(number)


def ask(page, question, *files):
    if files:
        add_files(page, *files)
    field = page.get_by_label("Question", exact=True)
    field.fill(question)
    field.press("Enter")


def wait_for_answers(page, *patterns):
    """That the model's messages are these and no more, the last one complete.

    The page must not have looked the same before: a state from before would be taken for the one that is waited for.
    """
    texts = [re.compile(rf"^\s*{pattern}\s*$") for pattern in patterns]
    expect(page.locator("#conversation .bot.message")).to_have_text(texts)
    expect(page.get_by_label("Submit")).to_be_visible()


def clear(page):
    page.get_by_label("Clear").click()
    expect(page.locator("#conversation .bot.message")).to_have_count(0)
    expect(page.get_by_text("Shown when you have asked about an image.")).to_be_visible()


def wait_for_picture(page, name):
    """That it is there, and that the browser can show it."""
    picture = page.get_by_alt_text(name).first
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 60


def luminance(element, name):
    """Relative luminance of a color of CSS, by WCAG 2.2: 0 for black, 1 for white."""
    color = element.evaluate(f"element => getComputedStyle(element).getPropertyValue('{name}')")
    channels = [int(channel) / 255 for channel in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", color).groups()]
    linear = [channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in channels]
    return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def keep(page, name):
    if os.environ.get("DEMO_PICTURES") == "1":
        page.wait_for_timeout(800)
        page.screenshot(path=ROOT / "docs" / "pictures" / f"demo-{name}.png", full_page=True)


def test_slices(tmp_path):
    first, second = QUESTIONS["uhd"][:2]
    with opened(["--model", os.path.relpath(CHECKPOINTS / "llava-uhd-miniature")]) as page:
        ask(page, first["question"], first["image"])
        wait_for_answers(page, first["answer"])
        wait_for_picture(page, "Image 1: its slices and its overview")
        expect(page.get_by_alt_text(first["image"])).to_have_count(1)
        expect(page.get_by_role("heading", name="Routing")).to_be_hidden()
        keep(page, "slices")
        # what is no image, an answer that is too short, and once more
        page.get_by_text("Decoding").click()
        broken = tmp_path / "notes.png"
        broken.write_text("no image")
        ask(page, "What?", broken)
        wait_for_answers(page, first["answer"], "Error: notes.png is not an image.*")
        clear(page)
        set_number(page, LENGTH, "1")
        ask(page, second["question"], second["image"])
        wait_for_answers(page, r"\(an answer without text\)")
        set_number(page, LENGTH, "8")
        page.get_by_label("Retry").click()
        wait_for_answers(page, second["answer"])


def test_routing():
    first, second = QUESTIONS["moe"][:2]
    with opened(["--model", os.path.relpath(CHECKPOINTS / "moe-llava-miniature")]) as page:
        ask(page, first["question"], first["image"])
        wait_for_answers(page, first["answer"])
        wait_for_picture(page, "Image 1: map of the first-choice expert")
        wait_for_picture(page, "Stacked bars")
        keep(page, "routing-moe")
        clear(page)
        ask(page, second["question"], first["image"], second["image"])
        wait_for_picture(page, "Image 2: map of the first-choice expert")
        wait_for_picture(page, "Image 2 as the square view")


@pytest.fixture
def endless_checkpoint(tmp_path):
    """An original checkpoint of random weights that never says the token that ends an answer, and is slow.

    Without a cache the whole conversation is read again for every token, so that its thousand take half a minute.
    """
    folder = shutil.copytree(UHD / "original_checkpoint", tmp_path / "endless")
    file = folder / "generation_config.json"
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**config, "suppress_tokens": [config["eos_token_id"]], "use_cache": False}), "utf-8")
    return folder


def test_stop_and_narrow_window(endless_checkpoint):
    """An answer that would go on for a thousand tokens, and does not."""
    arguments = ["--model", str(endless_checkpoint), "--vision-tower", str(UHD / "clip_vision_tower")]
    with opened([*arguments, "--dtype", "float32"], width=400) as page:
        page.get_by_text("Decoding").click()
        add_files(page, "skill_0.png")
        set_number(page, LENGTH, "1024")
        set_number(page, "Temperature", "1.5")
        ask(page, "What is this?")
        # More than "Loading content", which stands there before the first word
        page.wait_for_function("document.querySelector('#conversation .bot.message')?.innerText.length > 30")
        page.get_by_label("Stop").click()
        expect(page.get_by_label("Submit")).to_be_visible()
        page.wait_for_timeout(1000)  # for what was on its way
        answer = page.locator("#conversation .bot.message").inner_text()
        page.wait_for_timeout(2000)
        assert page.locator("#conversation .bot.message").inner_text() == answer
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_routing_of_lora_experts_by_day_and_night():
    (item, *_) = QUESTIONS["mole"]
    with opened(["--model", os.path.relpath(CHECKPOINTS / "llava-mole-miniature")]) as page:
        ask(page, item["question"], item["image"])
        wait_for_answers(page, item["answer"])
        wait_for_picture(page, "Image 1: map of the first-choice expert")
        keep(page, "routing-mole")
        check_contrast(page)
        page.emulate_media(color_scheme="dark")
        page.locator("body.dark").wait_for()
        check_contrast(page)


def check_contrast(page):
    """Of texts beside pictures, whose background is white in the dark too."""
    background = luminance(page.locator(".panel figure").first, "background-color")
    texts = page.locator(".panel figcaption, .panel figure p").all()
    assert len(texts) >= 3
    for text in texts:
        contrast = (background + 0.05) / (luminance(text, "color") + 0.05)
        assert contrast > 7, text.inner_text()  # WCAG 2.2, level AAA
