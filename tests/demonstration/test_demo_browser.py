"""The demo in a real browser."""

import asyncio

import pytest
from support.demo_runs import SHAPES, save_run

from fastflowgrpo.config import Config, parse_demo
from fastflowgrpo.demonstration.examples import demo_prompts
from fastflowgrpo.demonstration.generation import Demo

pytest.importorskip("gradio", reason="gradio, of the extra demo, is not installed")
pytest.importorskip("selenium", reason="selenium, of the extra test, is not installed")

from selenium.webdriver.common.by import By
from support.browser import emulate, find, texts, wait_for

from fastflowgrpo.demonstration.page import build_page, launch

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.filterwarnings("ignore"),  # Gradio's server, in a thread here, warns of its own affairs
]
HOSTILE = "<img src=x onerror=\"document.title = 'broken'\"> ![x](http://192.0.2.1/x.png) \u202emirror \U0001f984"


@pytest.fixture(scope="module")
def demo(chromium, tmp_path_factory):
    """The address of the demo of a run, and the model behind it; without a browser nothing is loaded."""
    folder = tmp_path_factory.mktemp("demo")
    run = save_run(folder / "run", Config(rewards=SHAPES), steps=(2,))
    config = parse_demo(["--run", str(run), "--num_steps", "2", "--num_images", "2"])
    examples, known = demo_prompts(config)
    model = Demo.load(config, known)

    async def build():
        return build_page(model, config, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        page = asyncio.run(build())  # Gradio leaves an event loop open unless it is called from one
        url, _ = launch(page, config)
        yield url, model
        page.close()


@pytest.fixture
def page(browser, demo):
    """The browser with the page, once it can be used."""
    browser.get(demo[0])
    button(browser, "Generate")
    return browser


def button(browser, text):
    return wait_for(browser, lambda: browser.find_elements(By.XPATH, f"//button[normalize-space()='{text}']"))[0]


def type_prompt(browser, text):
    """By a script: the driver types no character beyond U+FFFF."""
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
    browser.execute_script(script, find(browser, "textarea")[0], text)


def images(browser):
    """For both galleries, whether each image is drawn."""
    script = "return [...document.querySelectorAll('.images')].map(g => [...g.querySelectorAll('.thumbnail-item img')]"
    return browser.execute_script(f"{script}.map(image => image.naturalWidth))")


def test_a_prompt_becomes_images_and_scores(page):
    button(page, "Generate").click()
    wait_for(page, lambda: images(page) == 2 * [[48, 48]])
    captions = texts(page, ".caption-label")
    assert len(captions) == 4 and all("geneval" in text and "jpeg_compressibility" in text for text in captions)
    assert "checkpoint-2, 2 images, seed 0" in texts(page, ".scores")[0]
    find(page, "button.gallery-item")[-1].click()
    prompt = find(page, "textarea")[0]
    wait_for(page, lambda: prompt.get_attribute("value") == "a photo of a green triangle and a red circle")


def test_cancel_ends_a_request(page, demo, monkeypatch):
    """The model is made to draw until it is cancelled."""
    ended = []

    def generate(request, on_step):
        on_step(0, 100)
        try:
            while True:
                on_step(1, 100)
        except BaseException as error:
            ended.append(type(error).__name__)
            raise

    monkeypatch.setattr(demo[1], "generate", generate)
    button(page, "Generate").click()
    wait_for(page, lambda: "1/100" in page.find_element(By.TAG_NAME, "body").text)
    assert not ended
    button(page, "Cancel").click()
    wait_for(page, lambda: ended == ["Cancelled"] and "1/100" not in page.find_element(By.TAG_NAME, "body").text)


def test_a_hostile_prompt_is_text_on_a_phone(page):
    emulate(page, width=375, height=800)
    type_prompt(page, HOSTILE)
    button(page, "Generate").click()
    wait_for(page, lambda: "geneval gives no score" in texts(page, ".scores")[0])
    assert HOSTILE[:17] in texts(page, ".scores")[0]
    assert find(page, "textarea")[0].get_attribute("value") == HOSTILE
    assert page.title == "FastFlowGRPO"
    assert page.execute_script("return document.documentElement.scrollWidth") <= 375
