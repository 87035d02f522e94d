"""The pages in a real browser, from the server and from an export."""

from contextlib import ExitStack

import pytest
from support.gallery_runs import HOSTILE, add_evaluation, make_run, served

from fastflowgrpo.view import main

pytest.importorskip("selenium", reason="selenium, of the extra test, is not installed")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from support.browser import emulate, find, texts, wait_for

pytestmark = pytest.mark.xdist_group("browser")


@pytest.fixture
def serve(browser):
    """Serves the folders of runs until the test ends, and returns the address."""
    with ExitStack() as stack:
        yield lambda *folders: "http://{}:{}/".format(*stack.enter_context(served(*folders)))
        browser.get("about:blank")  # a page of a live run would ask the closed server


def trained_image(browser):
    """The file that the first card shows beside the base."""
    return find(browser, ".card .images > span:last-child img")[0].get_attribute("src").split("/")[-2]


def curves(browser):
    """The names of the curves of the first chart."""
    return [label.text for label in find(find(browser, ".chart")[0], ".u-label")[1:]]


def test_the_slider_the_buttons_and_the_curve_move_the_images(browser, serve, tmp_path):
    browser.get(serve(make_run(tmp_path / "run")))
    slider = find(browser, "#step")[0]
    assert trained_image(browser) == "step-000008" and "step 8 (3 of 3)" in texts(browser, ".player output")
    assert find(browser, ".base img")[0].get_attribute("src").split("/")[-2] == "step-000000"
    slider.send_keys(Keys.ARROW_LEFT)
    assert trained_image(browser) == "step-000004" and slider.get_attribute("aria-valuetext") == "step 4"
    mark = find(browser, ".mark")[0]
    before = mark.rect["x"]
    slider.send_keys(Keys.HOME)
    assert trained_image(browser) == "step-000000" and mark.rect["x"] < before - 100
    ActionChains(browser).move_to_element(find(browser, ".u-over")[0]).click().perform()
    assert trained_image(browser) == "step-000004" and mark.rect["x"] == before
    slider.send_keys(Keys.HOME)
    browser.execute_script("setInterval = (f) => { window.tick = f; return 1; }")  # a clock of the test's own
    find(browser, "#play")[0].send_keys(Keys.SPACE)
    assert trained_image(browser) == "step-000000" and "Pause" in find(browser, "#play")[0].text
    browser.execute_script("tick(); tick()")
    assert trained_image(browser) == "step-000008"
    browser.execute_script("tick()")
    assert trained_image(browser) == "step-000008" and "Play" in find(browser, "#play")[0].text
    Select(find(browser, ".controls select")[0]).select_by_visible_text("counting")
    assert len(find(browser, ".card")) == 2
    find(browser, ".controls input[type=checkbox]")[0].click()
    assert not find(browser, ".base")[0].is_displayed()


def test_the_gallery_filters_sorts_and_opens_an_image_by_the_keyboard(browser, serve, tmp_path):
    browser.get(serve(make_run(tmp_path / "run")) + "#gallery")
    assert texts(browser, ".count") == ["3 of 3 images"]
    tag, step, correct, _, sort = map(Select, find(browser, ".controls select"))
    step.select_by_value("all")
    assert texts(browser, ".count") == ["9 of 9 images"]
    correct.select_by_value("wrong")
    assert texts(browser, ".count") == ["2 of 9 images"] and not find(browser, ".card.wrong")[2:]
    correct.select_by_value("")
    find(browser, "input[type=search]")[0].send_keys("GREEN")
    low, high = find(browser, "input[type=number]")
    low.send_keys("0.3")
    assert texts(browser, ".count") == ["2 of 9 images"]
    high.send_keys("0.6")
    assert texts(browser, ".count") == ["1 of 9 images"]
    low.send_keys(3 * Keys.BACKSPACE)
    high.send_keys(3 * Keys.BACKSPACE)
    sort.select_by_value("low")
    tag.select_by_value("colors")
    assert [text.split()[0] for text in texts(browser, ".card .value")] == ["✗", "✓", "✓"]
    find(browser, ".card button")[1].send_keys(Keys.ENTER)
    assert texts(browser, "dialog h2") == ["a green square"] and texts(browser, ".bar span") == ["2 of 3"]
    assert texts(browser, "dialog tbody tr")[0] == "reward 0.250 0.500 +0.250"
    assert "1234567890123456789" in texts(browser, "dialog dl")[0]
    assert find(browser, "dialog .box")[0].text == "<b>red</b> circle"
    find(browser, "dialog input")[0].send_keys(Keys.SPACE)
    assert not find(browser, "dialog .box")[0].is_displayed()
    find(browser, "dialog [data-name=close]")[0].send_keys(Keys.ARROW_RIGHT)
    assert texts(browser, ".bar span") == ["3 of 3"]
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not browser.execute_script("return document.querySelector('dialog').open")


def test_runs_are_compared(browser, serve, tmp_path):
    folders = [make_run(tmp_path / "one"), make_run(tmp_path / "two", clip=0.02)]
    (folders[1] / "log.txt").write_text("warning: the guard has fallen\n")
    browser.get(serve(*folders) + "#runs")
    titles = texts(browser, ".chart figcaption")
    assert {"Reward, training batches", "KL to the reference", "Seconds of rollout", "my_metric"} <= set(titles)
    assert curves(browser) == ["one", "two"]
    assert texts(browser, "section > .scroll tbody tr") == ["update.clip_range 0.01 0.02"]
    assert texts(browser, ".notice li") == ["two: warning: the guard has fallen"]
    find(browser, ".plot")[1].send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert texts(browser, ".chart:nth-child(2) .u-value")[:3] == ["4", "0.600", "0.600"]
    find(browser, ".controls input")[1].click()
    assert curves(browser) == ["one"]
    find(browser, "nav a")[3].click()
    assert [text.split("\n")[0] for text in texts(browser, ".tiles li")] == ["+1.500", "+0.250", "−0.500", "–"]
    find(browser, "#epoch")[0].send_keys(Keys.HOME)
    assert texts(browser, ".group h3") == ["a group of epoch 0"]


def test_a_live_run_is_followed(browser, serve, tmp_path):
    folder = make_run(tmp_path / "run")
    browser.get(serve(folder))
    assert trained_image(browser) == "step-000008"
    find(browser, "#play")[0].send_keys("")
    add_evaluation(folder, 3, 12, ["three red circles"])
    wait_for(browser, lambda: trained_image(browser) == "step-000012")
    assert texts(browser, "#status") == ["live"]
    assert browser.switch_to.active_element.get_attribute("id") == "play"
    (folder / "gallery/step-000012/0-0.webp").unlink()
    index = folder / "gallery/index.jsonl"
    index.write_text(index.read_text()[:-40])
    (folder / "summary.json").write_text("{}")
    wait_for(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#problems li"))
    assert "index.jsonl: line 6 cannot be read" in texts(browser, "#problems li")[0]
    assert trained_image(browser) == "step-000008"
    assert texts(browser, "#status") == ["finished"]


def test_the_source_of_an_edit_is_first_on_every_page(browser, serve, tmp_path):
    address = serve(make_run(tmp_path / "run", prompts=HOSTILE, edits=True))
    browser.get(address)
    assert texts(browser, ".card:first-child .images small") == ["source", "base ✓", "step 8 ✓"]
    find(browser, ".card button")[0].send_keys(Keys.ENTER)
    assert texts(browser, "dialog .pair figcaption") == ["source", "base, step 0 ✓", "step 8 ✓"]
    browser.get(f"{address}#gallery")
    find(browser, "dialog [data-name=close]")[0].send_keys(Keys.ESCAPE)
    assert texts(browser, ".card:first-child .images small") == ["source", "result"]
    assert find(browser, ".card .source img")[0].get_attribute("alt").endswith(", source")
    browser.get(f"{address}#groups")
    assert texts(browser, ".group .source") == ["source"]
    shown = "return [...document.querySelectorAll('img')].every(i => i.complete && i.naturalWidth === 32)"
    wait_for(browser, lambda: browser.execute_script(shown))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_an_export_of_hostile_prompts_opens_from_the_disk_on_a_phone(browser, tmp_path, dark):
    run, site = make_run(tmp_path / "run", prompts=HOSTILE), tmp_path / "site"
    (run / "gallery/step-000004/0-0.webp").unlink()
    assert main([str(run), "--export", str(site)]) == 0
    emulate(browser, dark=dark, width=375, height=800)
    browser.get(f"{site.as_uri()}/index.html")
    find(browser, "#step")[0].send_keys(Keys.ARROW_LEFT)
    wait_for(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".picture.missing"))
    assert find(browser, ".picture.missing img")[0].get_attribute("alt") == "Missing image: runs/0/step-000004/0-0.webp"
    for page in ("gallery", "evolution", "runs", "groups"):
        browser.get(f"{site.as_uri()}/index.html#{page}")
        find(browser, "main h2")
        if page in ("gallery", "evolution"):
            shown = browser.execute_script(
                "return [...document.querySelectorAll('.card .prompt')].map(e => e.textContent)"
            )
            assert shown == HOSTILE
        width = browser.execute_script("return document.documentElement.scrollWidth")
        assert width <= 375
        assert browser.title == f"run – {page}"
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(18, 21, 28)") == dark
    browser.get_log("browser")  # the missing file
